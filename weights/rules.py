"""Rules that rename and reshape the tensors of a checkpoint, one way and back.

A key map is a tuple of rules. It is total: every tensor is read by exactly one rule, and every rule finds its
tensors. It is invertible: every rule has an inverse, bit for bit.

`check` looks at names, shapes and dtypes alone. A converter runs it on meta tensors made from the headers of the files,
then takes one rule at a time: load what it `reads`, `convert`, save what it `writes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...]
SHOWN = 10  # tensors named in an error


class KeyMapError(ValueError):
    """A key map and a set of tensors that do not fit each other."""


@dataclass(frozen=True)
class Rename:
    old: str
    new: str


@dataclass(frozen=True)
class Split:
    """One tensor into equal parts along `dim`."""

    old: str
    new: tuple[str, ...]
    dim: int = 0


@dataclass(frozen=True)
class Fuse:
    """Equal parts into one tensor along `dim`."""

    old: tuple[str, ...]
    new: str
    dim: int = 0


@dataclass(frozen=True)
class Reshape:
    """The same elements, in row-major order, in another shape."""

    old: str
    new: str
    old_shape: Shape
    new_shape: Shape

    def __post_init__(self) -> None:
        if prod(self.old_shape) != prod(self.new_shape):
            raise ValueError(
                f"Reshape needs as many elements after as before, got {self.old!r} {self.old_shape}"
                f" and {self.new!r} {self.new_shape}"
            )


Rule = Rename | Split | Fuse | Reshape


def apply(rules: tuple[Rule, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their new names, views where no data has to move. Raises KeyMapError, see `check`."""
    check(rules, tensors)
    converted: dict[str, Tensor] = {}
    for rule in rules:
        parts = convert(rule, *(tensors[name] for name in reads(rule)))
        converted.update(zip(writes(rule), parts, strict=True))
    return converted


def invert(rules: tuple[Rule, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes `apply`: new names and shapes to old ones. Raises KeyMapError, see `check`."""
    return apply(tuple(inverse(rule) for rule in rules), tensors)


def reads(rule: Rule) -> tuple[str, ...]:
    return (rule.old,) if isinstance(rule.old, str) else rule.old


def writes(rule: Rule) -> tuple[str, ...]:
    return (rule.new,) if isinstance(rule.new, str) else rule.new


def inverse(rule: Rule) -> Rule:
    match rule:
        case Rename(old, new):
            return Rename(new, old)
        case Split(old, new, dim):
            return Fuse(new, old, dim)
        case Fuse(old, new, dim):
            return Split(new, old, dim)
        case Reshape(old, new, old_shape, new_shape):
            return Reshape(new, old, new_shape, old_shape)


def convert(rule: Rule, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What the rule reads, in order -> what it writes, in order. A part of a split is a view and may have strides."""
    match rule:
        case Rename():
            return tensors
        case Split(new=new, dim=dim):
            return tensors[0].chunk(len(new), dim)
        case Fuse(dim=dim):
            return (torch.cat(tensors, dim),)
        case Reshape(new_shape=new_shape):
            return (tensors[0].reshape(new_shape),)


def check(rules: tuple[Rule, ...], tensors: Mapping[str, Tensor]) -> None:
    """Raises KeyMapError, naming the tensors, unless every rule finds tensors that fit and none is left over."""
    read, written = (Counter(name for rule in rules for name in names(rule)) for names in (reads, writes))
    found = [rule for rule in rules if tensors.keys() >= set(reads(rule))]
    misfits = [_misfit(rule, *(tensors[name] for name in reads(rule))) for rule in found]
    problems = [
        _listed("missing", (repr(name) for name in read if name not in tensors)),
        _listed("without a rule", (_shown(name, tensors[name]) for name in tensors if name not in read)),
        _listed("misshapen", (misfit for misfit in misfits if misfit)),
        _listed("read by more than one rule", (repr(name) for name, n in read.items() if n > 1)),
        _listed("written by more than one rule", (repr(name) for name, n in written.items() if n > 1)),
    ]
    if any(problems):
        raise KeyMapError("The key map does not fit the tensors: " + "; ".join(filter(None, problems)))


def _misfit(rule: Rule, *tensors: Tensor) -> str:
    """What is wrong with the tensors a rule found, '' if nothing."""
    came = ", ".join(map(_shown, reads(rule), tensors))
    like = {(tensor.shape, tensor.dtype) for tensor in tensors}  # torch.cat would promote a dtype, for good
    match rule:
        case Split(new=new, dim=dim) if not _divides(len(new), tensors[0].shape, dim):
            return f"{came} expected {len(new)} equal parts along dim {dim}"
        case Fuse(new=new, dim=dim) if len(like) != 1 or not _divides(1, tensors[0].shape, dim):
            return f"{came} expected parts of {new!r} with one shape that has a dim {dim}, and one dtype"
        case Reshape(old_shape=old_shape) if tensors[0].shape != old_shape:
            return f"{came} expected {old_shape}"
    return ""


def _divides(parts: int, shape: Shape, dim: int) -> bool:
    return parts > 0 and -len(shape) <= dim < len(shape) and shape[dim] > 0 and shape[dim] % parts == 0


def _shown(name: str, tensor: Tensor) -> str:
    return f"{name!r} {tuple(tensor.shape)}"


def _listed(what: str, names: Iterable[str]) -> str:
    """'2 missing: a, b', the first ten by name; '' for none."""
    all_names = list(names)
    rest = ["..."] if len(all_names) > SHOWN else []
    return f"{len(all_names)} {what}: {', '.join(all_names[:SHOWN] + rest)}" if all_names else ""
