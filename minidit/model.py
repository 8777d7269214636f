"""The diffusion transformer: embed, sublayers, final layer. The one place where broadcast happens is its forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit import embed, ops
from minidit.broadcast import PARTS, Act, Call, Part, Site
from minidit.cache import Cache
from minidit.caption import CaptionEncoder
from minidit.condition import Condition, Told
from minidit.config import ModelConfig
from minidit.kernels.reference import Rope, Update, score_bound
from minidit.layers import Around, CrossAttention, Final, Mlp, SelfAttention, Sublayer
from minidit.parallel import Shares, alone


@dataclass(frozen=True)
class Conditioning:
    """What stays the same over all calls of a run, computed once by DiT.prepare."""

    latent: tuple[int, int, int]  # (T, H, W)
    shares: Shares  # which of the tokens are this rank's
    positions: Tensor  # (S, D), the rank's
    told: Told
    tables: Mapping[Site, Tensor]  # (T, 1, D), the rank's, added to the tokens before a site: when each frame is
    contexts: tuple[Any, ...]  # what each site needs beside the tokens: layers.Around, layers.Caption or None


class DiT(nn.Module):
    """A spatio-temporal diffusion transformer with broadcast in its forward: STDiT 1 to 3, Latte and LatteT2V.

    Sources: hpcaitech/Open-Sora v1.0.0, v1.1.0, v1.2.0: opensora/models/stdit; Vchitect/Latte b27c24a: models/latte.py,
    latte_t2v.py; PKU-YuanGroup/Open-Sora-Plan v1.0.0, v1.1.0: opensora/models/diffusion/latte/modeling_latte.py.
    """

    blocks: Any  # a list of blocks, each a dictionary of part -> Sublayer
    rope_freqs: Tensor
    null_caption: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.sites = config, config.sites
        dim, patch, positions = config.dim, config.patch[1] * config.patch[2], config.positions
        self.patch = nn.Linear(config.in_channels * patch, dim)
        if positions.space == "stored" and positions.base:
            self.places = nn.Parameter(torch.randn(positions.base, dim) / dim**0.5)
        if positions.time == "stored" and positions.frames:
            self.frames = nn.Parameter(torch.randn(positions.frames, dim) / dim**0.5)
        if positions.time.startswith("rope"):
            self.register_buffer("rope_freqs", embed.rope_frequencies(config.head_dim))
        self.timestep = embed.ScalarEmbed(dim)
        self.condition = Condition(config)
        if config.modulation == "shared":
            self.modulation = nn.Linear(dim, 6 * dim)
            if config.told == "size":
                self.temporal_modulation = nn.Linear(dim, 3 * dim)
        if config.caption_dim:
            self.caption = Mlp(config.caption_dim, dim, dim)
        if config.null_caption:
            null = torch.randn(config.caption_length, config.caption_dim)
            self.null_caption = nn.Parameter(null / config.caption_dim**0.5)
        self.blocks = nn.ModuleList(nn.ModuleDict() for _ in range(config.depth * len(config.blocks)))
        for block, part in self.sites:
            self.blocks[block][part] = self._sublayer(part)
        self.final = Final(dim, patch * config.out_channels, self._rows_by)
        self.encoder = CaptionEncoder(config) if config.captions else None

    @property
    def _rows_by(self) -> Literal["table", "linear"]:
        return "table" if self.config.modulation == "shared" else "linear"

    def _sublayer(self, part: Part) -> Sublayer:
        config, dim = self.config, self.config.dim
        match part:
            case "spatial":
                return Sublayer(SelfAttention(config, part), dim, self._rows_by)
            case "temporal":
                bare = config.bare_temporal
                return Sublayer(SelfAttention(config, part), dim, None if bare else self._rows_by, normed=not bare)
            case "cross":
                return Sublayer(CrossAttention(dim, config.heads), dim, None)
            case "mlp":
                return Sublayer(Mlp(dim, config.mlp_dim, dim), dim, self._rows_by)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch.weight.dtype

    @property
    def sublayers(self) -> list[Sublayer]:
        """In the order of the forward, one a site."""
        return [self.blocks[block][part] for block, part in self.sites]

    def spatial(self) -> DiT:
        """The model without its temporal blocks, sharing its weights: how LatteT2V makes images.

        Raises ValueError for a model with temporal attention in every block.
        """
        keep = [i for i, block in enumerate(self.config.blocks) if "temporal" not in block]
        if not keep:
            raise ValueError("this model has temporal attention in every block: without those, nothing is left of it")
        blocks = tuple(self.config.blocks[i] for i in keep)
        kept = [layer * len(self.config.blocks) + i for layer in range(self.config.depth) for i in keep]
        with torch.device("meta"):
            model = DiT(replace(self.config, blocks=blocks))
        state = self.state_dict()
        ours = {name for name in state if not name.startswith("blocks.")}
        names = {name: name for name in ours}
        for new, old in enumerate(kept):
            names |= {f"blocks.{new}.{name}": f"blocks.{old}.{name}" for name in self.blocks[old].state_dict()}
        model.load_state_dict({new: state[old] for new, old in names.items()}, assign=True)
        return model.train(self.training).requires_grad_(self.patch.weight.requires_grad)

    def null(self, text: Tensor) -> Tensor:
        """What stands for no caption or class beside text, of the same shape. ValueError if the model learned none."""
        if self.config.classes is not None:
            return torch.full_like(text, self.config.classes)
        if not self.config.null_caption:
            raise ValueError("this model has learned no null caption: give the features of an empty prompt as `null`")
        return self.null_caption[: text.shape[1]].expand_as(text)  # as long as the caption, as in Open-Sora

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a folder that minidit.load reads, see checkpoint.save."""
        from minidit import checkpoint  # which builds models itself

        checkpoint.save(self, folder, dtype=dtype)

    def prepare(
        self,
        text: Tensor | None,
        lengths: Tensor | None,
        *,
        latent: tuple[int, int, int],
        height: float,
        width: float,
        fps: Tensor,
        frames: int | None = None,
        ratio: float | None = None,
        valid: Tensor | None = None,
        shares: Shares | None = None,
    ) -> Conditioning:
        """Everything that no timestep changes.

        text: (B, L, caption_dim) features, or (B,) class labels, or None for a model that knows neither; lengths: (B,)
        its tokens that count, None: all; latent: (T, H, W) of the latents; height, width: of the video in pixels, they
        scale the positions; fps: (B,) frames per second; frames: of the video, None: T; ratio: height / width, None:
        that; valid: (B, T, H, W) bool, false for latents that no attention looks at, None: all are true; shares: who
        has which of the tokens, None: this process has all.
        """
        config = self.config
        if (text is None) == bool(config.caption_dim or config.classes):
            raise ValueError(f"this model {'needs' if text is None else 'knows no'} captions or classes")
        label = text if config.classes else None
        told = self.condition(fps, height=height, width=width, frames=frames or latent[0], ratio=ratio, label=label)
        features = self.caption(text) if config.caption_dim else None
        moments = self._moments(latent[0])
        rope = None
        if config.positions.time.startswith("rope"):
            rope = Rope(*embed.rope_table(self.rope_freqs, latent[0]))
        first = next((site for site in self.sites if site.part == "temporal"), None)
        branch = config.positions.time == "branch"
        shares = shares or alone(*config.tokens(latent))
        bias = None if valid is None else shares.attended(self._bias(valid), 1)

        bounds = self._bounds()

        def context(site: Site, f: Any) -> Any:
            traded = shares if shares.trades(site.part) else None
            match site.part:
                case "spatial":
                    return Around(bias=bias, bound=bounds.get(site), shares=traded)
                case "temporal":
                    return Around(rope=rope, table=moments if branch and site == first else None, shares=traded)
                case "cross":
                    return f.prepare(features, lengths)
                case "mlp":
                    return None

        contexts = tuple(context(site, sublayer.f) for site, sublayer in zip(self.sites, self.sublayers, strict=True))
        tables = {}
        if moments is not None and first is not None and not branch:
            tables[first] = shares.own(moments[:, None], "frames", 0)
        positions = shares.own(self._places(latent, height, width), "places", 0)
        return Conditioning(latent, shares, positions, told, tables, contexts)

    def _places(self, latent: tuple[int, int, int], height: float, width: float) -> Tensor:
        """(S, D) positions of a frame's places."""
        positions, (rows, columns) = self.config.positions, self.config.grid(latent)
        scale, base = positions.scale, positions.base
        if positions.space == "stored":
            return self.places
        if positions.space == "area":
            assert base is not None
            scale, base = sqrt(height * width) / base, round(sqrt(rows * columns))
        table = embed.positions(rows, columns, self.config.dim, scale=scale, base=base)
        return table.to(self.patch.weight)

    def _moments(self, frames: int) -> Tensor | None:
        """(T, D) positions of the frames, None where there is no table of them."""
        positions = self.config.positions
        match positions.time:
            case "stored":
                return self.frames
            case "stream" if frames == 1:  # LatteT2V makes images without
                return None
            case "stream" | "branch":
                return embed.moments(frames, self.config.dim, positions.pace).to(self.patch.weight)
            case _:
                return None

    def _bounds(self) -> dict[Site, float]:
        """The largest scores of attention within a frame, known where it norms; not in training, where they change."""
        spatial = [site for site in self.sites if site.part == "spatial"]
        if not self.config.qk_norm or not spatial or torch.is_grad_enabled():
            return {}
        layers = [self.blocks[site.block]["spatial"].f for site in spatial]
        bounds = torch.stack([score_bound(f.q_norm, f.k_norm) for f in layers])
        return dict(zip(spatial, bounds.tolist(), strict=True))  # one wait for the device

    def _bias(self, valid: Tensor) -> Tensor:
        """(B, T, H, W) -> (B, T, S): -10000 for places none of whose latents is valid, as in Open-Sora-Plan."""
        seen = F.max_pool2d(valid.to(self.dtype), self.config.patch[1:]).flatten(2)
        return (1 - seen) * -10000

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
        frame_mask = None if frame_mask is None else cond.shares.own(frame_mask, "frames", 1)
        time, clean = self.timestep(t), self._clean(t, frame_mask)  # (B, D)
        modulation = self._modulation(time, clean, cond.told, frame_mask)
        acts = call.acts if call else (Act.COMPUTE,) * len(self.sites)
        last = call.last if call else (False,) * len(self.sites)

        pending: list[Update] = []  # what is still to be added to x, by the next pass over it
        sublayers = zip(self.sites, self.sublayers, cond.contexts, acts, last, strict=True)
        for site, sublayer, context, act, done in sublayers:
            if site in cond.tables:
                x, pending = ops.add_updates(x, *pending) + cond.tables[site], []
            if cache and act is Act.REUSE:
                pending.append(cache.take(site, last=done))
                continue
            x, update = sublayer(x, pending, self._rows(site, modulation), context)
            pending = [update]
            if cache and act is Act.STORE:
                cache.keep(site, update)

        x = self.final(
            x, pending, time + cond.told.final, None if clean is None else clean + cond.told.clean, frame_mask
        )
        x = cond.shares.gather(x)
        return embed.unpatchify(x, self.config.patch, self.config.grid(cond.latent))[..., :height, :width]

    def _embed(self, x: Tensor, cond: Conditioning) -> Tensor:
        if tuple(x.shape[2:]) != cond.latent:
            raise ValueError(f"latents of size {tuple(x.shape[2:])}, but prepared for {cond.latent}")
        x = embed.patchify(x, self.config.patch, self.config.grid(cond.latent))  # (B, T, S, C * patch)
        x = cond.shares.own(cond.shares.own(x, "frames", 1), "places", 2)
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

    def _clean(self, t: Tensor, frame_mask: Tensor | None) -> Tensor | None:
        """The embedding of t = 0, if some frames are clean."""
        if frame_mask is None:
            return None
        if not self.config.frame_masks:
            raise ValueError("this model was not trained with frame masks: Open-Sora 1.1 and 1.2 were")
        return self.timestep(torch.zeros_like(t))

    def _modulation(
        self, time: Tensor, clean: Tensor | None, told: Told, frame_mask: Tensor | None
    ) -> dict[Part, Tensor]:
        """What every sublayer makes its rows of, for each part and frame: (B, T or 1, 3, D), or (B, 1, D) in blocks."""
        if self.config.modulation == "block":
            shared = F.silu(time + told.tokens)[:, None]
            return dict.fromkeys(PARTS, shared)

        def rows(linear: nn.Linear, vector: Tensor | float) -> Tensor:
            m = linear(F.silu(time + vector))[:, None]  # (B, 1, 3 or 6 * D)
            if clean is not None and frame_mask is not None:
                m = torch.where(frame_mask[:, :, None], m, linear(F.silu(clean + vector))[:, None])
            return m.unflatten(-1, (-1, 3, self.config.dim))

        attention, mlp = rows(self.modulation, told.tokens).unbind(2)
        temporal = attention
        if self.config.told == "size":
            (temporal,) = rows(self.temporal_modulation, told.temporal).unbind(2)
        return {"spatial": attention, "temporal": temporal, "cross": attention, "mlp": mlp}

    def _rows(self, site: Site, modulation: Mapping[Part, Tensor]) -> Tensor | None:
        """Shift, scale and gate of a site, (B, T or 1, 3, D); cross-attention has none."""
        if site.part == "cross":
            return None
        part: Part = "spatial" if site.part == "temporal" and self.config.bare_temporal else site.part
        rows: Tensor = self.blocks[site.block][part].rows(modulation[part])
        return rows
