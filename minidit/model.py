"""The diffusion transformer: embed, sublayers, final layer. The one place where broadcast happens is its forward."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit import embed
from minidit.broadcast import Act, Call, Part
from minidit.cache import Cache
from minidit.caption import CaptionEncoder
from minidit.config import ModelConfig
from minidit.kernels import reference as ops
from minidit.layers import CrossAttention, Final, Mlp, SelfAttention, Sublayer


@dataclass(frozen=True)
class Conditioning:
    """What stays the same over all calls of a run, computed once by DiT.prepare."""

    latent: tuple[int, int, int]  # (T, H, W)
    positions: Tensor  # (S, D)
    fps: Tensor  # (B, D)
    contexts: tuple[Any, ...]  # one a site: the caption's keys, values and lengths; the frames' rotary table; None


class DiT(nn.Module):
    """STDiT3, the transformer of Open-Sora 1.2, with broadcast in its forward.

    Source: hpcaitech/Open-Sora v1.2.0, opensora/models/stdit/stdit3.py.
    """

    blocks: Any  # a list of blocks, each a dictionary of part -> Sublayer
    rope_freqs: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.sites = config, config.sites
        dim, patch = config.dim, config.patch[1] * config.patch[2]
        self.patch = nn.Linear(config.in_channels * patch, dim)
        self.timestep = embed.ScalarEmbed(dim)
        self.fps = embed.ScalarEmbed(dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.caption = Mlp(config.caption_dim, dim, dim)
        null = torch.randn(config.caption_length, config.caption_dim)
        self.null_caption = nn.Parameter(null / config.caption_dim**0.5)
        self.register_buffer("rope_freqs", embed.rope_frequencies(config.head_dim))
        self.blocks = nn.ModuleList(nn.ModuleDict() for _ in range(2 * config.depth))
        for block, part in self.sites:
            self.blocks[block][part] = self._sublayer(part)
        self.final = Final(dim, patch * config.out_channels)
        self.encoder = CaptionEncoder(config) if config.captions else None

    def _sublayer(self, part: Part) -> Sublayer:
        dim, heads = self.config.dim, self.config.heads
        match part:
            case "spatial" | "temporal":
                return Sublayer(SelfAttention(dim, heads, part), dim, modulated=True)
            case "cross":
                return Sublayer(CrossAttention(dim, heads), dim, modulated=False)
            case "mlp":
                return Sublayer(Mlp(dim, self.config.mlp_dim, dim), dim, modulated=True)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch.weight.dtype

    @property
    def sublayers(self) -> list[Sublayer]:
        """In the order of the forward, one a site."""
        return [self.blocks[block][part] for block, part in self.sites]

    def prepare(
        self,
        text: Tensor,
        lengths: Tensor | None,
        *,
        latent: tuple[int, int, int],
        height: float,
        width: float,
        fps: Tensor,
    ) -> Conditioning:
        """Everything that no timestep changes.

        text: (B, L, caption_dim); lengths: (B,) its tokens that count, None: all; latent: (T, H, W) of the latents;
        height, width: of the video in pixels, they scale the positions; fps: (B,) frames per second.
        """
        _, ph, pw = self.config.patch
        rows, columns = embed.grid(latent[1], ph), embed.grid(latent[2], pw)
        scale = sqrt(height * width) / self.config.base_size
        places = embed.positions(rows, columns, self.config.dim, scale=scale, base=round(sqrt(rows * columns)))
        text, rope = self.caption(text), embed.rope_table(self.rope_freqs, latent[0])
        contexts = tuple(sublayer.f.prepare(text, lengths, rope) for sublayer in self.sublayers)
        return Conditioning(latent, places.to(text), self.fps(fps), contexts)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Conditioning,
        call: Call | None = None,
        cache: Cache | None = None,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        """Latents x (B, C, T, H, W) at diffusion time t in 0..1000 -> (B, out_channels, T, H, W).

        t: a number for all samples, or (B,). call, cache: a row of the run's plan and the run's cache; without them
        every sublayer computes. frame_mask: (B, T) bool, false for frames that are clean, modulated as at t = 0.
        Raises ValueError for a call of another time, plan, model or batch.
        """
        height, width = x.shape[3:]
        x = self._embed(x, cond)
        t = self._check(call, cache, t, x)
        time = self.timestep(t) + cond.fps  # (B, D)
        clean = None if frame_mask is None else self.timestep(torch.zeros_like(t)) + cond.fps
        modulation = self._modulation(time, clean, frame_mask)
        acts = call.acts if call else (Act.COMPUTE,) * len(self.sites)
        last = call.last if call else (False,) * len(self.sites)

        sublayers = zip(self.sites, self.sublayers, cond.contexts, acts, last, strict=True)
        for site, sublayer, context, act, done in sublayers:
            if cache and act is Act.REUSE:
                x = ops.add_updates(x, cache.take(site, last=done))
                continue
            x, update = sublayer(x, modulation[site.part], context)
            if cache and act is Act.STORE:
                cache.keep(site, update)

        x = self.final(x, time, clean, frame_mask)
        return embed.unpatchify(x, self.config.patch, height, width)

    def _embed(self, x: Tensor, cond: Conditioning) -> Tensor:
        if x.shape[2:] != cond.latent:
            raise ValueError(f"latents of size {tuple(x.shape[2:])}, but prepared for {tuple(cond.latent)}")
        x = embed.patchify(x, self.config.patch)  # (B, T, S, C * patch)
        return self.patch(x.to(self.dtype)) + cond.positions

    def _check(self, call: Call | None, cache: Cache | None, t: Tensor | float, x: Tensor) -> Tensor:
        """t as a tensor (B,), after making sure that call, cache, time, model and tokens belong together."""
        if (call is None) != (cache is None):
            raise ValueError("a call of a plan and the run's cache go together: give both or neither")
        if call and cache:
            if isinstance(t, Tensor) or t != call.timestep:
                # a tensor's value cannot be compared without waiting for the device
                raise ValueError(f"call {call.index} was planned for the number t={call.timestep}, got {t}")
            cache.begin(call, self.sites, x)
        return t if isinstance(t, Tensor) else torch.full((len(x),), t, dtype=torch.float32, device=x.device)

    def _modulation(self, time: Tensor, clean: Tensor | None, frame_mask: Tensor | None) -> dict[Part, Tensor]:
        """For each part shift, scale and gate of every frame (B, T or 1, 3, D). Cross-attention has none."""
        m = self.modulation(F.silu(time))[:, None]  # (B, 1, 6 * D)
        if clean is not None and frame_mask is not None:
            m = torch.where(frame_mask[:, :, None], m, self.modulation(F.silu(clean))[:, None])
        attention, mlp = m.unflatten(-1, (2, 3, -1)).unbind(2)
        return {"spatial": attention, "temporal": attention, "cross": attention, "mlp": mlp}
