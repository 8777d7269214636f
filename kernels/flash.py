"""Attention in tiles: for a tile of queries, one pass over the keys with a running softmax (FlashAttention, 2022).

Tensors come as descriptors (samples, tokens, heads, channels), so that packed projections are read where they lie, and
what is outside of a tensor reads as zero. A head is cut into two tiles, see launch.cut. Within: M queries and N keys of
a tile, scores in units of log 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minidit.kernels import launch

# Softmax does not change if all scores of a row are shifted, and is mostly shifted by the largest, lest exp overflows.
# Scores that are known to be within these bounds, in units of log 2, need no shift, and so no search for the largest:
# exp and its sum over all keys are normal numbers then. The scores of normed queries and keys are known to be.
BOUNDS = {torch.float32: 100.0, torch.bfloat16: 100.0, torch.float16: 13.0}


def scale(channels: int) -> float:
    """What makes scores of dot products, in units of log 2."""
    return math.log2(math.e) / channels**0.5


def descriptors(tensor: Tensor, tokens: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Of the main and the tail tiles of a tensor (samples, tokens, heads, channels), for so many tokens at once."""
    shape, strides, (main, tail) = list(tensor.shape), list(tensor.stride()), launch.cut(tensor.shape[-1])
    first = TensorDescriptor(tensor, shape, strides, [1, tokens, 1, main])
    return first, TensorDescriptor(tensor, shape, strides, [1, tokens, 1, tail]) if tail else None


def why_not(tensor: Tensor, channels: int) -> str | None:
    """Why heads of so many channels of such a tensor cannot be read in tiles, None: they can."""
    if channels * tensor.itemsize % 16:
        return f"heads of {channels} channels of {tensor.itemsize} bytes are no multiples of 16 bytes"
    if channels > 128:
        return f"heads have {channels} channels, more than 128"
    if tensor.data_ptr() % 16:
        return "a tensor begins at no multiple of 16 bytes"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: tuple[int, int, int],
    out: Tensor,
    *,
    lengths: Tensor | None = None,
    normed: bool = False,
    bound: float | None = None,
) -> None:
    """Write softmax(q k / sqrt(E)) v into out.

    out: (N, M, H, E); q: (N, M, ..., E), k, v: (N, L, ..., E), of whose heads H are used, from the first (of q, of k,
    of v); lengths: (N,) keys that count, None: all; normed: queries count as if over their root mean square; bound: of
    the size of a score, None: unknown.
    """
    n, m, heads, channels = out.shape
    wide = out.dtype == torch.float32
    main, tail = launch.cut(channels)
    large = 0 < tail <= 32 and not wide
    # tiles of as many keys as channels, 64, come out wrong (Triton 3.6), see README.md
    tile_m, tile_n = 128 if large else 64, 32 if wide or channels == 64 else 64
    _kernel[launch.tiles(m, tile_m), heads, n](
        *descriptors(q, tile_m),
        *descriptors(k, tile_n),
        *descriptors(v, tile_n),
        *descriptors(out, tile_m),
        lengths,
        k.shape[1],
        *first,
        scale(channels),
        normed,
        bound is None or bound * math.log2(math.e) > BOUNDS[out.dtype],
        channels,
        main,
        tail,
        tile_m,
        tile_n,
        "ieee" if wide else "tf32",
        num_warps=4,
        num_stages=2 if wide else 3,
    )


@triton.jit
def _kernel(
    q_main,
    q_tail,
    k_main,
    k_tail,
    v_main,
    v_tail,
    out_main,
    out_tail,
    lengths,
    L,
    q_head,
    k_head,
    v_head,
    scale,
    NORMED: tl.constexpr,
    SEEK: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """SEEK: the largest score of a row is sought, and all are shifted by it."""
    first, head, sample = tl.program_id(0) * M, tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = out_main.dtype
    keys, values = k_head + head, v_head + head
    length = L
    if lengths is not None:
        length = tl.load(lengths + sample).to(tl.int32)
    q = q_main.load([sample, first, q_head + head, 0]).reshape(M, MAIN)
    q2 = q
    if TAIL:
        q2 = q_tail.load([sample, first, q_head + head, MAIN]).reshape(M, TAIL)
    factor = tl.full([M], scale, tl.float32)
    if NORMED:
        # by the scores and not by the queries, which so stay in the registers that they are multiplied from
        square = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)
        if TAIL:
            square += tl.sum(q2.to(tl.float32) * q2.to(tl.float32), 1)
        factor *= tl.rsqrt(square / E + 1e-6)

    most = tl.full([M], float("-inf"), tl.float32)  # the largest score of each row so far
    total = tl.zeros([M, 4], tl.float32)  # a row is in four threads: they add up what they have only at the end
    acc = tl.zeros([M, MAIN], tl.float32)
    acc2 = tl.zeros([M, TAIL if TAIL else 16], tl.float32)
    # both tiles of a head are asked for before the first is multiplied: two products in a row need not be waited for
    for start in range(0, length, N):
        k = k_main.load([sample, start, keys, 0]).reshape(N, MAIN)
        if TAIL:
            k2 = k_tail.load([sample, start, keys, MAIN]).reshape(N, TAIL)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if TAIL:
            scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
        if start + N > length:
            scores = tl.where((start + tl.arange(0, N))[None, :] < length, scores, float("-inf"))
        if SEEK:
            most_now = tl.maximum(most, tl.max(scores, 1) * factor)
            shrink = tl.exp2(most - most_now)[:, None]
            total *= shrink
            acc *= shrink
            acc2 *= shrink
            most = most_now
            weight = tl.exp2(scores * factor[:, None] - most[:, None])
        else:
            weight = tl.exp2(scores * factor[:, None])
        total += tl.sum(tl.sum(weight.reshape(M, N // 8, 4, 2), 3), 1)
        weight = weight.to(dtype)
        v = v_main.load([sample, start, values, 0]).reshape(N, MAIN)
        if TAIL:
            v2 = v_tail.load([sample, start, values, MAIN]).reshape(N, TAIL)
        acc = tl.dot(weight, v, acc, input_precision=PRECISION)
        if TAIL:
            acc2 = tl.dot(weight, v2, acc2, input_precision=PRECISION)

    total = tl.sum(total, 1)
    share = 1 / tl.where(total == 0, 1, total)[:, None]  # a caption of no tokens adds nothing
    out_main.store([sample, first, head, 0], (acc * share).to(dtype).reshape(1, M, 1, MAIN))
    if TAIL:
        out_tail.store([sample, first, head, MAIN], (acc2 * share).to(dtype).reshape(1, M, 1, TAIL))
