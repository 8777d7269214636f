"""Tensors in files: found by name, mapped into memory, checked against those expected, written one at a time."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minidit.weights.rules import listed, shown

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # as safetensors calls them
DTYPES = {code: dtype for dtype, code in CODES.items()}
SAFE, INDEX, PICKLED = ".safetensors", ".safetensors.index.json", (".pt", ".pth", ".ckpt")
CONTAINERS = ("ema", "model", "state_dict")  # where a .pt file may keep the tensors: the first of these that is there
LIMIT = 5 * 10**9  # bytes of a file, as on the Hugging Face hub


@dataclass(frozen=True)
class Stored:
    """The tensors of a checkpoint's files. Looking one up maps it into memory; it is read when it is used."""

    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    meta: dict[str, Tensor]  # their shapes and dtypes
    container: str = ""  # of a .pt file: "ema", "model.state_dict" and the like, where the tensors were
    ignored: tuple[str, ...] = ()  # and what was beside them

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.meta.values())


def read(*paths: Path, device: str | torch.device = "cpu") -> Stored:
    """One .pt file, or as one checkpoint: .safetensors files and the indices of such.

    Raises OSError or ValueError, naming the file. A file with code in it is refused, and the code not run.
    """
    if paths[0].suffix in PICKLED:
        return _read_archive(paths[0])
    indices = {path: _read_index(path) for path in paths if path.name.endswith(INDEX)}
    files = [file for path in paths for file in (sorted(set(indices[path].values())) if path in indices else [path])]
    handles = {file: _open(file, device) for file in files}
    places: dict[str, Path] = {}
    for file, handle in handles.items():
        if twice := places.keys() & set(handle.keys()):
            raise ValueError(f"{file}: {listed('stored in another file, too', map(repr, sorted(twice)))}")
        places |= dict.fromkeys(handle.keys(), file)
    for path, index in indices.items():
        _check_index(path, index, places)
    meta = {name: _meta(file, handles[file], name) for name, file in places.items()}
    return Stored((*indices, *files), _Mapped({name: handles[file] for name, file in places.items()}), meta)


class _Mapped(Mapping[str, Tensor]):
    def __init__(self, handles: dict[str, Any]) -> None:
        self.handles = handles

    def __getitem__(self, name: str) -> Tensor:
        return self.handles[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.handles)

    def __len__(self) -> int:
        return len(self.handles)


def _check_readable(path: Path) -> None:
    """Raises OSError for what is no file, or may not be read: the libraries say other things of it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    path.open("rb").close()


def _open(file: Path, device: str | torch.device) -> Any:
    _check_readable(file)
    try:
        return safe_open(file, "pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}): copy or fetch it again") from error


def _meta(file: Path, handle: Any, name: str) -> Tensor:
    found = handle.get_slice(name)
    if found.get_dtype() not in DTYPES:
        raise ValueError(f"{file}: {name!r} is of dtype {found.get_dtype()}, expected one of {', '.join(DTYPES)}")
    return torch.empty(found.get_shape(), dtype=DTYPES[found.get_dtype()], device="meta")


def _read_index(path: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it, which exists."""
    try:
        names = json.loads(path.read_text())["weight_map"]
        files = {tensor: path.parent / Path(file).name for tensor, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index, expected {{'weight_map': {{tensor: file}}}}: {error!r}") from error
    gone = {repr(names[tensor]) for tensor, file in files.items() if file.name != names[tensor] or not file.is_file()}
    if gone or not files:
        problem = listed("that are not there", sorted(gone)) or "none"
        raise FileNotFoundError(f"{path}: expected the names of files beside it, got {problem}: fetch all of them")
    return files


def _check_index(path: Path, index: Mapping[str, Path], places: Mapping[str, Path]) -> None:
    stored = {name: file for name, file in places.items() if file in index.values()}
    problems = [
        listed("not in the file it names", (repr(name) for name, file in index.items() if stored.get(name) != file)),
        listed("in its files alone", (repr(name) for name in stored if name not in index)),
    ]
    if any(problems):
        raise ValueError(f"{path}: the index and its files differ, tensors are {'; '.join(filter(None, problems))}")


def _read_archive(path: Path) -> Stored:
    """What torch.save has written: the tensors of a dictionary, itself in CONTAINERS or not."""
    _check_readable(path)
    try:
        # a record of options, which training scripts like to save; it holds no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"loading it would call {code[1]}" if code else "it holds more than tensors"
        raise ValueError(f"{path}: refused, {what}. Save its tensors alone, better as {SAFE}") from error
    except Exception as error:  # a broken file can fail in any way, as OSError, too
        old = "torch.save of before version 1.6 wrote it, or" if "mmap can only be used" in str(error) else ""
        reason = f"{old} it is cut off or something else: copy or fetch it again, or torch.save it anew".strip()
        raise ValueError(f"{path}: not a whole file of torch.save, {reason}") from error
    inside: list[str] = []
    ignored: list[str] = []
    while isinstance(tree, dict) and (key := next((k for k in CONTAINERS if isinstance(tree.get(k), dict)), None)):
        ignored += [".".join([*inside, str(other)]) for other in tree if other != key]
        inside.append(key)
        tree = tree[key]
    place = f"{path}: {'.'.join(inside) or 'the file'}"
    if not isinstance(tree, dict):
        raise ValueError(f"{place} holds one {type(tree).__name__}, expected a dictionary of tensors")
    others = [f"{name!r} ({type(value).__name__})" for name, value in tree.items() if not _plain(name, value)]
    if others or not tree:
        problem = listed("others", others) or "nothing"
        raise ValueError(f"{place} should hold tensors, by name, or one of {', '.join(CONTAINERS)}, got {problem}")
    tensors = {name: tensor.detach() for name, tensor in tree.items()}
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return Stored((path,), tensors, meta, ".".join(inside), tuple(ignored))


def _plain(name: Any, value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    return dense and isinstance(name, str) and value.dtype in CODES


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What is wrong with the tensors found, by kind. Any dtype of floating point fits any other."""
    both = [(name, expected[name], found[name]) for name in expected if name in found]
    return {
        "missing": [shown(name, expected[name]) for name in expected if name not in found],
        "unknown": [shown(name, found[name]) for name in found if name not in expected],
        "misshapen": [f"{shown(name, b)} expected {tuple(a.shape)}" for name, a, b in both if a.shape != b.shape],
        "not of floating point": [
            f"{name!r} {b.dtype}" for name, a, b in both if a.is_floating_point() and not b.is_floating_point()
        ],
    }


def told(wrong: Mapping[str, Sequence[str]]) -> str:
    """The misfits in one line, counted, the first ten of each kind by name; '' if there are none."""
    return "; ".join(filter(None, (listed(kind, names) for kind, names in wrong.items())))


def split(meta: Mapping[str, Tensor], limit: int = LIMIT) -> dict[str, list[str]]:
    """File -> its tensors, in order: model.safetensors, or several files of at most limit bytes, or of one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in meta.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {f"model{SAFE}": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}{SAFE}": names for i, names in enumerate(shards, 1)}


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Tensor],
    *,
    limit: int = LIMIT,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the tensors that meta names, in its dtypes, as `split` says, with an index if there are several files.

    No more than one tensor is in memory at a time. advance: told the bytes of each tensor that was written.
    """
    files = split(meta, limit)
    for file, names in files.items():
        write_file(folder / file, tensors, {name: meta[name] for name in names}, advance=advance)
    if len(files) > 1:
        index = {"total_size": sum(tensor.nbytes for tensor in meta.values())}
        places = {name: file for file, names in files.items() for name in names}
        (folder / f"model{INDEX}").write_text(json.dumps({"metadata": index, "weight_map": places}, indent=2) + "\n")


def write_file(
    path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Tensor], *, advance: Callable[[int], object]
) -> None:
    # save_file of safetensors wants all of them in memory. Wide dtypes first, as it does: each is aligned then
    meta = dict(sorted(meta.items(), key=lambda item: -item[1].itemsize))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in meta.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, like in meta.items():
            data = cast(name, tensors[name], like.dtype)
            assert data.shape == like.shape
            file.write(data.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            advance(like.nbytes)


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Raises ValueError for a number that becomes infinite."""
    data = tensor.to(dtype)
    if data is not tensor and (large := data.isinf()).any() and (large & ~tensor.isinf()).any():
        raise ValueError(f"{name!r} has numbers too large for {str(dtype).removeprefix('torch.')}: take bfloat16")
    return data


@contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """A new folder, to fill and then to move or empty to where the path is; gone at the end, whatever happens."""
    # not the process alone: in containers they have equal numbers
    folder = beside.with_name(f".{beside.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
