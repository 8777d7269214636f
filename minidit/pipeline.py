"""Captions -> videos: the text encoder, the plan, the sampler and the decoder in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidit import checkpoint, samplers, sampling
from minidit.broadcast import PAB_246, PARTS, RECIPES, Act, Plan, Pyramid, plan
from minidit.config import ModelConfig
from minidit.cost import Cost, cost
from minidit.jobs import numbered
from minidit.model import DiT
from minidit.parallel import ALONE, Layout
from minidit.references import ONCE, Loop, Reference, check, encoded, given, passed_on, repeated, spans
from minidit.samplers import Noise, Sampler
from minidit.sizes import fps_told
from minidit.stages import Classes, Decodes, Pixels, Prompts, Stages, Text, Told, Words, t5_folder, vae_folder
from minidit.text import rules_of
from minidit.tiling import Tile
from minidit.weights.decoders import load_decoder


@dataclass(frozen=True)
class Prediction:
    """What a run will do and cost."""

    plan: Plan
    cost: Cost  # of one model call of the whole batch, both guidance halves
    peak_bytes: int  # held by the cache at most
    clips: int = field(default=1, kw_only=True)  # of a loop, each a run of this plan

    @property
    def flops(self) -> int:
        """Of all clips; encoding and decoding are not counted."""
        return self.clips * (self.plan.flops(self.cost.parts, self.cost.rest) + self.cost.prepare)

    @property
    def flops_without(self) -> int:
        """Of the same run without broadcast."""
        every = plan(None, self.plan.timesteps, self.plan.sites)
        return self.clips * (every.flops(self.cost.parts, self.cost.rest) + self.cost.prepare)

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
            *[f"clips       {self.clips}, each a run of this plan"] * (self.clips > 1),
            f"compute     {readable(flops)}FLOP{saved if flops < without else ''}",
            f"peak cache  {readable(self.peak_bytes, 1024)}B",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report(Prediction):
    """What a run did and cost, its peak_bytes as they were."""

    seconds: float
    stages: Mapping[str, int] = field(default_factory=dict)  # bytes that each stage held at most on a GPU

    def __str__(self) -> str:
        lines = [f"time        {self.seconds:.1f} s"]
        lines += [f"{name:<12}{readable(size, 1024)}B at its peak" for name, size in self.stages.items()]
        return "\n".join([super().__str__(), *lines])


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


def recipe(config: ModelConfig) -> str:
    """The name, in RECIPES, of the paper's recipe for the model's family."""
    if config.null_caption:  # Open-Sora, and the embedded model
        return "pab-246"
    return "latte-236" if config.sampling.time == 1 else "open-sora-plan-246"


def pyramid_named(name: str, config: ModelConfig) -> Pyramid | None:
    """The recipe of that name, or "paper": the paper's for the model's family. ValueError for another name."""
    name = recipe(config) if name == "paper" else name
    if name not in RECIPES:
        raise ValueError(f"unknown pyramid {name!r}: give a Pyramid, or the name of one of {', '.join(RECIPES)}")
    return RECIPES[name]


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """Drawn on the CPU: a seed means the same on every device and in every batch."""
    return draws([seed])(torch.empty(1, *shape))[0]


def draws(seeds: Sequence[int]) -> Noise:
    """Noise for the videos of a batch, each from its own seed, at the start and at every step that adds some."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(z: Tensor) -> Tensor:
        return torch.stack([torch.randn(z.shape[1:], generator=generator) for generator in generators]).to(z.device)

    return draw


@dataclass(frozen=True)
class Pipeline:
    """A family made of what reads captions, the model and what makes frames; `generate` runs one after the other.

    Each is on `device` while it runs, and else where it was loaded, if it is not resident. A published model and its
    text encoder are loaded when they are needed first.
    """

    config: ModelConfig
    dtype: torch.dtype  # of the model
    text: Text
    load_model: Callable[[], DiT]
    decoder: Decodes
    device: torch.device
    offload: bool = False  # of model and text encoder, a layer is on the device only while it runs
    resident: bool = False  # what was brought to the device stays there, for the next video

    @cached_property
    def model(self) -> DiT:
        return self.load_model()

    def load_all(self) -> None:
        """What would be loaded only when it is needed."""
        _ = self.text.module, self.model

    @classmethod
    def of(cls, model: DiT) -> Pipeline:
        """Of a model that carries its caption encoder and makes frames itself, where it is."""
        if model.encoder is None or model.config.sampling.space != 1:
            raise ValueError(
                "this model has no caption encoder of its own or no decoder: Pipeline.load joins it with published ones"
            )
        return cls(
            model.config, model.dtype, Words(model.encoder), lambda: model, Pixels(), device=model.patch.weight.device
        )

    @classmethod
    def load(
        cls,
        folder: str | Path = "tiny",
        *,
        text: str | Path | None = None,
        vae: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        offload: bool = False,
        resident: bool = False,
    ) -> Pipeline:
        """Of a folder with a model, in it or in its model/; of a published one text_encoder/, tokenizer/ and vae/, too.

        text: instead, a folder of a T5 or org/name on the hub. vae: instead, a decoder's folder, or org/name or
        org/name/folder on the hub. dtype None: float32 on a CPU, else as the original runs. offload: for small GPUs,
        the same video, slower, see offload.py. resident: for large ones and several videos, all weights stay on the
        device. Reads the configs and the decoder. Raises OSError, ValueError or ImportError, saying what is missing or
        does not fit.
        """
        if offload and resident:
            raise ValueError("with offload no weights stay on the device: leave resident out")
        folder, device = checkpoint.folder_of(folder), torch.device(device)
        at = model_folder(folder)
        config = checkpoint.load_config(at)
        if config.captions:
            if text or vae:
                raise ValueError(
                    f"the model of {folder} reads captions and makes frames itself: give no text and no vae"
                )
            if offload:
                raise ValueError(f"the model of {folder} is small, and all on the device at once: leave offload out")
            return cls.of(checkpoint.load(at, device=device, dtype=dtype))
        on_cpu = device.type == "cpu"
        dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16 if config.rounds_time else torch.float16)
        if config.caption_dim:
            source, rules = text or t5_folder(folder), rules_of(config)
            encodes = torch.float32 if on_cpu else rules.dtype
            reads: Text = Prompts(source, rules, config.caption_length, config.null_caption, encodes)
        elif text is not None:
            raise ValueError(f"the model of {folder} reads no text: give no text encoder")
        else:
            reads = Classes(config)
        reads.check([], None)
        checkpoint.weights(at)
        where, wanted = vae or vae_folder(folder), (config.in_channels, config.sampling.space)
        decoder = load_decoder(where, dtype=dtype)
        if (decoder.channels, decoder.space) != wanted:
            found = (decoder.channels, decoder.space)
            raise ValueError(
                f"{where} decodes latents of (channels, pixels a side) {found}, the model's are of {wanted}: "
                "give the decoder of its family"
            )
        return cls(config, dtype, reads, lambda: checkpoint.load(at, dtype=dtype), decoder, device, offload, resident)

    def schedule(self, config: ModelConfig) -> tuple[Sampler, tuple[int, int, int]]:
        """See `schedule`. Raises ValueError for a video that the model cannot make or the decoder cannot decode."""
        sampler, latent = schedule(config, self.dtype)
        config.grid(latent)
        if (made := self.decoder.latent_frames(config.sampling.frames)) != latent[0]:
            frames = config.sampling.frames
            raise ValueError(f"{frames} frames are {latent[0]} latents to the model, but {made} to the decoder")
        return sampler, latent


def model_folder(folder: str | Path) -> Path:
    """Of a pipeline's folder, or of a name of an embedded model."""
    folder = checkpoint.folder_of(folder)
    return folder / "model" if (folder / "model").is_dir() else folder


def whole(frames: Iterator[Tensor]) -> Tensor:
    """A video (T, H, W, 3) of its parts (t, H, W, 3)."""
    return torch.cat([*frames])


def after(count: int, parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """The parts (t, H, W, 3) of a video without its first frames."""
    for part in parts:
        if count < len(part):
            yield part[count:]
        count = max(0, count - len(part))


def generate(
    model: DiT | Pipeline,
    captions: str | Path | Sequence[str],
    *,
    pyramid: Pyramid | str | None = "paper",
    seed: int = 0,
    negative: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    references: Sequence[Reference] = (),
    loop: Loop = ONCE,
    two_calls: bool = False,
    tile: Tile | None = None,
    layout: Layout = ALONE,
    on_step: Callable[[sampling.Step], None] | None = None,
    into: Callable[[Iterator[Tensor]], Any] = whole,
) -> tuple[Any, Report]:
    """A video for every caption: (B, T, H, W, 3) uint8, or (T, H, W, 3) for one caption; and what it cost.

    model: a Pipeline, or a DiT that is one by itself. captions: one, several, or the Path of a file with one a line.
    pyramid: or the name of one in RECIPES, or "paper": that for the model's family. negative: what the videos are
    guided away from. What is None is as the model was trained. Video i of a batch, or of a file's line i, starts from
    the noise of seed + i, the same on every device and in every batch. references: latents that every video is made
    around. loop: clips of one video, each of which goes on where the one before ends; frames is of a clip. tile: see
    Decoder.chunks. layout: the ranks that make the videos together, each of which gets all of them. Raises ValueError
    for captions the model does not know, sizes it cannot have and references it cannot be given.

    into: is handed each video as it is decoded, in parts (t, H, W, 3) that it need not keep, and what it returns stands
    for the video: partial(save_video, path="long.mp4", fps=24) holds one part at a time, of a loop also the clips
    before the last. Of several captions it is a list of that. The decoder is let go when it returns or raises, whether
    it took all parts or not.
    """
    pipe = model if isinstance(model, Pipeline) else Pipeline.of(model)
    named = numbered(captions)
    batch = [*named.values()]
    pipe.text.check(batch, negative)
    config = asked(pipe.config, steps=steps, guidance=guidance, frames=frames, height=height, width=width)
    run, (sampler, latent) = config.sampling, pipe.schedule(config)
    check(references, loop, config)
    pyramid = pyramid_named(pyramid, config) if isinstance(pyramid, str) else pyramid
    start, peak, stages = time.perf_counter(), 0, Stages(pipe.device, pipe.offload, pipe.resident)

    def watch(step: sampling.Step) -> None:
        nonlocal peak
        peak = max(peak, step.peak_bytes)
        if on_step:
            on_step(step)

    with stages.on("text", pipe.text):
        told = Told(*(None if part is None else part.to(pipe.device) for part in pipe.text.encode(batch, negative)))
    text, lengths, null = told
    longest = None if lengths is None else int(lengths.max())
    expected = predict(config, pipe.dtype, pyramid, captions=len(batch), caption_length=longest)
    draw = draws([seed + i for i in named])
    known: dict[int, list[Tensor]] = {clip: [] for clip in range(loop.clips)}  # latents that each clip is given
    if references:
        with stages.on("encoder", pipe.decoder) as encoder:
            for reference in references:
                known[reference.clip].append(encoded(reference, encoder, run).to(pipe.device))
    before: list[Tensor] = []  # frames (B, t, H, W, 3) of the clips before the last
    for clip, latents in known.items():
        z = draw(torch.empty(len(batch), config.in_channels, *latent, device=pipe.device))
        z, mask = given(z, spans(references, loop, clip, run), latents)
        with stages.on("model", pipe.model) as dit:
            z = sampling.sample(
                dit,
                z,
                _as(text, pipe.dtype),
                lengths,
                plan=expected.plan,
                sampler=sampler,
                guidance=run.guidance,
                height=run.height,
                width=run.width,
                fps=run.fps if config.captions else fps_told(run.frames, run.fps),
                two_calls=two_calls,
                null=_as(null, pipe.dtype),
                frames=mask,
                noise=draw,
                layout=layout,
                on_step=watch,
            )
        repeats = repeated(loop, run) if clip else 0
        if clip + 1 in known:
            with stages.on("decoder", pipe.decoder) as decoder:
                made = torch.stack([whole(decoder.chunks(part, run.frames, tile=tile)) for part in z])
                known[clip + 1].append(passed_on(made, loop, decoder, run).to(pipe.device))
            before.append(made[:, repeats:])
    with stages.on("decoder", pipe.decoder) as decoder:
        videos = [
            into(chain((clip[i] for clip in before), after(repeats, decoder.chunks(part, run.frames, tile=tile))))
            for i, part in enumerate(z)
        ]
    report = Report(expected.plan, expected.cost, peak, time.perf_counter() - start, stages.peaks, clips=loop.clips)
    if isinstance(captions, str):
        return videos[0], report
    return (torch.stack(videos) if into is whole else videos), report


def _as(features: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Features in the model's dtype; classes stay whole numbers."""
    return features.to(dtype) if features is not None and features.is_floating_point() else features
