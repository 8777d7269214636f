"""How near the embedded model comes to the best prediction that there is, by diffusion time.

    python scripts/posterior.py      # a minute on two CPU cores; 4 GB of memory

Its videos are drawn by program, so the best prediction of a noised video can be computed: the mean of all scenes that
the caption may mean, weighted by how likely each of them makes what is seen. A sample stands for all scenes. As long as
many of them share the weight, its error is that of the best; where few do (the last column), the best is better still.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import minidit
import shapes

CAPTION, TRIPLE, SIZE = "a little orange square is moving to the right", ("orange", "square", "right"), "small"
TIMES = (0.997, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94)  # of 1: below, a sample is too coarse
BATCH = 200  # scenes drawn at a time


class Row(NamedTuple):
    """Mean squared errors of what is predicted, of the data's -1..1, at a time."""

    t: float
    model: float
    best: float
    sharing: float  # scenes that share the weight, were it shared evenly


def scenes(count: int, seed: str) -> Tensor:
    """Videos (count, 3, T, H, W) of scenes that CAPTION may mean."""
    rng = random.Random(seed)
    found = list[shapes.Scene]()
    while len(found) < count:
        scene = shapes.scene(rng, [TRIPLE])
        if scene.actors[0].size == SIZE:
            found.append(scene)
    return torch.cat([shapes.render(found[i : i + BATCH]) for i in range(0, count, BATCH)])


def best(z: Tensor, t: float, known: Tensor) -> tuple[Tensor, float]:
    """The posterior mean of the data, if it is one of the known; and how many of those share the weight.

    z: (B, 3, T, H, W), (1 - t) data + t noise; known: (N, 3, T, H, W), each as likely as another.
    """
    flat, a = known.flatten(1), 1 - t
    logits = (a * (z.flatten(1) @ flat.T) - a * a / 2 * flat.square().sum(1)) / t**2  # (B, N)
    weights = logits.softmax(1)
    return (weights @ flat).view_as(z), (1 / weights.square().sum(1)).mean().item()


@torch.inference_mode()
def measure(model: minidit.DiT, known: Tensor, data: Tensor, times: Sequence[float]) -> list[Row]:
    """known, data: see scenes. The noise is the same at all times."""
    run, count = model.config.sampling, len(data)
    assert model.encoder is not None and run.prediction == "sample"
    text, lengths = model.encoder(model.encoder.tokenize([CAPTION] * count))
    latent = (data.shape[2], data.shape[3], data.shape[4])
    fps = torch.full((count,), float(run.fps))
    cond = model.prepare(text, lengths, latent=latent, height=run.height, width=run.width, fps=fps)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for t in times:
        z = (1 - t) * data + t * noise
        ideal, sharing = best(z, t, known)
        model_error, best_error = ((x - data).square().mean().item() for x in (model(z, 1000 * t, cond), ideal))
        rows.append(Row(t, model_error, best_error, sharing))
        more = model_error / best_error - 1
        print(f"{t:<8.3f}{model_error:<10.5f}{best_error:<10.5f}{more:<+10.1%}{sharing:.0f}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--scenes", type=int, default=4000, help="of the sample")
    parser.add_argument("--videos", type=int, default=16, help="that are noised and predicted")
    args = parser.parse_args(argv)
    model = minidit.load(args.model, dtype=torch.float32)
    print(f"{CAPTION}: mean squared error of predicted videos\n{'t':<8}{'model':<10}{'best':<10}{'more':<10}sharing")
    measure(model, scenes(args.scenes, "known"), scenes(args.videos, "data"), TIMES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
