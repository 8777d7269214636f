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

MOST_FRAMES = 128  # of attention along frames, which are one tile
WIDTH = 32  # channels of a head that attention along frames takes at a time


def why_not(
    qkv: Tensor,
    heads: int,
    norm: tuple[Tensor, Tensor] | None,
    rope: Rope | None,
    axis: Axis,
    *,
    bias: Tensor | None = None,
    **_: object,
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
    launch.insist("self_attention", qkv, why_not(qkv, heads, norm, rope, axis, bias=bias))
    qkv = qkv.contiguous()
    return _spatial(qkv, heads, norm, bound) if axis == "spatial" else _temporal(qkv, heads, norm, rope, rope_first)


def _spatial(qkv: Tensor, heads: int, norm: tuple[Tensor, Tensor] | None, bound: float | None) -> Tensor:
    b, t, s, d = qkv.shape
    packed = qkv.view(b * t, s, 3 * heads, -1)  # (B T, S, 3 H, E)
    out = torch.empty(b * t, s, heads, packed.shape[-1], dtype=qkv.dtype, device=qkv.device)
    if norm is None:
        flash.attend(packed, packed, packed, (0, heads, 2 * heads), out, bound=bound)
    else:
        # keys are normed once, not again by every tile of queries; the weight of queries goes with theirs
        keys = _normed_keys(packed, heads, *norm)
        flash.attend(packed, keys, packed, (0, 0, 2 * heads), out, normed=True, bound=bound)
    return out.view(b, t, s, d // 3)


def _normed_keys(packed: Tensor, heads: int, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """packed: (N, S, 3 H, E) -> (N, S, H, E) keys over their root mean square, times both weights."""
    n, s, _, channels = packed.shape
    out = torch.empty(n, s, heads, channels, dtype=packed.dtype, device=packed.device)
    count, rows = n * s * heads, 32
    _norm_kernel[launch.tiles(count, rows),](
        packed, q_weight, k_weight, out, count, heads, channels, *launch.cut(channels), rows
    )
    return out


@triton.jit
def _norm_kernel(
    packed,
    q_weight,
    k_weight,
    out,
    count,
    H: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # a head of a token
    source, there = packed + ((row // H * 3 + 1) * H + row % H) * E, row < count
    at = tl.arange(0, MAIN)
    mask = there[:, None] & (at < E)[None, :]
    x = tl.load(source[:, None] + at[None, :], mask, other=0).to(tl.float32)
    square = tl.sum(x * x, 1)
    if TAIL:
        at2 = MAIN + tl.arange(0, TAIL)
        mask2 = there[:, None] & (at2 < E)[None, :]
        x2 = tl.load(source[:, None] + at2[None, :], mask2, other=0).to(tl.float32)
        square += tl.sum(x2 * x2, 1)
    factor = tl.rsqrt(square / E + 1e-6)[:, None]
    tl.store(out + row[:, None] * E + at[None, :], x * factor * _product(q_weight, k_weight, at, E)[None, :], mask)
    if TAIL:
        x2 = x2 * factor * _product(q_weight, k_weight, at2, E)[None, :]
        tl.store(out + row[:, None] * E + at2[None, :], x2, mask2)


@triton.jit
def _product(q_weight, k_weight, at, E: tl.constexpr):
    q, k = tl.load(q_weight + at, at < E, other=0), tl.load(k_weight + at, at < E, other=0)
    return q.to(tl.float32) * k.to(tl.float32)


def _temporal(
    qkv: Tensor, heads: int, norm: tuple[Tensor, Tensor] | None, rope: Rope | None, rope_first: bool
) -> Tensor:
    b, t, s, d = qkv.shape
    channels = d // (3 * heads)
    out = torch.empty(b, t, s, d // 3, dtype=qkv.dtype, device=qkv.device)
    tile, wide = max(16, triton.next_power_of_2(t)), qkv.dtype == torch.float32
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
        WIDTH,
        tile,
        "ieee" if wide else "tf32",
        num_warps=tile // 16,
        # registers are what limits how many programs run at a time
        maxnreg=128 if qkv.is_cuda and not wide else None,
    )
    return out


@triton.jit
def _temporal_kernel(
    qkv, q_weight, k_weight, cos, sin, out, T, S, scale,
    ROPE_FIRST: tl.constexpr, H: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A head of a place, some of its channels after the other: few of them are in registers at a time.

    The norm's factor of a row changes places with its weight and with turning, so the scores are multiplied by it.
    """
    head = tl.program_id(0) % H
    place = (tl.program_id(0) // H).to(tl.int64)  # of all samples
    t = tl.arange(0, TILE)
    token = (place // S * T + t) * S + place % S  # [TILE]
    there = t < T
    q, k = qkv + (token * 3 * H + head) * E, qkv + (token * 3 * H + H + head) * E
    v, a = qkv + (token * 3 * H + 2 * H + head) * E, out + (token * H + head) * E
    sums = (tl.zeros([TILE, TILE], tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32))
    values = ()
    if TILE == 16:  # asked for before all else, they come meanwhile; of larger tiles there is no room for them
        for i in tl.static_range((E + WIDTH - 1) // WIDTH):
            values = values + (_values(v, there, i * WIDTH, WIDTH, E),)  # type: ignore[assignment]
    for i in tl.static_range((E + WIDTH - 1) // WIDTH):
        sums = _scored(
            sums, q, k, q_weight, k_weight, cos, sin, t, there, i * WIDTH, WIDTH, ROPE_FIRST, E, TILE, PRECISION
        )
    scores, q_square, k_square = sums
    scores *= scale
    if q_weight is not None:
        scores *= tl.rsqrt(q_square / E + 1e-6)[:, None] * tl.rsqrt(k_square / E + 1e-6)[None, :]
    scores = tl.where(there[None, :], scores, float("-inf"))
    weight = tl.exp2(scores - tl.max(scores, 1)[:, None])
    share = 1 / tl.sum(weight, 1)[:, None]
    weight = weight.to(out.dtype.element_ty)
    for i in tl.static_range((E + WIDTH - 1) // WIDTH):
        some = values[i] if TILE == 16 else _values(v, there, i * WIDTH, WIDTH, E)
        at = i * WIDTH + tl.arange(0, WIDTH)[None, :]
        mean = tl.dot(weight, some, input_precision=PRECISION) * share
        tl.store(a[:, None] + at, mean, there[:, None] & (at < E))


@triton.jit
def _scored(
    sums, q, k, q_weight, k_weight, cos, sin, t, there, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    ROPE_FIRST: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What WIDTH channels from FIRST on add to the scores, and to the sums of squares of queries and of keys."""
    scores, q_square, k_square = sums
    at = FIRST + tl.arange(0, WIDTH)
    mask = there[:, None] & (at < E)[None, :]
    x, y = tl.load(q[:, None] + at[None, :], mask, other=0), tl.load(k[:, None] + at[None, :], mask, other=0)
    dtype: tl.constexpr = x.dtype
    x, y = x.to(tl.float32), y.to(tl.float32)
    if q_weight is not None:
        q_square += tl.sum(x * x, 1)
        k_square += tl.sum(y * y, 1)
    x = _placed(x, q_weight, cos, sin, t, there, FIRST, WIDTH, ROPE_FIRST, E, TILE).to(dtype)
    y = _placed(y, k_weight, cos, sin, t, there, FIRST, WIDTH, ROPE_FIRST, E, TILE).to(dtype)
    return tl.dot(x, y.T, scores, input_precision=PRECISION), q_square, k_square


@triton.jit
def _placed(
    x, weight, cos, sin, t, there, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    ROPE_FIRST: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Channels times their weight and turned, or turned first; what is None is left out."""
    if ROPE_FIRST:
        x = _turned(x, cos, sin, t, there, FIRST, WIDTH, E, TILE)
    if weight is not None:
        at = FIRST + tl.arange(0, WIDTH)
        x *= tl.load(weight + at, at < E, other=0).to(tl.float32)[None, :]
    if cos is not None and not ROPE_FIRST:
        x = _turned(x, cos, sin, t, there, FIRST, WIDTH, E, TILE)
    return x


@triton.jit
def _turned(x, cos, sin, t, there, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr):
    """The pairs (2i, 2i + 1) of channels [TILE, WIDTH], the first of which is FIRST."""
    even, odd = tl.split(x.reshape(TILE, WIDTH // 2, 2))
    column = FIRST // 2 + tl.arange(0, WIDTH // 2)[None, :]
    at, mask = t[:, None] * (E // 2) + column, there[:, None] & (column < E // 2)
    c, s = tl.load(cos + at, mask, other=0), tl.load(sin + at, mask, other=0)
    return tl.join(even * c - odd * s, odd * c + even * s).reshape(TILE, WIDTH)


@triton.jit
def _values(v, there, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    """WIDTH channels of the values from FIRST on."""
    at = FIRST + tl.arange(0, WIDTH)[None, :]
    return tl.load(v[:, None] + at, there[:, None] & (at < E), other=0)
