"""What broadcast saves on the embedded model and what it costs: the table of the README.

    python scripts/quality.py judge      # 200 captions a recipe, judged by program; on a GPU if there is one
    python scripts/quality.py time       # seconds a video, recipes in turn, medians; on this machine
    python scripts/quality.py table      # both as Markdown, from benchmarks/*.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import judge
import measuring
import minidit
import shapes
from minidit.broadcast import RECIPES
from minidit.pipeline import Report

NAMES = ("none", "pab-246", "pab-357", "pab-579")
RIGHT = (("right", "captions"), ("two_right", "two"), ("held_out_right", "held_out"))
SEED = 1000  # of the captions and the first video, if no other is asked for: training's own samples have others


def generate_all(
    model: minidit.DiT, captions: Sequence[str], recipe: str, batch: int, seed: int, bar: tqdm[Any]
) -> tuple[list[Tensor], Report]:
    """A video (T, H, W, 3) for every caption, the i-th from seed + i, and the report of the last batch."""
    videos = list[Tensor]()
    for i in range(0, len(captions), batch):
        made, report = minidit.generate(
            model,
            captions[i : i + batch],
            pyramid=RECIPES[recipe],
            seed=seed + i,
            on_step=lambda step: bar.update(),
        )
        videos += made
    return videos, report


def accepted(video: Tensor, caption: str) -> bool:
    torch.set_num_threads(1)
    return judge.accepts(video, shapes.parse(caption))


def measure_quality(model: minidit.DiT, count: int, batch: int, seed: int) -> list[dict[str, Any]]:
    """A row a recipe: right among all, held-out and two-actor captions; mean PSNR and SSIM against no broadcast."""
    prompts = shapes.prompts(count, seed)
    captions = [caption for caption, _ in prompts]
    rows, plain = list[dict[str, Any]](), list[Tensor]()
    calls = model.config.sampling.steps * -(-count // batch) * len(NAMES)
    with tqdm(total=calls, unit="call") as bar, ProcessPoolExecutor() as pool:
        for name in NAMES:
            videos, report = generate_all(model, captions, name, batch, seed, bar)
            plain = plain or videos
            right = list(pool.map(accepted, videos, captions, chunksize=4))
            same = name == "none"
            rows.append(
                {
                    "recipe": name,
                    "right": sum(right),
                    "captions": count,
                    "held_out_right": sum(r for r, (_, held) in zip(right, prompts, strict=True) if held),
                    "held_out": sum(held for _, held in prompts),
                    "two_right": sum(r for r, c in zip(right, captions, strict=True) if len(shapes.parse(c)) == 2),
                    "two": sum(len(shapes.parse(c)) == 2 for c in captions),
                    "psnr": None if same else statistics.fmean(map(minidit.psnr, videos, plain)),
                    "ssim": None if same else statistics.fmean(map(minidit.ssim, videos, plain)),
                    "tflop": report.flops / 1e12 / ((count - 1) % batch + 1),  # of the last batch
                    "saved": 1 - report.flops / report.flops_without,
                    "wrong": [c for c, r in zip(captions, right, strict=True) if not r],
                }
            )
    return rows


def measure_time(model: minidit.DiT, rounds: int) -> list[dict[str, Any]]:
    """A row a recipe: median seconds of one video, the recipes in turn after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    calls = model.config.sampling.steps * (rounds + 1) * len(NAMES)
    with tqdm(total=calls, unit="call") as bar:
        for i in range(rounds + 1):
            for name in NAMES:
                _, report = generate_all(model, [shapes.prompts(1, i)[0][0]], name, 1, SEED, bar)
                seconds[name].append(report.seconds)
    return [
        {"recipe": name, "seconds": statistics.median(each[1:]), "rounds": rounds} for name, each in seconds.items()
    ]


def table(quality: dict[str, Any], timing: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| recipe | right captions | of one object | of two | held out | PSNR dB | SSIM | TFLOP | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = timing["rows"][0]["seconds"]
    for q, t in zip(quality["rows"], timing["rows"], strict=True):
        psnr, ssim = ("-", "-") if q["psnr"] is None else (f"{q['psnr']:.1f}", f"{q['ssim']:.3f}")
        right = [f"{q[a]} / {q[b]}" for a, b in RIGHT]
        one = f"{q['right'] - q['two_right']} / {q['captions'] - q['two']}"
        saved = f" (-{q['saved']:.1%})" if q["saved"] else ""
        cells = [q["recipe"], right[0], one, *right[1:], psnr, ssim, f"{q['tflop']:.3f}{saved}"]
        lines.append(f"| {' | '.join(cells)} | {t['seconds']:.1f} ({base / t['seconds']:.2f} x) |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("judge", "time", "table"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=SEED, help="other captions and other videos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="benchmarks", help="folder of the JSON files")
    args = parser.parse_args(argv)
    folder = Path(args.out)
    if args.what == "table":
        print(table(*(json.loads((folder / f"{name}.json").read_text()) for name in ("quality", "time"))))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32
    model = minidit.load(args.model, device=device, dtype=dtype)
    measured_with = measuring.origin(device, "quality", sys.argv[1:] if argv is None else argv, dtype)
    if args.what == "judge":
        name, rows = "quality", measure_quality(model, args.captions, args.batch, args.seed)
    else:
        name, rows = "time", measure_time(model, args.rounds)
    measuring.write(folder / f"{name}.json", {**measured_with, "rows": rows})
    print(json.dumps([{k: v for k, v in row.items() if k != "wrong"} for row in rows], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
