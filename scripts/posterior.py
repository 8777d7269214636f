"""How near the embedded model comes to the best prediction that there is, by diffusion time.

    python scripts/posterior.py      # three minutes on two CPU cores; 4 GB of memory

Its videos are drawn by program, so the best prediction of a noised video can be computed: the mean of all scenes that
the caption may mean, weighted by how likely each of them makes what is seen. A sample stands for all scenes. As long as
many of them share the weight, its error is that of the best; where few do (the last column), the best is better still.
Where there is little noise, none but scenes near the true one are likely, and the sample is of those: within so many
pixels of it, in the second column. Such a sample knows more than there is to know: where scenes farther away are
likely, too, its best is too good. At t = 0.94, which is shown in both ways, the truth lies between them.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import minidit
import shapes
from shapes import GREYS, MARGIN, RADII, SIZE, SPANS, Scene

CAPTION, TRIPLE, SMALL = "a little orange square is moving to the right", ("orange", "square", "right"), "small"
# diffusion times, of 1, and how near scenes are to the true one, in pixels; None: all
TIMES: tuple[tuple[float, float | None], ...] = (
    *((0.997, None), (0.99, None), (0.98, None), (0.97, None), (0.96, None), (0.95, None)),
    *((0.94, None), (0.94, 5.0), (0.92, 3.5), (0.9, 2.5), (0.87, 2.0), (0.83, 1.5)),
)
BATCH = 200  # scenes drawn at a time


class Sample(NamedTuple):
    """Videos that stand for all that there may be."""

    videos: Tensor  # (N, 3, T, H, W)
    log_weights: Tensor  # (N,): how many there may be for each, but for a factor


class Row(NamedTuple):
    """Mean squared errors of what is predicted, of the data's -1..1, at a time."""

    t: float
    model: float
    best: float
    sharing: float  # scenes that share the weight, were it shared evenly


def scenes(count: int, seed: str) -> list[Scene]:
    """That CAPTION may mean, each as likely as another."""
    rng = random.Random(seed)
    found = list[Scene]()
    while len(found) < count:
        scene = shapes.scene(rng, [TRIPLE])
        if scene.actors[0].size == SMALL:
            found.append(scene)
    return found


def drawn(scenes: Sequence[Scene]) -> Tensor:
    """Videos (N, 3, T, H, W)."""
    return torch.cat([shapes.render(scenes[i : i + BATCH]) for i in range(0, len(scenes), BATCH)])


def sample(scenes: Sequence[Scene]) -> Sample:
    """Of scenes that are each as likely as another."""
    return Sample(drawn(scenes), torch.zeros(len(scenes)))


def near(true: Scene, far: float, count: int, seed: str) -> Sample:
    """Of scenes like a true one: x and y of its middle, and its radius, differ by at most so many pixels.

    The length of its path differs by at most twice as much, and the grey behind it by a fiftieth.
    """
    (actor,), rng = true.actors, random.Random(seed)
    found, logs = list[Scene](), list[float]()

    def number(middle: float, far: float, span: tuple[float, float]) -> float:
        return rng.uniform(max(span[0], middle - far), min(span[1], middle + far))

    while len(found) < count:
        radius, extent = number(actor.radius, far, RADII[SMALL]), number(actor.extent, 2 * far, SPANS[1])
        edges = (radius + MARGIN + extent / 2, radius + MARGIN)  # as in shapes: the least that the middle keeps away
        rooms = [
            (max(edge, middle - far), min(SIZE - edge, middle + far))
            for edge, middle in zip(edges, actor.centre, strict=True)
        ]
        if any(first >= last for first, last in rooms):  # with this path there is none so near
            continue
        centre = (rng.uniform(*rooms[0]), rng.uniform(*rooms[1]))
        moved = replace(actor, radius=radius, centre=centre, extent=extent)
        found.append(Scene(actors=(moved,), background=number(true.background, far / 50, GREYS)))
        logs.append(sum(math.log((b - a) / (SIZE - 2 * edge)) for (a, b), edge in zip(rooms, edges, strict=True)))
    return Sample(drawn(found), torch.tensor(logs))


def best(z: Tensor, t: float, known: Sample) -> tuple[Tensor, float]:
    """The posterior mean of the data, if it is of the known; and how many of those share the weight.

    z: (B, 3, T, H, W), (1 - t) data + t noise.
    """
    flat, a = known.videos.flatten(1), 1 - t
    logits = (a * (z.flatten(1) @ flat.T) - a * a / 2 * flat.square().sum(1)) / t**2  # (B, N)
    weights = (logits + known.log_weights).softmax(1)
    return (weights @ flat).view_as(z), (1 / weights.square().sum(1)).mean().item()


@torch.inference_mode()
def measure(
    model: minidit.DiT, known: Sample, true: Sequence[Scene], times: Sequence[tuple[float, float | None]], nearby: int
) -> list[Row]:
    """known: of all scenes; true: those that are noised, alike at all times; nearby: scenes of a sample near one."""
    run, count, data = model.config.sampling, len(true), drawn(true)
    assert model.encoder is not None and run.prediction == "sample"
    text, lengths = model.encoder(model.encoder.tokenize([CAPTION] * count))
    latent = (data.shape[2], data.shape[3], data.shape[4])
    fps = torch.full((count,), float(run.fps))
    cond = model.prepare(text, lengths, latent=latent, height=run.height, width=run.width, fps=fps)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for t, far in times:
        z = (1 - t) * data + t * noise
        if far is None:
            ideal, sharing = best(z, t, known)
        else:
            each = [best(z[i : i + 1], t, near(scene, far, nearby, str(i))) for i, scene in enumerate(true)]
            ideal, sharing = torch.cat([mean for mean, _ in each]), sum(shared for _, shared in each) / count
        model_error, best_error = ((x - data).square().mean().item() for x in (model(z, 1000 * t, cond), ideal))
        rows.append(Row(t, model_error, best_error, sharing))
        where, more = "all" if far is None else f"{far:g}", model_error / best_error - 1
        print(f"{t:<8.3f}{where:<8}{model_error:<10.5f}{best_error:<10.5f}{more:<+10.1%}{sharing:.0f}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--scenes", type=int, default=4000, help="of the sample of all")
    parser.add_argument("--nearby", type=int, default=500, help="of a sample near a scene")
    parser.add_argument("--videos", type=int, default=16, help="that are noised and predicted")
    args = parser.parse_args(argv)
    model = minidit.load(args.model, dtype=torch.float32)
    print(f"{CAPTION}: mean squared error of predicted videos")
    print(f"{'t':<8}{'near':<8}{'model':<10}{'best':<10}{'more':<10}sharing")
    known, true = sample(scenes(args.scenes, "known")), scenes(args.videos, "data")
    measure(model, known, true, TIMES, args.nearby)
    return 0


if __name__ == "__main__":
    sys.exit(main())
