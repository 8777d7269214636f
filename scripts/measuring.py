"""What the measuring scripts share: clocks, a device's ceilings, where figures come from, files, tables, arguments."""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from minidit.broadcast import PARTS, Act, Plan
from minidit.options import Parser

FLUSH = 256 * 2**20  # bytes, more than any GPU keeps near its cores
MARKER = "spin_kernel"  # what torch.cuda._sleep runs
Candidate = Callable[[], Any]
Row = tuple[Act, ...]


# Clocks


class Stopwatch:
    """Takes times in the device's own order. Nothing waits for the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._marks = device.type == "cuda", list[Any]()

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """ms from each mark to the next."""
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        if not self._cuda:
            return [1000 * (then - now) for now, then in pairs]
        torch.cuda.synchronize()
        return [now.elapsed_time(then) for now, then in pairs]


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_ms(candidates: Mapping[str, Candidate], repeats: int, device: torch.device) -> dict[str, float]:
    """Median ms of each, taking turns. They have been called before."""
    flush = torch.empty(FLUSH if device.type == "cuda" else 1, dtype=torch.int8, device=device)
    if device.type == "cuda":
        torch.cuda._sleep(20_000_000)  # cycles, some 10 ms: calls queue up, so that no launch is waited for
    watches = {name: Stopwatch(device) for name in candidates}
    for _ in range(repeats):
        for name, f in candidates.items():
            flush.zero_()
            watches[name].mark()
            f()
            watches[name].mark()
    return {name: statistics.median(watch.laps()[::2]) for name, watch in watches.items()}


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device reaches: bytes a second of a copy, read and written, and operations a second of a product."""
    on_gpu, dtype = device.type == "cuda", precision(device)
    source, n = torch.randn(2**29 if on_gpu else 2**16, device=device).to(dtype), 8192 if on_gpu else 128
    target, a, b = torch.empty_like(source), *torch.randn(2, n, n, device=device).to(dtype)
    runs: dict[str, Candidate] = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    median_ms(runs, 3, device)
    ms = median_ms(runs, 20, device)
    return {"copy_bytes_s": 2e3 * source.nbytes / ms["copy"], "matmul_flops_s": 2e3 * n**3 / ms["matmul"]}


def precision(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def profiled(f: Callable[[], Any]) -> torch.profiler.profile:
    """What ran on the GPU while f did."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        f()
        torch.cuda.synchronize()
    return profiler


def kernels(profiler: torch.profiler.profile) -> list[tuple[str, float]]:
    """(name, ms) of what was seen, in the order it ran."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return read_trace(json.loads(file.read_text()))


def read_trace(trace: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(name, ms) of what ran on the GPU, in that order, of a trace as Chrome has it."""
    wanted = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [event for event in trace["traceEvents"] if event.get("cat") in wanted]
    return [(event["name"], event["dur"] / 1e3) for event in sorted(events, key=lambda event: event["ts"])]


# A plan's rows, equal ones of which take equal time


def tour(plan: Plan, least: int) -> Plan:
    """A shorter plan with the same rows, each `least` times or, if that is fewer, as often as the whole plan has it.

    What lies between two equal rows can go: what may follow the first may follow the second.
    """
    numbers = {row: number for number, row in enumerate(dict.fromkeys(plan.acts))}
    kept = list(range(len(plan)))
    while True:
        rows = [numbers[plan.acts[i]] for i in kept]
        need = {row: min(least, count) for row, count in Counter(numbers[row] for row in plan.acts).items()}
        cuts = [
            (j - i, i)
            for i in range(len(rows))
            for j in range(i + 1, len(rows))
            if rows[i] == rows[j] and _covers(rows[:i] + rows[j:], need)
        ]
        if not cuts:
            return Plan(tuple(plan.timesteps[i] for i in kept), plan.sites, tuple(plan.acts[i] for i in kept))
        length, at = max(cuts)
        del kept[at : at + length]


def _covers(rows: Sequence[int], need: Mapping[int, int]) -> bool:
    counts = Counter(rows)
    return all(counts[row] >= count for row, count in need.items())


def by_row(plan: Plan, times: Sequence[float]) -> dict[Row, float]:
    """The median time of each row of a plan, of the times of its calls."""
    found: dict[Row, list[float]] = {}
    for row, each in zip(plan.acts, times, strict=True):
        found.setdefault(row, []).append(each)
    return {row: statistics.median(each) for row, each in found.items()}


def whole_time(plan: Plan, rows: Mapping[Row, float]) -> float:
    """Of all calls, by the time of each row."""
    return sum(rows[row] for row in plan.acts)


def letters(plan: Plan, row: Row) -> str:
    """A row in short: the acts of spatial, temporal, cross-attention and MLPs, such as "S R R ."."""
    parts = [part for part in PARTS if any(site.part == part for site in plan.sites)]
    found = [{act.value for site, act in zip(plan.sites, row, strict=True) if site.part == part} for part in parts]
    return " ".join("".join(sorted(acts)) for acts in found)


# Where figures come from, and where they go


def origin(device: torch.device, script: str, argv: Sequence[str], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What a figure is worth nothing without. Where the result went is left out of the command.

    dtype: of the model; None: precision(device).
    """
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False
    )
    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    gpu = device.type == "cuda"
    return {
        "command": re.sub(r"\s*--json[ =]\S+", "", " ".join(["python", f"scripts/{script}.py", *argv])),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": triton,
        "cuda": torch.version.cuda,
        "commit": git.stdout.strip() or "unknown",
        "dtype": str(dtype or precision(device)).removeprefix("torch."),
    }


def signed(measured: Mapping[str, Any]) -> str:
    """Where, with what and how figures were measured."""
    versions = f"PyTorch {measured['torch']}, Triton {measured['triton']}"
    return f"Measured on {measured['device']}, {versions}, commit {measured['commit']}, by `{measured['command']}`."


def write(file: Path, measured: Mapping[str, Any]) -> None:
    """As JSON, all or nothing: what is killed on the way leaves what was there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}")
    draft.write_text(json.dumps(measured, indent=2) + "\n")
    draft.replace(file)


def read(file: Path, *keys: str) -> dict[str, Any]:
    """A file of figures. Raises ValueError for a file of something else, without these keys."""
    try:
        measured = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(measured, dict) or not set(keys) <= set(measured):
        raise ValueError(f"{file} is of something else: expected a JSON object with {' and '.join(keys)}")
    return measured


def gather(
    what: str, rows: Iterable[dict[str, Any]], file: Path | None, found: Mapping[str, Any], default: str, partial: bool
) -> list[dict[str, Any]]:
    """All rows, and the JSON of what was found and them: also if one fails, which does not take the others with it.

    Written to the file, or the default one: what is partial not over that, which is full.
    """
    gathered, complete = list[dict[str, Any]](), False
    try:
        for row in rows:
            gathered.append(row)
        complete = True
    finally:
        file = file or (Path(default) if complete and not partial else None)
        if file:
            write(file, {**found, "rows": gathered})
        print(f"{what}: {file or 'nothing written, --json FILE does'}")
    return gathered


def show(text: str, name: str, into: Path | None) -> None:
    """Print it, or put it into a file: between its <!-- name --> and <!-- /name -->, or at its end if it has none."""
    if into is None:
        print(text)
        return
    old = into.read_text() if into.exists() else "# Measurements\n"
    section = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    there = re.escape(f"<!-- {name} -->\n") + ".*?" + re.escape(f"<!-- /{name} -->")
    new, found = re.subn(there, lambda _: section, old, flags=re.S)
    into.write_text(new if found else f"{old.rstrip()}\n\n{section}\n")


# Arguments


def command_line(script: str, about: str | None, result: str) -> Parser:
    """A parser of what all benchmarks take. Raises ValueError, in a line, where it does not understand."""
    parser = Parser(prog=f"{script}.py", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("measure", "table"), default="measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"{result} of a full run; of table, what it reads")
    parser.add_argument("--into", type=Path, metavar="FILE", help="table: write it into the file's section")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it (%(default)s)")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def started(name: str) -> torch.device:
    """The device. ValueError if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: --device cpu tries the script")
    return torch.device(name)
