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

# A row of scores of normed queries and keys is within +- its bound, |q| |k|. Softmax does not change if all of a row is
# shifted, so a bound serves as well as the largest score, and need not be looked for: exp(score - bound) is at least
# exp(-2 bound). That is no subnormal number of float32 or bfloat16 up to this bound, in units of log 2.
HIGHEST_BOUND = 60.0


def scale(channels: int) -> float:
    """What makes scores of dot products, in units of log 2."""
    return math.log2(math.e) / channels**0.5


def keys_of_a_tile(dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float32 else 64


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
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: tuple[int, int, int],
    out: Tensor,
    *,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Write softmax(q k / sqrt(E)) v into out.

    out: (N, M, H, E); q: (N, M, ..., E), k, v: (N, L, ..., E), of whose heads H are used, from the first (of q, of k,
    of v); lengths: (N,) keys that count, None: all; weights: (E,) by which queries are RMS-normed here; then all keys
    count and are normed already. If k has more keys than v, those are copies of the last one up to a whole tile: then
    no tile needs a mask, and what the copies add to the sum of the weights is known.
    """
    n, m, heads, channels = out.shape
    wide = out.dtype == torch.float32
    tile_m, tile_n = 64 if wide or channels > 96 else 128, keys_of_a_tile(out.dtype)
    _kernel[triton.cdiv(m, tile_m), heads, n](
        *descriptors(q, tile_m),
        *descriptors(k, tile_n),
        *descriptors(v, tile_n),
        *descriptors(out, tile_m),
        lengths,
        weights,
        None if weights is None else k[:, v.shape[1] - 1],
        k.stride(0),
        k.shape[1],
        k.shape[1] - v.shape[1],
        *first,
        scale(channels),
        HIGHEST_BOUND if out.dtype != torch.float16 else -1.0,  # in float16 the smallest weights would be subnormal
        channels,
        *launch.cut(channels),
        tile_m,
        tile_n,
        "ieee" if wide else "tf32",
        weights is None or k.shape[1] % tile_n > 0,
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
    weights,
    last,
    last_stride,
    L,
    copies,
    q_head,
    k_head,
    v_head,
    scale,
    HIGHEST: tl.constexpr,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    start, head, sample = tl.program_id(0) * M, tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = out_main.dtype
    keys, values = k_head + head, v_head + head
    q = q_main.load([sample, start, q_head + head, 0]).reshape(M, MAIN)
    q2 = q
    if TAIL:
        q2 = q_tail.load([sample, start, q_head + head, MAIN]).reshape(M, TAIL)
    if weights is None:
        length = L
        if lengths is not None:
            length = tl.load(lengths + sample).to(tl.int32)
        nothing = tl.full([M], float("-inf"), tl.float32)
        acc, acc2, total, _ = _pass(
            q, q2, k_main, k_tail, v_main, v_tail, sample, keys, values, length, scale, nothing,
            True, MASKED, MAIN, TAIL, M, N, PRECISION, dtype,
        )  # fmt: skip
        total = tl.where(total == 0, 1, total)  # a caption of no tokens adds nothing
    else:
        at, at2 = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL if TAIL else MAIN)
        wide, wide2 = q.to(tl.float32), q2.to(tl.float32)
        factor = tl.rsqrt(_square(wide, wide2, TAIL) / E + 1e-6)[:, None]
        wide *= factor * tl.load(weights + at, at < E, other=0).to(tl.float32)[None, :]
        wide2 *= factor * tl.load(weights + at2, at2 < E, other=0).to(tl.float32)[None, :]
        q, q2 = wide.to(dtype), wide2.to(dtype)
        # |k| is at most sqrt(E), and roundings may add a little
        bound = tl.sqrt(_square(wide, wide2, TAIL) * E) * (scale * 1.02)
        row = last + sample.to(tl.int64) * last_stride + keys * E
        extra = tl.sum(q.to(tl.float32) * tl.load(row + at, at < E, other=0).to(tl.float32)[None, :], 1)
        if TAIL:
            extra += tl.sum(q2.to(tl.float32) * tl.load(row + at2, at2 < E, other=0).to(tl.float32)[None, :], 1)
        if tl.max(bound) <= HIGHEST:
            acc, acc2, total, most = _pass(
                q, q2, k_main, k_tail, v_main, v_tail, sample, keys, values, L, scale, bound,
                False, MASKED, MAIN, TAIL, M, N, PRECISION, dtype,
            )  # fmt: skip
        else:
            acc, acc2, total, most = _pass(
                q, q2, k_main, k_tail, v_main, v_tail, sample, keys, values, L, scale, bound - float("inf"),
                True, MASKED, MAIN, TAIL, M, N, PRECISION, dtype,
            )  # fmt: skip
        total -= copies * tl.exp2(extra * scale - most)  # of their values nothing was added: those read as zero
    out_main.store([sample, start, head, 0], (acc / total[:, None]).to(dtype).reshape(1, M, 1, MAIN))
    if TAIL:
        out_tail.store([sample, start, head, MAIN], (acc2 / total[:, None]).to(dtype).reshape(1, M, 1, TAIL))


@triton.jit
def _square(x, x2, TAIL: tl.constexpr):
    square = tl.sum(x * x, 1)
    if TAIL:
        square += tl.sum(x2 * x2, 1)
    return square


@triton.jit
def _pass(
    q, q2, k_main, k_tail, v_main, v_tail, sample, keys, values, length, scale, most,
    SEEK: tl.constexpr, MASKED: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Sums over all keys: of the values by their weights (main and tail), and of the weights; and `most`.

    most: (M,) what each row of scores is shifted by; SEEK: its largest so far, else its bound. MASKED: the last tile
    has fewer than N keys. A descriptor is not read in a branch: in Triton 3.6 that reads wrong numbers.
    """
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, MAIN], tl.float32)
    acc2 = tl.zeros([M, TAIL if TAIL else 16], tl.float32)
    for start in range(0, length, N):
        k = k_main.load([sample, start, keys, 0]).reshape(N, MAIN)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if TAIL:
            k2 = k_tail.load([sample, start, keys, MAIN]).reshape(N, TAIL)
            scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
        if MASKED:
            scores = tl.where((start + tl.arange(0, N))[None, :] < length, scores, float("-inf"))
        if SEEK:
            most_now = tl.maximum(most, tl.max(scores, 1) * scale)
            shrink = tl.exp2(most - most_now)
            total *= shrink
            acc *= shrink[:, None]
            acc2 *= shrink[:, None]
            most = most_now
        weight = tl.exp2(scores * scale - most[:, None])
        total += tl.sum(weight, 1)
        weight = weight.to(dtype)
        v = v_main.load([sample, start, values, 0]).reshape(N, MAIN)
        acc = tl.dot(weight, v, acc, input_precision=PRECISION)
        if TAIL:
            v2 = v_tail.load([sample, start, values, MAIN]).reshape(N, TAIL)
            acc2 = tl.dot(weight, v2, acc2, input_precision=PRECISION)
    return acc, acc2, total, most
