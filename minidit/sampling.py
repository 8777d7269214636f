"""From noise to latents: timesteps, the rectified-flow step, guidance, and the run that follows a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from minidit.broadcast import Call, Plan
from minidit.cache import Cache
from minidit.config import ModelConfig
from minidit.model import Conditioning, DiT

NUM_TIMESTEPS = 1000  # t runs from 1000, noise, to 0, data
Real = TypeVar("Real", float, Tensor)


def opensora_shift(height: int, width: int, frames: int, dtype: torch.dtype = torch.float32) -> float:
    """Open-Sora 1.2's r: larger and longer videos spend more of their steps at high noise.

    height, width: pixels; frames: of the video. The original computes it in the model's dtype (bfloat16 reads a width
    of 854 as 856). From 2 to 16 frames its formula gives 0, a limit of the original, and this raises ValueError.
    Source: hpcaitech/Open-Sora v1.2.0, opensora/schedulers/rf/rectified_flow.py: timestep_transform.
    """
    h, w, n = (torch.tensor(size, dtype=dtype) for size in (height, width, frames))
    latent_frames = torch.ones_like(n) if frames == 1 else n // 17 * 5
    if not latent_frames:
        raise ValueError(f"Open-Sora's timestep transform knows 1 frame or at least 17, got {frames}")
    return float((h * w / 512**2).sqrt() * latent_frames.sqrt())


def timesteps(steps: int, shift: float) -> list[float]:
    """The times of the model calls, falling from 1000: evenly spaced u, then `shifted`."""
    if steps < 1:
        raise ValueError(f"a run has at least 1 step, got {steps}")
    return [NUM_TIMESTEPS * shifted(1 - i / steps, shift) for i in range(steps)]


def shifted(u: Real, shift: float) -> Real:
    """Time u in 0..1, moved towards 1, the noise, by a shift above 1."""
    return shift * u / (1 + (shift - 1) * u)


def seen(times: Sequence[float], dtype: torch.dtype) -> list[float]:
    """Times as a model of that dtype sees them: the original rounds them before it embeds them and plans with them."""
    rounded: list[float] = torch.tensor(times, dtype=torch.float64).to(dtype).tolist()
    return rounded


def velocity(output: Tensor, z: Tensor, t: float | Tensor, config: ModelConfig) -> Tensor:
    """dz / du, u = 1 - t / 1000, from noise to data, as the network's output tells it.

    "velocity": the output is it, as in Open-Sora. "sample": the output is the data itself; a network that predicts it
    need not carry the noise of a whole patch through its channels (arXiv:2511.13720), and the last step ends on it.
    Channels after the first in_channels, Open-Sora's unused variance, are dropped.
    """
    output = output[:, : config.in_channels].float()
    return output if config.sampling.prediction == "velocity" else (output - z) * (NUM_TIMESTEPS / t)


def guide(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: away from what is likely without the caption."""
    return uncond + guidance * (cond - uncond)


def integrate(
    field: Callable[[int, Tensor, Tensor | None], Tensor],
    z: Tensor,
    times: Sequence[float],
    *,
    frames: Tensor | None = None,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Euler steps along a velocity field from times[0] to 0.

    field(i, z, frame_mask) is the velocity in call i. z: (B, C, T, H, W) float32. frames: (B, T) in 0..1, None: all 1;
    a frame of value m is given clean in z, stays so while t > 1000 m, then is noised once and takes part.
    Source: hpcaitech/Open-Sora v1.2.0, opensora/schedulers/rf/__init__.py: RFLOW.sample.
    """
    joined = None if frames is None else frames == 1
    for i, (t, then) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        mask = None
        if frames is not None and joined is not None:
            mask = frames * NUM_TIMESTEPS >= t
            # drawn at every step, as the original does: a seed then means the same whatever the mask
            noised = (1 - t / NUM_TIMESTEPS) * z + t / NUM_TIMESTEPS * noise(z)
            z, joined = torch.where(_of_frames(mask & ~joined), noised, z), mask
        moved = z + field(i, z, mask) * ((t - then) / NUM_TIMESTEPS)
        z = moved if mask is None else torch.where(_of_frames(mask), moved, z)
    return z


def _of_frames(mask: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, 1, 1)."""
    return mask[:, None, :, None, None]


@dataclass(frozen=True)
class Step:
    """What on_step is told after each model call."""

    call: Call
    steps: int  # of the run
    cache_bytes: int  # held now
    peak_bytes: int  # held at most so far


@torch.inference_mode()
def sample(
    model: DiT,
    z: Tensor,
    text: Tensor,
    lengths: Tensor | None = None,
    *,
    plan: Plan,
    times: Sequence[float],
    guidance: float,
    height: int,
    width: int,
    fps: float,
    two_calls: bool = False,
    frames: Tensor | None = None,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Latents (B, C, T, H, W) for captions, from noise z of that shape, by a plan.

    text: (B, L, caption_dim); lengths: (B,) tokens that count, None: all; height, width: pixels. A guidance of 1 is
    none; any other runs each caption beside the null caption, cut to the caption's length as in Open-Sora: as one batch
    [cond; uncond], or in two_calls a step, each with a cache of its own. frames, noise: see integrate.
    Raises ValueError for a plan made with other times or for another model.
    """
    if plan.timesteps != tuple(seen(times, model.dtype)):
        raise ValueError(
            f"the plan's {len(plan)} timesteps are not the run's {len(times)} as the model sees them: "
            "make the plan with seen(times, model.dtype)"
        )
    texts = [text] if guidance == 1 else [text, model.null_caption[: text.shape[1]].expand_as(text)]
    batches = texts if two_calls else [torch.cat(texts)]
    copies = len(texts) // len(batches)  # of z in one model call
    lengths = None if lengths is None else lengths.repeat(copies)
    rate = torch.full((copies * len(z),), float(fps), device=z.device)
    latent = (z.shape[2], z.shape[3], z.shape[4])

    def prepare(text: Tensor) -> Conditioning:
        return model.prepare(text, lengths, latent=latent, height=height, width=width, fps=rate)

    runs = [(prepare(batch), Cache(plan)) for batch in batches]

    def field(i: int, z: Tensor, mask: Tensor | None) -> Tensor:
        call, many = plan[i], z.repeat(copies, 1, 1, 1, 1)
        mask = None if mask is None else mask.repeat(copies, 1)
        outputs = torch.cat([model(many, call.timestep, cond, call, cache, mask) for cond, cache in runs])
        halves = [velocity(output, z, times[i], model.config) for output in outputs.chunk(len(texts))]
        if on_step:
            held, peak = sum(cache.nbytes for _, cache in runs), sum(cache.peak_bytes for _, cache in runs)
            on_step(Step(call, len(plan), held, peak))
        return halves[0] if guidance == 1 else guide(halves[0], halves[1], guidance)

    return integrate(field, z, times, frames=frames, noise=noise)
