"""Whole runs of Open-Sora 1.2's STDiT3-XL/2 on the GPUs of a host, with random weights.

    for n in 1 2 4 8; do torchrun --nproc-per-node $n scripts/bench_parallel.py; done   # into benchmarks/parallel.json
    torchrun --nproc-per-node 8 scripts/bench_parallel.py --quick --json quick.json     # equal calls are not repeated
    torchrun --nproc-per-node 8 scripts/bench_parallel.py --cases 480p-8s --recipes pab-246 --axes auto
    python scripts/bench_parallel.py table --into benchmarks/README.md

A launch measures its own number of ranks and merges its rows into the file, after each one: a launch that breaks off
loses the row it was at. Speed-ups are over the one-rank rows of the file. Bytes are counted on what is handed to
torch.distributed, and predicted from the plan. Time in collectives is the device's, from when a rank is ready for one
until it goes on, so waiting for slower ranks is in it; beside it what NCCL's kernels took, by the profiler.
The difference to one rank is that of the latents, over how far one rank moved them from the noise, in a shorter run
with all kinds of calls, which every rank makes alone, too. That of one rank is to itself with guidance in two calls:
how far another order of sums leads. Of the automatic axis, the run along the axis that it chooses is reported.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import bench
import measuring
from bench import Given
from measuring import positive, tour, wait
from metering import Meter, of_whole, profiled, run
from minidit import parallel, pipeline
from minidit.broadcast import RECIPES, Plan
from minidit.config import ModelConfig
from minidit.cost import cost
from minidit.model import DiT
from minidit.options import Parser
from minidit.parallel import ALONE, Axis, Layout, choose_axis, traffic

RESULT = "benchmarks/parallel.json"
KEYS = ("launches", "rows")  # of that file
CASES = ("480p-2s", "480p-8s", "720p-2s")
DEFAULT_RECIPES = ("none", "pab-246")
AXES: tuple[Axis, ...] = ("frames", "places")
GUIDANCE = {"together": 1, "apart": 2}  # groups of ranks
CALLS = 6  # of a shorter run, at least
PATIENCE = 20  # seconds: torchrun ends all ranks when one has ended, and the first one has something to say
TARGETS = {"pab-246": 7.0, "none": 8.5}  # 480p 8s with PAB_246 on 8 ranks, over one rank with these
# both would use NVLink multicast, which not every host has
QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def small(config: ModelConfig) -> ModelConfig:
    """The same on a shape that a CPU computes at once."""
    config = replace(config, depth=2, dim=24, heads=2, mlp_ratio=1.0, caption_dim=8)
    return pipeline.asked(config, height=32, width=48, frames=min(config.sampling.frames, 51))


class Combination(NamedTuple):
    """How the ranks of a launch share a run."""

    halves: int  # of guidance, on so many groups of ranks
    sequence: int  # ranks that share the tokens
    shared: Axis | None  # None: nothing is
    names: tuple[str, ...]  # of the asked axes that this one is: itself, or the automatic one, or both

    @property
    def guidance(self) -> str:
        return next(name for name, groups in GUIDANCE.items() if groups == self.halves)


def predicted(plan: Plan, config: ModelConfig, given: Given, dtype: torch.dtype, how: Combination) -> list[int]:
    """Bytes that each rank hands to all-to-alls in a run: of its tokens, and of guidance."""
    latent = (given.z.shape[2], given.z.shape[3], given.z.shape[4])
    halves, sequence = how.halves, how.sequence
    price = cost(config, batch=2 // halves, latent=latent, caption_length=int(given.lengths), itemsize=dtype.itemsize)
    found = traffic(plan, price, config.tokens(latent), axis=how.shared or "frames", ranks=sequence)
    outputs = config.out_channels * math.prod(latent) * torch.float32.itemsize
    joined = len(plan) * halves * outputs if halves > 1 else 0
    return [sent + gathered + joined for sent, gathered in zip(found.sent, found.gathered, strict=True)] * halves


def combinations(
    world: int, axes: Sequence[str], guidance: Sequence[str], auto: Mapping[int, Axis]
) -> list[Combination]:
    """All that is asked for and possible, each once. auto: the automatic axis of so many halves."""
    found = list[Combination]()
    for name in guidance:
        halves = GUIDANCE[name]
        if world % halves:
            continue
        sequence = world // halves
        if sequence == 1:
            found.append(Combination(halves, 1, None, ("-",)))
            continue
        for axis in AXES:
            names = tuple(asked for asked in axes if asked == axis or (asked == "auto" and auto[halves] == axis))
            if names:
                found.append(Combination(halves, sequence, axis, names))
    return found


def everyones(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """The values of every rank, on every rank, which waits for the others."""
    mine = torch.tensor([list(values)], dtype=torch.float64, device=device)
    if dist.is_initialized():
        mine = parallel.gather(mine, [1] * dist.get_world_size(), None)
    return mine.tolist()


def distance(made: Tensor, alone: Tensor, z: Tensor) -> float:
    """Of two runs' latents, over how far one of them came from the noise z."""
    return ((made - alone).norm() / (alone - z).norm()).item()


@dataclass(frozen=True)
class Bench:
    """A case and a recipe, ready to be measured."""

    case: str
    recipe: str
    config: ModelConfig
    model: DiT
    given: Given
    plan: Plan
    quick: bool

    def measure(self, how: Combination, layout: Layout, alone: Tensor | None) -> dict[str, Any]:
        """What the ranks measured together. alone: the latents of `short` on one rank; None: this is one rank."""
        device, config, plan = self.given.z.device, self.config, self.plan
        cuda, ran = device.type == "cuda", self.short if self.quick else plan

        def go(plan: Plan, meter: Meter, **options: Any) -> Tensor:
            return run(self.model, config, plan, self.given, layout, meter, **options)

        made = go(self.short, Meter(device))  # everything is compiled, and the memory of a run is taken
        other = go(self.short, Meter(device), two_calls=True) if alone is None else alone
        difference = distance(made, other, self.given.z)
        del made, other
        everyones([0], device)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        meter, start = Meter(device), time.perf_counter()
        go(ran, meter)
        wait(device)
        took, calls = time.perf_counter() - start, meter.ms()
        # what is done once a run is in it as well, only the calls are those of the whole plan
        seconds = took + (of_whole(plan, ran, calls) - sum(calls)) / 1e3
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan
        nccl = profiled(device, len(self.short), lambda meter: go(self.short, meter))
        mine = {
            "seconds": seconds,
            "collectives_s": of_whole(plan, ran, meter.collectives_ms()) / 1e3,
            "nccl_s": math.nan if nccl is None else of_whole(plan, self.short, nccl) / 1e3,
            "peak_gib": peak,
            "counted_bytes": of_whole(plan, ran, meter.sent),
            "difference": difference,
        }
        columns = zip(*everyones(list(mine.values()), device), strict=True)
        found: dict[str, Any] = {
            name: list(column) if all(map(math.isfinite, column)) else None
            for name, column in zip(mine, columns, strict=True)
        }
        found["counted_bytes"] = list(map(round, found["counted_bytes"]))
        return {
            "case": self.case,
            "recipe": self.recipe,
            "ranks": how.halves * how.sequence,
            "guidance": how.guidance,
            "shared": how.shared,
            "steps": len(plan),
            "timed_calls": len(ran),
            **found,
            "seconds": max(found["seconds"]),
            "difference": found["difference"] and max(found["difference"]),
            "frames_s": config.sampling.frames / max(found["seconds"]),
            "predicted_bytes": predicted(plan, config, self.given, self.model.dtype, how),
        }

    @cached_property
    def short(self) -> Plan:
        """The shortest tour of the plan with so many calls, or the plan."""
        tours = (tour(self.plan, least) for least in count(1))
        return next(short for short in tours if len(short) >= min(CALLS, len(self.plan)))


def same_bytes(row: Mapping[str, Any]) -> bool:
    return bool(row["counted_bytes"] == row["predicted_bytes"])


# The file of all launches


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("case", "recipe", "ranks", "guidance", "axis"))


def merged(old: Mapping[str, Any], launch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the file says after a launch: its rows replace older ones of the same, and all speed-ups are told anew."""
    new = {key(row) for row in rows}
    kept = [row for row in old.get("rows", []) if key(row) not in new]
    numbers = sorted({row["launch"] for row in kept})
    launches = [old["launches"][number] for number in numbers] + [launch]
    kept = [{**row, "launch": numbers.index(row["launch"])} for row in kept]
    every = [*kept, *({**row, "launch": len(numbers)} for row in rows)]
    return {"launches": launches, "rows": with_speedups(sorted(every, key=order), launches)}


def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    place = {name: number for number, name in enumerate((*CASES, *RECIPES, *GUIDANCE, "-", *AXES, "auto"))}
    return row["ranks"], *(place[row[name]] for name in ("case", "recipe", "guidance", "axis"))


def with_speedups(rows: Sequence[Mapping[str, Any]], launches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each with how many times faster it was than one rank of the same device, by its recipe and without broadcast."""

    def like(row: Mapping[str, Any], recipe: str) -> tuple[Any, ...]:
        return row["case"], recipe, row["steps"], launches[row["launch"]]["device"]

    one = {like(row, row["recipe"]): row["seconds"] for row in rows if row["ranks"] == 1}

    def over(row: Mapping[str, Any], recipe: str) -> float | None:
        base = one.get(like(row, recipe))
        return base and base / row["seconds"]

    return [{**row, "speedup": over(row, row["recipe"]), "speedup_over_plain": over(row, "none")} for row in rows]


# What is shown


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def report(row: Mapping[str, Any]) -> str:
    """A line."""
    shared = row["shared"] or "nothing"
    ranks = f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}"
    parts = [
        f"{row['case']:<8} {row['recipe']:<8} {ranks}, {shared} shared, guidance {row['guidance']}:",
        f"{row['seconds']:.2f} s,",
        f"collectives {statistics.fmean(row['collectives_s']):.3f} s,",
        f"{'as many bytes as' if same_bytes(row) else 'OTHER BYTES THAN'} predicted,",
        f"difference {shown(row['difference'], '.1e')}",
    ]
    return " ".join(parts)


HEADS = (
    *("case", "recipe", "ranks", "shared", "guidance", "s / run", "x one rank", "x one rank without broadcast"),
    *("frames / s", "peak GiB a rank", "GB a rank", "as predicted", "s in collectives", "s in NCCL's kernels"),
    "difference",
)


def table(measured: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    for row in measured["rows"]:
        automatic = f"{row['shared']}, automatic" if row["axis"] == "auto" else row["shared"] or "-"
        means = {name: row[name] and statistics.fmean(row[name]) for name in ("collectives_s", "nccl_s")}
        cells = [
            *(str(row[name]) for name in ("case", "recipe", "ranks")),
            automatic,
            row["guidance"],
            f"{row['seconds']:.2f}",
            shown(row["speedup"], ".2f"),
            shown(row["speedup_over_plain"], ".2f"),
            f"{row['frames_s']:.2f}",
            shown(row["peak_gib"] and max(row["peak_gib"]), ".1f"),
            f"{statistics.fmean(row['counted_bytes']) / 1e9:.2f}",
            "yes" if same_bytes(row) else f"no: {statistics.fmean(row['predicted_bytes']) / 1e9:.2f}",
            *(shown(mean, ".3f") for mean in means.values()),
            shown(row["difference"], ".1e"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *reached(measured["rows"]), *map(measuring.signed, measured["launches"])])


def reached(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What came of the targets, a line, if it was measured."""
    wanted = [row for row in rows if (row["case"], row["recipe"], row["ranks"]) == ("480p-8s", "pab-246", 8)]
    if not (known := [row for row in wanted if row["speedup"] and row["speedup_over_plain"]]):
        return []
    best = max(known, key=lambda row: row["speedup"])
    found = f"{best['speedup']:.2f} x one rank's time with it ({TARGETS['pab-246']} wanted)"
    plain = f"{best['speedup_over_plain']:.2f} x one rank's without ({TARGETS['none']} wanted)"
    differ = sum(not same_bytes(row) for row in rows)
    counted = f"counted bytes were {'not ' if differ else ''}the predicted ones in {differ or len(rows)} rows"
    return [f"480p 8s with PAB_246 on 8 ranks: {found}, {plain}; {counted}."]


# The launch


def command_line() -> Parser:
    parser = measuring.command_line("bench_parallel", __doc__, RESULT)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=DEFAULT_RECIPES, metavar="RECIPE")
    parser.add_argument("--axes", nargs="+", choices=(*AXES, "auto"), default=(*AXES, "auto"), help="all of them")
    parser.add_argument("--guidance", nargs="+", choices=tuple(GUIDANCE), default=tuple(GUIDANCE), help="both")
    parser.add_argument("--steps", type=positive, metavar="N", help="of a run: 30")
    parser.add_argument("--quick", action="store_true", help="a shorter run with all kinds of calls, added up")
    return parser


def configs(args: argparse.Namespace) -> dict[str, ModelConfig]:
    found = {name: bench.CASES[name].config for name in dict.fromkeys(args.cases)}
    if args.device == "cpu":
        found = {name: small(config) for name, config in found.items()}
    return {name: pipeline.asked(config, steps=args.steps) for name, config in found.items()}


def prepared(
    args: argparse.Namespace, cases: Mapping[str, ModelConfig], world: int, device: torch.device
) -> Iterator[tuple[Bench, list[Combination]]]:
    """All cases and recipes, and the ways to share each that are asked for."""
    for name, config in cases.items():
        model, given = bench.build(config, device)
        for recipe in dict.fromkeys(args.recipes):
            expected = pipeline.predict(config, model.dtype, RECIPES[recipe], caption_length=int(given.lengths))
            plan, tokens = expected.plan, config.tokens(pipeline.schedule(config, model.dtype)[1])
            auto = {
                halves: choose_axis(plan, expected.cost.share(halves), tokens, ranks=max(1, world // halves))
                for halves in GUIDANCE.values()
            }
            ways = combinations(world, tuple(dict.fromkeys(args.axes)), tuple(dict.fromkeys(args.guidance)), auto)
            yield Bench(name, recipe, config, model, given, plan, args.quick), ways
        del model, given
        if device.type == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def measure_all(
    args: argparse.Namespace, cases: Mapping[str, ModelConfig], world: int, device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one measurement after the other: one for each name of its axis."""
    layouts = {1: ALONE}
    if world > 1:
        halves = {groups for name, groups in GUIDANCE.items() if name in args.guidance and world % groups == 0}
        layouts = {groups: parallel.layout(device, guidance=groups)[0] for groups in sorted(halves)}
    for ready, ways in prepared(args, cases, world, device):
        alone = None
        if world > 1:
            alone = run(ready.model, ready.config, ready.short, ready.given, ALONE, Meter(device))
            if device.type == "cuda":
                torch.cuda.empty_cache()  # its updates, all of them, are no longer kept
        for how in ways:
            row = ready.measure(how, replace(layouts[how.halves], axis=how.shared), alone)
            yield [{**row, "axis": name} for name in how.names]


def launched(world: int, device: torch.device, argv: Sequence[str]) -> dict[str, Any]:
    """What the figures of a launch are worth nothing without."""
    found = measuring.origin(device, "bench_parallel", argv)
    return {**found, "command": found["command"].replace("python", f"torchrun --nproc-per-node {world}", 1)}


def broken_off(error: Exception, where: str) -> int:
    """Say why, in one line if it is for the user to mend. The exit code."""
    if isinstance(error, ValueError | OSError | torch.OutOfMemoryError):
        print(f"{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    if isinstance(error, RuntimeError) and parallel.lost(error):
        print(f"{where}: another rank ended", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    world, first = parallel.world(), parallel.rank() == 0
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser.parse_args(argv)
        if args.what == "table":
            file = args.json or Path(RESULT)
            measuring.show(table(measuring.read(file, *KEYS)), file.stem, args.into)
            return 0
        measuring.started(args.device)
        if args.device == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise ValueError(f"{world} ranks, but {torch.cuda.device_count()} GPUs: start fewer")
        if not any(world % GUIDANCE[name] == 0 for name in args.guidance):
            raise ValueError(f"--guidance apart needs an even number of ranks, not {world}: start them with torchrun")
        cases = configs(args)
        file = args.json or (None if args.quick or args.steps or args.device == "cpu" else Path(RESULT))
        old = measuring.read(file, *KEYS) if file and file.exists() else {}
    except (ValueError, OSError) as error:
        if first:
            print(f"{parser.prog}: {error}", file=sys.stderr)
        else:
            time.sleep(PATIENCE)
        return 2
    os.environ.update(QUIET)
    rows, start = list[dict[str, Any]](), time.monotonic()
    with parallel.started(args.device) as device:
        launch = launched(world, device, argv) if first else {}
        try:
            for found in measure_all(args, cases, world, device):
                rows += found
                if first:
                    print(f"{time.monotonic() - start:>4.0f} s  {report(found[0])}", flush=True)
                    if file:
                        measuring.write(file, merged(old, launch, rows))
        except Exception as error:
            code = broken_off(error, f"{parser.prog}, rank {os.environ.get('RANK', 0)}, rows before: {len(rows)}")
            if world > 1:
                # leaving the groups could wait for ranks that wait for this one; torchrun ends them
                os._exit(code)
            return code
    if not first:
        return 0
    print(f"parallel: {file or 'nothing written, --json FILE does'}")
    if wrong := sum(not same_bytes(row) for row in rows):
        print(f"{parser.prog}: rows with other bytes than predicted: {wrong}", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
