"""What every kernel makes and holds for itself, without computing it: for counting memory before a run.

Each op as in reference.py, of what its kernel takes: ops.py asks that first. Its results have no numbers in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minidit.kernels.reference import Axis, Rope, Update


def add_updates(x: Tensor, *updates: Update) -> Tensor:
    """See reference.add_updates."""
    return torch.empty_like(x) if updates else x


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *updates: Update) -> tuple[Tensor, Tensor]:
    """See reference.norm_modulate."""
    return torch.empty_like(x) if updates else x, torch.empty_like(x)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See reference.linear_gelu."""
    return x.new_empty(*x.shape[:-1], len(weight))


def self_attention(
    qkv: Tensor,
    heads: int,
    norm: tuple[Tensor, Tensor] | None,
    rope: Rope | None,
    axis: Axis,
    **_: object,
) -> Tensor:
    """See reference.self_attention. Within a frame, the normed keys are there as well until it returns."""
    shape = (*qkv.shape[:-1], qkv.shape[-1] // 3)
    keys = qkv.new_empty(shape) if axis == "spatial" and norm is not None else None
    out = qkv.new_empty(shape)
    del keys
    return out


def cross_attention(q: Tensor, kv: Tensor, lengths: Tensor | None) -> Tensor:
    """See reference.cross_attention."""
    return torch.empty_like(q)
