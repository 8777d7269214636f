"""The published checkpoints, by the names of PRESETS: whose key map reads them, and which one it is that was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from minidit.config import ModelConfig
from minidit.model import DiT
from minidit.presets import PRESETS
from minidit.tensors import misfits, told
from minidit.weights import latte, opensora
from minidit.weights.rules import Drop, Rule, invert


@dataclass(frozen=True)
class Published:
    rules: Callable[[ModelConfig], tuple[Rule, ...]]  # the key map
    hub: tuple[str, ...]  # org/name, or org/name/path of the file or its folder, on the Hugging Face hub

    def is_at(self, hub: str) -> bool:
        return any(f"{hub}/".startswith(f"{place}/") for place in self.hub)


def _plan(folder: str) -> Published:
    return Published(latte.latte_t2v, (f"LanguageBind/Open-Sora-Plan-{folder}",))


PUBLISHED: dict[str, Published] = {
    "opensora-1.2": Published(opensora.stdit3, ("hpcai-tech/OpenSora-STDiT-v3",)),
    "opensora-1.1": Published(
        opensora.stdit2, ("hpcai-tech/OpenSora-STDiT-v2-stage3", "hpcai-tech/OpenSora-STDiT-v2-stage2")
    ),
    "opensora-1.0-16x512x512": Published(opensora.stdit, ("hpcai-tech/Open-Sora/OpenSora-v1-HQ-16x512x512.pth",)),
    "opensora-1.0-16x256x256": Published(
        opensora.stdit,
        ("hpcai-tech/Open-Sora/OpenSora-v1-HQ-16x256x256.pth", "hpcai-tech/Open-Sora/OpenSora-v1-16x256x256.pth"),
    ),
    "latte": Published(
        latte.latte, ("maxin-cn/Latte/ffs.pt", "maxin-cn/Latte/skytimelapse.pt", "maxin-cn/Latte/taichi-hd.pt")
    ),
    "latte-ucf101": Published(latte.latte, ("maxin-cn/Latte/ucf101.pt",)),
    "latte-t2v": Published(
        latte.latte_t2v,
        ("maxin-cn/Latte-1", "maxin-cn/Latte-0", "maxin-cn/Latte/t2v_required_models"),
    ),
    "opensora-plan-1.1-65x512x512": _plan("v1.1.0/65x512x512"),
    "opensora-plan-1.1-221x512x512": _plan("v1.1.0/221x512x512"),
    "opensora-plan-1.0-65x512x512": _plan("v1.0.0/65x512x512"),
    "opensora-plan-1.0-65x256x256": _plan("v1.0.0/65x256x256"),
    "opensora-plan-1.0-17x256x256": _plan("v1.0.0/17x256x256"),
}


@cache
def skeleton(config: ModelConfig) -> DiT:
    """The model without numbers, for its names and shapes."""
    with torch.device("meta"):
        return DiT(config)


@cache
def upstream(name: str, config: ModelConfig) -> dict[str, Tensor]:
    """The published names and shapes of that model, in this shape, as tensors without numbers."""
    return invert(PUBLISHED[name].rules(config), skeleton(config).state_dict())


def misfit(name: str, config: ModelConfig, found: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What is wrong with upstream tensors for the key map of that model and a shape; tensors to be dropped fit."""
    dropped = {rule.old for rule in PUBLISHED[name].rules(config) if isinstance(rule, Drop)}
    return misfits(upstream(name, config), {old: tensor for old, tensor in found.items() if old not in dropped})


def _likeness(wrong: Mapping[str, Sequence[str]], found: int) -> tuple[float, int]:
    """The share of all names that both have, and if that is equal fewer tensors of another shape."""
    share = (found - len(wrong["unknown"])) / (found + len(wrong["missing"]))
    return share, -len(wrong["misshapen"])


def recognise(found: Mapping[str, Tensor], hub: str | None = None) -> str:
    """The model whose names and shapes these upstream tensors have; of several, the one that is on the hub there.

    Raises ValueError with the closest if none has, and with the candidates if several have.
    """
    wrong = {name: misfit(name, PRESETS[name], found) for name in PUBLISHED}
    fitting = [name for name in PUBLISHED if not told(wrong[name])]
    if len(fitting) > 1 and hub:
        fitting = [name for name in fitting if PUBLISHED[name].is_at(hub)] or fitting
    if len(fitting) > 1:
        raise ValueError(f"these tensors may be those of {', '.join(fitting)}: say which with --model NAME")
    if not fitting:
        closest = max(wrong, key=lambda name: _likeness(wrong[name], len(found)))
        raise ValueError(
            f"not the tensors of a model known here; {closest} is closest, but there are {told(wrong[closest])}. "
            f"For another shape of a known model give --model and --config"
        )
    return fitting[0]
