"""Rules that rename and reshape the tensors of a checkpoint, one way and back.

A key map is a tuple of rules. It is total: every tensor is read by exactly one rule, and every rule finds its
tensors. It is invertible: every rule has an inverse, bit for bit.

A tensor that the model has no use for is dropped by a rule, too: it moves aside, under the prefix DROPPED, from where
the inverse takes it back. It is the only kind of tensor that may be absent.

`check` looks at names, shapes and dtypes alone, so meta tensors made from the headers of files will do. `Applied` reads
no more tensors at a time than one rule needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...]
SHOWN = 10  # tensors named in an error
DROPPED = "dropped/"  # before the name of a tensor that was moved aside


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


@dataclass(frozen=True)
class Drop:
    """A tensor, if it is there, that the model has no use for."""

    old: str
    why: str

    @property
    def new(self) -> str:
        return DROPPED + self.old


@dataclass(frozen=True)
class Restore:
    """The inverse of Drop."""

    new: str
    why: str

    @property
    def old(self) -> str:
        return DROPPED + self.new


Rule = Rename | Split | Fuse | Reshape | Drop | Restore


def linears(names: Mapping[str, str], old: str = "", new: str = "") -> tuple[Rule, ...]:
    """Rules for linear layers, each a weight and a bias. names: upstream's -> ours, after the prefixes old and new."""
    return tuple(
        Rename(f"{old}{a}.{kind}", f"{new}{b}.{kind}") for a, b in names.items() for kind in ("weight", "bias")
    )


def patch(dim: int, channels: int, kernel: tuple[int, ...], old: str) -> tuple[Rule, ...]:
    """A convolution with kernel = stride = patch is a linear layer over a patch in (C, T, H, W) order."""
    conv, linear = (dim, channels, *kernel), (dim, channels * prod(kernel))
    return Reshape(f"{old}.weight", "patch.weight", conv, linear), Rename(f"{old}.bias", "patch.bias")


class Applied(Mapping[str, Tensor]):
    """What `apply` gives, each tensor made when it is looked up. Raises KeyMapError, see `check`."""

    def __init__(self, rules: tuple[Rule, ...], tensors: Mapping[str, Tensor]) -> None:
        check(rules, tensors)
        self.tensors = tensors
        self.made = {name: (rule, i) for rule in present(rules, tensors) for i, name in enumerate(writes(rule))}

    def __getitem__(self, name: str) -> Tensor:
        rule, part = self.made[name]
        return convert(rule, *(self.tensors[old] for old in reads(rule)))[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


def apply(rules: tuple[Rule, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their new names, views where no data has to move. Raises KeyMapError, see `check`."""
    return dict(Applied(rules, tensors))


def invert(rules: tuple[Rule, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes `apply`: new names and shapes to old ones. Raises KeyMapError, see `check`."""
    return apply(tuple(inverse(rule) for rule in rules), tensors)


def present(rules: tuple[Rule, ...], tensors: Mapping[str, Tensor]) -> tuple[Rule, ...]:
    """The rules without those for dropped tensors that are not there."""
    return tuple(rule for rule in rules if not isinstance(rule, Drop | Restore) or rule.old in tensors)


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
        case Drop(old, why):
            return Restore(old, why)
        case Restore(new, why):
            return Drop(new, why)


def convert(rule: Rule, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What the rule reads, in order -> what it writes, in order. A part of a split is a view and may have strides."""
    match rule:
        case Rename() | Drop() | Restore():
            return tensors
        case Split(new=new, dim=dim):
            return tensors[0].chunk(len(new), dim)
        case Fuse(dim=dim):
            return (torch.cat(tensors, dim),)
        case Reshape(new_shape=new_shape):
            return (tensors[0].reshape(new_shape),)


def check(rules: tuple[Rule, ...], tensors: Mapping[str, Tensor]) -> None:
    """Raises KeyMapError, naming the tensors, unless every rule finds tensors that fit and none is left over."""
    rules = present(rules, tensors)
    read, written = (Counter(name for rule in rules for name in names(rule)) for names in (reads, writes))
    found = [rule for rule in rules if tensors.keys() >= set(reads(rule))]
    misfits = [_misfit(rule, *(tensors[name] for name in reads(rule))) for rule in found]
    problems = [
        listed("missing", (repr(name) for name in read if name not in tensors)),
        listed("without a rule", (shown(name, tensors[name]) for name in tensors if name not in read)),
        listed("misshapen", (misfit for misfit in misfits if misfit)),
        listed("read by more than one rule", (repr(name) for name, n in read.items() if n > 1)),
        listed("written by more than one rule", (repr(name) for name, n in written.items() if n > 1)),
    ]
    if any(problems):
        raise KeyMapError("The key map does not fit the tensors: " + "; ".join(filter(None, problems)))


def _misfit(rule: Rule, *tensors: Tensor) -> str:
    """What is wrong with the tensors a rule found, '' if nothing."""
    came = ", ".join(map(shown, reads(rule), tensors))
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


def shown(name: str, tensor: Tensor) -> str:
    return f"{name!r} {tuple(tensor.shape)}"


def listed(what: str, names: Iterable[str]) -> str:
    """'2 missing: a, b', the first ten by name; '' for none."""
    all_names = list(names)
    rest = ["..."] if len(all_names) > SHOWN else []
    return f"{len(all_names)} {what}: {', '.join(all_names[:SHOWN] + rest)}" if all_names else ""
