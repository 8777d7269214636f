"""Self-attention that reads the packed projection where it lies, with QK-RMSNorm and RoPE inside.

Within a frame: `flash`, over tiles of keys. Along the frames of a place: all frames are one tile, so a program is one
head of one place, and the projection is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidit.kernels import flash, launch
from minidit.kernels.reference import Axis, Rope

MOST_FRAMES = 128  # of attention along frames: one tile


def why_not(
    qkv: Tensor,
    heads: int,
    norm: tuple[Tensor, Tensor] | None,
    rope: Rope | None,
    axis: Axis,
    *,
    rope_first: bool = False,
    bias: Tensor | None = None,
    bound: float | None = None,
) -> str | None:
    """Why the kernels do not take these, None: they do."""
    channels = qkv.shape[-1] // (3 * heads)
    if bias is not None:
        return "scores have a bias"
    if axis == "spatial":
        if rope is not None:
            return "attention within a frame has no rotary positions here"
        return launch.why_not([qkv, *(norm or ())]) or flash.why_not(qkv, channels)
    if qkv.shape[1] > MOST_FRAMES:
        return f"{qkv.shape[1]} frames are more than {MOST_FRAMES}"
    if channels > 128 or channels % 2:
        return f"heads have {channels} channels, more than 128 or an odd number"
    return launch.why_not([qkv, *(norm or ())])


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
    """See reference.self_attention; norm and rope are computed in float32 and rounded once."""
    launch.insist("self_attention", why_not(qkv, heads, norm, rope, axis, rope_first=rope_first, bias=bias))
    qkv = qkv.contiguous()
    return _spatial(qkv, heads, norm, bound) if axis == "spatial" else _temporal(qkv, heads, norm, rope, rope_first)


def _spatial(qkv: Tensor, heads: int, norm: tuple[Tensor, Tensor] | None, bound: float | None) -> Tensor:
    b, t, s, d = qkv.shape
    packed = qkv.view(b * t, s, 3 * heads, -1)  # (B T, S, 3 H, E)
    out = torch.empty(b * t, s, heads, packed.shape[-1], dtype=qkv.dtype, device=qkv.device)
    if norm is None:
        flash.attend(packed, packed, packed, (0, heads, 2 * heads), out, bound=bound)
    else:
        # keys are normed once, not again by every tile of queries; their weight goes with the queries'
        weights, keys = norm[0].float() * norm[1].float(), _normed_keys(packed, heads)
        flash.attend(packed, keys, packed, (0, 0, 2 * heads), out, weights=weights, bound=bound)
    return out.view(b, t, s, d // 3)


def _normed_keys(packed: Tensor, heads: int) -> Tensor:
    """packed: (N, S, 3 H, E) -> (N, S, H, E) keys over their root mean square."""
    n, s, _, channels = packed.shape
    out = torch.empty(n, s, heads, channels, dtype=packed.dtype, device=packed.device)
    count, rows = n * s * heads, 32
    _norm_kernel[triton.cdiv(count, rows),](packed, out, count, heads, channels, *launch.cut(channels), rows)
    return out


@triton.jit
def _norm_kernel(
    packed, out, count, H: tl.constexpr, E: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # a head of a token
    source = ((row // H * 3 + 1) * H + row % H) * E
    there = row < count
    x, x2 = _head(packed, source, there, E, MAIN, TAIL)
    x, x2 = _rms_normed(x, x2, E, TAIL)
    _write_head(out, row * E, there, x, x2, E, MAIN, TAIL)


def _temporal(
    qkv: Tensor, heads: int, norm: tuple[Tensor, Tensor] | None, rope: Rope | None, rope_first: bool
) -> Tensor:
    b, t, s, d = qkv.shape
    channels = d // (3 * heads)
    out = torch.empty(b, t, s, d // 3, dtype=qkv.dtype, device=qkv.device)
    tile = max(16, triton.next_power_of_2(t))
    wide = qkv.dtype == torch.float32
    _temporal_kernel[b * s * heads,](
        qkv,
        *(norm or (None, None)),
        *(rope or (None, None)),
        out,
        t,
        s,
        flash.scale(channels),
        rope_first,
        heads,
        channels,
        *launch.cut(channels),
        tile,
        "ieee" if wide else "tf32",
        num_warps=1 if tile == 16 else 4 if tile <= 64 else 8,
        # three programs for two at a time, where registers are what limits them
        maxnreg=None if wide or tile > 64 or not qkv.is_cuda else 168,
    )
    return out


@triton.jit
def _temporal_kernel(
    qkv, q_weight, k_weight, cos, sin, out, T, S, scale,
    ROPE_FIRST: tl.constexpr, H: tl.constexpr, E: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % H
    place = (tl.program_id(0) // H).to(tl.int64)  # of all samples
    t = tl.arange(0, TILE)
    token = (place // S * T + t) * S + place % S  # [TILE]
    there = t < T
    dtype: tl.constexpr = out.dtype.element_ty
    q, q2 = _head(qkv, (token * 3 * H + head) * E, there, E, MAIN, TAIL)
    k, k2 = _head(qkv, (token * 3 * H + H + head) * E, there, E, MAIN, TAIL)
    q, q2 = _placed(q, q2, q_weight, cos, sin, t, there, ROPE_FIRST, E, MAIN, TAIL, TILE)
    k, k2 = _placed(k, k2, k_weight, cos, sin, t, there, ROPE_FIRST, E, MAIN, TAIL, TILE)
    scores = tl.dot(q.to(dtype), k.to(dtype).T, input_precision=PRECISION)
    if TAIL:
        scores = tl.dot(q2.to(dtype), k2.to(dtype).T, scores, input_precision=PRECISION)
    scores = tl.where(there[None, :], scores * scale, float("-inf"))
    weight = tl.exp2(scores - tl.max(scores, 1)[:, None])
    share = 1 / tl.sum(weight, 1)[:, None]
    weight = weight.to(dtype)
    v, v2 = _head(qkv, (token * 3 * H + 2 * H + head) * E, there, E, MAIN, TAIL)
    a = tl.dot(weight, v.to(dtype), input_precision=PRECISION) * share
    a2 = a
    if TAIL:
        a2 = tl.dot(weight, v2.to(dtype), input_precision=PRECISION) * share
    _write_head(out, (token * H + head) * E, there, a, a2, E, MAIN, TAIL)


@triton.jit
def _placed(
    x, x2, weight, cos, sin, t, there,
    ROPE_FIRST: tl.constexpr, E: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Queries or keys, normed and turned, or turned and normed; what is None is left out."""
    if ROPE_FIRST:
        x, x2 = _turned(x, x2, cos, sin, t, there, E, MAIN, TAIL, TILE)
    if weight is not None:
        x, x2 = _rms_normed(x, x2, E, TAIL)
        at = tl.arange(0, MAIN)
        x *= tl.load(weight + at, at < E, other=0).to(tl.float32)[None, :]
        if TAIL:
            at2 = MAIN + tl.arange(0, TAIL)
            x2 *= tl.load(weight + at2, at2 < E, other=0).to(tl.float32)[None, :]
    if cos is not None and not ROPE_FIRST:
        x, x2 = _turned(x, x2, cos, sin, t, there, E, MAIN, TAIL, TILE)
    return x, x2


@triton.jit
def _turned(x, x2, cos, sin, t, there, E: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TILE: tl.constexpr):
    x = _turn(x, cos, sin, t, there, 0, E, MAIN, TILE)
    if TAIL:
        x2 = _turn(x2, cos, sin, t, there, MAIN // 2, E, TAIL, TILE)
    return x, x2


@triton.jit
def _turn(x, cos, sin, t, there, FIRST: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """The pairs (2i, 2i + 1) of x [TILE, WIDTH], of which the tables' first column is FIRST."""
    even, odd = tl.split(x.reshape(TILE, WIDTH // 2, 2))
    column = FIRST + tl.arange(0, WIDTH // 2)[None, :]
    at, mask = t[:, None] * (E // 2) + column, there[:, None] & (column < E // 2)
    c, s = tl.load(cos + at, mask, other=0), tl.load(sin + at, mask, other=0)
    return tl.join(even * c - odd * s, odd * c + even * s).reshape(TILE, WIDTH)


@triton.jit
def _rms_normed(x, x2, E: tl.constexpr, TAIL: tl.constexpr):
    square = tl.sum(x * x, 1)
    if TAIL:
        square += tl.sum(x2 * x2, 1)
    factor = tl.rsqrt(square / E + 1e-6)[:, None]
    return x * factor, x2 * factor


@triton.jit
def _head(pointer, row, there, E: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Main and tail of a head in float32, zero where there is nothing. row: where each begins; without a tail: main."""
    at = tl.arange(0, MAIN)[None, :]
    x = tl.load(pointer + row[:, None] + at, there[:, None] & (at < E), other=0).to(tl.float32)
    x2 = x
    if TAIL:
        at2 = MAIN + tl.arange(0, TAIL)[None, :]
        x2 = tl.load(pointer + row[:, None] + at2, there[:, None] & (at2 < E), other=0).to(tl.float32)
    return x, x2


@triton.jit
def _write_head(pointer, row, there, x, x2, E: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    at = tl.arange(0, MAIN)[None, :]
    tl.store(pointer + row[:, None] + at, x, there[:, None] & (at < E))
    if TAIL:
        at2 = MAIN + tl.arange(0, TAIL)[None, :]
        tl.store(pointer + row[:, None] + at2, x2, there[:, None] & (at2 < E))
