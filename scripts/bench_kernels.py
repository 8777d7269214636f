"""Every op beside its best composition in PyTorch, at the shapes of Open-Sora 1.2. Needs a GPU.

    python scripts/bench_kernels.py                                # all ops; writes benchmarks/kernels.json
    python scripts/bench_kernels.py --only cross_attention --quick # fewer repeats, nothing compiled, nothing written
    python scripts/bench_kernels.py table                          # Markdown, from benchmarks/kernels.json
    python scripts/bench_kernels.py table --into benchmarks/README.md  # into its section, named as the file is

All candidates of a case take turns in one loop, so that what the GPU does otherwise, its clock and its heat, meets all
of them; what is reported is the median. The second-level cache is overwritten before every call. "alone" is attention
by itself: queries, keys and values normed, rotated and laid out as it likes them, before the clock runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from measuring import (
    Candidate,
    ceilings,
    command_line,
    gather,
    median_ms,
    origin,
    precision,
    read,
    show,
    signed,
    started,
)
from minidit import embed
from minidit.kernels import reference
from minidit.kernels.reference import Axis, Rope, Update

OPS = ("self_attention", "cross_attention", "norm_modulate", "add_updates", "linear_gelu")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SLACK = 1.3  # what a pass over memory may take, of the time that its bytes take to copy
RESULT = "benchmarks/kernels.json"


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op at a shape: (B, T, S, D) tokens of so many heads."""

    op: str
    name: str
    b: int = 2
    t: int = 15
    s: int = 1590
    dim: int = 1152
    heads: int = 16
    axis: Axis = "spatial"
    keys: int = 0  # of a caption
    updates: int = 0
    target: float | None = None  # ms; a pass over memory has SLACK instead

    @property
    def elements(self) -> int:
        return self.b * self.t * self.s * self.dim

    @property
    def tensors(self) -> float:
        """How many times the tokens' bytes have to be read or written at least. Rows of modulation are left out."""
        match self.op:
            case "self_attention":
                return 4
            case "cross_attention":
                return 2 + 2 * self.b * self.keys * self.dim / self.elements
            case "norm_modulate":
                return 2 + self.updates + bool(self.updates)
            case "add_updates":
                return 2 + self.updates
            case _:  # linear_gelu
                return 5 + 4 * self.dim * self.dim / self.elements

    @property
    def flops(self) -> int:
        """Of matrix products and attention, two for each multiply-add, as minidit.cost counts."""
        match self.op:
            case "self_attention":
                return 4 * self.elements * (self.s if self.axis == "spatial" else self.t)
            case "cross_attention":
                return 4 * self.elements * self.keys
            case "linear_gelu":
                return 2 * self.elements * 4 * self.dim
            case _:
                return 0

    def nbytes(self, itemsize: int = 2) -> int:
        return round(self.tensors * self.elements) * itemsize


CASES = (
    Case(op="self_attention", name="spatial 480p 2s", target=1.10),
    Case(op="self_attention", name="spatial 720p 2s", s=3600, target=5.1),
    Case(op="self_attention", name="temporal 480p 2s", axis="temporal", target=0.20),
    Case(op="self_attention", name="temporal 480p 8s", axis="temporal", t=60, target=0.85),
    Case(op="cross_attention", name="cross, 100 keys", keys=100, target=0.16),
    Case(op="cross_attention", name="cross, 300 keys", keys=300, target=0.30),
    Case(op="norm_modulate", name="norm_modulate"),
    Case(op="norm_modulate", name="norm_modulate, 1 update", updates=1),
    Case(op="norm_modulate", name="norm_modulate, 3 updates", updates=3),
    Case(op="add_updates", name="add_updates, 1", updates=1),
    Case(op="add_updates", name="add_updates, 2", updates=2),
    Case(op="linear_gelu", name="linear_gelu"),
)


def small(case: Case) -> Case:
    """The same on a shape that a CPU computes at once."""
    return replace(case, t=min(case.t, 3), s=7, dim=32, heads=2, keys=case.keys // 25)


def arguments(case: Case, device: torch.device) -> tuple[Any, ...]:
    """What the op is called with: normally distributed numbers, none of them zero but by chance."""
    generator = torch.Generator(device).manual_seed(0)
    dim, head = case.dim, case.dim // case.heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(precision(device))

    def tokens(times: int = 1) -> Tensor:
        return normal(case.b, case.t, case.s, times * dim)

    def row() -> Tensor:
        return normal(case.b, 1, 1, dim)

    updates = [Update(tokens(), row()) for _ in range(case.updates)]
    match case.op:
        case "self_attention":
            cos, sin = embed.rope_table(embed.rope_frequencies(head).to(device), case.t)
            norm = (1 + normal(head) / 10, 1 + normal(head) / 10)
            return tokens(3), case.heads, norm, Rope(cos, sin) if case.axis == "temporal" else None, case.axis
        case "cross_attention":
            lengths = torch.full((case.b,), case.keys, device=device)
            return tokens(), normal(case.b, case.keys, 2, case.heads, head), lengths
        case "norm_modulate":
            return tokens(), row(), row(), *updates
        case "add_updates":
            return tokens(), *updates
        case _:  # linear_gelu
            return tokens(), normal(4 * dim, dim) / dim**0.5, normal(4 * dim)


def part(case: Case, x: Tensor) -> Tensor:
    """(B, T, S, ...) -> what errors are measured on: a last frame, or the last places of all frames of a last video."""
    return x[-1:, :, -64:] if case.axis == "temporal" else x[-1:, -1:]


def meaning(case: Case, args: tuple[Any, ...]) -> Any:
    """The part of the op's result, in float32."""

    def wide(update: Update) -> Update:
        return Update(part(case, update.a).float(), None if update.gate is None else update.gate[-1:].float())

    x, *others = args
    x = part(case, x).float()
    with sdpa_kernel(SDPBackend.MATH):
        match case.op:
            case "self_attention":
                heads, (q, k), rope, axis = others
                return reference.self_attention(x, heads, (q.float(), k.float()), rope, axis)
            case "cross_attention":
                return reference.cross_attention(x, *(y[-1:] if y.dim() == 1 else y[-1:].float() for y in others))
            case "norm_modulate":
                shift, scale, *updates = others
                return reference.norm_modulate(x, shift[-1:].float(), scale[-1:].float(), *map(wide, updates))
            case "add_updates":
                return reference.add_updates(x, *map(wide, others))
            case _:  # linear_gelu
                return reference.linear_gelu(x, *(y.float() for y in others))


def error(case: Case, result: Any, expected: Any) -> float:
    """The largest distance between the part of a result and what is expected of it."""
    if isinstance(result, Tensor):
        return (part(case, result).float() - expected).abs().max().item()
    return max(error(case, one, other) for one, other in zip(result, expected, strict=True))


def candidates(case: Case, args: tuple[Any, ...], compiled: bool) -> dict[str, Candidate]:
    """Name -> call. Ours on a GPU only."""
    meant: Callable[..., Any] = getattr(reference, case.op)
    device = args[0].device
    if case.op == "cross_attention":  # a mask would keep PyTorch from its fastest: it is given full captions
        q, kv, _ = args
        args_torch: tuple[Any, ...] = (q, kv[:, : case.keys], None)
    else:
        args_torch = args
    found: dict[str, Candidate] = {"eager": lambda: meant(*args_torch)}
    if device.type == "cuda":
        found = {"ours": _ours(case, args)} | found
    if compiled:
        f = torch.compile(meant, dynamic=False)
        found["compiled"] = lambda: f(*args_torch)
    if "attention" in case.op and device.type == "cuda":
        qkv = _laid_out(case, device)
        for name, backend in BACKENDS.items():
            found[name] = _within(backend, meant, *args_torch)
            found[f"{name} alone"] = _within(backend, F.scaled_dot_product_attention, *qkv)
        if compiled:
            found["compiled cudnn"] = _compiled_within(BACKENDS["cudnn"], meant, *args_torch)
    if case.op == "linear_gelu":
        found["linear alone"] = lambda: F.linear(*args)
    return found


def _ours(case: Case, args: tuple[Any, ...]) -> Candidate:
    """The kernel; of attention within a frame told what a model tells it, how large a score can be."""
    kernel = getattr(importlib.import_module(f"minidit.kernels.{case.op}"), case.op)
    if case.op == "self_attention" and case.axis == "spatial":
        bound = reference.score_bound(*args[2]).item()
        return lambda: kernel(*args, bound=bound)
    return lambda: kernel(*args)


def _within(backend: SDPBackend, f: Callable[..., Any], *args: Any) -> Candidate:
    def call() -> Any:
        with sdpa_kernel(backend):
            return f(*args)

    return call


def _compiled_within(backend: SDPBackend, f: Callable[..., Any], *args: Any) -> Candidate:
    # the backend is chosen inside of what is compiled: around it, another backend's graph would be found and taken
    def graph(*args: Any) -> Any:
        with sdpa_kernel(backend):
            return f(*args)

    compiled = torch.compile(graph, dynamic=False)
    return lambda: compiled(*args)


def _laid_out(case: Case, device: torch.device) -> list[Tensor]:
    """Queries, keys and values (..., H, L, E), each contiguous."""
    b, t, s = case.b, case.t, case.s
    if case.op == "cross_attention":
        folded, queries, keys = b, t * s, case.keys
    else:
        folded, queries = (b * t, s) if case.axis == "spatial" else (b * s, t)
        keys = queries
    shapes = [(folded, case.heads, n, case.dim // case.heads) for n in (queries, keys, keys)]
    return [torch.randn(shape, device=device, dtype=precision(device)) for shape in shapes]


@torch.inference_mode()
def measure(
    case: Case, limits: Mapping[str, float], repeats: int, compiled: bool, device: torch.device
) -> dict[str, Any]:
    """A row: what the case cannot do without, and for every candidate its ms and error, or why it failed."""
    torch.compiler.reset()  # or the shapes of two cases would become one graph of any shape
    args = arguments(case, device)
    found, expected = candidates(case, args, compiled), meaning(case, args)
    results = dict[str, dict[str, Any]]()
    for name, f in found.items():
        try:
            result = f()
            off = None if name.endswith("alone") else error(case, result, expected)
            del result
            f()
            results[name] = {"error": off}
        except Exception as failure:  # a backend that refuses a shape says so in many ways; it is a result as well
            results[name] = {"failed": " ".join(f"{type(failure).__name__}: {failure}".split())[:300]}
    works = {name: f for name, f in found.items() if "failed" not in results[name]}
    median_ms(works, 3, device)
    nbytes = case.nbytes(precision(device).itemsize)
    for name, ms in median_ms(works, repeats, device).items():
        results[name] |= {
            "ms": ms,
            "gb_s": nbytes / ms / 1e6,
            "of_copy": nbytes / ms * 1e3 / limits["copy_bytes_s"],
            "tflop_s": case.flops / ms / 1e9,
            "of_matmul": case.flops / ms * 1e3 / limits["matmul_flops_s"],
        }
    shape = [case.b, case.t, case.s, case.dim]
    row = {"case": case.name, "op": case.op, "shape": shape, "heads": case.heads}
    return row | floors(case, nbytes, limits) | {"candidates": results}


def floors(case: Case, nbytes: int, limits: Mapping[str, float]) -> dict[str, Any]:
    """The least ms that the bytes, and that the operations, of a case take at a device's ceilings; and its target."""
    copying = nbytes / limits["copy_bytes_s"] * 1e3
    memory_bound = case.op in ("norm_modulate", "add_updates")
    return {
        "bytes": nbytes,
        "flops": case.flops,
        "bytes_floor_ms": copying,
        "flops_floor_ms": case.flops / limits["matmul_flops_s"] * 1e3,
        "target_ms": SLACK * copying if memory_bound else case.target,
    }


def best(row: Mapping[str, Any], *, alone: bool) -> tuple[str, dict[str, Any]] | None:
    """The fastest of PyTorch's, doing all that ours does, or attention alone.

    What is ten times as far from float64 as eager PyTorch does something else: torch 2.11 compiles attention along 15
    frames so.
    """
    works = {name: it for name, it in row["candidates"].items() if "ms" in it and name != "ours"}
    if (off := works.get("eager", {}).get("error")) is not None:
        works = {name: it for name, it in works.items() if it["error"] is None or it["error"] <= 10 * off}
    fitting = {name: it for name, it in works.items() if name.endswith("alone") == alone}
    return min(fitting.items(), key=lambda item: item[1]["ms"], default=None)


def report(row: Mapping[str, Any]) -> str:
    """What was measured of a case, a line a candidate."""
    target = "" if row["target_ms"] is None else f", target {row['target_ms']:.3f}"
    floor = f"{row['bytes_floor_ms']:.3f} of bytes, {row['flops_floor_ms']:.3f} of operations"
    lines = [f"{row['case']}: floors {floor}{target} ms"]
    for name, it in row["candidates"].items():
        if "failed" in it:
            lines.append(f"  {name:<16} {it['failed']}")
            continue
        rate = f"{it['gb_s']:>6.0f} GB/s {it['of_copy']:>4.0%}  {it['tflop_s']:>5.0f} TFLOP/s {it['of_matmul']:>4.0%}"
        off = "" if it["error"] is None else f"  error {it['error']:.2g}"
        lines.append(f"  {name:<16} {it['ms']:>8.3f} ms  {rate}{off}")
    return "\n".join(lines)


def table(measured: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| op | ours, ms | target | best PyTorch | ours is | eager | compiled | alone | floor of bytes | "
        "of operations | of copy rate | of matmul rate | error, ours | PyTorch |",
        "|" + "---|" * 14,
    ]
    for row in measured["rows"]:
        results = row["candidates"]
        ours, whole, alone = results.get("ours", {}), best(row, alone=False), best(row, alone=True)
        faster = f"{whole[1]['ms'] / ours['ms']:.2f} x" if whole and "ms" in ours else "-"
        rates = [f"{ours[key]:.0%}" if ours.get(key) else "-" for key in ("of_copy", "of_matmul")]
        cells = [
            row["case"],
            _ms(ours.get("ms")),
            _ms(row["target_ms"]),
            f"{_ms(whole[1]['ms'])} {whole[0]}" if whole else "-",
            faster,
            *(_ms(results.get(name, {}).get("ms")) for name in ("eager", "compiled")),
            f"{_ms(alone[1]['ms'])} {alone[0].removesuffix(' alone')}" if alone else "-",
            _ms(row["bytes_floor_ms"]),
            _ms(row["flops_floor_ms"]) if row["flops"] else "-",
            *rates,
            *(f"{it['error']:.1e}" if "error" in it else "-" for it in (ours, whole[1] if whole else {})),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    copy, matmul = measured["copy_bytes_s"] / 1e12, measured["matmul_flops_s"] / 1e12
    ran = f"a large {measured['dtype']} matrix product ran at {matmul:.0f} TFLOP/s"
    lines += ["", f"{signed(measured)} In the same run a copy moved {copy:.2f} TB/s, read and written, and {ran}."]
    return "\n".join(lines)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def measure_all(
    args: argparse.Namespace, limits: Mapping[str, float], device: torch.device
) -> Iterator[dict[str, Any]]:
    for case in CASES:
        if not args.only or case.op in args.only:
            case = case if device.type == "cuda" else small(case)
            row = measure(case, limits, 10 if args.quick else 40, not args.quick, device)
            print(report(row), flush=True)
            yield row


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line("bench_kernels", __doc__, RESULT)
    parser.add_argument("--only", nargs="+", choices=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--quick", action="store_true", help="10 repeats instead of 40, nothing compiled")
    try:
        args = parser.parse_args(argv)
        if args.what == "table":
            file = args.json or Path(RESULT)
            show(table(read(file, "rows")), file.stem, args.into)
            return 0
        device = started(args.device)
    except (ValueError, OSError) as failure:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", module="torch.*")  # a backend that refuses a shape says so at length
    limits = ceilings(device)
    print(f"copy {limits['copy_bytes_s'] / 1e12:.2f} TB/s, matmul {limits['matmul_flops_s'] / 1e12:.0f} TFLOP/s")
    found = origin(device, "bench_kernels", sys.argv[1:] if argv is None else argv)
    partial = bool(args.only or args.quick or device.type == "cpu")
    rows = gather("kernels", measure_all(args, limits, device), args.json, {**found, **limits}, RESULT, partial)
    return int(any("failed" in row["candidates"].get("ours", {}) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
