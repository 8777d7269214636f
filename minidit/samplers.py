"""From noise to latents: at which times the model is called, and what each of its outputs does to the latents.

A sampler is the settings of a run as a frozen value; what changes during a run stays in `integrate`. The diffusion
processes are those of all published families: betas rise linearly from 1e-4 to 0.02 over 1000 timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import accumulate, pairwise, repeat
from math import log
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from minidit.config import ModelConfig, Sampling

NUM_TIMESTEPS = 1000  # t runs from 1000, noise, to 0, data
BETAS = (1e-4, 0.02)
Real = TypeVar("Real", float, Tensor)
Field = Callable[[int, Tensor, Tensor | None], Tensor]
Noise = Callable[[Tensor], Tensor]


class Sampler(Protocol):
    """One way from noise to data."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The time of every model call, in order, in 0..1000, before it is rounded to the model's dtype."""

    def integrate(
        self, field: Field, z: Tensor, *, frames: Tensor | None = None, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Latents, from z (B, C, T, H, W): standard normal, float32.

        field(i, z, frame_mask) is the guided output (B, C or more, T, H, W) float32 of model call i for its input z;
        frame_mask: (B, T) bool, false for frames that are clean. frames: (B, T) in 0..1, None: all 1; a frame of value
        m is given clean in z, stays so while t > 1000 m, then is noised once and takes part. noise(z): drawn like z.
        Raises ValueError for frames where a sampler has no frame masks.
        """


def sampler(run: Sampling, dtype: torch.dtype) -> Sampler:
    """The sampler that `run` names. dtype: the model's, in which Open-Sora 1.2 computes its shift."""
    match run.method:
        case "rectified-flow":
            assert run.prediction != "noise"  # Sampling refuses it
            shift = run.shift or opensora_shift(run.height, run.width, run.frames, dtype)
            return RectifiedFlow(run.steps, shift, run.prediction)
        case "iddpm":
            return IDDPM(run.steps, torch.float64)
        case "iddpm-float32":
            return IDDPM(run.steps, torch.float32)
        case "iddpm-ddim":
            return IDDPM(run.steps, torch.float64, ddim=True)
        case "euler-ancestral":
            return EulerAncestral(run.steps)
        case "ddim" | "ddim-offset" | "pndm":
            return Diffusers(run.method, run.steps)


def seen(times: Sequence[float], dtype: torch.dtype) -> list[float]:
    """Times as a model of that dtype sees them: the original rounds them before it embeds them and plans with them."""
    rounded: list[float] = torch.tensor(times, dtype=torch.float64).to(dtype).tolist()
    return rounded


def planned(sampler: Sampler, config: ModelConfig, dtype: torch.dtype) -> list[float]:
    """The times of a run's model calls as a plan has to have them: as that model sees them in that dtype."""
    return seen(sampler.timesteps, dtype) if config.rounds_time else list(sampler.timesteps)


def _check_steps(method: str, steps: int, least: int, most: int | None = NUM_TIMESTEPS) -> None:
    if steps < least or (most and steps > most):
        end = f" and at most {most}" if most else ""
        raise ValueError(f"a run of {method} has at least {least} step{'s' * (least > 1)}{end}, got {steps}")


def _check_no_frames(method: str, frames: Tensor | None) -> None:
    if frames is not None:
        raise ValueError(f"{method} has no frame masks: frames must be None")


def _of_frames(mask: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, 1, 1)."""
    return mask[:, None, :, None, None]


# Rectified flow: Open-Sora 1.2 and the embedded model


def opensora_shift(height: int, width: int, frames: int, dtype: torch.dtype = torch.float32) -> float:
    """Open-Sora 1.2's r: larger and longer videos spend more of their steps at high noise.

    height, width: pixels; frames: of the video. The original computes it in the model's dtype (bfloat16 reads a width
    of 854 as 856). From 2 to 16 frames its formula gives 0, a limit of the original, and this raises ValueError.
    Source: hpcaitech/Open-Sora v1.2.0, opensora/schedulers/rf/rectified_flow.py: timestep_transform.
    """
    dtype = torch.float32 if dtype == torch.float16 else dtype  # which holds no number of pixels
    h, w, n = (torch.tensor(size, dtype=dtype) for size in (height, width, frames))
    latent_frames = torch.ones_like(n) if frames == 1 else n // 17 * 5
    if not latent_frames:
        raise ValueError(f"Open-Sora's timestep transform knows 1 frame or at least 17, got {frames}")
    return float((h * w / 512**2).sqrt() * latent_frames.sqrt())


def shifted(u: Real, shift: float) -> Real:
    """Time u in 0..1, moved towards 1, the noise, by a shift above 1."""
    return shift * u / (1 + (shift - 1) * u)


def velocity(output: Tensor, z: Tensor, t: float | Tensor, prediction: Literal["velocity", "sample"]) -> Tensor:
    """dz / du, u = 1 - t / 1000, from noise to data, as the network's output tells it.

    "velocity": the output is it, as in Open-Sora. "sample": the output is the data itself; a network that predicts it
    need not carry the noise of a whole patch through its channels (arXiv:2511.13720), and the last step ends on it.
    Channels beyond those of z, Open-Sora's unused variance, are dropped.
    """
    output = output[:, : z.shape[1]].float()
    return output if prediction == "velocity" else (output - z) * (NUM_TIMESTEPS / t)


@dataclass(frozen=True)
class RectifiedFlow:
    """Euler steps along a velocity, at evenly spaced times that are then shifted.

    Source: hpcaitech/Open-Sora v1.2.0, opensora/schedulers/rf/__init__.py: RFLOW.sample.
    """

    steps: int
    shift: float  # see shifted
    prediction: Literal["velocity", "sample"]  # see velocity

    def __post_init__(self) -> None:
        _check_steps("rectified flow", self.steps, 1, None)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Falling from 1000."""
        return tuple(NUM_TIMESTEPS * shifted(1 - i / self.steps, self.shift) for i in range(self.steps))

    def integrate(
        self, field: Field, z: Tensor, *, frames: Tensor | None = None, noise: Noise = torch.randn_like
    ) -> Tensor:
        """See Sampler."""
        times, joined = self.timesteps, None if frames is None else frames == 1
        for i, (t, then) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
            mask = None
            if frames is not None and joined is not None:
                mask = frames * NUM_TIMESTEPS >= t
                # drawn at every step, as the original does: a seed then means the same whatever the mask
                noised = (1 - t / NUM_TIMESTEPS) * z + t / NUM_TIMESTEPS * noise(z)
                z, joined = torch.where(_of_frames(mask & ~joined), noised, z), mask
            moved = z + velocity(field(i, z, mask), z, t, self.prediction) * ((t - then) / NUM_TIMESTEPS)
            z = moved if mask is None else torch.where(_of_frames(mask), moved, z)
        return z


# IDDPM: Open-Sora 1.0 and 1.1, and Latte of classes


class Respaced(NamedTuple):
    """A diffusion of N of the 1000 timesteps, each table (N,) by rising time, under the names of the original."""

    betas: Tensor
    alphas_cumprod: Tensor  # what is left of the data's variance
    alphas_cumprod_prev: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_mean_coef1: Tensor  # of the data
    posterior_mean_coef2: Tensor  # of the latents
    posterior_log_variance_clipped: Tensor


@dataclass(frozen=True)
class IDDPM:
    """Ancestral steps whose variance the network tells in a second half of its channels; or, of ddim, without noise.

    With frame masks, time is counted in steps of the run, as in Open-Sora 1.1. Two of its quirks are kept: in the step
    in which a frame joins it is already moved although the frame mask still calls it clean; and so a frame of value 0
    is noised, a little, and moved in the last step.
    Source: hpcaitech/Open-Sora v1.0.0 and v1.1.0, opensora/schedulers/iddpm/gaussian_diffusion.py: p_sample and
    p_sample_loop_progressive, respace.py; Vchitect/Latte b27c24a, diffusion/gaussian_diffusion.py: ddim_sample.
    """

    steps: int
    dtype: torch.dtype  # of the tables: float64, but float32 in Open-Sora 1.1, which can be seen in the fourth digit
    ddim: bool = False

    def __post_init__(self) -> None:
        _check_steps("IDDPM", self.steps, 2)

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """Whole numbers, from 999 to 0."""
        stride = (NUM_TIMESTEPS - 1) / (self.steps - 1)
        # summed up as the original does: where a sum is close to a half, its rounding error decides
        rising = accumulate(repeat(stride, self.steps - 1), initial=0.0)
        return tuple(float(round(t)) for t in rising)[::-1]

    @cached_property
    def tables(self) -> Respaced:
        kept = [int(t) for t in reversed(self.timesteps)]
        abar = (1 - torch.linspace(*BETAS, NUM_TIMESTEPS, dtype=torch.float64)).cumprod(0)[kept]
        # each beta makes up for all the timesteps that are left out before it
        betas = (1 - abar / _before(abar)).to(self.dtype)
        abar = (1 - betas).cumprod(0)
        before = _before(abar)
        variance = betas * (1 - before) / (1 - abar)
        return Respaced(
            betas,
            abar,
            before,
            (1 / abar).sqrt(),
            (1 / abar - 1).sqrt(),
            betas * before.sqrt() / (1 - abar),
            (1 - before) * (1 - betas).sqrt() / (1 - abar),
            torch.cat((variance[1:2], variance[1:])).log(),  # the first is 0, and without noise
        )

    def integrate(
        self, field: Field, z: Tensor, *, frames: Tensor | None = None, noise: Noise = torch.randn_like
    ) -> Tensor:
        """See Sampler. field: of 2 C channels, the noise and the variance."""
        joins = None if frames is None else (frames * self.steps).int()  # (B, T) the step before the first of the mask
        for i, k in enumerate(reversed(range(self.steps))):
            mask = None
            if joins is not None:
                abar = float(self.tables.alphas_cumprod[k])
                noised = abar**0.5 * z + (1 - abar) ** 0.5 * noise(z)
                z, mask = torch.where(_of_frames(joins == k), noised, z), joins > k
            moved = self._step(k, field(i, z, mask), z, noise)
            z = moved if joins is None else torch.where(_of_frames(joins >= k), moved, z)
        return z

    def _step(self, k: int, output: Tensor, z: Tensor, noise: Noise) -> Tensor:
        """From step k, counted from the data, to the one before it."""
        if output.shape[1] != 2 * z.shape[1]:
            wanted, got = 2 * z.shape[1], output.shape[1]
            raise ValueError(f"IDDPM needs a model of {wanted} channels, noise and variance, not {got}")
        # numbers and not tensors, so that nothing has to be copied to a device
        beta, _, before, recip, recipm1, coef1, coef2, least = (float(table[k]) for table in self.tables)
        eps, variance = output.chunk(2, 1)
        data = recip * z - recipm1 * eps
        if self.ddim:
            return before**0.5 * data + (1 - before) ** 0.5 * eps
        mean = coef1 * data + coef2 * z
        if k == 0:
            return mean
        fraction = (variance + 1) / 2
        log_variance = fraction * log(beta) + (1 - fraction) * least
        return mean + torch.exp(0.5 * log_variance) * noise(z)


def _before(abar: Tensor) -> Tensor:
    """Of the step before: of the first, all is data."""
    return torch.cat((torch.ones_like(abar[:1]), abar[:-1]))


# The samplers of the diffusers library: Latte's DDIM, Open-Sora-Plan's PNDM and Euler-ancestral


@dataclass(frozen=True)
class EulerAncestral:
    """Euler steps that go a little too far and add noise again, on latents scaled as z = data + sigma * noise.

    Source: huggingface/diffusers v0.27.2, EulerAncestralDiscreteScheduler with its defaults, which is not used itself
    because it draws its own noise.
    """

    steps: int

    def __post_init__(self) -> None:
        _check_steps("Euler-ancestral", self.steps, 2)  # a single one would be at 0, where there is no noise

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """Evenly spaced, from 999 to 0, and not always whole."""
        return tuple(np.linspace(0, NUM_TIMESTEPS - 1, self.steps, dtype=np.float32)[::-1].tolist())

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """Of each model call, and 0 at the end."""
        abar = (1 - torch.linspace(*BETAS, NUM_TIMESTEPS)).cumprod(0)
        table = ((1 - abar) / abar).sqrt().numpy()
        return *np.interp(self.timesteps, range(NUM_TIMESTEPS), table).astype(np.float32).tolist(), 0.0

    def integrate(
        self, field: Field, z: Tensor, *, frames: Tensor | None = None, noise: Noise = torch.randn_like
    ) -> Tensor:
        """See Sampler."""
        _check_no_frames("Euler-ancestral", frames)
        z = z * self.sigmas[0]
        for i, (sigma, then) in enumerate(pairwise(self.sigmas)):
            up = (then**2 * (sigma**2 - then**2) / sigma**2) ** 0.5
            down = (then**2 - up**2) ** 0.5
            eps = field(i, z / (sigma**2 + 1) ** 0.5, None)[:, : z.shape[1]]
            z = z + eps * (down - sigma) + noise(z) * up
        return z


# class, fewest and most steps, options
SCHEDULERS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", 2, 1000, {"clip_sample": False}),
    "ddim-offset": ("DDIMScheduler", 2, 999, {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}),
    "pndm": ("PNDMScheduler", 4, 1000, {}),  # the first three steps are of four model calls each
}


@dataclass(frozen=True)
class Diffusers:
    """A scheduler of the diffusers library that draws no noise. Raises ImportError where diffusers is not installed."""

    method: Literal["ddim", "ddim-offset", "pndm"]
    steps: int

    def __post_init__(self) -> None:
        _, least, most, _ = SCHEDULERS[self.method]
        _check_steps(self.method, self.steps, least, most)

    def scheduler(self) -> Any:
        """A new one for each run, since PNDM counts its calls and keeps the last outputs."""
        try:
            diffusers = import_module("diffusers")
        except ModuleNotFoundError as error:
            if error.name != "diffusers":
                raise
            message = f"sampling by {self.method} needs the package diffusers, of minidit's extra 'hub'"
            raise ModuleNotFoundError(message, name="diffusers") from error
        name, _, _, options = SCHEDULERS[self.method]
        scheduler = getattr(diffusers, name)(beta_start=BETAS[0], beta_end=BETAS[1], **options)
        scheduler.set_timesteps(self.steps)
        return scheduler

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """Whole numbers; most of PNDM's first ones come twice."""
        return tuple(map(float, self.scheduler().timesteps.tolist()))

    def integrate(
        self, field: Field, z: Tensor, *, frames: Tensor | None = None, noise: Noise = torch.randn_like
    ) -> Tensor:
        """See Sampler."""
        _check_no_frames(self.method, frames)
        scheduler = self.scheduler()
        for i, t in enumerate(scheduler.timesteps.tolist()):
            z = scheduler.step(field(i, z, None)[:, : z.shape[1]], t, z, return_dict=False)[0]
        return z
