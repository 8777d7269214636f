"""x + gate * a, for one update or several in a row, in one pass: the residual, computed or reused."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidit.kernels import launch
from minidit.kernels.reference import Update


def why_not(x: Tensor, *updates: Update) -> str | None:
    """Why the kernel does not take these, None: it does."""
    return launch.why_not([x, *(tensor for update in updates for tensor in update)])


def add_updates(x: Tensor, *updates: Update) -> Tensor:
    """See reference.add_updates; equal to it bit for bit."""
    launch.insist("add_updates", x, why_not(x, *updates))
    if not updates:
        return x
    b, t, s, d = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, block = launch.tile(d)
    # no fma: x + gate * a in one rounding is not what a later call adds that has gate * a
    _kernel[launch.tiles(s, rows), b * t](
        x.contiguous(), *arguments(updates, b, t), out, t, s, d, rows, block, num_warps=4, enable_fp_fusion=False
    )
    return out


def arguments(updates: tuple[Update, ...], b: int, t: int) -> tuple[Any, ...]:
    """Updates as a kernel takes them: their tensors, their gates, and how far apart samples and frames of gates are."""
    gates = [None if gate is None else gate.expand(b, t, 1, -1) for _, gate in updates]
    strides = tuple((0, 0) if gate is None else gate.stride()[:2] for gate in gates)
    return tuple(a.contiguous() for a, _ in updates), tuple(gates), strides


@triton.jit
def added(x, tensors, gates, strides, b, t, offset, column, mask):
    """x in float32 + the updates at these offsets, every product and sum rounded to the dtype of the tensors."""
    for i in tl.static_range(len(tensors)):
        update = tl.load(tensors[i] + offset, mask, other=0)
        dtype = update.dtype
        if gates[i] is not None:
            gate = tl.load(gates[i] + b * strides[i][0] + t * strides[i][1] + column, mask, other=0)
            update = (gate.to(tl.float32) * update.to(tl.float32)).to(dtype)
        x = (x + update.to(tl.float32)).to(dtype).to(tl.float32)
    return x


@triton.jit
def _kernel(x_ptr, tensors, gates, strides, out_ptr, T, S, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    frame = tl.program_id(1).to(tl.int64)  # of all samples
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < S) & (column < D)
    offset = (frame * S + row) * D + column
    x = tl.load(x_ptr + offset, mask, other=0).to(tl.float32)
    x = added(x, tensors, gates, strides, frame // T, frame % T, offset, column, mask)
    tl.store(out_ptr + offset, x, mask)
