"""What one sampling run keeps between model calls: the updates that later calls reuse, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minidit.broadcast import Act, Call, Plan, Site
from minidit.kernels.reference import Update


class Cache:
    """The kept updates of one run of one plan, each held from its STORE to its last REUSE.

    A run takes its calls in order; one that starts again with call 0, after an end or half way, starts empty. Guidance
    in two calls a step needs two caches, since the two halves of a guidance pair have different updates.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.clear()

    def clear(self) -> None:
        """Forget everything, as if the run had not begun."""
        self._held: dict[Site, Update] = {}
        self._next = 0
        self.nbytes = self.peak_bytes = 0  # of the tokens held now, and at most so far, without the gates beside them
        self._like: tuple[object, ...] | None = None

    def begin(self, call: Call, sites: Sequence[Site], x: Tensor) -> None:
        """Called once a model call, before its first sublayer. x: the tokens (B, T, S, D).

        Raises ValueError for a call of another plan, out of order or after one that broke off, for another model, and
        for tokens of another batch, size, dtype or device than the run's: a kept update would not belong to them.
        """
        if tuple(sites) != self.plan.sites:
            raise ValueError(
                f"this cache's plan is for a model of {len(self.plan.sites)} sites, this one has {len(sites)} "
                "or other ones: make the plan with model.sites"
            )
        if call.index not in (0, self._next):
            raise ValueError(f"call {call.index} came where call {self._next} of the plan was due: calls go in order")
        if call.index >= len(self.plan) or call != self.plan[call.index]:
            raise ValueError(f"call {call.index} is of another plan than this cache: make a Cache for each plan")
        reused = {site for site, act in zip(sites, call.acts, strict=True) if act is Act.REUSE}
        if call.index and self._held.keys() != reused:
            raise ValueError(f"call {call.index - 1} broke off half way: begin a new run with call 0")
        if call.index == 0:  # only now: a refused call leaves the run as it was
            self.clear()
        like = (x.shape, x.dtype, x.device)
        if self._like not in (None, like):
            raise ValueError(f"the run began with tokens {self._like}, call {call.index} has {like}: begin a new run")
        self._like, self._next = like, call.index + 1

    def keep(self, site: Site, update: Update) -> None:
        """Hold the update until its last reuse, without a copy."""
        self._held[site] = update
        self.nbytes += update.a.nbytes
        self.peak_bytes = max(self.peak_bytes, self.nbytes)

    def take(self, site: Site, *, last: bool) -> Update:
        """The kept update; freed here if this is its last reuse."""
        update = self._held[site]
        if last:
            del self._held[site]
            self.nbytes -= update.a.nbytes
        return update
