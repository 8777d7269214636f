"""A model as a folder: config.json and model.safetensors, or several such files and their index."""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

import torch

from minidit import tensors
from minidit.config import ModelConfig
from minidit.model import DiT

EMBEDDED = {"tiny": Path(__file__).parent / "weights" / "tiny"}  # models that come with the package
PARAMETERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CONFIG, WEIGHTS, INDEX = "config.json", f"model{tensors.SAFE}", f"model{tensors.INDEX}"
LAYOUT = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")  # what `save` writes


def folder_of(name_or_folder: str | Path) -> Path:
    """Of an embedded model by its name, a str; a Path, or what is no such name, is a folder: "./tiny", too."""
    embedded = EMBEDDED.get(name_or_folder) if isinstance(name_or_folder, str) else None
    return embedded or Path(name_or_folder)


def load_config(name_or_folder: str | Path = "tiny") -> ModelConfig:
    """What `load` would build, from config.json alone. Raises FileNotFoundError or ValueError, saying what is wrong."""
    return read_config(_existing(folder_of(name_or_folder) / CONFIG))


def read_config(path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_json(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def weights(folder: Path) -> Path:
    """The file of the model's tensors, or the index of the files. Raises FileNotFoundError or ValueError."""
    if not (folder / INDEX).is_file():
        return _existing(folder / WEIGHTS)
    if (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds a {WEIGHTS} and a {INDEX}: remove the one that is not the model's")
    return folder / INDEX


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give a folder with {CONFIG} and {WEIGHTS}, or {', '.join(EMBEDDED)}"
        )
    return path


def load(
    name_or_folder: str | Path = "tiny", *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DiT:
    """A model in eval mode, from the name of an embedded one or a folder. dtype None: float32 on a CPU, else bfloat16.

    On a CPU, tensors of that dtype stay in the file until they are used. Raises FileNotFoundError or ValueError,
    saying what is missing or does not fit; loads all of it or nothing.
    """
    device = torch.device(device)
    config, path = load_config(name_or_folder), weights(folder_of(name_or_folder))
    with torch.device("meta"):
        model = DiT(config)
    stored = tensors.read(path, device=device)
    if wrong := tensors.told(tensors.misfits(model.state_dict(), stored.meta)):
        raise ValueError(f"{path} does not fit {CONFIG}, tensors are wrong: {wrong}")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    # buffers keep their dtype: frequencies in bfloat16 would turn late frames by wrong angles
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    state = {name: tensors.cast(name, it, dtypes.get(name, dtype)) for name, it in stored.tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def save(model: DiT, folder: str | Path, *, dtype: torch.dtype | None = None, limit: int = tensors.LIMIT) -> None:
    """Write the model's folder, its parameters in dtype (None: as they are), in files of at most limit bytes.

    A save that fails leaves the old model; one that is interrupted, or fails, while it replaces the files, the new one,
    whole, in model.unfinished-...; one that is killed then leaves no config.json, and so no model that is half the old
    one, unless there is one file to replace. Raises ValueError for numbers that dtype cannot hold.
    """
    if dtype not in (None, *PARAMETERS):
        raise ValueError(f"parameters are saved as one of {', '.join(map(str, PARAMETERS))}, not {dtype}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state, buffers = model.state_dict(), {name for name, _ in model.named_buffers()}
    meta = {
        name: torch.empty_like(tensor, dtype=None if name in buffers else dtype, device="meta")
        for name, tensor in state.items()
    }
    with tensors.scratch(folder / "model") as new:
        tensors.write(new, state, meta, limit=limit)
        write_config(new, model.config)
        written = sorted(path.name for path in new.iterdir())
        old = [path for path in folder.glob("model*") if LAYOUT.fullmatch(path.name) and path.name not in written]
        config = folder / CONFIG
        alike = config.is_file() and config.read_bytes() == (new / CONFIG).read_bytes()
        if old or written != [CONFIG, WEIGHTS] or not alike:
            config.unlink(missing_ok=True)
        try:
            for name in written[1:]:
                os.replace(new / name, folder / name)
            for path in old:
                path.unlink(missing_ok=True)
            os.replace(new / CONFIG, config)
        except BaseException:
            if not config.is_file():
                for name in written[1:]:
                    if not (new / name).exists():
                        (folder / name).rename(new / name)
                new.rename(folder / f"model.unfinished-{secrets.token_hex(4)}")
            raise


def write_config(folder: Path, config: ModelConfig) -> None:
    (folder / CONFIG).write_text(json.dumps(config.to_json(), indent=2) + "\n")
