"""What every op means, in plain torch. Runs anywhere, differentiable, never imports triton.

Letters: B batch, T frames, S places in a frame, L attended length, H heads, E channels of a head, D = H * E.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Axis = Literal["spatial", "temporal"]


class Refused(RuntimeError):
    """An op's kernel does not take what it was given, and says why."""


class Update(NamedTuple):
    """What a sublayer adds to the tokens: gate * a, rounded to their dtype before it is added."""

    a: Tensor  # (B, T, S, D)
    gate: Tensor | None  # (B, T or 1, 1, D), None: one


def add_updates(x: Tensor, *updates: Update) -> Tensor:
    """x + the updates, one after the other, each sum rounded. x: (B, T, S, D)."""
    for a, gate in updates:
        x = x + (a if gate is None else gate * a)
    return x


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *updates: Update) -> tuple[Tensor, Tensor]:
    """x with the updates added, and LayerNorm(that) * (1 + scale) + shift.

    x: (B, T, S, D); shift, scale: (B, T or 1, 1, D).
    """
    x = add_updates(x, *updates)
    return x, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x @ weight.T + bias), by its tanh formula. x: (..., N); weight: (M, N); bias: (M,) -> (..., M)."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


class Rope(NamedTuple):
    """Rotary positions of the attended tokens: cosines and sines (L, E / 2)."""

    cos: Tensor
    sin: Tensor


def self_attention(
    qkv: Tensor,
    heads: int,
    norm: tuple[Tensor, Tensor] | None,
    rope: Rope | None,
    axis: Axis,
    *,
    rope_first: bool = False,
    bias: Tensor | None = None,
    bound: float | None = None,
) -> Tensor:
    """Attention over the places of a frame, or over the frames of a place.

    qkv: (B, T, S, 3 * H * E), packed [q | k | v]; norm: weights (E,) of the RMSNorm of queries and of keys; rope is
    applied after the norm, or first; bias: added to the scores of a key, (B, T, S), for "spatial"; bound: no score is
    larger, or smaller than -bound, if that is known (see score_bound): it saves a kernel work and changes nothing
    -> (B, T, S, H * E).
    """
    b = qkv.shape[0]
    fold = "b t s (three h e) -> three (b t) h s e" if axis == "spatial" else "b t s (three h e) -> three (b s) h t e"
    q, k, v = rearrange(qkv, fold, three=3, h=heads)
    if rope is not None and rope_first:
        q, k = rotate(q, *rope), rotate(k, *rope)
    if norm is not None:
        q, k = rms_norm(q, norm[0]), rms_norm(k, norm[1])
    if rope is not None and not rope_first:
        q, k = rotate(q, *rope), rotate(k, *rope)
    scores = None if bias is None else rearrange(bias, "b t s -> (b t) 1 1 s").to(q.dtype)
    x = _attention(q, k, v, scores)
    return rearrange(x, "(b t) h s e -> b t s (h e)" if axis == "spatial" else "(b s) h t e -> b t s (h e)", b=b)


def cross_attention(q: Tensor, kv: Tensor, lengths: Tensor | None) -> Tensor:
    """Every token attends to the first lengths[b] keys of its caption; None: to all of them.

    q: (B, T, S, D); kv: (B, L, 2, H, E), packed [k | v]; lengths: (B,) -> (B, T, S, D).
    """
    t, s, h = *q.shape[1:3], kv.shape[3]
    k, v = rearrange(kv, "b l two h e -> two b h l e")
    mask = None if lengths is None else caption_mask(lengths, kv.shape[1])[:, None, None]  # (B, 1, 1, L)
    x = _attention(rearrange(q, "b t s (h e) -> b h (t s) e", h=h), k, v, mask)
    return rearrange(x, "b h (t s) e -> b t s (h e)", t=t, s=s)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # torch 2.11 returns None on a GPU for no queries, which a rank without tokens has
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask) if q.numel() else q


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) over the last axis in float32, cast back, then times weight (E,): Llama's order of roundings."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def score_bound(q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """() the largest score that queries and keys normed with these weights (E,) can have: by Cauchy and Schwarz."""
    return len(q_weight) ** 0.5 * (q_weight.float() * k_weight.float()).abs().max()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the pairs (2i, 2i + 1). x: (..., L, E); cos, sin: (L, E / 2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def caption_mask(lengths: Tensor, length: int) -> Tensor:
    """lengths: (B,) -> (B, length) bool, true for the tokens that are there."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]
