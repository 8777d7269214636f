"""Captions -> videos: the text encoder, the plan, the sampler and the decoder in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minidit import samplers, sampling
from minidit.broadcast import PAB_246, PARTS, Act, Plan, Pyramid, plan
from minidit.caption import PADDING, CaptionEncoder
from minidit.config import ModelConfig
from minidit.cost import Cost, cost
from minidit.model import DiT
from minidit.parallel import ALONE, Layout
from minidit.samplers import Sampler


@dataclass(frozen=True)
class Prediction:
    """What a run will do and cost."""

    plan: Plan
    cost: Cost  # of one model call of the whole batch, both guidance halves
    peak_bytes: int  # held by the cache at most

    @property
    def flops(self) -> int:
        return self.plan.flops(self.cost.parts, self.cost.rest) + self.cost.prepare

    @property
    def flops_without(self) -> int:
        """Of the same run without broadcast."""
        every = plan(None, self.plan.timesteps, self.plan.sites)
        return every.flops(self.cost.parts, self.cost.rest) + self.cost.prepare

    def __str__(self) -> str:
        lines = ["part      sites  computed  reused  in calls"]
        for part, count in sorted(self.plan.counts().items(), key=lambda item: PARTS.index(item[0])):
            columns = [i for i, site in enumerate(self.plan.sites) if site.part == part]
            calls = sum(any(row[i] is Act.REUSE for i in columns) for row in self.plan.acts)
            computed, reused = count.total() - count[Act.REUSE], count[Act.REUSE]
            lines.append(f"{part:<8}{len(columns):>7}{computed:>10}{reused:>8}  {f'{calls} of {len(self.plan)}':>8}")
        flops, without = self.flops, self.flops_without
        saved = f", {1 - flops / without:.1%} less than {readable(without)}FLOP without broadcast"
        lines += [
            "",
            f"compute     {readable(flops)}FLOP{saved if flops < without else ''}",
            f"peak cache  {readable(self.peak_bytes, 1024)}B",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report(Prediction):
    """What a run did and cost, its peak_bytes as they were."""

    seconds: float

    def __str__(self) -> str:
        return f"{super().__str__()}\ntime        {self.seconds:.1f} s"


PREFIXES = {1000: ("", "K", "M", "G", "T"), 1024: ("", "Ki", "Mi", "Gi", "Ti")}


def readable(amount: float, base: int = 1000) -> str:
    """A number and the prefix of the unit that follows: 12_300_000 is "12.3 M", or "11.7 Mi" of base 1024."""
    power = 0
    while amount >= base and power < len(PREFIXES[base]) - 1:
        amount, power = amount / base, power + 1
    return f"{amount:.{1 if power else 0}f} {PREFIXES[base][power]}"


def asked(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The model with the sampling that is asked for; what is None stays as it was trained. ValueError: impossible."""
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(config, sampling=replace(config.sampling, **given))


def schedule(config: ModelConfig, dtype: torch.dtype) -> tuple[Sampler, tuple[int, int, int]]:
    """The sampler of a run, and the size (T, H, W) of its latents."""
    run = config.sampling
    return samplers.sampler(run, dtype), run.latent_size(run.frames, run.height, run.width)


def predict(
    config: ModelConfig,
    dtype: torch.dtype,
    pyramid: Pyramid | None = PAB_246,
    *,
    captions: int = 1,
    caption_length: int | None = None,
) -> Prediction:
    """What a run of config.sampling will do and cost, from sizes alone: nothing is built, nothing runs.

    caption_length: tokens of the longest caption, None: as long as captions can be.
    """
    sampler, latent = schedule(config, dtype)
    table = plan(pyramid, samplers.planned(sampler, config, dtype), config.sites)
    price = cost(
        config,
        batch=captions * (1 if config.sampling.guidance == 1 else 2),
        latent=latent,
        caption_length=config.caption_length if caption_length is None else caption_length,
        itemsize=dtype.itemsize,
    )
    return Prediction(table, price, price.update_bytes * max(most for most, _ in table.held()))


def encoder(model: DiT) -> CaptionEncoder:
    """Raises ValueError for a model that `generate` cannot run."""
    if model.encoder is None or model.config.sampling.space != 1:
        raise ValueError("this model has no caption encoder of its own or no decoder: generate() cannot run it yet")
    return model.encoder


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """Drawn on the CPU: a seed means the same on every device and in every batch."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def generate(
    model: DiT,
    captions: str | Sequence[str],
    *,
    pyramid: Pyramid | None = PAB_246,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    two_calls: bool = False,
    layout: Layout = ALONE,
    on_step: Callable[[sampling.Step], None] | None = None,
) -> tuple[Tensor, Report]:
    """A video for every caption: (B, T, H, W, 3) uint8, or (T, H, W, 3) for one caption; and what it cost.

    What is None is as the model was trained. Video i of a batch starts from the noise of seed + i, the same on every
    device and in every batch. layout: the ranks that make the videos together, each of which gets all of them.
    Raises ValueError for words the model does not know and sizes it cannot have.
    """
    batch = [captions] if isinstance(captions, str) else list(captions)
    tokens, device = encoder(model).tokenize(batch), model.patch.weight.device
    config = asked(model.config, steps=steps, guidance=guidance, frames=frames, height=height, width=width)
    longest = int((tokens != PADDING).sum(1).max())
    expected = predict(config, model.dtype, pyramid, captions=len(batch), caption_length=longest)
    sampler, latent = schedule(config, model.dtype)
    start, peak = time.perf_counter(), 0

    def watch(step: sampling.Step) -> None:
        nonlocal peak
        peak = step.peak_bytes
        if on_step:
            on_step(step)

    with torch.inference_mode():
        text, lengths = encoder(model)(tokens.to(device))
    z = torch.stack([noise((config.in_channels, *latent), seed + i) for i in range(len(batch))]).to(device)
    z = sampling.sample(
        model,
        z,
        text,
        lengths,
        plan=expected.plan,
        sampler=sampler,
        guidance=config.sampling.guidance,
        height=config.sampling.height,
        width=config.sampling.width,
        fps=config.sampling.fps,
        two_calls=two_calls,
        layout=layout,
        on_step=watch,
    )
    videos = ((z + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).cpu()
    report = Report(expected.plan, expected.cost, peak, time.perf_counter() - start)
    return (videos[0] if isinstance(captions, str) else videos), report
