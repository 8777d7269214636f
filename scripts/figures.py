"""Draw the pictures of the documentation: samples, the loss curve, the benchmarks. All but samples: minidit[plots].

python scripts/figures.py samples --out docs/samples.png
python scripts/figures.py loss weights/tiny/losses.json --out weights/tiny/loss.png
python scripts/figures.py kernels benchmarks/kernels.json --out docs/kernels.svg
python scripts/figures.py steps benchmarks/steps.json --out docs/steps.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


def loss(stages: Any, out: Path) -> None:
    from matplotlib import pyplot  # an extra: only some pictures need it

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    before = 0
    for name, points in stages.items():
        axes.plot([before + step for step, _ in points], [value for _, value in points], label=name)
        before += points[-1][0]
    axes.set(yscale="log", xlabel="step", ylabel="loss of the velocity")
    axes.legend()
    figure.savefig(out, dpi=120)


def kernels(measured: Any, out: Path) -> None:
    """A small bar chart a case: ours, PyTorch's, attention alone; a line where the floor is."""
    from matplotlib import pyplot

    from bench_kernels import best

    columns = 3
    lines = -(-len(measured["rows"]) // columns)
    pyplot.rcParams["svg.hashsalt"] = "minidit"  # equal figures are equal files
    figure, grid = pyplot.subplots(lines, columns, figsize=(12, 1.9 * lines), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, axes in zip(measured["rows"], grid.flat, strict=False):
        axes.set_axis_on()
        found = {name: row["candidates"].get(name, {}).get("ms") for name in ("ours", "eager", "compiled")}
        for alone in (False, True):
            if one := best(row, alone=alone):
                found.setdefault(one[0], one[1]["ms"])
        bars = {name: ms for name, ms in found.items() if ms}
        colours = ["C0" if name == "ours" else "C7" for name in bars]
        drawn = axes.barh(list(bars), list(bars.values()), color=colours)
        axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=8)
        floor = max(row["bytes_floor_ms"], row["flops_floor_ms"])
        axes.axvline(floor, color="C3", linestyle="--", linewidth=1)
        axes.set_title(f"{row['case']}, floor {floor:.3f}", fontsize=10)
        axes.set_xlabel("ms")
        axes.set_xlim(0, 1.2 * max([floor, *bars.values()]))
        axes.invert_yaxis()
    figure.suptitle(f"{measured['device']}: dashed, what bytes or operations take at the device's measured ceilings")
    figure.savefig(out, metadata=_undated(out))


def steps(measured: Any, out: Path) -> None:
    """Where a step's time goes: a stacked bar for every case without broadcast."""
    from matplotlib import pyplot

    rows = [row for row in measured["rows"] if row["breakdown_ms"]]
    if not rows:
        raise ValueError("no row has a breakdown: those of `none` measured on a GPU have")
    pyplot.rcParams["svg.hashsalt"] = "minidit"
    figure, axes = pyplot.subplots(figsize=(10, 1.4 + 0.5 * len(rows)), layout="constrained")
    names = [f"{row['case']} {row['impl']}" for row in rows]
    before = [0.0] * len(rows)
    for group in rows[0]["breakdown_ms"]:
        widths = [row["breakdown_ms"][group] for row in rows]
        axes.barh(names, widths, left=before, label=group)
        before = [start + width for start, width in zip(before, widths, strict=True)]
    for i, total in enumerate(before):
        axes.text(total, i, f" {total:.0f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms of one step without broadcast", title=measured["device"])
    figure.legend(ncols=6, loc="outside lower center")
    figure.savefig(out, metadata=_undated(out))


def _undated(out: Path) -> dict[str, None] | None:
    return {"Date": None} if out.suffix == ".svg" else None


DRAWN_OF_A_FILE: dict[str, Callable[[Any, Path], None]] = {"loss": loss, "kernels": kernels, "steps": steps}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("samples", *DRAWN_OF_A_FILE))
    parser.add_argument("file", nargs="?", type=Path, help="of all but samples: the JSON with what is drawn")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.what == "samples":
        samples(args.out, args.seed)
    elif args.file is None:
        parser.error(f"{args.what} needs the JSON with what is drawn")
    else:
        try:
            DRAWN_OF_A_FILE[args.what](json.loads(args.file.read_text()), args.out)
        except ImportError as error:
            parser.error(f"{error}: pip install 'minidit[plots]'")
        except (OSError, ValueError) as error:
            parser.error(f"{error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
