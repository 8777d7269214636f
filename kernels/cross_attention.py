"""Attention of every token to the tokens of its caption that are there: no mask tensor, no work for those that are not.

A caption of one tile of keys stays in shared memory while a program goes over tiles of queries; for a longer one, each
tile of queries goes over tiles of keys: `flash`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidit.kernels import flash, launch

SHORT = 128  # tokens of a caption that is one tile


def why_not(q: Tensor, kv: Tensor, lengths: Tensor | None) -> str | None:
    """Why the kernel does not take these, None: it does."""
    return launch.why_not([q, kv]) or flash.why_not(q, kv.shape[-1]) or flash.why_not(kv, kv.shape[-1])


def cross_attention(q: Tensor, kv: Tensor, lengths: Tensor | None) -> Tensor:
    """See reference.cross_attention."""
    launch.insist("cross_attention", q, why_not(q, kv, lengths))
    if not q.numel():
        return q  # of a rank without tokens
    b, t, s, d = q.shape
    h, e = kv.shape[3:]
    queries = q.contiguous().view(b, t * s, h, e)
    packed = kv.contiguous().flatten(2, 3)  # (B, L, 2 H, E)
    out = torch.empty_like(queries)
    if packed.shape[1] > SHORT or q.dtype == torch.float32:
        flash.attend(queries, packed, packed, (0, 0, h), out, lengths=lengths)
    else:
        _short(queries, packed, lengths, out)
    return out.view(b, t, s, d)


def _short(q: Tensor, kv: Tensor, lengths: Tensor | None, out: Tensor) -> None:
    b, count, h, e = q.shape
    keys = max(16, triton.next_power_of_2(kv.shape[1]))
    tile, tiles = 64, 8  # queries at once, and how often
    _kernel[launch.tiles(count, tile * tiles), h, b](
        *flash.descriptors(q, tile),
        *flash.descriptors(kv, keys),
        *flash.descriptors(out, tile),
        lengths,
        kv.shape[1],
        launch.tiles(count, tile),
        flash.scale(e),
        h,
        *launch.cut(e),
        tile,
        keys,
        tiles,
        num_warps=4,
    )


@triton.jit
def _kernel(
    q_main,
    q_tail,
    kv_main,
    kv_tail,
    out_main,
    out_tail,
    lengths,
    L,
    count,
    scale,
    H: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TILES: tl.constexpr,
):
    first, head, sample = tl.program_id(0) * TILES, tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = out_main.dtype
    length = L
    if lengths is not None:
        length = tl.load(lengths + sample).to(tl.int32)
    there = (tl.arange(0, N) < length)[None, :]
    k = kv_main.load([sample, 0, head, 0]).reshape(N, MAIN)
    v = kv_main.load([sample, 0, H + head, 0]).reshape(N, MAIN)
    if TAIL:
        k2 = kv_tail.load([sample, 0, head, MAIN]).reshape(N, TAIL)
        v2 = kv_tail.load([sample, 0, H + head, MAIN]).reshape(N, TAIL)
    for tile in tl.range(first, tl.minimum(first + TILES, count), num_stages=2):
        start = tile * M
        scores = tl.dot(q_main.load([sample, start, head, 0]).reshape(M, MAIN), k.T)
        if TAIL:
            scores = tl.dot(q_tail.load([sample, start, head, MAIN]).reshape(M, TAIL), k2.T, scores)
        scores = tl.where(there, scores * scale, float("-inf"))
        most = tl.max(scores, 1)
        # a caption of no tokens adds nothing
        weight = tl.where(there, tl.exp2(scores - most[:, None]), 0)
        total = tl.sum(weight, 1)
        share = 1 / tl.where(total == 0, 1, total)[:, None]
        weight = weight.to(dtype)
        out_main.store([sample, start, head, 0], (tl.dot(weight, v) * share).to(dtype).reshape(1, M, 1, MAIN))
        if TAIL:
            out_tail.store([sample, start, head, MAIN], (tl.dot(weight, v2) * share).to(dtype).reshape(1, M, 1, TAIL))
