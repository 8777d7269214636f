"""What is measured of a run on several ranks: its calls, what each hands to torch.distributed, NCCL's kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import measuring
from bench import Given
from measuring import MARKER, Stopwatch, by_row, whole_time
from minidit import sampling
from minidit.broadcast import Plan
from minidit.config import ModelConfig
from minidit.model import DiT
from minidit.parallel import Layout
from minidit.samplers import Field, Noise


class Meter:
    """Times the calls of a run, and counts and times what each hands to torch.distributed, but for digests."""

    def __init__(self, device: torch.device, marking: bool = False) -> None:
        self._calls, self._collectives = Stopwatch(device), Stopwatch(device)
        self._marking = marking  # for the profiler
        self._bytes, self._counts = list[int](), list[int]()

    def mark(self) -> None:
        """Before the first call, and after each."""
        if self._marking:
            torch.cuda._sleep(1)
        self._calls.mark()
        self._bytes.append(0)
        self._counts.append(0)

    def __enter__(self) -> Meter:
        self._before = dist.all_to_all_single

        def metered(output: Tensor, given: Tensor, *args: Any, **options: Any) -> Any:
            if not given.is_floating_point():
                return self._before(output, given, *args, **options)
            self._bytes[-1] += given.nbytes
            self._counts[-1] += 1
            self._collectives.mark()
            result = self._before(output, given, *args, **options)
            self._collectives.mark()
            return result

        dist.all_to_all_single = metered  # type: ignore[assignment]
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_to_all_single = self._before

    @property
    def sent(self) -> list[int]:
        """Bytes of every call."""
        return self._bytes[:-1]

    def ms(self) -> list[float]:
        """Of every call."""
        return self._calls.laps()

    def collectives_ms(self) -> list[float]:
        """Of every call, in collectives."""
        each = iter(self._collectives.laps()[::2])
        return [sum(islice(each, many)) for many in self._counts[:-1]]


@dataclass(frozen=True)
class Metered:
    """A sampler: Euler steps along the velocity at a plan's times, which need not be evenly spaced; a meter marks them.

    Ranks compare their samplers by what they print: a meter is each rank's own.
    """

    timesteps: tuple[float, ...]
    meter: Meter = field(repr=False, compare=False)

    def integrate(
        self, call: Field, z: Tensor, *, frames: Tensor | None = None, noise: Noise = torch.randn_like
    ) -> Tensor:
        """See samplers.Sampler."""
        self.meter.mark()
        for i, (t, then) in enumerate(pairwise((*self.timesteps, 0.0))):
            z = z + call(i, z, None)[:, : z.shape[1]] * (t - then) / 1000
            self.meter.mark()
        return z


def run(
    model: DiT, config: ModelConfig, plan: Plan, given: Given, layout: Layout, meter: Meter, two_calls: bool = False
) -> Tensor:
    """The latents of a run."""
    asked = config.sampling
    with meter:
        return sampling.sample(
            model,
            given.z,
            given.text,
            given.lengths,
            plan=plan,
            sampler=Metered(plan.timesteps, meter),
            guidance=asked.guidance,
            height=asked.height,
            width=asked.width,
            fps=asked.fps,
            two_calls=two_calls,
            null=given.null,
            layout=layout,
        )


def of_whole(plan: Plan, ran: Plan, each: Sequence[float]) -> float:
    """The sum over a plan's calls of what each call of a run took: of all of its calls, or of a shorter one's."""
    return sum(each) if len(ran) == len(plan) else whole_time(plan, by_row(ran, each))


def nccl_ms(kernels: Sequence[tuple[str, float]], calls: int) -> list[float]:
    """ms of NCCL's kernels in every call. kernels: (name, ms) in the order they ran, markers among them.

    Raises RuntimeError for kernels with other markers than were launched.
    """
    found = list[float]()
    for name, ms in kernels:
        if MARKER in name:
            found.append(0.0)
        elif "nccl" in name.lower() and found:
            found[-1] += ms
    if len(found) != calls + 1:
        raise RuntimeError("the profiler has lost kernels: the time of NCCL's would be wrong")
    return found[:-1]


def profiled(device: torch.device, calls: int, f: Callable[[Meter], Any]) -> list[float] | None:
    """ms of NCCL's kernels in every call of a run; None where they cannot be seen. f: runs with a meter."""
    if device.type != "cuda":
        return None
    seen = measuring.profiled(lambda: f(Meter(device, marking=True)))
    try:
        return nccl_ms(measuring.kernels(seen), calls)
    except RuntimeError as error:  # all collectives are over: the other ranks need not know
        print(f"no time of NCCL: {error}", file=sys.stderr)
        return None
