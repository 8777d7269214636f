"""A run's model calls as CUDA graphs, where starting their kernels takes the CPU longer than the GPU runs them.

A plan has few different rows. Equal rows do equal work, and at equal places in memory if what a call is given and what
a run keeps lie at places of their own. So a row that comes often is recorded, and played from then on: one launch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from minidit.broadcast import Act, Call, Plan, Site
from minidit.cache import Cache
from minidit.cost import Cost
from minidit.kernels.reference import Update
from minidit.model import Conditioning, DiT

OFTEN = 3  # calls of a row: the first is made, so that its kernels are compiled, the second recorded, others played
SHORT = 40e12  # floating-point operations of a call that a GPU does about as fast as a CPU starts them


def short(plan: Plan, price: Cost, ranks: int) -> bool:
    """Whether the calls of a run on so many ranks, that share the tokens, are SHORT, in the mean."""
    return plan.flops(price.parts, price.rest) < SHORT * ranks * len(plan)


class Kept(Cache):
    """A cache that copies what it is given to a place of each site, the same in the whole run."""

    def __init__(self, plan: Plan) -> None:
        self._places = dict[Site, Update]()
        super().__init__(plan)

    def keep(self, site: Site, update: Update) -> None:
        if site not in self._places:
            gate = None if update.gate is None else torch.empty_like(update.gate)
            self._places[site] = Update(torch.empty_like(update.a), gate)
        place = self._places[site]
        for there, given in zip(place, update, strict=True):
            if there is not None and given is not None:
                there.copy_(given)
        super().keep(site, place)

    def follow(self, call: Call) -> None:
        """Hold what is held after the call, which a recording makes."""
        for site, act, last in zip(self.plan.sites, call.acts, call.last, strict=True):
            if act is Act.STORE:
                super().keep(site, self._places[site])
            elif act is Act.REUSE:
                self.take(site, last=last)


class Recorder(Protocol):
    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Note what work does on the device, which does not do it yet. What is returned does it, at the same places."""


class Graphs:
    """Records CUDA graphs, which take turns in one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # other threads, such as NCCL's watchdog, go on with what a recording thread may not do
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()

        def play() -> Tensor:
            graph.replay()
            return result.clone()  # the next graph writes where it lies

        return play


class Played:
    """A model's calls of a run, some of them recorded, unless there is no recorder."""

    def __init__(self, model: DiT, cond: Conditioning, plan: Plan, recorder: Recorder | None) -> None:
        self.model, self.cond, self.cache = model, cond, Kept(plan) if recorder else Cache(plan)
        self._record, counts = recorder, Counter(plan.acts)
        self._often = {row for row, count in counts.items() if recorder and count >= OFTEN}
        self._met, self._plays = set[tuple[Act, ...]](), dict[tuple[Act, ...], Callable[[], Tensor]]()
        self._given: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, call: Call, frame_mask: Tensor | None = None) -> Tensor:
        """As DiT.forward."""
        row = call.acts
        if self._record is None or frame_mask is not None or row not in self._often or row not in self._met:
            self._met.add(row)
            return self.model(x, call.timestep, self.cond, call, self.cache, frame_mask)
        t = self.model.begun(x, call.timestep, self.cond, call, self.cache)
        if self._given is None:
            self._given = torch.empty_like(x), torch.empty_like(t)
        x, t = (there.copy_(given) for there, given in zip(self._given, (x, t), strict=True))
        assert isinstance(self.cache, Kept)
        if row in self._plays:
            self.cache.follow(call)
        else:
            self._plays[row] = self._record(lambda: self.model.called(x, t, self.cond, call, self.cache))
        return self._plays[row]()
