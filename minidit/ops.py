"""The one place that chooses how an op is computed: by its Triton kernel, or in plain torch, its meaning.

Each op has one name and signature in kernels/reference.py and in kernels/<op>.py. Triton takes tensors on a GPU that
need no gradient, where the kernel supports them; all else is plain torch. `using` asks for one of the two, or only for
the shapes of what would be made.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from minidit.kernels import reference, shapes
from minidit.kernels.reference import Axis, Rope, Update

Impl = Literal["auto", "torch", "triton", "shapes"]
_asked: ContextVar[Impl] = ContextVar("minidit.ops.using", default="auto")


@contextmanager
def using(impl: Impl) -> Iterator[None]:
    """Within it, ops are computed so. "triton" raises a RuntimeError that says why, where a kernel cannot be had.

    "shapes": by nothing; tensors are made as they would be on a GPU, by kernels where those are taken.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"an op is computed by {', '.join(get_args(Impl))}, not {impl!r}")
    before = _asked.set(impl)
    try:
        yield
    finally:
        _asked.reset(before)


def add_updates(x: Tensor, *updates: Update) -> Tensor:
    """See reference.add_updates."""
    return _computed("add_updates", x, *updates)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *updates: Update) -> tuple[Tensor, Tensor]:
    """See reference.norm_modulate."""
    return _computed("norm_modulate", x, shift, scale, *updates)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See reference.linear_gelu. Its kernel is cuBLASLt's: asking for Triton's does not insist on it."""
    return _computed("linear_gelu", x, weight, bias, insist=False)


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
    return _computed("self_attention", qkv, heads, norm, rope, axis, rope_first=rope_first, bias=bias, bound=bound)


def cross_attention(q: Tensor, kv: Tensor, lengths: Tensor | None) -> Tensor:
    """See reference.cross_attention."""
    return _computed("cross_attention", q, kv, lengths)


def _computed(op: str, *args: Any, insist: bool = True, **options: Any) -> Any:
    asked, meaning = _asked.get(), getattr(reference, op)
    # the compiler fuses the meaning by itself
    if asked == "torch" or torch.compiler.is_compiling() or (asked == "auto" and args[0].device.type != "cuda"):
        return meaning(*args, **options)
    if asked == "shapes":
        refused = importlib.import_module(f"minidit.kernels.{op}").why_not(*args, **options)
        return (meaning if refused else getattr(shapes, op))(*args, **options)
    try:
        return _kernel(op)(*args, **options)
    except reference.Refused:
        if asked == "triton" and insist:
            raise
        return meaning(*args, **options)


@cache
def _kernel(op: str) -> Callable[..., Any]:
    """An op's kernel, imported when it is first needed."""
    if importlib.util.find_spec("triton") is None:
        return partial(_missing, op)
    kernel: Callable[..., Any] = getattr(importlib.import_module(f"minidit.kernels.{op}"), op)
    return kernel


def _missing(op: str, *args: Any, **options: Any) -> Any:
    raise reference.Refused(f"{op} cannot be computed by its Triton kernel: triton is not installed")
