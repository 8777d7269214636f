"""The videos that a list or a file of captions asks for, by number: which are still to make, where, with what seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Job(NamedTuple):
    """A video to make."""

    caption: str
    out: Path
    seed: int


def numbered(captions: str | Path | Sequence[str]) -> dict[int, str]:
    """Captions by their number, from 0: one, several, or those of a file's lines, of which empty ones are none.

    Raises OSError or ValueError for a file that cannot be read or has none.
    """
    if isinstance(captions, str):
        return {0: captions}
    if not isinstance(captions, Path):
        if not captions:
            raise ValueError("no caption is given: give one, or a list of them")
        return dict(enumerate(captions))
    try:
        lines = captions.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{captions}: {error}: give a text file, UTF-8, a caption a line") from error
    if not (found := {i: line.strip() for i, line in enumerate(lines) if line.strip()}):
        raise ValueError(f"{captions} has no caption in it: write one a line")
    return found


def jobs(captions: Path | Sequence[str], folder: str | Path, *, kind: str = "mp4", seed: int = 0) -> list[Job]:
    """The videos that are not in the folder yet, which is made: caption i as 000i.mp4, from the noise of seed + i.

    captions: a list, or a file of a caption a line, where i counts all lines, from 0, empty ones too. Whatever is there
    already, each has the same name and seed, so that a run that was interrupted is taken up by running it again;
    `save_video` leaves no half of a file. Raises OSError or ValueError for a file that cannot be read and a folder that
    cannot be made.
    """
    folder, every = Path(folder), numbered(captions)
    folder.mkdir(exist_ok=True)
    made = [Job(caption, folder / f"{i:04}.{kind}", seed + i) for i, caption in every.items()]
    return [job for job in made if not job.out.exists()]
