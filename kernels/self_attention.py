"""Self-attention that reads the packed projection where it lies, with QK-RMSNorm and RoPE inside.

Within a frame: `flash`, over tiles of keys. Along the frames of a place: all frames are one tile, and a program takes
some heads one after the other, so that what is read of the next comes meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from minidit.kernels import flash, launch
from minidit.kernels.reference import Axis, Rope

MOST_FRAMES = 128  # of attention along frames, which are one tile
MOST_WIDE_FRAMES = 64  # in float32, of whose tiles shared memory holds fewer
# Heads that a program of attention along frames takes one after the other, of one place or of several. A loop of one
# turn is compiled wrong (Triton 3.6), see README.md.
TOGETHER = 4


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
    most = MOST_WIDE_FRAMES if qkv.dtype == torch.float32 else MOST_FRAMES
    if qkv.shape[1] > most:
        return f"{qkv.shape[1]} frames are more than {most}"
    return launch.why_not([qkv, *(norm or ())]) or flash.why_not(qkv, channels)


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
    if not qkv.numel():
        return qkv[..., : qkv.shape[-1] // 3]  # of a rank without tokens
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
    try:
        _temporal_kernel[launch.tiles(b * s * heads, TOGETHER),](
            *flash.descriptors(qkv.view(b, t, s * 3 * heads, channels), tile),
            *flash.descriptors(out.view(b, t, s * heads, channels), tile),
            *(norm or (None, None)),
            *(rope or (None, None)),
            t,
            s,
            heads,
            flash.scale(channels),
            rope_first and rope is not None,
            channels,
            *launch.cut(channels),
            tile,
            TOGETHER,
            3 if tile < 64 else 2,  # as of turns, one is compiled wrong
            "ieee" if wide else "tf32",
            num_warps=tile // 16,
            # registers are what limits how many programs run at a time
            maxnreg=168 if qkv.is_cuda and not wide else None,
        )
    except OutOfResources as error:  # many frames or large heads, on GPUs with less shared memory than an H100
        launch.insist("self_attention", qkv, f"{t} frames of {channels} channels are too many for this GPU: {error}")
    return out


@triton.jit(do_not_specialize=["T", "S", "H"])
def _temporal_kernel(
    x_main, x_tail, out_main, out_tail, q_weight, k_weight, cos, sin, T, S, H, scale,
    ROPE_FIRST: tl.constexpr, E: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TILE: tl.constexpr,
    TOGETHER: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Heads of places, one after the other: the tiles of the next come while one is computed.

    The norm's factor of a row changes places with its weight and with turning, so the scores are multiplied by it.
    What is beyond the last sample is not there to be read or written: it reads as zero, and is not written.
    """
    t = tl.arange(0, TILE)
    there = t < T
    dtype: tl.constexpr = x_main.dtype
    turn = None  # all heads turn alike
    turn2 = None
    if cos is not None:
        turn = _turn(cos, sin, t, there, 0, MAIN, E)
        if TAIL:
            turn2 = _turn(cos, sin, t, there, MAIN, TAIL, E)
    first = tl.program_id(0) * TOGETHER
    for i in tl.range(first, first + TOGETHER, num_stages=STAGES):
        place, head = i // H, i % H
        b, s = place // S, place % S
        q, a = s * 3 * H + head, s * H + head
        k, v = q + H, q + 2 * H
        sums = (tl.zeros([TILE, TILE], tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32))
        sums = _scored(sums, x_main, b, q, k, q_weight, k_weight, turn, 0, MAIN, ROPE_FIRST, E, TILE, PRECISION)
        if TAIL:
            sums = _scored(sums, x_tail, b, q, k, q_weight, k_weight, turn2, MAIN, TAIL, ROPE_FIRST, E, TILE, PRECISION)
        scores, q_square, k_square = sums
        factor = tl.full([TILE], scale, tl.float32)
        if q_weight is not None:
            factor *= tl.rsqrt(q_square / E + 1e-6)
            scores *= tl.rsqrt(k_square / E + 1e-6)[None, :]
        scores = tl.where(there[None, :], scores * factor[:, None], float("-inf"))
        weight = tl.exp2(scores - tl.max(scores, 1)[:, None])
        share = 1 / tl.sum(weight, 1)[:, None]
        weight = weight.to(dtype)
        mean = tl.dot(weight, x_main.load([b, 0, v, 0]).reshape(TILE, MAIN), input_precision=PRECISION) * share
        out_main.store([b, 0, a, 0], mean.to(dtype).reshape(1, TILE, 1, MAIN))
        if TAIL:
            mean2 = tl.dot(weight, x_tail.load([b, 0, v, MAIN]).reshape(TILE, TAIL), input_precision=PRECISION) * share
            out_tail.store([b, 0, a, MAIN], mean2.to(dtype).reshape(1, TILE, 1, TAIL))


@triton.jit
def _scored(
    sums, x, b, q, k, q_weight, k_weight, turn, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROPE_FIRST: tl.constexpr,
    E: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What WIDTH channels from FIRST on add to the scores, and to the sums of squares of queries and of keys."""
    scores, q_square, k_square = sums
    queries = x.load([b, 0, q, FIRST]).reshape(TILE, WIDTH).to(tl.float32)
    keys = x.load([b, 0, k, FIRST]).reshape(TILE, WIDTH).to(tl.float32)
    if q_weight is not None:
        q_square += tl.sum(queries * queries, 1)
        k_square += tl.sum(keys * keys, 1)
    queries = _placed(queries, q_weight, turn, FIRST, WIDTH, ROPE_FIRST, E, TILE).to(x.dtype)
    keys = _placed(keys, k_weight, turn, FIRST, WIDTH, ROPE_FIRST, E, TILE).to(x.dtype)
    return tl.dot(queries, keys.T, scores, input_precision=PRECISION), q_square, k_square


@triton.jit
def _placed(
    x, weight, turn, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROPE_FIRST: tl.constexpr, E: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Channels times their weight and turned, or turned first; what is None is left out."""
    if ROPE_FIRST:
        x = _turned(x, turn, WIDTH, TILE)
    if weight is not None:
        at = FIRST + tl.arange(0, WIDTH)
        x *= tl.load(weight + at, at < E, other=0).to(tl.float32)[None, :]
    if turn is not None and not ROPE_FIRST:
        x = _turned(x, turn, WIDTH, TILE)
    return x


@triton.jit
def _turned(x, turn, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """The pairs (2i, 2i + 1) of channels [TILE, WIDTH]."""
    c, s = turn
    even, odd = tl.split(x.reshape(TILE, WIDTH // 2, 2))
    return tl.join(even * c - odd * s, odd * c + even * s).reshape(TILE, WIDTH)


@triton.jit
def _turn(cos, sin, t, there, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    """Cosines and sines [TILE, WIDTH / 2] of WIDTH channels from FIRST on."""
    column = FIRST // 2 + tl.arange(0, WIDTH // 2)[None, :]
    at, mask = t[:, None] * (E // 2) + column, there[:, None] & (column < E // 2)
    return tl.load(cos + at, mask, other=0), tl.load(sin + at, mask, other=0)
