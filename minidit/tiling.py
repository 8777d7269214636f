"""What is too large to be decoded at once, in tiles that overlap: rows, columns and frames by one rule."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Places of latents, along one axis, that are decoded together, and how many of them two neighbours share."""

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= 2 * self.overlap <= self.size:
            raise ValueError(
                f"Tile.size must be at least 1 and twice Tile.overlap, got size={self.size}, overlap={self.overlap}"
            )


def windows(length: int, tile: Tile) -> list[tuple[int, int]]:
    """(start, stop) of each tile: as few as can be, all of one size, the smallest that so many can have."""
    count = max(1, ceil((length - tile.overlap) / (tile.size - tile.overlap)))
    size = ceil((length + (count - 1) * tile.overlap) / count)
    starts = [i * (length - size) // max(1, count - 1) for i in range(count)]
    return [(start, start + size) for start in starts]


def tiled(f: Map, x: Tensor, dim: int, tile: Tile, *, scale: int, short: int = 0) -> Iterator[Tensor]:
    """f(x) in parts along dim, in order, each made when it is asked for, of f of tiles of x.

    f makes scale * n - short places of n, and the first of them is at scale times the place where its tile starts. Of
    the places that two tiles make both, the first quarter is the one's and the last quarter the other's, as near its
    edge a tile lacks context; the half between goes over from one to the other in a straight line. So the parts are
    f(x), to rounding, if f sees no farther than a quarter of what tiles share, and else they are near it.
    """
    tiles = windows(x.shape[dim], tile)
    if len(tiles) > 1 and scale * tile.overlap < short:
        raise ValueError(f"tiles of which each makes {short} places less must overlap, got {tile}")
    width = (scale * tile.overlap - short) / 2
    middles = [(scale * (start + stop) - short) / 2 for (_, stop), (start, _) in pairwise(tiles)]
    edges = [-inf, *middles, inf]
    rest: Tensor | None = None  # what tiles so far have added to places that are not done
    for i, (start, stop) in enumerate(tiles):
        y = f(x.narrow(dim, start, stop - start))
        if len(tiles) > 1:
            y = y * _share(y, dim, scale * start, edges[i], edges[i + 1], width)
        if rest is not None:
            y.narrow(dim, 0, rest.shape[dim]).add_(rest)
        done = scale * (tiles[i + 1][0] - start) if i + 1 < len(tiles) else y.shape[dim]
        part, rest = y.narrow(dim, 0, done), y.narrow(dim, done, y.shape[dim] - done)
        yield part


def _share(y: Tensor, dim: int, start: int, before: float, after: float, width: float) -> Tensor:
    """A tile's part in each of its places, rising around the one before and falling around the one after."""
    places = torch.arange(start, start + y.shape[dim], dtype=torch.float64) + 0.5
    risen, fallen = (((places - middle) / max(width, 1e-6) + 0.5).clamp(0, 1) for middle in (before, after))
    return (risen - fallen).to(y).reshape([-1 if axis == dim % y.ndim else 1 for axis in range(y.ndim)])


def mosaic(f: Map, z: Tensor, tile: Tile, scale: int) -> Tensor:
    """f(z) in tiles of rows and columns. z: (..., h, w) -> (..., scale * h, scale * w)."""

    def row(strip: Tensor) -> Tensor:
        return torch.cat(list(tiled(f, strip, -1, tile, scale=scale)), -1)

    return torch.cat(list(tiled(row, z, -2, tile, scale=scale)), -2)


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that are alive. A convolution is taken to need room for its input and output again.

    That is what cuDNN takes to bring them into the order of its kernels, and back.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.now = self.peak = 0
        self.alive: dict[int, weakref.finalize[..., Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.hold(tensor.untyped_storage())
        if func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + args[0].nbytes + out.nbytes)
        return out

    def hold(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.alive:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            self.alive[id(storage)] = weakref.finalize(storage, self._release, id(storage), storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size


class Fused(TorchFunctionMode):
    """Attention holds what it returns and no more, as all fused kernels do; on the meta device torch has none."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return torch.empty_like(args[0]) if func is F.scaled_dot_product_attention else func(*args, **kwargs or {})
