"""Model steps and whole runs at the size of the published checkpoints, with random weights.

    python scripts/bench.py                                   # all cases; writes benchmarks/steps.json
    python scripts/bench.py --quick                           # a look: 480p 2s alone, nothing written
    python scripts/bench.py --cases 480p-2s latte --recipes none --impl auto torch --json steps.json
    python scripts/bench.py table                             # Markdown, from benchmarks/steps.json
    python scripts/bench.py table --into benchmarks/README.md # into its section, named as the file is

A plan has few different rows, and equal rows take equal time. So a shorter plan of the same rows is run, every call is
timed, and a run's time is the sum over its plan of the median of each row; `whole` is a run through `minidit.sample`,
guidance and sampler included, to check that sum. Neither has the text encoder or the decoder in it. Guidance doubles
the batch; of a caption's slots, 100 are filled. Operations are those of the 100, not those of the padding.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import measuring
from measuring import MARKER, Stopwatch, by_row, letters, positive, precision, signed, tour, wait, whole_time
from minidit import ops, pipeline, sampling
from minidit.broadcast import RECIPES, Plan
from minidit.cache import Cache
from minidit.config import ModelConfig
from minidit.cost import cost
from minidit.layers import CrossAttention, SelfAttention
from minidit.model import Conditioning, DiT
from minidit.options import Parser
from minidit.presets import PRESETS

RESULT = "benchmarks/steps.json"
FILLED = 100  # tokens of a caption
IMPLS: tuple[ops.Impl, ...] = ("auto", "torch", "triton")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and what is asked of it."""

    config: ModelConfig
    recipes: tuple[str, ...]
    impls: tuple[ops.Impl, ...] = ("auto",)
    whole: bool = False  # run it whole as well


def _open_sora(frames: int, height: int, width: int, **more: Any) -> Case:
    config = pipeline.asked(PRESETS["opensora-1.2"], frames=frames, height=height, width=width)
    return Case(config=config, recipes=("none", "pab-246"), **more)


CASES = {
    "240p-2s": _open_sora(51, 240, 426),
    "480p-2s": _open_sora(51, 480, 854, impls=("auto", "torch"), whole=True),
    "480p-4s": _open_sora(102, 480, 854),
    "480p-8s": _open_sora(204, 480, 854),
    "720p-2s": _open_sora(51, 720, 1280, whole=True),
    "latte": Case(config=PRESETS["latte-t2v"], recipes=("none", "latte-236")),
}
BY_DEFAULT = tuple(name for name in CASES if name != "latte")
QUICK = ("480p-2s",)


class Peer(NamedTuple):
    """What another engine takes for the same."""

    seconds: float  # a run
    gib: float  # at its peak


# VideoSys, NUS-HPC-AI-Lab's own engine of PAB, on its FlashAttention path, and the Latte pipeline of diffusers, eager:
# medians in bfloat16 on one NVIDIA H100 80GB HBM3 with PyTorch 2.11 and CUDA 13.0
PEERS = {
    ("480p-2s", "none"): Peer(20.72, 3.9),
    ("480p-2s", "pab-246"): Peer(15.60, 15.2),
    ("480p-4s", "none"): Peer(39.11, 5.4),
    ("480p-4s", "pab-246"): Peer(30.60, 28.0),
    ("480p-8s", "none"): Peer(74.11, 8.5),
    ("480p-8s", "pab-246"): Peer(58.81, 53.6),
    ("720p-2s", "none"): Peer(47.41, 5.9),
    ("720p-2s", "pab-246"): Peer(37.11, 31.4),
    ("latte", "none"): Peer(10.74, 2.9),
}
PEERS_DEVICE = "NVIDIA H100 80GB HBM3"
SOURCE = (
    f"The peer is VideoSys on its FlashAttention path, for latte the eager Latte pipeline of diffusers: medians of "
    f"earlier runs on one {PEERS_DEVICE} with PyTorch 2.11 in bfloat16."
)


class Given(NamedTuple):
    """What a run is given: one video, one caption, and no caption."""

    z: Tensor  # (1, C, T, H, W) float32
    text: Tensor  # (1, L, caption_dim)
    lengths: Tensor  # (1,)
    null: Tensor  # (L, caption_dim)


def build(config: ModelConfig, device: torch.device) -> tuple[DiT, Given]:
    """A model of random weights, none of them zero: those that a training would begin with at zero neither."""
    torch.manual_seed(0)
    dtype = precision(device)
    with device:
        model = DiT(config).to(dtype).eval().requires_grad_(False)
        z = torch.randn(1, config.in_channels, *pipeline.schedule(config, dtype)[1])
        text, null = torch.randn(2, 1, config.caption_length, config.caption_dim).to(dtype)
        lengths = torch.tensor([min(FILLED, config.caption_length)])
    return model, Given(z, text, lengths, null[0])


def prepared(model: DiT, config: ModelConfig, given: Given) -> tuple[Tensor, Conditioning]:
    """The input of a model call, both halves of guidance, and what it is conditioned on."""
    run, z = config.sampling, given.z
    fps = torch.full((2,), float(run.fps), device=z.device)
    text = torch.cat((given.text, given.null[None]))[:, : int(given.lengths)]  # as sample() cuts it
    latent = (z.shape[2], z.shape[3], z.shape[4])
    lengths = given.lengths.repeat(2)
    return z.repeat(2, 1, 1, 1, 1), model.prepare(
        text, lengths, latent=latent, height=run.height, width=run.width, fps=fps
    )


def time_calls(model: DiT, plan: Plan, x: Tensor, cond: Conditioning) -> list[float]:
    """ms of every call of a run."""
    watch, cache = Stopwatch(x.device), Cache(plan)
    watch.mark()
    for i in range(len(plan)):
        model(x, plan[i].timestep, cond, plan[i], cache)
        watch.mark()
    return watch.laps()


def time_whole(model: DiT, config: ModelConfig, plan: Plan, given: Given) -> float:
    """Seconds of a run through `sample`."""
    run, device = config.sampling, given.z.device
    sampler, _ = pipeline.schedule(config, model.dtype)
    wait(device)
    start = time.perf_counter()
    sampling.sample(
        model,
        given.z,
        given.text,
        given.lengths,
        plan=plan,
        sampler=sampler,
        guidance=run.guidance,
        height=run.height,
        width=run.width,
        fps=run.fps,
        null=given.null,
    )
    wait(device)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(
    name: str,
    case: Case,
    recipe: str,
    impl: ops.Impl,
    model: DiT,
    given: Given,
    *,
    least: int,
    whole: bool,
    limit: float,
) -> dict[str, Any]:
    """A row: times, memory and rates of a case by a recipe. limit: operations a second of a large matrix product."""
    config, device = case.config, given.z.device
    plan = pipeline.predict(config, model.dtype, RECIPES[recipe]).plan
    latent, filled = (given.z.shape[2], given.z.shape[3], given.z.shape[4]), int(given.lengths)
    price = cost(config, batch=2, latent=latent, caption_length=filled, itemsize=model.dtype.itemsize)
    flops = plan.flops(price.parts, price.rest)
    with ops.using(impl):
        x, cond = prepared(model, config, given)
        short = tour(plan, least)
        time_calls(model, short, x, cond)  # everything is compiled, Python is warm, and the memory of a run is taken
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rows = by_row(short, time_calls(model, short, x, cond))
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        seconds = whole_time(plan, rows) / 1e3
        took = time_whole(model, config, plan, given) if whole else None
        parts = None
        if recipe == "none" and device.type == "cuda":
            parts = breakdown(model, plan.timesteps[0], x, cond, 1e3 * seconds / len(plan))
    counts = Counter(plan.acts)
    return {
        "case": name,
        "recipe": recipe,
        "impl": impl,
        "latent": latent,
        "steps": len(plan),
        "timed_calls": len(short),
        "rows": [{"acts": letters(plan, row), "calls": counts[row], "ms": ms} for row, ms in rows.items()],
        "step_s": seconds / len(plan),
        "run_s": seconds,
        "whole_s": took,
        "frames_s": config.sampling.frames / seconds,
        "peak_gib": peak,
        "tflop": flops / 1e12,
        "tflop_s": flops / 1e12 / seconds,
        "of_matmul": flops / seconds / limit,
        "breakdown_ms": parts,
    }


# Where a step's time goes

GROUPS = ("matmul", "spatial", "temporal", "cross", "elementwise", "rest")
ATTENTION = re.compile("flash|fmha|sdpa|attention", re.I)  # their names may tell of the products inside as well
MATMUL = re.compile("gemm|gemv|nvjet|cutlass|wgmma|xmma|splitk", re.I)
ABOUT_GROUPS = (
    "Without broadcast. Attention is without its projections, which are matrix products, and with its norms, rotations "
    "and rearrangements; rest: copies, and times when no kernel ran."
)


def grouped(kernels: Sequence[tuple[str, float]], labels: Sequence[str]) -> dict[str, float]:
    """ms of each group. kernels: (name, ms) in the order they ran; labels: of what follows each marker among them.

    A matrix product is one by its name, wherever it runs; all else is what it is a part of: of an attention, its norm,
    rotation and rearrangements included, or of what is done to single elements. Copies and fills are the rest.
    Raises RuntimeError for kernels with other markers than were launched.
    """
    if sum(MARKER in name for name, _ in kernels) != len(labels):
        raise RuntimeError("the profiler has lost kernels: the groups would be wrong")
    ms, left, label = dict.fromkeys(GROUPS, 0.0), iter(labels), "elementwise"
    for name, each in kernels:
        if MARKER in name:
            label = next(left)
        elif name.startswith("Mem"):  # Memcpy, Memset
            ms["rest"] += each
        elif MATMUL.search(name) and not ATTENTION.search(name):
            ms["matmul"] += each
        else:
            ms[label] += each
    return ms


def breakdown(model: DiT, t: float, x: Tensor, cond: Conditioning, step: float) -> dict[str, float] | None:
    """ms of each group in a call that computes everything and takes `step` ms; rest: also where no kernel ran."""
    labels, hooks = list[str](), []

    def marking(label: str) -> Any:
        def mark(*_: Any) -> None:
            labels.append(label)
            torch.cuda._sleep(1)

        return mark

    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            label = module.axis if isinstance(module, SelfAttention) else "cross"
            hooks += [module.register_forward_pre_hook(marking(label))]
            hooks += [module.register_forward_hook(marking("elementwise"))]
    try:
        measuring.profiled(lambda: None)  # the profiler's first start is slow
        ms = grouped(measuring.kernels(measuring.profiled(lambda: model(x, t, cond))), labels)
    except RuntimeError as error:
        print(f"no breakdown: {error}", file=sys.stderr)
        return None
    finally:
        for hook in hooks:
            hook.remove()
    known = sum(ms.values()) - ms["rest"]
    return ms | {"rest": max(ms["rest"], step - known)}


# What is shown


def report(row: Mapping[str, Any]) -> str:
    whole = "" if row["whole_s"] is None else f" ({row['whole_s']:.2f} in one)"
    peak = "" if row["peak_gib"] is None else f"  {row['peak_gib']:.1f} GiB"
    head = f"{row['case']:<8} {row['recipe']:<10} {row['impl']:<7}"
    rate = f"{row['frames_s']:.2f} frames/s  {row['tflop_s']:.0f} TFLOP/s {row['of_matmul']:.0%}{peak}"
    lines = [f"{head}{row['step_s']:.4f} s/step  {row['run_s']:.2f} s/run{whole}  {rate}"]
    lines += [f"    {each['acts']:<12} {each['calls']:>3} calls {each['ms']:>9.2f} ms" for each in row["rows"]]
    if row["breakdown_ms"]:
        total = sum(row["breakdown_ms"].values())
        lines.append("    " + ", ".join(f"{k} {v:.1f} ms {v / total:.0%}" for k, v in row["breakdown_ms"].items()))
    return "\n".join(lines)


def peer_of(row: Mapping[str, Any]) -> Peer | None:
    """What is known of another engine's run of as many steps."""
    usual = row["case"] in CASES and row["steps"] == CASES[row["case"]].config.sampling.steps
    return PEERS.get((row["case"], row["recipe"])) if usual else None


def table(measured: Mapping[str, Any]) -> str:
    """Markdown: a table of runs, and one of where a step's time goes."""
    same = measured["device"] == PEERS_DEVICE
    lines = [
        "| case | recipe | ops | s / step | s / run | in one | frames / s | peak GiB | TFLOP/s | of matmul rate | "
        f"peer, {'same GPU model' if same else PEERS_DEVICE}, s / run | peak GiB | faster |",
        "|" + "---|" * 13,
    ]
    for row in measured["rows"]:
        peer = peer_of(row)
        cells = [
            *(row[key] for key in ("case", "recipe", "impl")),
            f"{row['step_s']:.3f}",
            f"{row['run_s']:.2f}",
            *("-" if row[key] is None else f"{row[key]:.{n}f}" for key, n in (("whole_s", 2), ("frames_s", 2))),
            "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
            f"{row['tflop_s']:.0f}",
            f"{row['of_matmul']:.0%}",
            *((f"{peer.seconds:.2f}", f"{peer.gib:.1f}", f"{peer.seconds / row['run_s']:.2f} x") if peer else "---"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    matmul = measured["matmul_flops_s"] / 1e12
    lines += [
        "",
        f"{signed(measured)} A large {measured['dtype']} matrix product ran at {matmul:.0f} TFLOP/s. {SOURCE}",
    ]
    if broken := [row for row in measured["rows"] if row["breakdown_ms"]]:
        heads = ["case", "ops", "ms / step", *GROUPS]
        lines += ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for row in broken:
            total = sum(row["breakdown_ms"].values())
            shares = [f"{ms:.1f} ({ms / total:.0%})" for ms in row["breakdown_ms"].values()]
            lines.append(f"| {' | '.join([row['case'], row['impl'], f'{total:.1f}', *shares])} |")
        lines += ["", ABOUT_GROUPS]
    return "\n".join(lines)


def command_line() -> Parser:
    parser = measuring.command_line("bench", __doc__, RESULT)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), metavar="RECIPE", help="none, pab-246 ...")
    parser.add_argument("--impl", nargs="+", choices=IMPLS, help="auto; of 480p-2s torch, too")
    parser.add_argument("--steps", type=positive, metavar="N", help="of a run: as the model was trained")
    parser.add_argument("--calls", type=positive, default=3, metavar="N", help="timed of each row (%(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}, 2 calls of each row, no whole run")
    return parser


def measure_all(
    args: argparse.Namespace, cases: Mapping[str, Case], device: torch.device, limit: float
) -> Iterator[dict[str, Any]]:
    """A row for every case, recipe and implementation that is asked for."""
    for name, case in cases.items():
        model, given = build(case.config, device)
        impls = args.impl or (("auto",) if args.quick else case.impls)
        for impl in impls:
            for recipe in args.recipes or case.recipes:
                row = measure(
                    name,
                    case,
                    recipe,
                    impl,
                    model,
                    given,
                    least=2 if args.quick else args.calls,
                    whole=case.whole and impl == impls[0] and not args.quick,
                    limit=limit,
                )
                print(report(row), flush=True)
                yield row
        del model, given
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    try:
        args = parser.parse_args(argv)
        if args.what == "table":
            file = args.json or Path(RESULT)
            measuring.show(table(measuring.read(file, "rows")), file.stem, args.into)
            return 0
        device = measuring.started(args.device)
        if "triton" in (args.impl or ()) and device.type == "cpu":
            raise ValueError("--impl triton: a CPU has no Triton kernels")
        names = args.cases or (QUICK if args.quick else BY_DEFAULT)
        cases = {name: CASES[name] for name in names}
        if args.steps:
            cases = {
                name: replace(case, config=pipeline.asked(case.config, steps=args.steps))
                for name, case in cases.items()
            }
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    limits = measuring.ceilings(device)
    print(f"matmul {limits['matmul_flops_s'] / 1e12:.0f} TFLOP/s", flush=True)
    found = measuring.origin(device, "bench", sys.argv[1:] if argv is None else argv)
    partial = any((args.cases, args.recipes, args.impl, args.steps, args.quick, device.type == "cpu"))
    rows = measure_all(args, cases, device, limits["matmul_flops_s"])
    measuring.gather("steps", rows, args.json, {**found, **limits}, RESULT, partial)
    return 0


if __name__ == "__main__":
    sys.exit(main())
