"""Draw the pictures of the documentation: a sheet of samples, and the loss curve. Needs minidit[plots].

    python scripts/figures.py samples --out docs/samples.png
    python scripts/figures.py loss weights/tiny/losses.json --out weights/tiny/loss.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import minidit
from minidit.video import sheet

CAPTIONS = (
    "a red circle moves to the right",
    "the yellow star is going around in a circle",
    "a small green square falls",
    "a blue triangle gets bigger",
    "one orange star glides from right to left",
    "a big purple circle shrinks",
    "a white triangle rises",
    "a cyan square does not move",
)


def samples(out: Path, seed: int) -> None:
    """One video of each of CAPTIONS, as generate makes it: PAB_246 and one seed for all, none picked."""
    model = minidit.load("tiny")
    videos = [minidit.generate(model, caption, seed=seed)[0] for caption in CAPTIONS]
    sheet(videos, CAPTIONS).save(out)


def loss(curve: Path, out: Path) -> None:
    from matplotlib import pyplot  # an extra: only this picture needs it

    stages = json.loads(curve.read_text())
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    before = 0
    for name, points in stages.items():
        axes.plot([before + step for step, _ in points], [value for _, value in points], label=name)
        before += points[-1][0]
    axes.set(yscale="log", xlabel="step", ylabel="loss of the velocity")
    axes.legend()
    figure.savefig(out, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("samples", "loss"))
    parser.add_argument("curve", nargs="?", type=Path, help="of loss: a JSON of stage -> [[step, loss], ...]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.what == "samples":
        samples(args.out, args.seed)
    elif args.curve is None:
        parser.error("loss needs the file of the curve")
    else:
        try:
            loss(args.curve, args.out)
        except ImportError as error:
            parser.error(f"{error}: pip install 'minidit[plots]'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
