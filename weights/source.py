"""Where a published checkpoint is: a file, a folder that holds one, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minidit.tensors import INDEX, PICKLED, SAFE

ENDINGS = (SAFE, INDEX, *PICKLED)
FOLDERS = ("transformer", "model")  # where diffusers and training scripts keep what we want


@dataclass(frozen=True)
class Place:
    path: Path  # of the one file, or of the index of several
    hub: str | None = None  # org/name/path/file
    revision: str | None = None  # of the hub's repository, a commit


def locate(source: str) -> Place:
    """Fetches what is on the hub and not in its cache. Raises OSError, ValueError or ImportError."""
    path = Path(source)
    if path.exists():
        return Place(find(path))
    name = on_hub(source)
    if not name or path.suffix in ENDINGS and not name.inside:
        raise FileNotFoundError(f"{source} does not exist: expected a file, a folder, or org/name on the hub")
    folder = _fetch(source, name.repository, name.inside)
    try:
        path = find(folder / name.inside)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} on the hub: {error}; {name.hint}") from error
    return Place(path, f"{name.repository}/{path.relative_to(folder).as_posix()}", folder.name)


class Name(NamedTuple):
    """What is on the Hugging Face hub."""

    repository: str  # org/name
    inside: str  # a path in it; "": all of it

    @property
    def hint(self) -> str:
        return f"a file or folder in it is named as {self.repository}/PATH"


def on_hub(source: str) -> Name | None:
    """org/name or org/name/path, unless it can be none of the hub or begins with a folder that is here."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", source)
    return None if not found or Path(Path(source).parts[0]).exists() else Name(found[1], found[2] or "")


def fetch(source: str, repository: str, wanted: Sequence[str], *, but: str | None = None) -> Path:
    """The repository's folder in the hub's cache, with the files of these patterns; without a network, those there.

    Raises FileNotFoundError, saying why it could not be had, and ImportError where huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        problem = f"{source} does not exist here, and to look for it on the hub needs huggingface_hub"
        raise ImportError(problem, name="huggingface_hub") from error
    try:
        return Path(snapshot_download(repository, allow_patterns=list(wanted), ignore_patterns=but))
    except Exception as error:  # a connection can fail in any way, as an error of httpx, which is no OSError, too
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(f"{source} does not exist, and could not be had from the hub: {reason}") from error


def find(path: Path) -> Path:
    """The path, or the one checkpoint in that folder. Raises FileNotFoundError, or ValueError for several."""
    if not path.is_dir():
        if not path.name.endswith(ENDINGS):
            raise ValueError(f"{path}: expected a file that ends in one of {', '.join(ENDINGS)}")
        return path
    found = _checkpoints(path)
    if not found:
        below, endings = ", ".join(f"{folder}/" for folder in FOLDERS), ", ".join(ENDINGS)
        raise FileNotFoundError(f"{path} holds no checkpoint, itself or in {below}: no file ends in one of {endings}")
    if len(found) > 1:
        names = ", ".join(file.relative_to(path).as_posix() for file in found)
        raise ValueError(f"{path} holds {len(found)} checkpoints, name one of them: {names}")
    return found[0]


def _checkpoints(path: Path) -> list[Path]:
    files = [file for folder in (path, *(path / name for name in FOLDERS)) for file in sorted(folder.glob("*"))]
    found = [file for file in files if file.name.endswith(ENDINGS)]
    sharded = {file.parent / file.name.removesuffix(INDEX) for file in found if file.name.endswith(INDEX)}
    return [file for file in found if file.parent / re.sub(r"-\d+-of-\d+\.safetensors$", "", file.name) not in sharded]


def _fetch(source: str, repository: str, inside: str) -> Path:
    """The repository's folder in the local cache, with the weights in that place or else in its FOLDERS."""

    def weights(*folders: str, but: str | None = None) -> Path:
        wanted = [f"{folder}*{ending}" for folder in folders for ending in ENDINGS] + [inside] * bool(inside)
        return fetch(source, repository, wanted, but=but)

    base = f"{inside}/" if inside else ""
    folder = weights(base, but=f"{base}*/*")  # a * of the hub stands for folders, too
    found = (folder / inside).is_file() or _checkpoints(folder / inside)
    return folder if found else weights(*(f"{base}{name}/" for name in FOLDERS))
