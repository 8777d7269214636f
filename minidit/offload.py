"""Weights at home in the computer's memory, and on the GPU while they are needed: a whole stage's, or a layer's.

For small GPUs, each layer's are there only while it runs. Meanwhile a second stream brings the weights of the one that
ran after it the last time, so that at most two layers are there. A sublayer that broadcast reuses does not run, and is
not brought.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minidit.layers import Mlp
from minidit.model import DiT


def layers(model: DiT) -> list[nn.Module]:
    """What is brought one after the other: the linear layers of the sublayers, an MLP's two together."""
    found: list[nn.Module] = []
    for part in (part for sublayer in model.sublayers for part in (sublayer.linear, sublayer.f)):
        # an MLP hands a weight to a kernel itself, so that only it knows when that runs
        found += [part] if isinstance(part, Mlp | nn.Linear) else [] if part is None else part.children()
    return found


class Loans:
    """The weights of layers, at home in the computer's memory, lent to a device. It is a GPU, but for tests."""

    def __init__(self, units: Sequence[nn.Module], device: torch.device) -> None:
        self.device, gpu = device, device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if gpu else None
        self.homes: list[list[tuple[nn.Parameter, Tensor]]] = []
        for unit in units:
            for parameter in unit.parameters():
                if gpu and not parameter.is_pinned():
                    parameter.data = parameter.data.pin_memory()  # else a copy would wait for the layer that runs
            self.homes.append([(parameter, parameter.data) for parameter in unit.parameters()])
        self.after: dict[int, int] = {}  # which layer ran after which
        self.last = -1  # that ran
        self.coming: dict[int, list[Tensor]] = {}  # of one layer, the next
        self.ran: torch.cuda.Event | None = None

    def lend(self, i: int, *_: Any) -> None:
        """Before layer i runs; and begins to bring the next."""
        if self.ran is not None:
            self.ran.synchronize()  # the host runs ahead, and would bring ever more layers
        copies = self.coming[i] if i in self.coming else self._bring(i)
        self.coming = {}
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            for copy in copies:
                copy.record_stream(torch.cuda.current_stream(self.device))
        for (parameter, _home), copy in zip(self.homes[i], copies, strict=True):
            parameter.data = copy
        self.after[self.last], self.last = i, i
        if (after := self.after.get(i)) is not None:
            self.coming = {after: self._bring(after)}

    def _bring(self, i: int) -> list[Tensor]:
        with torch.inference_mode(False), nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            return [home.to(self.device, non_blocking=True, copy=True) for _, home in self.homes[i]]

    def take_back(self, i: int, *_: Any) -> None:
        """After layer i has run. Its weights were not changed, so nothing is copied."""
        for parameter, home in self.homes[i]:
            parameter.data = home
        if self.stream is not None:
            self.ran = torch.cuda.current_stream(self.device).record_event()


@contextmanager
def brought(module: nn.Module, device: torch.device, units: Sequence[nn.Module] = ()) -> Iterator[None]:
    """The module ready to run on the device, where each of its units is only while it runs; then all at home again.

    What ran has changed no weights, so nothing is copied back.
    """
    loans = Loans(units, device)
    lent = {id(parameter) for unit in units for parameter in unit.parameters()}
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in lent]
    homes, hooks = [(tensor, tensor.data) for tensor in tensors], []
    try:
        for tensor, home in homes:
            tensor.data = home.to(device)
        for i, unit in enumerate(units):
            hooks.append(unit.register_forward_pre_hook(partial(loans.lend, i)))
            hooks.append(unit.register_forward_hook(partial(loans.take_back, i)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for i in range(len(units)):
            loans.take_back(i)
        for tensor, home in homes:
            tensor.data = home
