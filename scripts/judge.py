"""A judge of generated videos: reads colour, shape and motion off the pixels by program, with nothing learnt.

It looks for blobs that stand out from the background, follows each from frame to frame, and calls an object's colour,
shape or motion None where it is none that scripts/shapes.py can draw, or does not last. Lengths are in pixels of a
64 x 64 frame. Letters: T frames, N frames that an object is seen in, H and W rows and columns.

    python scripts/judge.py VIDEO "a red circle moves to the right"
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minidit.video import load_video
from shapes import COLOURS, SHAPES, SIZE, Actor, Scene, parse, render

CONTRAST = 0.25  # a pixel stands out whose channels differ by this from the background, of 0..1
LEAST_AREA = 14  # pixels of a blob worth a look; the smallest shape has 60
LEAST_FRAMES = 3  # an object seen in fewer is a flicker
PRESENCE = 0.9  # share of the frames that an object must be seen in
AGREEMENT = 0.7  # share of the pixels, and of the frames, that must agree on a colour or a shape
COLOUR_LIMIT = 0.45  # distance in the RGB cube beyond which a colour has no name
STEP = 12.0  # pixels that an object may move from one frame to the next
OVERLAP = 0.7  # intersection over union below which a shape has no name


@dataclass(frozen=True)
class Reading:
    """What was seen of one object; None where it is unclear or changes."""

    colour: str | None
    shape: str | None
    motion: str | None


@dataclass(frozen=True)
class Blob:
    """One object in one frame."""

    frame: int
    colour: str | None
    cover: Tensor  # (64, 64): how much of each pixel it fills, 0..1
    area: float  # pixels
    x: float
    y: float


def read(video: Tensor) -> tuple[Reading, ...]:
    """The objects in a video, uint8 (T, H, W, 3), largest first."""
    if video.dtype != torch.uint8 or video.dim() != 4 or video.shape[3] != 3 or not video.numel():
        raise ValueError(f"expected a video of uint8 (T, H, W, 3), got {video.dtype} {tuple(video.shape)}")
    pixels = _shrink(video.permute(0, 3, 1, 2).contiguous() / 255)
    tracks = [track for track in _follow(_blobs(pixels)) if len(track) >= min(LEAST_FRAMES, len(video))]
    tracks.sort(key=lambda track: -sum(blob.area for blob in track))
    return tuple(_describe(track, len(video)) for track in tracks)


def accepts(video: Tensor, wanted: Sequence[tuple[str, str, str]]) -> bool:
    """Does the video, uint8 (T, H, W, 3), show the wanted (colour, shape, motion) objects, and nothing else?"""
    return _agree(read(video), wanted)


def _agree(seen: Sequence[Reading], wanted: Sequence[tuple[str, str, str]]) -> bool:
    return Counter(seen) == Counter(Reading(*triple) for triple in wanted)


def _shrink(pixels: Tensor) -> Tensor:
    """(T, 3, H, W) -> (T, 3, 64, 64), averaging."""
    return pixels if pixels.shape[2:] == (SIZE, SIZE) else F.interpolate(pixels, (SIZE, SIZE), mode="area")


def _blobs(pixels: Tensor) -> list[list[Blob]]:
    """The blobs of every frame. pixels: (T, 3, 64, 64) in 0..1."""
    contrast = pixels - pixels.transpose(0, 1).flatten(1).median(dim=1).values[:, None, None]  # less the background
    # noise would break a blob into crumbs
    smooth = F.avg_pool2d(F.pad(contrast, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    labels = _components(smooth.abs().amax(dim=1) > CONTRAST)
    return [
        [
            _blob(frame, pixels[frame], contrast[frame], labels[frame] == label)
            for label in labels[frame].unique().tolist()
            if label and (labels[frame] == label).sum() >= LEAST_AREA
        ]
        for frame in range(len(pixels))
    ]


def _components(mask: Tensor) -> Tensor:
    """(T, H, W) bool -> int64: 0 outside; inside, a number that touching pixels of a frame share."""
    numbers = torch.arange(1, mask[0].numel() + 1, dtype=torch.float32).reshape(mask.shape[1:])
    labels, before = numbers * mask, None
    while before is None or not torch.equal(labels, before):  # the largest number floods its component
        before, labels = labels, _spread(labels) * mask
    return labels.long()


def _spread(values: Tensor) -> Tensor:
    """The largest of each 3 x 3 neighbourhood. (..., H, W), none negative. Shifts are much faster than max_pool2d."""
    wide = F.pad(values, (1, 1))
    values = torch.maximum(torch.maximum(wide[..., :-2], wide[..., 2:]), values)
    tall = F.pad(values, (0, 0, 1, 1))
    return torch.maximum(torch.maximum(tall[..., :-2, :], tall[..., 2:, :]), values)


def _blob(frame: int, pixels: Tensor, contrast: Tensor, mask: Tensor) -> Blob:
    """One component. pixels, contrast: (3, 64, 64); mask: (64, 64) bool."""
    strength = contrast.abs().amax(dim=0)
    # edges are mixed with the background, so colour is read where the blob stands out most
    core = mask & (strength >= 0.7 * strength[mask].quantile(0.9))
    hue = contrast[:, core].median(dim=1).values  # (3,)
    cover = (torch.einsum("chw,c->hw", contrast, hue) / hue.square().sum().clamp_min(1e-6)).clamp(0, 1)
    cover = cover * _spread(mask.float())  # its soft edge too, but no other blob
    area = cover.sum().clamp_min(1e-6)
    places = torch.arange(SIZE) + 0.5
    x, y = (cover.sum(0) * places).sum() / area, (cover.sum(1) * places).sum() / area
    return Blob(frame, _name_colour(pixels[:, core]), cover, area.item(), x.item(), y.item())


def _name_colour(pixels: Tensor) -> str | None:
    """The colour that most of the pixels, (3, N) in 0..1, are nearest to."""
    distances = torch.cdist(pixels.T, torch.tensor(list(COLOURS.values())))  # (N, colours)
    nearest = distances.min(dim=1)
    names = [list(COLOURS)[i] for i in nearest.indices[nearest.values < COLOUR_LIMIT].tolist()]
    return _majority(names, pixels.shape[1])


def _majority(names: Sequence[str | None], total: int) -> str | None:
    """The name that AGREEMENT of the total share, if there is one."""
    name, count = Counter(names).most_common(1)[0] if names else (None, 0)
    return name if count >= AGREEMENT * total else None


def _follow(frames: Sequence[Sequence[Blob]]) -> list[list[Blob]]:
    """Join the blobs of successive frames into tracks, the nearest pairs first; one frame may be missed."""
    tracks: list[list[Blob]] = []
    for blobs in frames:
        pairs = [(_distance(track[-1], blob), i, j) for i, track in enumerate(tracks) for j, blob in enumerate(blobs)]
        taken, joined = set(), set()
        for distance, i, j in sorted(pairs):
            if i not in taken and j not in joined and distance <= STEP and blobs[j].frame - tracks[i][-1].frame <= 2:
                tracks[i].append(blobs[j])
                taken.add(i)
                joined.add(j)
        tracks.extend([blob] for j, blob in enumerate(blobs) if j not in joined)
    return tracks


def _distance(one: Blob, other: Blob) -> float:
    return math.hypot(one.x - other.x, one.y - other.y)


def _describe(track: Sequence[Blob], frames: int) -> Reading:
    """What a track shows; nothing is clear of an object that is not there all the time."""
    if len(track) < PRESENCE * frames:
        return Reading(_majority([blob.colour for blob in track], len(track)), None, None)
    return Reading(_majority([blob.colour for blob in track], len(track)), _name_shape(track), _name_motion(track))


def _name_shape(track: Sequence[Blob]) -> str | None:
    """The shape that a blob overlaps best, if it does so well and in most frames."""
    patches = torch.stack([_normalise(blob) for blob in track])[:, None]  # (N, 1, P, P)
    templates = _templates()  # (shapes, P, P)
    overlap = torch.minimum(patches, templates).sum((2, 3)) / torch.maximum(patches, templates).sum((2, 3))
    best = overlap.max(dim=1)  # over shapes: (N,)
    names = [list(SHAPES)[i] for i in best.indices[best.values > OVERLAP].tolist()]
    return _majority(names, len(track))


def _normalise(blob: Blob) -> Tensor:
    """(32, 32): a blob's cover, seen from its centre and scaled to one area."""
    half = math.sqrt(blob.area)  # no shape reaches farther from its centre
    places = torch.linspace(-half, half, 32)
    x, y = ((centre + places) / (SIZE / 2) - 1 for centre in (blob.x, blob.y))  # as grid_sample counts: -1..1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (32, 32, 2)
    return F.grid_sample(blob.cover[None, None], grid[None], align_corners=False)[0, 0]


@cache
def _templates() -> Tensor:
    """(shapes, 32, 32): what each shape looks like to `_normalise`."""
    actors = [
        Actor(colour="white", shape=shape, motion="still", radius=10.0, centre=(SIZE / 2, SIZE / 2), extent=0.0)
        for shape in SHAPES
    ]
    videos = render([Scene(actors=(actor,), background=0.0) for actor in actors])
    blobs = [_blobs(video[:, :1].transpose(0, 1) / 2 + 0.5)[0][0] for video in videos]
    return torch.stack([_normalise(blob) for blob in blobs])


def _name_motion(track: Sequence[Blob]) -> str | None:
    """What the blob's path and size do; None for anything between two motions."""
    u = torch.tensor([blob.frame for blob in track], dtype=torch.float32)
    u = (u - u[0]) / (u[-1] - u[0]).clamp_min(1)
    path = torch.tensor([(blob.x, blob.y) for blob in track])  # (N, 2)
    growth = _slope(u, torch.tensor([math.log(blob.area) / 2 for blob in track])[:, None]).item()  # log of the factor
    spread = (path.amax(dim=0) - path.amin(dim=0)).norm().item()
    if spread < 5:
        return "grow" if growth > 0.4 else "shrink" if growth < -0.4 else "still" if abs(growth) < 0.2 else None
    if abs(growth) > 0.3:
        return None
    return _straight(u, path) or ("circle" if _is_orbit(path) else None)


def _slope(u: Tensor, values: Tensor) -> Tensor:
    """How much each column of (N, K) values changes while u, (N,), goes from 0 to 1: least squares."""
    u = u - u.mean()
    return u @ (values - values.mean(dim=0)) / u.square().sum().clamp_min(1e-6)


def _straight(u: Tensor, path: Tensor) -> str | None:
    """The direction of a path, (N, 2), that is long, straight, even and along an axis."""
    travel = _slope(u, path)  # (2,)
    errors = path - path.mean(dim=0) - (u - u.mean())[:, None] * travel
    length, error = travel.norm().item(), errors.norm(dim=1).mean().item()
    along, across = travel.abs().amax().item(), travel.abs().amin().item()
    if length < 10 or error > 0.12 * length or across > 0.4 * along:
        return None
    dx, dy = travel.tolist()
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _is_orbit(path: Tensor) -> bool:
    """Does the path, (N, 2), go around its middle once, one way, at a steady distance?"""
    middle = (path.amax(dim=0) + path.amin(dim=0)) / 2
    spokes = path - middle
    radii = spokes.norm(dim=1)
    angles = torch.atan2(spokes[:, 1], spokes[:, 0])
    turned = torch.remainder(angles.diff() + math.pi, math.tau) - math.pi
    return bool(radii.mean() > 5 and radii.std() < 0.25 * radii.mean() and 4.7 < turned.sum().abs() < 8)


def main(argv: Sequence[str] | None = None) -> int:
    """0: the video shows what the caption says; 1: it does not; 2: a mistake in the arguments."""
    parser = argparse.ArgumentParser(description="Does a video show what its caption says?")
    parser.add_argument("video", help="mp4, gif or webp")
    parser.add_argument("caption", help='such as "a red circle moves to the right"')
    arguments = parser.parse_args(argv)
    try:
        wanted = parse(arguments.caption)
        video = load_video(arguments.video)
    except (OSError, ValueError) as error:
        print(f"judge: {error}", file=sys.stderr)
        return 2
    print("asked:", "; ".join(" ".join(triple) for triple in wanted))
    seen = read(video)
    print("seen: ", "; ".join(_said(seen)) or "nothing")
    accepted = _agree(seen, wanted)
    print("accepted" if accepted else "not accepted")
    return 0 if accepted else 1


def _said(readings: Sequence[Reading]) -> Iterator[str]:
    for reading in readings:
        yield " ".join(name or "?" for name in (reading.colour, reading.shape, reading.motion))


if __name__ == "__main__":
    sys.exit(main())
