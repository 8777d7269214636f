"""The three things a sublayer may do to the tokens, and the sublayer itself: x + gate * f(modulate(norm(x))).

Each f has a `prepare(text, lengths, rope)`: what it needs beside the tokens, the same at every call of a run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit.kernels import reference as ops

Rope = tuple[Tensor, Tensor]  # cosines and sines (T, E / 2)
Caption = tuple[Tensor, Tensor | None]  # keys and values (B, L, 2, H, E), lengths (B,)


class SelfAttention(nn.Module):
    """Attention within a frame (axis "spatial") or along a place's frames ("temporal"), QK-RMSNorm, RoPE."""

    def __init__(self, dim: int, heads: int, axis: ops.Axis) -> None:
        super().__init__()
        self.axis = axis
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.Parameter(torch.ones(dim // heads))
        self.k_norm = nn.Parameter(torch.ones(dim // heads))
        self.proj = nn.Linear(dim, dim)

    def prepare(self, text: Tensor, lengths: Tensor | None, rope: Rope) -> Rope | None:
        """Frames have an order, places have had their positions added."""
        return rope if self.axis == "temporal" else None

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        """x: (B, T, S, D) -> (B, T, S, D)."""
        return self.proj(ops.self_attention(self.qkv(x), self.q_norm, self.k_norm, rope, self.axis))


class CrossAttention(nn.Module):
    """Attention of every token to its caption."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def prepare(self, text: Tensor, lengths: Tensor | None, rope: Rope) -> Caption:
        """text: (B, L, D) -> packed keys and values (B, L, 2, H, E), and the lengths (B,)."""
        return self.kv(text).unflatten(-1, (2, self.heads, -1)), lengths

    def forward(self, x: Tensor, caption: Caption) -> Tensor:
        """x: (B, T, S, D) -> (B, T, S, D)."""
        return self.proj(ops.cross_attention(self.q(x), *caption))


class Mlp(nn.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def prepare(self, text: Tensor, lengths: Tensor | None, rope: Rope) -> None:
        """Nothing but the tokens."""

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        """x: (..., dim) -> (..., out)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Sublayer(nn.Module):
    """One site of the model: x -> (x + update, update).

    With a table, update = gate * f(norm(x) * (1 + scale) + shift); shift, scale and gate are the sublayer's own table
    plus what the timestep asks for. Without, update = f(x): cross-attention has neither norm nor gate.
    """

    def __init__(self, f: SelfAttention | CrossAttention | Mlp, dim: int, *, modulated: bool) -> None:
        super().__init__()
        self.f = f
        self.table = nn.Parameter(torch.randn(3, dim) / dim**0.5) if modulated else None

    def forward(self, x: Tensor, modulation: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """x: (B, T, S, D); modulation: (B, T or 1, 3, D); context: what f.prepare returned."""
        if self.table is None:
            return ops.gated_residual(x, self.f(x, context), None)
        shift, scale, gate = (self.table + modulation)[:, :, :, None].unbind(2)  # each (B, T or 1, 1, D)
        return ops.gated_residual(x, self.f(ops.norm_modulate(x, shift, scale), context), gate)


class Final(nn.Module):
    """Norm, modulation by the time alone, and the linear that makes the channels of a patch."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.linear = nn.Linear(dim, out)

    def forward(self, x: Tensor, time: Tensor, clean: Tensor | None, frame_mask: Tensor | None) -> Tensor:
        """x: (B, T, S, D); time, clean: (B, D) embeddings of t and of 0; frame_mask: (B, T) -> (B, T, S, out)."""
        z = self._modulate(x, time)
        if clean is not None and frame_mask is not None:
            # Open-Sora trained with it: a clean frame is normalised again, after the modulation of a noisy one
            # (v1.2.0, opensora/models/layers/blocks.py: T2IFinalLayer.forward)
            z = torch.where(frame_mask[:, :, None, None], z, self._modulate(z, clean))
        return self.linear(z)

    def _modulate(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.table + time[:, None])[:, :, None, None].unbind(1)
        return ops.norm_modulate(x, shift, scale)
