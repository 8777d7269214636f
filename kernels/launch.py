"""What all kernels have in common: which tensors they take, and how a head is cut into powers of two."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
import triton
from torch import Tensor

from minidit.kernels.reference import Refused

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 16384  # channels of a tensor: a program may hold whole tokens


def why_not(tensors: Iterable[Tensor | None]) -> str | None:
    """Why no kernel takes these tensors together, None: one may, on a GPU. All of them have to be of one dtype."""
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return "a gradient is needed, which kernels do not compute"
    devices, dtypes = {tensor.device for tensor in given}, {tensor.dtype for tensor in given}
    if len(devices) > 1:
        return f"the tensors are on {' and '.join(sorted(map(str, devices)))}"
    if not dtypes <= set(DTYPES) or len(dtypes) > 1:
        return f"the tensors are {' and '.join(sorted(map(str, dtypes)))}, not all of float32, float16 or bfloat16"
    if any(tensor.shape[-1] > WIDEST for tensor in given):
        return f"tokens have more than {WIDEST} channels"
    return None


def insist(op: str, x: Tensor, reason: str | None) -> None:
    """Raises Refused for a kernel that is called with what it does not take, or where there is none."""
    if reason is None and x.device.type != "cuda" and not triton.knobs.runtime.interpret:
        reason = f"the tensors are on {x.device}, not on a GPU"
    if reason is not None:
        raise Refused(f"{op} cannot be computed by its Triton kernel: {reason}")


def tiles(size: int, tile: int) -> int:
    """How many tiles hold so many. Triton's own cdiv is slow outside of a kernel, and asked for at every launch."""
    return -(-size // tile)


@cache
def cut(channels: int) -> tuple[int, int]:
    """(main, tail): widths of the two tiles of a head, powers of two of at least 16 that Triton can multiply.

    72 = 64 + 8 becomes (64, 16), where one tile would have 128. A tail of 0: there is none.
    """
    main = max(16, triton.next_power_of_2(channels + 1) // 2)
    rest = channels - main
    return main, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


@cache
def tile(channels: int) -> tuple[int, int]:
    """(rows, block): tokens of a program that goes over all their channels, and the power of two that holds those."""
    block = triton.next_power_of_2(channels)
    return max(1, 1024 // block), block
