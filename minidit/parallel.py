"""One run over several processes, on torch.distributed: sequence, guidance and data parallel.

Sequence: the tokens (B, T, S, D) are shared out along one axis, frames or places. Attention along the other axis,
cross-attention and MLPs work on the own share. Attention along the shared axis trades it for a share of the other one,
in one all-to-all before and one after (dynamic sequence parallel, arXiv:2403.10266). An attention that is reused
computes nothing and so trades nothing: broadcast drops communication with computation (arXiv:2408.12588, 3.3).
Shares are uneven where a size does not divide: nothing is padded. All that is ever communicated are all-to-alls.
Guidance: the captions on one group of ranks, the null captions on another. Data: each video on one group of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from minidit.broadcast import Act, Part, Plan
from minidit.cost import Cost

Axis = Literal["frames", "places"]
TIMEOUT = timedelta(minutes=5)  # of a rank that waits for another one in the middle of a run
TRADED: dict[Axis, Part] = {"frames": "temporal", "places": "spatial"}  # the attention along the shared axis


def shares(size: int, ranks: int) -> tuple[int, ...]:
    """How many of `size` each rank has: as even as can be, the larger ones first."""
    return tuple(size // ranks + (rank < size % ranks) for rank in range(ranks))


@dataclass(frozen=True)
class Shares:
    """Who has which of the tokens of a run, and how they are traded. The shares of one rank alone are everything."""

    axis: Axis
    frames: tuple[int, ...]  # of each rank: what it has of an axis when that one is shared
    places: tuple[int, ...]
    rank: int = 0
    group: dist.ProcessGroup | None = None  # None: one rank alone

    @property
    def ranks(self) -> int:
        return len(self.frames)

    def trades(self, part: Part) -> bool:
        return self.ranks > 1 and part == TRADED[self.axis]

    def own(self, x: Tensor, axis: Axis, dim: int) -> Tensor:
        """The rank's share of something that has all of an axis in a dim; all of it, if the other axis is shared."""
        sizes = self.frames if axis == "frames" else self.places
        return x.split(sizes, dim)[self.rank] if axis == self.axis else x

    def attended(self, x: Tensor, dim: int) -> Tensor:
        """The frames, of all in a dim, within which the rank attends: its own, or those it trades its places for."""
        return x.split(self.frames, dim)[self.rank]

    def whole(self, x: Tensor) -> Tensor:
        """The own share of the tokens -> one that has all of the shared axis, and a share of the other."""
        return self._to_places(x) if self.axis == "frames" else self._to_frames(x)

    def back(self, x: Tensor) -> Tensor:
        """Undoes `whole`."""
        return self._to_frames(x) if self.axis == "frames" else self._to_places(x)

    def _to_places(self, x: Tensor) -> Tensor:
        """(B, own T, S, D) -> (B, T, own S, D)."""
        b, t, s, d = x.shape
        packed = x.new_empty(t * b * s * d)
        blocks = packed.split([t * b * own * d for own in self.places])
        for block, part in zip(blocks, x.split(self.places, 2), strict=True):
            block.view(t, b, part.shape[2], d).copy_(part.transpose(0, 1))
        here = self.places[self.rank]
        received = self._trade(packed, blocks, [own * b * here * d for own in self.frames])
        return received.view(sum(self.frames), b, here, d).transpose(0, 1)

    def _to_frames(self, x: Tensor) -> Tensor:
        """(B, T, own S, D) -> (B, own T, S, D)."""
        b, t, s, d = x.shape
        packed, here = x.transpose(0, 1).contiguous().flatten(), self.frames[self.rank]
        blocks = packed.split([own * b * s * d for own in self.frames])
        received = self._trade(packed, blocks, [here * b * own * d for own in self.places])
        out = x.new_empty(b, here, sum(self.places), d)
        parts = received.split([here * b * own * d for own in self.places])
        for target, part in zip(out.split(self.places, 2), parts, strict=True):
            target.copy_(part.view(here, b, target.shape[2], d).transpose(0, 1))
        return out

    def _trade(self, packed: Tensor, blocks: Sequence[Tensor], sizes: list[int]) -> Tensor:
        """Block i goes to rank i, sizes[i] elements come from it."""
        received = packed.new_empty(sum(sizes))
        dist.all_to_all_single(received, packed, sizes, [block.numel() for block in blocks], group=self.group)
        return received

    def gather(self, x: Tensor) -> Tensor:
        """The own share of the tokens (B, T, S, D) -> all of them, on every rank."""
        if self.ranks == 1:
            return x
        dim, sizes = (1, self.frames) if self.axis == "frames" else (2, self.places)
        return gather(x.movedim(dim, 0), sizes, self.group).movedim(0, dim)


def gather(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows of every rank, sizes[i] of rank i, on every rank. It is an all-to-all: a gather wants equal sizes."""
    everywhere = x.repeat(len(sizes), *[1] * (x.dim() - 1))
    out = x.new_empty(sum(sizes), *x.shape[1:])
    dist.all_to_all_single(out, everywhere, list(sizes), [len(x)] * len(sizes), group=group)
    return out


def alone(frames: int, places: int) -> Shares:
    """The shares of a run in one process."""
    return Shares("frames", (frames,), (places,))


@dataclass(frozen=True)
class Traffic:
    """What the ranks of a run communicate."""

    sent: tuple[int, ...]  # bytes that each rank hands to all-to-alls, what it keeps for itself among them
    gathered: tuple[int, ...]  # and to the all-to-alls that end the calls, where all ranks get all outputs
    trades: int  # of each rank
    gathers: int

    @property
    def mean(self) -> float:
        """Bytes that a rank hands to all-to-alls, as papers count them."""
        return sum(self.sent) / len(self.sent)


def traffic(plan: Plan, price: Cost, tokens: tuple[int, int], *, axis: Axis, ranks: int) -> Traffic:
    """Of a whole run, before it. tokens: (T, S)."""
    if ranks == 1:
        return Traffic((0,), (0,), 0, 0)
    (t, s), (frames, places) = tokens, (shares(size, ranks) for size in tokens)
    computed = sum(
        act is not Act.REUSE
        for acts in plan.acts
        for site, act in zip(plan.sites, acts, strict=True)
        if site.part == TRADED[axis]
    )
    token, out = price.update_bytes // (t * s), price.output_bytes // (t * s)
    sent = [computed * token * (own_t * s + t * own_s) for own_t, own_s in zip(frames, places, strict=True)]
    own = [n * s for n in frames] if axis == "frames" else [t * n for n in places]
    gathered = [len(plan) * ranks * out * tokens for tokens in own]
    return Traffic(tuple(sent), tuple(gathered), 2 * computed, len(plan))


@dataclass(frozen=True)
class Speed:
    """Of the ranks, to predict how long a run takes: unless given, what H100s and H200s with NVLink were seen to do."""

    compute: float = 500e12  # floating-point operations a second of one rank
    link: float = 200e9  # bytes a second out of one rank, of all-to-alls of some hundred MB


H100 = Speed()


def seconds(
    plan: Plan, price: Cost, tokens: tuple[int, int], *, axis: Axis, ranks: int, speed: Speed = H100
) -> tuple[float, float]:
    """Predicted for the busiest rank: of computing, which it does on the largest share, and of communicating."""
    found, size = traffic(plan, price, tokens, axis=axis, ranks=ranks), tokens[0 if axis == "frames" else 1]
    computing = plan.flops(price.parts, price.rest) * shares(size, ranks)[0] / size / speed.compute
    leaving = (ranks - 1) / ranks  # of what a rank hands over
    return computing, (max(found.sent) + max(found.gathered)) * leaving / speed.link


def choose_axis(plan: Plan, price: Cost, tokens: tuple[int, int], *, ranks: int, speed: Speed = H100) -> Axis:
    """The axis with which the busiest rank is done earlier: what it communicates counts, and how uneven shares are."""

    def total(axis: Axis) -> float:
        return sum(seconds(plan, price, tokens, axis=axis, ranks=ranks, speed=speed))

    return "places" if total("places") < total("frames") else "frames"


def halves(ranks: int, guidance: float) -> int:
    """The groups of a video's ranks for guidance: two, with a half each, if there are halves and the ranks divide."""
    return 2 if guidance != 1 and ranks % 2 == 0 else 1


def table(
    plan: Plan,
    price: Cost,
    tokens: tuple[int, int],
    groups: Mapping[int, int],
    speed: Speed,
    memory: Mapping[int, int],
) -> str:
    """What the plan's run would communicate and how long it would take, predicted, for numbers of ranks.

    groups: for each number, into how many it is divided for guidance. What joins the halves again is left out. memory:
    bytes of each rank, for each number, with the axis that is chosen.
    """
    lines = [
        "ranks  guidance  shared   largest share  GB sent  Ulysses  all-to-alls"
        "  compute s  communicate s  in all s   GiB"
    ]
    for count, divided in groups.items():
        ranks, part = count // divided, price.share(divided)
        chosen = choose_axis(plan, part, tokens, ranks=ranks)
        for axis, size in zip(TRADED, tokens, strict=True):
            if ranks == 1 and axis != chosen:  # nothing is shared along either
                continue
            found = traffic(plan, part, tokens, axis=axis, ranks=ranks)
            computing, communicating = seconds(plan, part, tokens, axis=axis, ranks=ranks, speed=speed)
            shared = "-" if ranks == 1 else f"{axis}{'*' * (axis == chosen)}"
            share = "-" if ranks == 1 else f"{shares(size, ranks)[0]} of {size}"
            held = f"{memory[count] / 2**30:.1f}" if axis == chosen else ""
            lines.append(
                f"{count:>5}  {'apart' if divided > 1 else 'together':<8}  {shared:<7}  {share:>13}"
                f"  {found.mean / 1e9:>7.2f}  {2 * found.mean / 1e9:>7.2f}  {found.trades + found.gathers:>11}"
                f"  {computing:>9.2f}  {communicating:>13.3f}  {computing + communicating:>8.2f}  {held:>4}"
            )
    return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class Layout:
    """The ranks that make one video together, as this one sees them: `guidance` halves of `sequence` ranks each."""

    sequence: dist.ProcessGroup | None = None  # None: this rank alone
    guidance: dist.ProcessGroup | None = None  # of the two ranks with the same tokens; None: both halves are here
    axis: Axis | None = None  # that is shared out; None: the one that `choose_axis` finds
    speed: Speed = H100  # to choose it by

    @property
    def first(self) -> bool:
        """Whether this rank is the one of them that tells and writes."""
        return all(group is None or dist.get_rank(group) == 0 for group in (self.sequence, self.guidance))

    @property
    def half(self) -> int:
        """0: the captions are this rank's, 1: the null captions."""
        return dist.get_rank(self.guidance)

    def shares(self, plan: Plan, price: Cost, tokens: tuple[int, int]) -> Shares:
        """Who has which of the tokens (T, S), frames and places of a frame, of a run of that plan."""
        if self.sequence is None:
            return alone(*tokens)
        ranks = dist.get_world_size(self.sequence)
        frames, places = (shares(size, ranks) for size in tokens)
        axis = self.axis or choose_axis(plan, price, tokens, ranks=ranks, speed=self.speed)
        return Shares(axis, frames, places, dist.get_rank(self.sequence), self.sequence)

    def join(self, x: Tensor) -> Tensor:
        """This rank's half of guidance (B, ...) -> both (2 * B, ...), captions first, on both ranks."""
        return gather(x, [len(x)] * 2, self.guidance)

    def agree(self, device: torch.device, **given: object) -> None:
        """Raises ValueError, naming the first that differs, unless all ranks were given the same."""
        groups = [group for group in (self.sequence, self.guidance) if group is not None]
        if not groups:  # one rank alone need not read its tensors back from the device
            return
        digests = torch.tensor([_digest(value) for value in given.values()], device=device)
        for group in groups:
            all_digests = gather(digests[None], [1] * dist.get_world_size(group), group)
            for name, same in zip(given, (all_digests == digests).all(0).tolist(), strict=True):
                if not same:
                    raise ValueError(f"the ranks of a run were given different {name}: start all alike")


ALONE = Layout()


def _digest(value: object) -> int:
    """A number of 63 bits that equal values share."""
    if isinstance(value, Tensor):
        value = value.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    data = value if isinstance(value, bytes) else repr(value).encode()
    return int.from_bytes(sha256(data).digest()[:8]) >> 1


def layout(device: torch.device, *, guidance: int = 1, data: int = 1, axis: Axis | None = None) -> tuple[Layout, int]:
    """The layout of this rank, and which of the `data` groups it is in; all started ranks take part.

    guidance: 2 for the halves of guidance apart. Raises ValueError where the ranks do not divide into such groups.
    """
    world = dist.get_world_size()
    if world % (guidance * data):
        raise ValueError(
            f"{world} ranks do not divide into {data} x {guidance} groups (data x guidance): start a multiple of "
            f"{guidance * data}"
        )
    sizes = {"data": data, "guidance": guidance, "sequence": world // (guidance * data)}
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    groups = {name: mesh.get_group(name) if size > 1 else None for name, size in sizes.items()}
    return Layout(groups["sequence"], groups["guidance"], axis), mesh.get_local_rank("data")


@contextmanager
def started(device: str) -> Iterator[torch.device]:
    """Join the ranks that torchrun started with this one, if it did, until the end; the device of this one.

    A rank that waits for another one longer than TIMEOUT gives up with an error.
    """
    if world() == 1:
        yield torch.device(device)
        return
    own = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield own
    finally:
        dist.destroy_process_group()


def world() -> int:
    """The processes that torchrun started; 1 if it did not."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Of this process among all that torchrun started; 0 if it did not."""
    return int(os.environ.get("RANK", 0))


def lost(error: RuntimeError) -> bool:
    """Whether it says that another rank is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def first_with(problem: bool, device: torch.device) -> int | None:
    """The first rank that has a problem, the same answer on all; None: no rank has one."""
    if not dist.is_initialized():
        return 0 if problem else None
    every = gather(torch.tensor([problem], device=device, dtype=torch.int32), [1] * dist.get_world_size(), None)
    return every.tolist().index(1) if every.any() else None
