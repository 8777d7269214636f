"""The updates that are still to be added, LayerNorm and modulation, in one pass over the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidit.kernels import launch
from minidit.kernels.add_updates import added, arguments
from minidit.kernels.reference import Update


def why_not(x: Tensor, shift: Tensor, scale: Tensor, *updates: Update) -> str | None:
    """Why the kernel does not take these, None: it does."""
    return launch.why_not([x, shift, scale, *(tensor for update in updates for tensor in update)])


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *updates: Update) -> tuple[Tensor, Tensor]:
    """See reference.norm_modulate; the sum is equal to it bit for bit, the norm is rounded once, at the end."""
    launch.insist("norm_modulate", x, why_not(x, shift, scale, *updates))
    x = x.contiguous()
    b, t, s, d = x.shape
    total, out = torch.empty_like(x) if updates else x, torch.empty_like(x)
    shift, scale = shift.expand(b, t, 1, d), scale.expand(b, t, 1, d)
    rows, block = launch.tile(d)
    _kernel[launch.tiles(s, rows), b * t](
        x,
        *arguments(updates, b, t),
        shift,
        scale,
        total,
        out,
        *shift.stride()[:2],
        *scale.stride()[:2],
        t,
        s,
        d,
        rows,
        block,
        num_warps=max(2, block // 1024),
        enable_fp_fusion=False,  # as in add_updates
    )
    return total, out


@triton.jit
def _kernel(
    x_ptr,
    tensors,
    gates,
    strides,
    shift_ptr,
    scale_ptr,
    total_ptr,
    out_ptr,
    shift_b,
    shift_t,
    scale_b,
    scale_t,
    T,
    S,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    frame = tl.program_id(1).to(tl.int64)  # of all samples
    b, t = frame // T, frame % T
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < S) & (column < D)
    offset = (frame * S + row) * D + column
    x = tl.load(x_ptr + offset, mask, other=0).to(tl.float32)  # [ROWS, BLOCK]
    x = added(x, tensors, gates, strides, b, t, offset, column, mask)
    if len(tensors) > 0:
        tl.store(total_ptr + offset, x, mask)
    shift = tl.load(shift_ptr + b * shift_b + t * shift_t + column, column < D, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + b * scale_b + t * scale_t + column, column < D, other=0).to(tl.float32)
    x = tl.where(mask, x - tl.sum(x, 1, keep_dims=True) / D, 0)
    x = x * tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + 1e-6)
    tl.store(out_ptr + offset, x * (1 + scale) + shift, mask)
