"""Draw the pictures of the documentation: samples, the loss curve, the benchmarks. All but samples: minidit[plots].

python scripts/figures.py samples --seed 1 --out docs/samples.png
python scripts/figures.py loss weights/tiny/losses.json --out weights/tiny/loss.png
python scripts/figures.py kernels benchmarks/kernels_h200.json --out docs/kernels.svg
python scripts/figures.py steps benchmarks/steps.json --out docs/steps.svg
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import judge
import minidit
import shapes
from bench import GROUPS, PEERS_DEVICE, SOURCE, peer_of
from bench_kernels import best
from measuring import signed
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
    """One video of each of CAPTIONS, as generate makes it: PAB_246 and one seed for all. Says how many are right."""
    model = minidit.load("tiny")
    videos = [minidit.generate(model, caption, seed=seed)[0] for caption in CAPTIONS]
    sheet(videos, CAPTIONS).save(out)
    right = sum(judge.accepts(v, shapes.parse(c)) for v, c in zip(videos, CAPTIONS, strict=True))
    print(f"seed {seed}: the judge accepts {right} of {len(CAPTIONS)}")


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


COLOURS = {"ours": "C0", "target": "0.55", "PyTorch": "C1", "floor": "0.8"}  # a number is a grey


def kernels(measured: Any, out: Path) -> None:
    """A small bar chart an op: ours, what it is to take, PyTorch's best that does as much, the least possible."""
    columns, rows = 3, measured["rows"]
    lines = -(-len(rows) // columns)
    figure, grid = _figure(lines, columns, (12, 0.9 + 1.6 * lines))
    for axes in grid.flat[len(rows) :]:
        axes.set_axis_off()
    for row, axes in zip(rows, grid.flat, strict=False):
        theirs, floors = best(row, alone=False), {"bytes": row["bytes_floor_ms"], "operations": row["flops_floor_ms"]}
        found = {
            "ours": row["candidates"].get("ours", {}).get("ms"),
            "target": row["target_ms"],
            f"PyTorch, {theirs[0]}" if theirs else "PyTorch": theirs and theirs[1]["ms"],
            f"floor of {max(floors, key=lambda name: floors[name])}": max(floors.values()),
        }
        bars = {name: ms for name, ms in found.items() if ms}
        colours = [next(colour for what, colour in COLOURS.items() if name.startswith(what)) for name in bars]
        drawn = axes.barh(list(bars), list(bars.values()), color=colours)
        axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=8)
        axes.set_title(row["case"], fontsize=10)
        axes.set_xlabel("ms", fontsize=8)
        axes.set_xlim(0, 1.2 * max(bars.values()))
        axes.tick_params(labelsize=8)
        axes.invert_yaxis()
    _save(figure, measured, out)


def steps(measured: Any, out: Path) -> None:
    """Where a step's time goes, a stacked bar a case; and whole runs, plain and with broadcast, beside the peers'."""
    broken = [row for row in measured["rows"] if row["breakdown_ms"]]
    if not broken:
        raise ValueError("no row has a breakdown: those of `none` measured on a GPU have")
    runs = [row for row in measured["rows"] if row["impl"] == "auto"] or measured["rows"]
    figure, grid = _figure(1, 2, (13, 1.8 + 0.3 * max(len(broken), 2 * len(runs))))
    left, right = grid.flat
    names, before = [_cased(row) for row in broken], [0.0] * len(broken)
    for group in GROUPS:
        widths = [row["breakdown_ms"][group] for row in broken]
        left.barh(names, widths, left=before, label=group)
        before = [start + width for start, width in zip(before, widths, strict=True)]
    for i, total in enumerate(before):
        left.text(total, i, f" {total:.0f}", va="center", fontsize=8)
    left.set(xlabel="ms", title="one step without broadcast, by op")
    left.set_xlim(0, 1.1 * max(before))
    theirs = [peer and peer.seconds for peer in map(peer_of, runs)]
    for label, shift, colour, values in (
        ("ours", -0.2, COLOURS["ours"], [row["run_s"] for row in runs]),
        (f"peer, on {PEERS_DEVICE}", 0.2, COLOURS["PyTorch"], theirs),
    ):
        there = [(i + shift, value) for i, value in enumerate(values) if value]
        if there:
            drawn = right.barh(*zip(*there, strict=True), height=0.4, color=colour, label=label)
            right.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
    right.set_yticks(range(len(runs)), [f"{_cased(row)} {row['recipe']}" for row in runs])
    right.set(xlabel="s", title="a run, all steps")
    right.set_xlim(0, 1.15 * max(value for value in (*theirs, *(row["run_s"] for row in runs)) if value))
    for axes, side in ((left, "left"), (right, "right")):
        axes.tick_params(labelsize=8)
        axes.invert_yaxis()
        # outside, where no bar is
        figure.legend(*axes.get_legend_handles_labels(), loc=f"outside upper {side}", ncols=6, fontsize=8)
    _save(figure, measured, out, f" {SOURCE}")


def _cased(row: Any) -> str:
    return row["case"] if row["impl"] == "auto" else f"{row['case']}, {row['impl']}"


def _figure(lines: int, columns: int, size: tuple[float, float]) -> Any:
    from matplotlib import pyplot  # an extra: only some pictures need it

    pyplot.rcParams["svg.hashsalt"] = "minidit"  # equal figures are equal files
    return pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)


def _save(figure: Any, measured: Any, out: Path, more: str = "") -> None:
    """With where the figures come from in a line under them."""
    wide = round(13 * figure.get_figwidth())  # letters
    figure.supxlabel(textwrap.fill(f"{signed(measured)}{more}", wide), fontsize=8, color="0.3")
    figure.savefig(out, dpi=120, metadata={"Date": None} if out.suffix == ".svg" else None)


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
