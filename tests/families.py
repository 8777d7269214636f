"""The tiny models that the goldens were made with, one a published architecture: their shapes, weights and inputs.

The goldens hold the originals' weights under the originals' names, inputs, and the outputs that their code gave.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from minidit.config import ModelConfig
from minidit.kernels.reference import add_updates
from minidit.model import Conditioning, DiT
from minidit.presets import PRESETS

GOLDENS = Path(__file__).parent / "goldens"
SMALL = {"depth": 2, "dim": 72, "heads": 4}
CAPTIONED = {**SMALL, "caption_dim": 32, "caption_length": 12}


@dataclass(frozen=True)
class Family:
    """A tiny model of a published architecture."""

    golden: str  # file name, without its ending
    preset: str
    config: ModelConfig
    weights: str  # the golden that has its weights

    def __str__(self) -> str:
        return f"{self.preset} {self.golden}"

    @property
    def cases(self) -> dict[int, dict[str, Any]]:
        """What the JSON says of each case. Latte's golden has cases with labels and one of the model without."""
        cases = dict(enumerate(json.loads((GOLDENS / f"{self.golden}.json").read_text())["cases"]))
        labelled = self.config.classes is not None
        return {i: case for i, case in cases.items() if "mode" not in case or labelled == (case["mode"] != "uncond")}

    def upstream(self) -> dict[str, Tensor]:
        """The original's weights, stored as float16 and used as float32."""
        tensors = load_file(GOLDENS / f"{self.weights}.safetensors")
        own = {name[2:]: tensor.float() for name, tensor in tensors.items() if name.startswith("w/")}
        if self.preset == "latte":  # the golden is of the class-conditional one; without labels it is the other
            del own["y_embedder.embedding_table.weight"]
        return own

    def tensors(self) -> dict[str, Tensor]:
        return load_file(GOLDENS / f"{self.golden}.safetensors")


def _family(golden: str, preset: str, weights: str | None = None, *, place: Mapping[str, Any], **shape: Any) -> Family:
    base = PRESETS[preset]
    config = replace(base, **shape, positions=replace(base.positions, **place))
    return Family(golden, preset, config, weights or golden)


LATTE = {**SMALL, "mlp_ratio": 2.0}
SPLIT = "osp110_latte_t2v_a"  # the weights of both Open-Sora-Plan goldens
FAMILIES = [
    _family("stdit3_a", "opensora-1.2", place={}, mlp_ratio=2.0, **CAPTIONED),
    _family("stdit2_a", "opensora-1.1", place={}, mlp_ratio=2.0, **CAPTIONED),
    _family("stdit1_a", "opensora-1.0-16x256x256", place={}, mlp_ratio=2.0, **CAPTIONED),
    _family(
        "stdit1_b",
        "opensora-1.0-16x512x512",
        place={"pace": 2 / 3},
        **{"depth": 2, "dim": 64, "heads": 2, "mlp_ratio": 2.0, "caption_dim": 16, "caption_length": 6},
    ),
    _family("latte_a", "latte-ucf101", place={"base": 9, "frames": 5}, classes=10, **LATTE),
    _family("latte_a", "latte", place={"base": 9, "frames": 5}, **LATTE),
    _family("latte_t2v_a", "latte-t2v", place={"base": 4}, **CAPTIONED),
    _family("osp110_latte_t2v_a", "opensora-plan-1.1-65x512x512", SPLIT, place={"base": 4}, **CAPTIONED),
    _family("osp100_latte_t2v_a", "opensora-plan-1.0-65x512x512", SPLIT, place={"base": 4, "pace": 2.0}, **CAPTIONED),
]


def prepared(model: DiT, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Conditioning]:
    """A case's inputs by the originals' names -> latents (B, C, T, H, W), t (B,), and what is prepared of the rest."""
    x = given["x"] if "x" in given else given["hidden_states"]
    t = next(given[name] for name in ("timestep", "t") if name in given).float()
    if model.config.modulation == "block":
        x = x.transpose(1, 2)  # the original has frames before channels
    mask = given.get("mask", given.get("encoder_attention_mask"))
    text = given["y"][:, 0] if "y" in given and given["y"].dim() == 4 else given.get("encoder_hidden_states")
    one = {name: given[name][0].item() for name in ("height", "width", "num_frames", "ar") if name in given}
    cond = model.prepare(
        given.get("y") if model.config.classes else text,
        None if mask is None else of_batch(mask.sum(1), len(x)),
        latent=(x.shape[2], x.shape[3], x.shape[4]),
        height=one.get("height", 1.0),
        width=one.get("width", 1.0),
        fps=of_batch(given.get("fps", torch.zeros(1)), len(x)),
        frames=one.get("num_frames"),
        ratio=one.get("ar"),
        valid=given.get("attention_mask"),
    )
    return x, t, cond


def of_batch(rows: Tensor, batch: int) -> Tensor:
    """The original repeats what has fewer rows than the batch; here the caller does."""
    return rows.repeat(batch // len(rows))


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a part of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


RECIPE = {  # the paper's, of each published model
    "opensora-1.2": "pab-246",
    "opensora-1.1": "pab-246",
    "opensora-1.0": "pab-246",
    "latte": "latte-236",
    "opensora-plan": "open-sora-plan-246",
}


def recipe(preset: str) -> str:
    return next(name for start, name in RECIPE.items() if preset.startswith(start))


def stage(out: Any) -> Tensor:
    """The tokens that a layer hands on: a sublayer's with its own update, which it leaves to the next one to add."""
    return add_updates(out[0], out[1]) if isinstance(out, tuple) else out
