"""A run: the model called by a plan, at a sampler's times, each caption guided away from the null caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidit.broadcast import Call, Plan
from minidit.cache import Cache
from minidit.cost import cost
from minidit.model import Conditioning, DiT
from minidit.parallel import ALONE, Layout
from minidit.samplers import Noise, Sampler, planned


def guide(cond: Tensor, uncond: Tensor, guidance: float, channels: int) -> Tensor:
    """Classifier-free guidance: away from what is likely without the caption.

    cond, uncond: (B, C, T, H, W). Only the first channels are moved: the others, such as the variance, are cond's.
    """
    cond, rest = cond[:, :channels], cond[:, channels:]
    uncond = uncond[:, :channels]
    return torch.cat((uncond + guidance * (cond - uncond), rest), 1)


@dataclass(frozen=True)
class Step:
    """What on_step is told after each model call."""

    call: Call
    steps: int  # of the run: its model calls
    cache_bytes: int  # held now
    peak_bytes: int  # held at most so far


def _halves(model: DiT, text: Tensor | None, null: Tensor | None, two_calls: bool) -> Sequence[Tensor]:
    """text and what stands for none beside it: as two batches, or as one."""
    if text is None:
        raise ValueError("a guidance other than 1 needs captions or classes to guide to")
    if null is None:
        null = model.null(text)
    elif len(null) < text.shape[1]:
        raise ValueError(f"the null caption has {len(null)} tokens, fewer than the captions' {text.shape[1]}: pad it")
    else:
        null = null[: text.shape[1]].expand_as(text)
    return [text, null] if two_calls else [torch.cat((text, null))]


@torch.inference_mode()
def sample(
    model: DiT,
    z: Tensor,
    text: Tensor | None,
    lengths: Tensor | None = None,
    *,
    plan: Plan,
    sampler: Sampler,
    guidance: float,
    height: int,
    width: int,
    fps: float,
    two_calls: bool = False,
    null: Tensor | None = None,
    frames: Tensor | None = None,
    noise: Noise = torch.randn_like,
    layout: Layout = ALONE,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Latents (B, C, T, H, W) for captions, from noise z of that shape, by a plan.

    text, lengths, height, width, fps: see DiT.prepare. A guidance of 1 is none; any other runs each caption beside the
    null caption, cut to the captions' length as in the originals: as one batch [cond; uncond], or in two_calls a step,
    each with a cache of its own. null: (L or more, caption_dim) features of the null caption; None: the one that the
    model has learned. frames, noise: see Sampler.integrate.
    layout: the ranks that share the run; each is given all of z and makes all of the latents, and noise has to be the
    same on all of them.
    Raises ValueError for a plan made with other times or for another model, and for ranks that were given other things.
    """
    times = planned(sampler, model.config, model.dtype)
    if plan.timesteps != tuple(times):
        raise ValueError(
            f"the plan's {len(plan)} timesteps are not the run's {len(times)} as the model sees them: "
            "make the plan with planned(sampler, model.config, model.dtype)"
        )
    guided = guidance != 1
    apart = layout.guidance is not None
    if apart and not guided:
        raise ValueError("a guidance of 1 has no second half for other ranks: start fewer")
    told = {"text": text, "lengths": lengths, "null": null, "guidance": guidance, "two_calls": two_calls}
    sizes = {"height": height, "width": width, "fps": fps}
    layout.agree(z.device, z=z, **told, **sizes, plan=plan, sampler=sampler, frames=frames)
    if text is not None and lengths is not None:
        text = text[:, : int(lengths.max())]  # nobody attends to what lies behind
    batches = _halves(model, text, null, two_calls or apart) if guided else [text]
    if apart:
        batches = [batches[layout.half]]
    copies = 2 if guided and not two_calls and not apart else 1  # of z in one model call
    lengths = None if lengths is None else lengths.repeat(copies)
    rate = torch.full((copies * len(z),), float(fps), device=z.device)
    latent = (z.shape[2], z.shape[3], z.shape[4])
    length, itemsize = 0 if text is None or text.dim() < 3 else text.shape[1], model.dtype.itemsize
    price = cost(model.config, batch=copies * len(z), latent=latent, caption_length=length, itemsize=itemsize)
    shares = layout.shares(plan, price, model.config.tokens(latent))

    def prepare(text: Tensor | None) -> Conditioning:
        return model.prepare(text, lengths, latent=latent, height=height, width=width, fps=rate, shares=shares)

    runs = [(prepare(batch), Cache(plan)) for batch in batches]

    def field(i: int, z: Tensor, mask: Tensor | None) -> Tensor:
        call, many = plan[i], z.repeat(copies, 1, 1, 1, 1)
        mask = None if mask is None else mask.repeat(copies, 1)
        outputs = torch.cat([model(many, call.timestep, cond, call, cache, mask) for cond, cache in runs]).float()
        if on_step:
            held, peak = sum(cache.nbytes for _, cache in runs), sum(cache.peak_bytes for _, cache in runs)
            on_step(Step(call, len(plan), held, peak))
        if not guided:
            return outputs
        if apart:
            outputs = layout.join(outputs)
        cond, uncond = outputs.chunk(2)
        return guide(cond, uncond, guidance, model.config.sampling.guided)

    return sampler.integrate(field, z, frames=frames, noise=noise)
