"""A model as a folder: config.json and model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minidit.config import ModelConfig
from minidit.model import DiT

EMBEDDED = {"tiny": Path(__file__).parent / "weights" / "tiny"}  # models that come with the package
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def _folder(name_or_folder: str | Path, *names: str) -> Path:
    """The model's folder, which has files of these names. Raises FileNotFoundError."""
    folder = EMBEDDED.get(str(name_or_folder), Path(name_or_folder))
    for name in (CONFIG, *names):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} does not exist: give a folder with {CONFIG} and {WEIGHTS}, or {', '.join(EMBEDDED)}"
            )
    return folder


def load_config(name_or_folder: str | Path = "tiny") -> ModelConfig:
    """What `load` would build, from config.json alone. Raises FileNotFoundError or ValueError, saying what is wrong."""
    folder = _folder(name_or_folder)
    try:
        return ModelConfig.from_json(json.loads((folder / CONFIG).read_text()))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def load(
    name_or_folder: str | Path = "tiny", *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DiT:
    """A model in eval mode, from the name of an embedded one or a folder. dtype None: float32 on a CPU, else bfloat16.

    Raises FileNotFoundError or ValueError, saying what is missing or does not fit; loads all of it or nothing.
    """
    folder, device = _folder(name_or_folder, WEIGHTS), torch.device(device)
    config = load_config(folder)
    with torch.device("meta"):
        model = DiT(config)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    # buffers keep their dtype: frequencies in bfloat16 would turn late frames by wrong angles
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    try:
        with safe_open(folder / WEIGHTS, "pt", device=str(device)) as file:
            names = list(file.keys())
            if misfits := _misfits(model.state_dict(), {name: file.get_slice(name).get_shape() for name in names}):
                raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}, tensors are wrong: {misfits}")
            tensors = {name: file.get_tensor(name).to(dtypes.get(name, dtype)) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: {error}") from error
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _misfits(expected: Mapping[str, Tensor], found: Mapping[str, Sequence[int]]) -> str:
    """The number and the first of the tensors that are missing, unknown or of another shape; '' if there are none."""
    wrong = {name: list(tensor.shape) for name, tensor in expected.items() if list(tensor.shape) != found.get(name)}
    kinds = {
        "missing": [name for name in wrong if name not in found],
        "unknown": [name for name in found if name not in expected],
        "misshapen": [f"{name} {found[name]} instead of {shape}" for name, shape in wrong.items() if name in found],
    }
    return "; ".join(f"{len(names)} {kind}, first {names[0]}" for kind, names in kinds.items() if names)


def save(model: DiT, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the model's folder, its parameters in dtype (None: as they are). A save that fails leaves the old model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        name: (tensor.to(dtype) if dtype and name in parameters else tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / f".{WEIGHTS}", metadata={"format": "pt"})
    (folder / f".{CONFIG}").write_text(json.dumps(model.config.to_json(), indent=2) + "\n")
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / f".{name}", folder / name)
