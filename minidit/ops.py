"""The one place that chooses how an op is computed: by its Triton kernel, or in plain torch, its meaning.

Each op has one name and signature in kernels/reference.py and in kernels/<op>.py. Triton takes tensors on a GPU that
need no gradient, where the kernel supports them; all else is plain torch. `using` asks for one of the two.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from minidit.kernels import reference
from minidit.kernels.reference import Axis, Rope, Update

Impl = Literal["auto", "torch", "triton"]
_asked: ContextVar[Impl] = ContextVar("minidit.ops.using", default="auto")


@contextmanager
def using(impl: Impl) -> Iterator[None]:
    """Within it, ops are computed so. "triton" raises a RuntimeError that says why, where a kernel cannot be had."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"an op is computed by auto, torch or triton, not {impl!r}")
    before = _asked.set(impl)
    try:
        yield
    finally:
        _asked.reset(before)


def add_updates(x: Tensor, *updates: Update) -> Tensor:
    """See reference.add_updates."""
    return _chosen("add_updates", x, *updates)(x, *updates)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *updates: Update) -> tuple[Tensor, Tensor]:
    """See reference.norm_modulate."""
    return _chosen("norm_modulate", x, shift, scale, *updates)(x, shift, scale, *updates)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See reference.linear_gelu. Its kernel is cuBLASLt's: asking for Triton's does not insist on it."""
    return _chosen("linear_gelu", x, weight, bias, insist=False)(x, weight, bias)


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
    """See reference.self_attention."""
    f = _chosen("self_attention", qkv, heads, norm, rope, axis, bias=bias)
    return f(qkv, heads, norm, rope, axis, rope_first=rope_first, bias=bias, bound=bound)


def cross_attention(q: Tensor, kv: Tensor, lengths: Tensor | None) -> Tensor:
    """See reference.cross_attention."""
    return _chosen("cross_attention", q, kv, lengths)(q, kv, lengths)


def _chosen(op: str, *args: Any, insist: bool = True, **options: Any) -> Any:
    asked = _asked.get()
    # the compiler fuses the meaning by itself
    if asked == "torch" or torch.compiler.is_compiling() or (asked == "auto" and args[0].device.type != "cuda"):
        return getattr(reference, op)
    kernel = _kernel(op)
    why_not = "triton is not installed" if kernel is None else kernel.why_not(*args, **options)
    if why_not is None:
        return getattr(kernel, op)
    if asked == "triton" and insist:
        raise RuntimeError(f"{op} cannot be computed by its Triton kernel: {why_not}")
    return getattr(reference, op)


@cache
def _kernel(op: str) -> Any:
    """The module of an op's kernel, imported when it is first needed, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"minidit.kernels.{op}")
