"""The benchmark of several ranks, rehearsed on processes of this machine's CPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
import bench_parallel
import metering
from bench_parallel import Bench, Combination, combinations, merged, predicted
from metering import of_whole
from minidit import pipeline
from minidit.broadcast import RECIPES

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = bench_parallel.small(bench.CASES["480p-2s"].config)
LAUNCH = {
    "command": "torchrun --nproc-per-node 8 scripts/bench_parallel.py",
    "device": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "commit": "abc1234",
}


def row(case="480p-8s", recipe="pab-246", ranks=8, axis="frames", seconds=4.0, **changes):
    counted = [0] if ranks == 1 else [2 * 10**9, 4 * 10**9]
    return {
        "case": case,
        "recipe": recipe,
        "ranks": ranks,
        "guidance": "together",
        "axis": axis,
        "shared": None if axis == "-" else "places" if axis == "auto" else axis,
        "steps": 30,
        "seconds": seconds,
        "frames_s": 204 / seconds,
        "collectives_s": [0.1, 0.3],
        "nccl_s": None,
        "peak_gib": [10.0, 12.0],
        "counted_bytes": counted,
        "predicted_bytes": counted,
        "difference": 0.012,
        **changes,
    }


# ways to share a run


AUTO = {1: "places", 2: "frames"}


def test_every_way_that_is_asked_for_is_measured_once_and_named_as_often_as_it_was_asked_for():
    found = combinations(8, ("frames", "places", "auto"), ("together", "apart"), AUTO)
    assert found == [
        Combination(1, 8, "frames", ("frames",)),
        Combination(1, 8, "places", ("places", "auto")),
        Combination(2, 4, "frames", ("frames", "auto")),
        Combination(2, 4, "places", ("places",)),
    ]
    assert [way.guidance for way in found] == ["together", "together", "apart", "apart"]
    assert combinations(8, ("auto",), ("together",), AUTO) == [Combination(1, 8, "places", ("auto",))]


def test_one_rank_shares_nothing_and_an_odd_number_has_no_halves():
    both = ("together", "apart")
    assert combinations(1, ("frames", "auto"), both, AUTO) == [Combination(1, 1, None, ("-",))]
    assert combinations(2, ("auto",), both, AUTO)[1] == Combination(2, 1, None, ("-",))
    assert {way.halves for way in combinations(3, ("frames", "places"), both, AUTO)} == {1}


def test_halves_of_guidance_hand_over_half_the_tokens_and_their_outputs():
    model, given = bench.build(SMALL, CPU)
    plan = pipeline.predict(SMALL, model.dtype, RECIPES["pab-246"]).plan

    def found(halves, sequence):
        shared = "frames" if sequence > 1 else None
        return predicted(plan, SMALL, given, model.dtype, Combination(halves, sequence, shared, ()))

    outputs = 30 * 2 * 8 * 15 * 4 * 6 * 4  # calls, halves, channels, latents, bytes
    assert found(1, 1) == [0] and found(2, 1) == [outputs] * 2
    assert found(2, 2) == [together // 2 + outputs for together in found(1, 2)] * 2


# what is added up


def ready(recipe="pab-246", quick=False, steps=30):
    config = pipeline.asked(SMALL, steps=steps)
    model, given = bench.build(config, CPU)
    plan = pipeline.predict(config, model.dtype, RECIPES[recipe]).plan
    return Bench("480p-2s", recipe, config, model, given, plan, quick)


def test_a_short_run_has_calls_of_all_kinds_and_adds_up_to_the_whole_one():
    for recipe, steps in ("pab-246", 30), ("none", 30), ("none", 3):
        case = ready(recipe, steps=steps)
        assert set(case.short.acts) == set(case.plan.acts)
        assert min(bench_parallel.CALLS, steps) <= len(case.short) <= 12
        cost = {acts: 3.0 + number for number, acts in enumerate(dict.fromkeys(case.plan.acts))}
        of_short, of_all = ([cost[acts] for acts in plan.acts] for plan in (case.short, case.plan))
        assert of_whole(case.plan, case.short, of_short) == of_whole(case.plan, case.plan, of_all) == sum(of_all)


def test_the_time_of_nccl_is_told_apart_by_call_and_not_told_if_calls_are_lost():
    marker, nccl = "spin_kernel(long)", "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
    kernels = [(nccl, 64.0), (marker, 0.5), (nccl, 1.0), ("gemm", 8.0), (nccl, 2.0), (marker, 0.5), (marker, 0.5)]
    assert metering.nccl_ms(kernels, 2) == [3.0, 0.0]
    with pytest.raises(RuntimeError, match="lost kernels"):
        metering.nccl_ms(kernels, 3)


def test_a_distance_is_measured_by_how_far_a_run_went():
    z, alone = torch.ones(4), torch.tensor([1.0, 1.0, 4.0, 5.0])
    assert bench_parallel.distance(alone + 0.25, alone, z) == pytest.approx(0.1)


# the file and the table


def test_launches_are_merged_and_speed_ups_are_over_one_rank():
    one = [row(ranks=1, axis="-", seconds=32.0), row(recipe="none", ranks=1, axis="-", seconds=40.0)]
    first = merged({}, {**LAUNCH, "command": "first"}, [*one, row(seconds=8.0)])
    second = merged(first, {**LAUNCH, "command": "second"}, [row(), row(axis="auto", seconds=5.0)])
    assert [launch["command"] for launch in second["launches"]] == ["first", "second"]
    assert [(r["ranks"], r["axis"], r["launch"]) for r in second["rows"]] == [
        (1, "-", 0),
        (1, "-", 0),
        (8, "frames", 1),
        (8, "auto", 1),
    ]
    assert [r["speedup"] for r in second["rows"]] == [1, 1, 8.0, 6.4]
    assert [r["speedup_over_plain"] for r in second["rows"]] == [1, 1.25, 10.0, 8.0]
    third = merged(second, {**LAUNCH, "command": "third"}, one)
    assert [launch["command"] for launch in third["launches"]] == ["second", "third"]


def test_there_is_no_speed_up_over_another_device_or_another_number_of_steps():
    first = merged({}, LAUNCH, [row(ranks=1, axis="-")])
    assert merged(first, {**LAUNCH, "device": "NVIDIA H200"}, [row()])["rows"][1]["speedup"] is None
    assert merged(first, LAUNCH, [row(steps=10)])["rows"][1]["speedup"] is None


def test_a_table_says_what_was_reached_and_how_it_was_measured(tmp_path, capsys):
    file = tmp_path / "parallel.json"
    one = [
        row(recipe=recipe, ranks=1, axis="-", seconds=seconds) for recipe, seconds in (("none", 40), ("pab-246", 32))
    ]
    rows = [*one, row(axis="auto", nccl_s=[0.1, 0.2], predicted_bytes=[10**9] * 2)]
    file.write_text(json.dumps(merged({}, LAUNCH, rows)))
    assert bench_parallel.main(["table", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells[:9] == ["480p-8s", "pab-246", "8", "places, automatic", "together", "4.00", "8.00", "10.00", "51.00"]
    assert cells[9:] == ["12.0", "3.00", "no: 1.00", "0.200", "0.150", "1.2e-02"]
    assert "8.00 x one rank's time with it (7.0 wanted), 10.00 x one rank's without (8.5 wanted)" in lines[6]
    assert "not the predicted ones in 1 rows" in lines[6]
    assert "NVIDIA H100" in lines[7] and "`torchrun --nproc-per-node 8 scripts/bench_parallel.py`" in lines[7]
    into = tmp_path / "README.md"
    assert bench_parallel.main(["table", "--json", str(file), "--into", str(into)]) == 0
    assert lines[4] in into.read_text()


# what goes wrong


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--cases", "1080p"],
        ["--recipes", "pab"],
        ["--axes", "rows"],
        ["--guidance", "split"],
        ["--steps", "0"],
        ["--device", "cpu", "--guidance", "apart"],
        ["--device", "cpu", "--json", "other.json"],
        ["table", "--json", "absent.json"],
        ["table", "--json", "other.json"],
        ["table", "--json", "broken.json"],
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line_by_one_rank(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_parallel, "PATIENCE", 0)
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text('{"rows": []}')
    Path("broken.json").write_text("{")
    assert bench_parallel.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("bench_parallel.py: ")
    monkeypatch.setenv("RANK", "1")
    assert bench_parallel.main(argv) == 2
    assert capsys.readouterr() == ("", "")


def test_what_was_measured_before_a_launch_broke_off_is_written(tmp_path, monkeypatch, capsys):
    before = Bench.measure

    def measure(self, *args):
        if self.recipe == "pab-246":
            raise torch.OutOfMemoryError("no memory\nleft")
        return before(self, *args)

    monkeypatch.setattr(Bench, "measure", measure)
    file = tmp_path / "parallel.json"
    argv = ["--device", "cpu", "--cases", "480p-2s", "--steps", "2", "--json", str(file)]
    assert bench_parallel.main(argv) == 2
    assert capsys.readouterr().err == "bench_parallel.py, rank 0, rows before: 1: no memory left\n"
    assert [r["recipe"] for r in json.loads(file.read_text())["rows"]] == ["none"]
    assert [file.name for file in tmp_path.iterdir()] == ["parallel.json"]


def test_other_bytes_than_predicted_are_an_error(monkeypatch, capsys):
    before = Bench.measure
    monkeypatch.setattr(Bench, "measure", lambda *args: replace_bytes(before(*args)))

    def replace_bytes(row):
        return {**row, "predicted_bytes": [1]}

    argv = ["--device", "cpu", "--cases", "480p-2s", "--recipes", "none", "--steps", "2"]
    assert bench_parallel.main(argv) == 1
    said = capsys.readouterr()
    assert "OTHER BYTES THAN predicted" in said.out and "nothing written" in said.out
    assert said.err == "bench_parallel.py: rows with other bytes than predicted: 1\n"


# on processes


def test_two_processes_measure_every_way_that_is_asked_for(tmp_path, capsys):
    file, script = tmp_path / "parallel.json", ROOT / "scripts" / "bench_parallel.py"
    small = ["--device", "cpu", "--cases", "480p-2s", "--steps", "12", "--json", str(file)]
    assert bench_parallel.main(small) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *small]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("parallel: ") == 1  # one rank tells
    measured = json.loads(file.read_text())
    assert [launch["command"].split()[:3] for launch in measured["launches"]] == [
        ["torchrun", "--nproc-per-node", ranks] for ranks in "12"
    ]
    ways = [("together", "frames"), ("together", "places"), ("together", "auto"), ("apart", "-")]
    assert [(r["ranks"], r["recipe"], r["guidance"], r["axis"]) for r in measured["rows"]] == [
        *((1, recipe, "together", "-") for recipe in ("none", "pab-246")),
        *((2, recipe, *way) for recipe in ("none", "pab-246") for way in ways),
    ]
    for found in measured["rows"]:
        assert found["counted_bytes"] == found["predicted_bytes"] and len(found["counted_bytes"]) == found["ranks"]
        assert found["difference"] < 1e-4 and found["speedup"] > 0 and found["frames_s"] == 51 / found["seconds"]
        assert (sum(found["counted_bytes"]) > 0) == (found["ranks"] > 1)
        assert 0 <= max(found["collectives_s"]) < found["seconds"] and found["timed_calls"] == found["steps"] == 12
    by_axis = {(r["recipe"], r["axis"]): sum(r["counted_bytes"]) for r in measured["rows"] if r["ranks"] == 2}
    assert by_axis["pab-246", "frames"] < by_axis["pab-246", "places"] < by_axis["none", "places"]
    assert by_axis["pab-246", "-"] == by_axis["none", "-"]
    capsys.readouterr()
    assert bench_parallel.main(["table", "--json", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 10 + 1 + 2


def test_latents_that_are_no_numbers_have_no_difference(monkeypatch):
    monkeypatch.setattr(bench_parallel, "distance", lambda *_: float("nan"))
    case = replace(ready(steps=2), quick=True)
    with torch.inference_mode():
        found = case.measure(Combination(1, 1, None, ("-",)), bench_parallel.ALONE, None)
    assert found["difference"] is None and "difference -" in bench_parallel.report(found)
    one = merged({}, LAUNCH, [{**found, "axis": "-"}])
    assert bench_parallel.table(one).splitlines()[2].endswith("| - |")


def test_a_quick_run_counts_the_bytes_of_a_whole_one():
    case = replace(ready(), quick=True)
    with torch.inference_mode():
        found = case.measure(Combination(1, 1, None, ("-",)), bench_parallel.ALONE, None)
    assert found["timed_calls"] == len(case.short) < found["steps"] and found["seconds"] > 0
