"""A published checkpoint to a folder that `minidit.load` opens, and back.

What will be written is a value, a Conversion, made before a byte is written: everything that can be wrong with names,
shapes and places is found by `prepare`. Then `Conversion.run` reads and writes one tensor at a time, in a folder beside
the one asked for, which gets its name when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidit import checkpoint, tensors
from minidit.config import ModelConfig
from minidit.presets import PRESETS
from minidit.tensors import LIMIT, SAFE, Stored
from minidit.weights.families import PUBLISHED, misfit, recognise, skeleton, upstream
from minidit.weights.rules import (
    DROPPED,
    Applied,
    Drop,
    Rename,
    Restore,
    Rule,
    apply,
    inverse,
    listed,
    present,
    reads,
    writes,
)
from minidit.weights.source import Place, locate

REPORT, SIDE = "conversion.json", f"dropped{SAFE}"
# of all names in what a torch.nn.parallel model has saved, or a compiled one, or one that is both
PREFIX = re.compile(r"((module|_orig_mod)\.)+")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK = 2**22  # bytes
Advance = Callable[[int], object]  # told the bytes done


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is going to be written, and of what."""

    source: str  # as it was asked for
    place: Place
    stored: Stored
    prefix: str  # taken off all names
    model: str  # of PUBLISHED
    config: ModelConfig
    rules: tuple[Rule, ...]  # source -> what is written
    meta: dict[str, Tensor]  # what is written: names, shapes and dtypes
    dtype: torch.dtype | None  # None: as stored
    back: bool  # to the published names
    out: Path
    limit: int  # bytes of a file

    @property
    def dropped(self) -> dict[str, str]:
        """The published names that our model has no use for, with the reason."""
        return {rule.old: rule.why for rule in self.rules if isinstance(rule, Drop)}

    @property
    def files(self) -> dict[str, int]:
        """The files of tensors that are written, and their bytes without the header."""
        main, side = _parted(self.meta)
        files = {name: [main[part] for part in parts] for name, parts in tensors.split(main, self.limit).items()}
        files |= {SIDE: list(side.values())} if side else {}
        return {name: sum(tensor.nbytes for tensor in parts) for name, parts in files.items()}

    def work(self, *, verify: bool) -> int:
        """Bytes that `run` will tell of."""
        hashed = 0 if self.back else sum(path.stat().st_size for path in self.stored.files)
        return hashed + sum(self.files.values()) + verify * self.stored.nbytes

    def run(self, *, verify: bool = False, advance: Advance = lambda _: None) -> None:
        """Write it, all or nothing. verify: read it again and compare all of it. Raises OSError or ValueError."""
        main, side = _parted(self.meta)
        made = Applied(self.rules, self.stored.tensors)
        try:
            with tensors.scratch(self.out) as folder:
                tensors.write(folder, made, main, limit=self.limit, advance=advance)
                if side:
                    tensors.write_file(folder / SIDE, made, side, advance=advance)
                if verify:
                    self._verify(folder, advance)
                if not self.back:
                    checkpoint.write_config(folder, self.config)
                    (folder / REPORT).write_text(json.dumps(self._report(advance), indent=1) + "\n")
                folder.rename(self.out)
        except OSError as error:
            if error.errno not in FULL:
                raise
            size = f"{sum(self.files.values()) / 1e6:.1f} MB"
            raise OSError(
                f"{self.out}: {error.strerror}, nothing was kept: make room for {size}, or name another disk"
            ) from error

    def _verify(self, folder: Path, advance: Advance) -> None:
        """Compare what comes back from the files with the source, bit for bit, or with its cast to another dtype."""
        side = [folder / SIDE] if (folder / SIDE).exists() else []
        again = Applied(tuple(map(inverse, self.rules)), tensors.read(checkpoint.weights(folder), *side).tensors)
        wrong = []
        for name, before in self.stored.tensors.items():
            after = again[name]
            if after.dtype not in (before.dtype, self.dtype) or not _same(after, before.to(after.dtype)):
                wrong.append(repr(name))
            advance(before.nbytes)
        if wrong:
            problem = listed("came back as other numbers", wrong)
            raise OSError(f"{self.out}: of the tensors written {problem}; nothing was kept, is the disk in order?")

    def _report(self, advance: Advance) -> dict[str, object]:
        return {
            "source": self.source,
            "revision": self.place.revision,
            "sha256": {path.name: _sha256(path, advance) for path in self.stored.files},
            "container": self.stored.container,
            "ignored": self.stored.ignored,
            "prefix": self.prefix,
            "model": self.model,
            "dtype": "as stored" if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "dropped": self.dropped,
            "rules": [{"rule": type(rule).__name__, **asdict(rule)} for rule in self.rules],
            "versions": {name: _version(name) for name in ("minidit", "safetensors", "torch")},
        }


def prepare(
    source: str,
    out: str | Path,
    *,
    model: str | None = None,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    back: bool = False,
    limit: int = LIMIT,
) -> Conversion:
    """What is to be written. Raises OSError, ValueError or ImportError, saying in one line what is wrong and where.

    source: a file, a folder or org/name on the hub; with back, a folder that was written here. model: whose key map
    (None: that of the published checkpoint with these names and shapes). config: another shape for it.
    """
    out = Path(out)
    _check_free(out)
    if model is not None and model not in PUBLISHED:
        raise ValueError(f"unknown model {model!r}: give one of {', '.join(PUBLISHED)}")
    if config and (back or not model):
        raise ValueError("a config needs a key map, give --model; and on the way back it is that of the folder")
    prefix = ""
    if back:
        folder = checkpoint.folder_of(source)
        place, config = Place(checkpoint.weights(folder)), checkpoint.load_config(folder)
        stored, model = _converted(folder, config, model)
        rules = tuple(map(inverse, PUBLISHED[model].rules(config)))
    elif (Path(source) / REPORT).is_file():
        raise ValueError(f"{source} was converted here already: --inverse goes back to the published names")
    else:
        place = locate(source)
        stored, prefix = _without_prefix(tensors.read(place.path))
        model, config = _fitting(place, stored, model, config)
        rules = PUBLISHED[model].rules(config)
    rules = present(rules, stored.meta)
    try:
        meta = _cast(apply(rules, stored.meta), rules, config, dtype)
    except ValueError as error:
        raise ValueError(f"{place.path}: {error}") from error
    return Conversion(
        source=source,
        place=place,
        stored=stored,
        prefix=prefix,
        model=model,
        config=config,
        rules=rules,
        meta=meta,
        dtype=dtype,
        back=back,
        out=out,
        limit=limit,
    )


def _check_free(out: Path) -> None:
    if not out.name:
        raise ValueError(f"{out} is no name of a new folder: give one")
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise FileExistsError(f"{out} exists: remove it, or name another folder to write")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: the folder {out.parent} does not exist")
    if out.is_mount():
        raise FileExistsError(f"{out} is where another disk is mounted: name a new folder in it")


def _without_prefix(stored: Stored) -> tuple[Stored, str]:
    found = PREFIX.match(next(iter(stored.meta), ""))
    if not found or not all(name.startswith(found[0]) for name in stored.meta):
        return stored, ""
    rules = tuple(Rename(name, name.removeprefix(found[0])) for name in stored.meta)
    return replace(stored, tensors=Applied(rules, stored.tensors), meta=apply(rules, stored.meta)), found[0]


def _fitting(place: Place, stored: Stored, model: str | None, config: ModelConfig | None) -> tuple[str, ModelConfig]:
    """The model and shape that the tensors fit. Raises ValueError, naming the tensors that do not."""
    if not model:
        try:
            model = recognise(stored.meta, place.hub)
        except ValueError as error:
            raise ValueError(f"{place.path}: {error}") from error
    config = config or PRESETS[model]
    try:
        upstream(model, config)
    except ValueError as error:
        raise ValueError(f"the config is not that of a model like {model}: {error}") from error
    if wrong := tensors.told(misfit(model, config, stored.meta)):
        raise ValueError(f"{place.path} does not fit {model}, tensors are wrong: {wrong}")
    return model, config


def _converted(folder: Path, config: ModelConfig, model: str | None) -> tuple[Stored, str]:
    """The tensors of a folder that was written here, those moved aside among them, and the model it says it is."""
    side, report = folder / SIDE, {"model": None, "dropped": {}} | _read_report(folder / REPORT)
    model = model or report["model"]
    if model not in PUBLISHED:
        raise ValueError(f"{folder}: {REPORT} names no known model, give --model, one of {', '.join(PUBLISHED)}")
    stored = tensors.read(checkpoint.weights(folder), *[side] * side.exists())
    main, moved = _parted(stored.meta)
    if wrong := tensors.told(tensors.misfits(skeleton(config).state_dict(), main)):
        raise ValueError(f"{folder}: the tensors do not fit {checkpoint.CONFIG}: {wrong}")
    if lost := listed("missing", (repr(name) for name in report["dropped"] if DROPPED + name not in moved)):
        raise FileNotFoundError(f"{side}: of the tensors that {REPORT} says were dropped, {lost}")
    return stored, model


def _read_report(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    kinds = {"model": str, "dropped": dict}
    if not isinstance(report, dict) or any(not isinstance(report.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path}: not the report of a conversion, expected an object with 'model' and 'dropped'")
    return report


def _cast(
    meta: dict[str, Tensor], rules: tuple[Rule, ...], config: ModelConfig, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """All in dtype (None: as they are) but buffers, such as frequencies, and what is moved aside."""
    buffers = {name for name, _ in skeleton(config).named_buffers()}
    kept = {
        name
        for rule in rules
        if isinstance(rule, Drop | Restore) or buffers & {*reads(rule), *writes(rule)}
        for name in writes(rule)
    }
    return {
        name: tensor.to(dtype) if name not in kept and tensor.is_floating_point() else tensor
        for name, tensor in meta.items()
    }


def _parted(meta: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the model has, and what was moved aside."""
    main = {name: tensor for name, tensor in meta.items() if not name.startswith(DROPPED)}
    return main, {name: tensor for name, tensor in meta.items() if name not in main}


def _same(one: Tensor, other: Tensor) -> bool:
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


def _sha256(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
