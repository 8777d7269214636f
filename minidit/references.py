"""Images and videos that a video is made around, and long videos: clips, each going on where the one before ends.

A frame mask tells the model which latent frames are given, and how much of them may change (see Sampler.integrate).
Source: hpcaitech/Open-Sora, of 1.1 scripts/inference-long.py (at 000a3f88), of 1.2 scripts/inference.py and
opensora/utils/inference_utils.py (at 0860b06b), whose mask_strategy "loop id, reference id, reference start, target
start, length, edit ratio" is a Reference here. Positions are counted in latent frames, of which Open-Sora 1.1 has one a
frame, 1.2 five to a piece of 17 frames.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from minidit.config import ModelConfig, Sampling
from minidit.video import READERS, check_video, load_video

IMAGES = (".png", ".jpg", ".jpeg", ".bmp")  # beside .webp, which may be a video


def _check_amounts(what: str, length: int | None, edit: float) -> None:
    if length is not None and length < 1:
        raise ValueError(f"the length of {what} must be 1 latent frame at least, got {length}")
    if not 0 <= edit <= 1:
        raise ValueError(f"the edit of {what} must be a share from 0 to 1, got {edit}")


@dataclass(frozen=True, eq=False)
class Reference:
    """Latents of `video` from `start` on that stand in a clip from `at` on; negative positions count from the end.

    By default an image is the first frame. Reference(image, at=-1) is the last one; Reference(video, start=-5) is a
    video's end, to be continued. Quirks that are kept: in Open-Sora 1.2, which encodes 17 frames together, start and at
    move to the nearest piece, so that an image at=-1 begins the last 17 frames, of which the rest is free; in 1.1 what
    stays is noised and moved a little in the last step (see IDDPM).
    Raises ValueError for a video of another kind and for what no clip has.
    """

    video: Tensor  # (T, H, W, 3) uint8 of any size, an image as one frame: it is resized until it fills, and cropped
    start: int = 0  # latent frame of the reference
    at: int = 0  # latent frame of the clip
    length: int | None = None  # latent frames; None, or more than there are: as many as fit
    edit: float = 0.0  # what is given changes, too, once t is at most 1000 * edit; 0: it stays
    clip: int = 0  # of a loop

    def __post_init__(self) -> None:
        check_video(self.video, "a reference's video")
        _check_amounts("a reference", self.length, self.edit)
        if self.clip < 0:
            raise ValueError(f"a reference's clip must be 0, the first one, or more, got {self.clip}")


@dataclass(frozen=True)
class Loop:
    """Clips, each beginning with the last latents of the one before, of which the video has one copy."""

    clips: int = 1
    length: int | None = None  # latent frames handed on; None: a piece, or 4 of Open-Sora 1.1, as in the originals
    edit: float = 0.0  # see Reference

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ValueError(f"a loop has 1 clip at least, got {self.clips}")
        _check_amounts("a loop", self.length, self.edit)


ONCE = Loop()


class Span(NamedTuple):
    """Where latents come from and go to."""

    start: int
    at: int
    length: int
    edit: float


class Encodes(Protocol):
    def encode(self, video: Tensor) -> Tensor: ...


def piece(run: Sampling) -> int:
    """Latent frames that are encoded together, without what lies before and behind: the original's `align`."""
    return ceil((run.chunk or run.frames) / run.time)


def latent_frames(run: Sampling, frames: int) -> int:
    return run.latent_size(frames, run.height, run.width)[0]


def nearest(position: int, step: int, size: int) -> int:
    """The multiple of step next to a position in 0..size - 1, of those with a whole step behind them.

    The one before for what lies half way. Source: inference_utils.py find_nearest_point.
    """
    steps, rest = divmod(position, step)
    return step * (steps + (2 * rest > step and steps < size // step - 1))


def span(reference: Reference, run: Sampling) -> Span:
    """Source: inference_utils.py apply_mask_strategy. Raises ValueError for a position outside."""
    have, room, step = latent_frames(run, len(reference.video)), latent_frames(run, run.frames), piece(run)
    for name, position, size in (("start", reference.start, have), ("at", reference.at, room)):
        if not -size <= position < size:
            of = "the reference" if name == "start" else "a clip"
            raise ValueError(f"{name}={position} is not in {-size}..{size - 1}: {of} has {size} latent frames")
    start, at = nearest(reference.start % have, step, have), nearest(reference.at % room, step, room)
    return Span(start, at, min(reference.length or have, have - start, room - at), reference.edit)


def edits(spans: Iterable[Span], frames: int) -> list[float]:
    """Of each latent frame of a clip, 1 where nothing is given. What comes later counts where spans overlap."""
    values = [1.0] * frames
    for _, at, length, edit in spans:
        values[at : at + length] = [edit] * length
    return values


def handed_on(loop: Loop, run: Sampling) -> int:
    """Latent frames that a clip of a loop begins with."""
    return loop.length or max(piece(run), 4)


def repeated(loop: Loop, run: Sampling) -> int:
    """Frames of a clip that the one before has, too. Source: inference_utils.py dframe_to_frame."""
    return handed_on(loop, run) // piece(run) * (run.chunk or run.frames)


def spans(references: Sequence[Reference], loop: Loop, clip: int, run: Sampling) -> list[Span]:
    """Of a clip: its references, and what the one before hands on, which counts where both are."""
    found = [span(reference, run) for reference in references if reference.clip == clip]
    return [*found, *[Span(0, 0, handed_on(loop, run), loop.edit)] * (clip > 0)]


def check(references: Sequence[Reference], loop: Loop, config: ModelConfig) -> None:
    """Raises ValueError for what config.sampling cannot be made around, or looped; nothing is encoded."""
    if not references and loop.clips == 1:
        return
    run = config.sampling
    room, step = latent_frames(run, run.frames), piece(run)
    if not config.frame_masks:
        raise ValueError(
            "this model was not trained with frame masks and would make what it likes beside the given frames: "
            "references and loops are for Open-Sora 1.1 and 1.2"
        )
    if loop.clips > 1:
        length = handed_on(loop, run)
        if length % step or length >= room:
            raise ValueError(
                f"a loop hands on a multiple of {step} latent frames, fewer than a clip's {room}, got {length}: "
                "give longer clips, or another length"
            )
        if run.chunk and run.frames % run.chunk:
            raise ValueError(f"clips of a loop have a multiple of {run.chunk} frames, got {run.frames}")
    for reference in references:
        if reference.clip >= loop.clips:
            raise ValueError(f"a reference is of clip {reference.clip}, but the last one is {loop.clips - 1}")
    for clip in range(loop.clips):
        if not any(edits(spans(references, loop, clip, run), room)):
            raise ValueError(
                f"references leave none of the {room} latent frames to be made: give them a length or start, as "
                "start=-1 to continue a video, or an edit above 0"
            )


def encoded(reference: Reference, encoder: Encodes, run: Sampling) -> Tensor:
    """Latents (C, length, h, w), float32, of the pieces that are needed. Original: drawn from around these means."""
    start, _, length, _ = span(reference, run)
    step, frames = piece(run), run.chunk or run.frames
    video = reference.video[start // step * frames :][: ceil(length / step) * frames]
    _, rows, columns = run.latent_size(run.frames, run.height, run.width)
    # what is left over on the right and below has no latent
    video = fitted(video, run.height, run.width)[:, :, : rows * run.space, : columns * run.space]
    return encoder.encode(video)[:, :length]


def passed_on(videos: Tensor, loop: Loop, encoder: Encodes, run: Sampling) -> Tensor:
    """The last latents (B, C, length, h, w) of clips (B, T, H, W, 3) uint8, for the next ones to begin with.

    Source: inference_utils.py append_generated, which, too, encodes what has been decoded, but before it is
    rounded to whole numbers, and all of it.
    """
    ends = videos[:, -repeated(loop, run) :].permute(0, 4, 1, 2, 3) / 127.5 - 1
    return torch.stack([encoder.encode(end) for end in ends])


def given(z: Tensor, spans: Sequence[Span], latents: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Noise z (B, C, T, h, w) with latents (C, length, h, w) or (B, C, ...) in it, and the frame mask (B, T)."""
    if not spans:
        return z, None
    z = z.clone()
    for (_, at, length, _), part in zip(spans, latents, strict=True):
        z[:, :, at : at + length] = part
    mask = torch.tensor(edits(spans, z.shape[2]), device=z.device)
    return z, mask.expand(len(z), -1)


def fitted(video: Tensor, height: int, width: int) -> Tensor:
    """(T, H, W, 3) uint8 -> (3, T, height, width), -1 to 1: resized until it fills, and its middle taken.

    An image by PIL's bicubic, a video bilinear and without smoothing, however small it becomes, as the original.
    Source: opensora/datasets/utils.py (at 000a3f88) and video_transforms.py (at 0918e4bc), resize_crop_to_fill.
    """
    scale = max(height / video.shape[1], width / video.shape[2])
    rows, columns = round(scale * video.shape[1]), round(scale * video.shape[2])
    if len(video) == 1:
        image = Image.fromarray(video[0].numpy()).resize((columns, rows), Image.Resampling.BICUBIC)
        full = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, None] / 255
        top, left = round((rows - height) / 2), round((columns - width) / 2)
    else:
        frames = F.interpolate(video.permute(0, 3, 1, 2) / 255, (rows, columns), mode="bilinear", align_corners=False)
        full = frames.transpose(0, 1)
        top, left = (rows - height) // 2, (columns - width) // 2
    return 2 * full[:, :, top : top + height, left : left + width] - 1


def read(text: str) -> Reference:
    """Of "FILE", or "FILE@at=-1,length=5" with fields of a Reference. Raises OSError or ValueError."""
    name, fields = _fields(text, "start", "at", "length", "edit", "clip")
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such image or video, which a reference is")
    if path.suffix.lower() in READERS:
        return Reference(load_video(path), **fields)  # type: ignore[arg-type]
    if path.suffix.lower() not in IMAGES:
        raise ValueError(f"{name}: a reference is one of {', '.join((*IMAGES, *READERS))}; convert it first")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
            upright = Image.fromarray((np.asarray(upright) / 257).round().clip(0, 255).astype(np.uint8))
        pixels = np.array(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is not a whole image: {error}") from error
    return Reference(torch.from_numpy(pixels)[None], **fields)  # type: ignore[arg-type]


def read_loop(text: str) -> Loop:
    """Of "3", or "3@length=10,edit=0.2". Raises ValueError."""
    clips, fields = _fields(text, "length", "edit")
    if not re.fullmatch(r"\d{1,4}", clips):
        raise ValueError(f"a loop is a number of clips from 1 to 9999, got {clips!r}")
    return Loop(int(clips), **fields)  # type: ignore[arg-type]


def _fields(text: str, *known: str) -> tuple[str, dict[str, int | float]]:
    """What stands before the last @, and the numbers behind it by their names."""
    found = re.fullmatch(r"(.+)@([^@]*=[^@]*)", text, re.DOTALL)
    if not found:
        return text, {}
    fields: dict[str, int | float] = {}
    for field in found[2].split(","):
        name, _, value = field.partition("=")
        number = r"\d+(\.\d*)?|\.\d+" if name == "edit" else r"-?\d{1,9}"
        if name not in known or not re.fullmatch(number, value):
            raise ValueError(f"{text}: behind the @ are {', '.join(known)}, =, and a number, whole but for edit's")
        fields[name] = float(value) if name == "edit" else int(value)
    return found[1], fields
