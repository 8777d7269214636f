"""Attention in tiles: for a tile of queries, one pass over the keys with a running softmax (FlashAttention, 2022).

Tensors come as descriptors (samples, tokens, heads, channels), so that packed projections are read where they lie, and
what is outside of a tensor reads as zero. A head is cut into two tiles, see launch.cut. Within: M queries and N keys of
a tile, scores in units of log 2.
"""

from __future__ import annotations

from math import e, log2

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


def descriptors(tensor: Tensor, tokens: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Of the main and the tail tiles of a tensor (samples, tokens, heads, channels), for so many tokens at once."""
    main, tail = launch.cut(tensor.shape[-1])
    shape, strides = list(tensor.shape), list(tensor.stride())
    blocks = ([1, tokens, 1, width] for width in (main, tail))
    first, second = (TensorDescriptor(tensor, shape, strides, block) if block[-1] else None for block in blocks)
    assert first is not None
    return first, second


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
    heads: tuple[int, int, int],
    out: Tensor,
    lengths: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Write softmax(q k / sqrt(E)) v into out.

    q, out: (N, M, ..., E); k, v: (N, L, ..., E) of which heads, (first of q, of k, of v), are used, as many as out has;
    lengths: (N,) keys that count, None: all; weights: (E,) for RMS-normed queries, which are normed here while keys
    already are, None: neither is.
    """
    n, m, count, channels = out.shape
    main, tail = launch.cut(channels)
    wide = out.dtype == torch.float32
    tile_m, tile_n = (64, 32) if wide else (128, 64)
    tile_m = min(tile_m, max(16, triton.next_power_of_2(m)))
    tile_n = min(tile_n, max(16, triton.next_power_of_2(k.shape[1])))
    _kernel[triton.cdiv(m, tile_m), count, n](
        *descriptors(q, tile_m),
        *descriptors(k, tile_n),
        *descriptors(v, tile_n),
        *descriptors(out, tile_m),
        lengths,
        weights,
        k.shape[1],
        *heads,
        log2(e) / channels**0.5,
        HIGHEST_BOUND if out.dtype != torch.float16 else -1.0,
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
    weights,
    L,
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
):
    start, head, sample = tl.program_id(0) * M, tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = out_main.dtype
    length = L
    if lengths is not None:
        length = tl.load(lengths + sample).to(tl.int32)
    keys, values = k_head + head, v_head + head
    q = q_main.load([sample, start, q_head + head, 0]).reshape(M, MAIN)
    q2 = q
    if TAIL:
        q2 = q_tail.load([sample, start, q_head + head, MAIN]).reshape(M, TAIL)
    bounded = False
    bound = tl.zeros([M], tl.float32)
    if weights is not None:
        wide, wide2 = q.to(tl.float32), q2.to(tl.float32)
        square = tl.sum(wide * wide, 1)
        if TAIL:
            square += tl.sum(wide2 * wide2, 1)
        factor = tl.rsqrt(square / E + 1e-6)[:, None]
        at, at2 = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL if TAIL else MAIN)
        wide *= factor * tl.load(weights + at, at < E, other=0).to(tl.float32)[None, :]
        wide2 *= factor * tl.load(weights + at2, at2 < E, other=0).to(tl.float32)[None, :]
        q, q2 = wide.to(dtype), wide2.to(dtype)
        square = tl.sum(wide * wide, 1)
        if TAIL:
            square += tl.sum(wide2 * wide2, 1)
        # |k| is at most sqrt(E), and roundings may add a little
        bound = tl.sqrt(square * E) * (scale * 1.02)
        bounded = tl.max(bound) <= HIGHEST
    if bounded:
        acc, acc2, total = _pass(
            q, q2, k_main, k_tail, v_main, v_tail, sample, keys, values, length, scale, bound,
            False, MAIN, TAIL, M, N, PRECISION, dtype,
        )  # fmt: skip
    else:
        acc, acc2, total = _pass(
            q, q2, k_main, k_tail, v_main, v_tail, sample, keys, values, length, scale, bound - float("inf"),
            True, MAIN, TAIL, M, N, PRECISION, dtype,
        )  # fmt: skip
    share = 1 / tl.where(total == 0, 1, total)[:, None]  # a caption of no tokens adds nothing
    out_main.store([sample, start, head, 0], (acc * share).to(dtype).reshape(1, M, 1, MAIN))
    if TAIL:
        out_tail.store([sample, start, head, MAIN], (acc2 * share).to(dtype).reshape(1, M, 1, TAIL))


@triton.jit
def _pass(
    q, q2, k_main, k_tail, v_main, v_tail, sample, keys, values, length, scale, most,
    SEEK: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Sums over all keys: of the values by their weights (main and tail), and of the weights."""
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, MAIN], tl.float32)
    acc2 = tl.zeros([M, TAIL if TAIL else 16], tl.float32)
    whole = length // N * N
    for start in range(0, whole, N):
        acc, acc2, total, most = _step(
            q, q2, k_main, k_tail, v_main, v_tail, sample, keys, values, start, length, scale, acc, acc2, total, most,
            False, SEEK, MAIN, TAIL, M, N, PRECISION, dtype,
        )  # fmt: skip
    if whole < length:  # a ragged last tile, which alone needs a mask
        acc, acc2, total, most = _step(
            q, q2, k_main, k_tail, v_main, v_tail, sample, keys, values, whole, length, scale, acc, acc2, total, most,
            True, SEEK, MAIN, TAIL, M, N, PRECISION, dtype,
        )  # fmt: skip
    return acc, acc2, total


@triton.jit
def _step(
    q, q2, k_main, k_tail, v_main, v_tail, sample, keys, values, start, length, scale, acc, acc2, total, most,
    RAGGED: tl.constexpr, SEEK: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """One tile of keys. most: (M,) what each row of scores is shifted by; SEEK: its largest so far, else its bound."""
    k = k_main.load([sample, start, keys, 0]).reshape(N, MAIN)
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    if TAIL:
        k2 = k_tail.load([sample, start, keys, MAIN]).reshape(N, TAIL)
        scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
    if RAGGED:
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
