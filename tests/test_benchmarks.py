"""What the documentation says was measured is what the committed files say, and those say where they come from."""

import json
import re
from pathlib import Path

import pytest

import bench
import bench_kernels
import bench_parallel
import bench_stages

ROOT = Path(__file__).parents[1]
TABLES = {
    "kernels": bench_kernels,
    "kernels_h200": bench_kernels,
    "steps": bench,
    "steps_h200": bench,
    "stages": bench_stages,
    "parallel": bench_parallel,
}
README, KERNELS = (ROOT / "README.md").read_text(), (ROOT / "kernels" / "README.md").read_text()


def measured(name):
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def cells(text, start):
    """Of the row of a Markdown table that starts so, the first number in each cell after the first."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    numbers = [re.search(r"[\d.]+", cell) for cell in row.split("|")[2:-1]]
    return [number and float(number[0]) for number in numbers]


@pytest.mark.parametrize("name", TABLES)
def test_the_page_of_measurements_is_made_of_the_files(name, tmp_path):
    page = (ROOT / "benchmarks" / "README.md").read_text()
    file, into = ROOT / "benchmarks" / f"{name}.json", tmp_path / "README.md"
    assert TABLES[name].main(["table", "--json", str(file), "--into", str(into)]) == 0
    section = into.read_text().removeprefix("# Measurements\n\n")
    assert section.startswith(f"<!-- {name} -->\n") and section.endswith(f"<!-- /{name} -->\n") and section in page


@pytest.mark.parametrize("name", [*TABLES, "quality", "time"])
def test_every_file_names_its_device_versions_commit_and_command(name):
    found = measured(name)
    for origin in found.get("launches", [found]):
        assert re.fullmatch(r"[0-9a-f]{7,}", origin["commit"])  # of a tree that was committed
        assert re.match(r"(python|torchrun --nproc-per-node \d) scripts/\w+\.py", origin["command"])
        assert origin["device"] and origin["torch"] and origin["python"]


def steps(name):
    return {(row["case"], row["recipe"], row["impl"]): row for row in measured(name)["rows"]}


def test_the_readmes_steps_are_the_measured_ones():
    rows, later = steps("steps"), steps("steps_h200")
    ours, torch = (rows["480p-2s", "none", impl] for impl in ("auto", "torch"))
    peer = bench.PEERS["480p-2s", "none"]
    assert cells(README, "a step")[:2] == [round(row["step_s"], 3) for row in (ours, torch)]
    assert cells(README, "30 steps") == [round(ours["run_s"], 2), round(torch["run_s"], 2), peer.seconds]
    ours, torch = (rows["480p-2s", "pab-246", impl] for impl in ("auto", "torch"))
    peer = bench.PEERS["480p-2s", "pab-246"]
    assert cells(README, "30 steps, PAB_246") == [round(ours["run_s"], 2), round(torch["run_s"], 2), peer.seconds]
    plain, broadcast = (later["480p-2s", recipe, "auto"] for recipe in ("none", "pab-246"))
    prose = " ".join(README.split())
    said = re.search(r"On an H200, .*? a step takes ([\d.]+) s, 30 steps ([\d.]+) s and with PAB_246 ([\d.]+) s", prose)
    expected = [round(plain["step_s"], 3), round(plain["run_s"], 2), round(broadcast["run_s"], 2)]
    assert [float(number) for number in said.groups()] == expected
    for name in ("240p 2s", "480p 2s", "480p 4s", "480p 8s", "720p 2s"):
        plain, broadcast = (rows[name.replace(" ", "-"), recipe, "auto"] for recipe in ("none", "pab-246"))
        expected = [round(plain["step_s"] * 1000), round(100 * plain["of_matmul"])]
        found = cells(KERNELS, name)
        assert found[:4] == [*expected, round(plain["run_s"], 2), round(broadcast["run_s"], 2)]
        plain, broadcast = (later[name.replace(" ", "-"), recipe, "auto"] for recipe in ("none", "pab-246"))
        assert found[-2:] == [round(plain["step_s"] * 1000), round(broadcast["run_s"], 2)]


def test_the_kernels_page_has_the_measured_times():
    before, rows = ({row["case"]: row for row in measured(name)["rows"]} for name in ("kernels", "kernels_h200"))
    said = {
        "spatial, QK-RMSNorm included": ["spatial 480p 2s"],
        "the same, S 3600": ["spatial 720p 2s"],
        "temporal, 15 frames, QK-RMSNorm and RoPE included": ["temporal 480p 2s"],
        "temporal, 60 frames": ["temporal 480p 8s"],
        "cross, 100 tokens": ["cross, 100 keys"],
        "cross, 300 tokens": ["cross, 300 keys"],
        "norm_modulate": ["norm_modulate"],
        "norm_modulate with one update; with three": ["norm_modulate, 1 update", "norm_modulate, 3 updates"],
        "add_updates, one (`x + gate * a`); two": ["add_updates, 1", "add_updates, 2"],
    }
    for start, cases in said.items():
        line = next(line for line in KERNELS.splitlines() if line.startswith(f"| {start} |"))
        columns = line.split("|")[2:-1]
        numbers = [[float(n) for n in re.findall(r"[\d.]+", column)] for column in columns]
        for i, case in enumerate(cases):
            row, ours, earlier = rows[case], *(of[case]["candidates"]["ours"]["ms"] for of in (rows, before))
            alone = bench_kernels.best(row, alone=True)
            expected = [ours, row["target_ms"], bench_kernels.best(row, alone=False)[1]["ms"]]
            expected += [alone and alone[1]["ms"], row["bytes_floor_ms"], earlier]
            found = [each[i] if each else None for each in numbers]
            assert found == [ms and round(ms, 3) for ms in expected]
            assert ("**" in columns[0]) == (ours > row["target_ms"])
            assert ("**" in columns[5]) == (earlier > before[case]["target_ms"])


def test_the_readmes_stages_are_the_measured_ones():
    for row in measured("stages")["rows"]:
        line = next(line for line in README.splitlines() if line.startswith(f"| {row['case'][:4]} | {row['recipe']} |"))
        found = [float(cell) for cell in line.split("|")[3:7]]
        stages = row["stages"]
        moving = sum(stage["moving_s"] for stage in stages.values())
        seconds = [stages[name]["seconds"] for name in bench_stages.STAGES]
        assert found == pytest.approx([*seconds, moving], abs=0.0051)
        peaks = [stages[name][kind] for kind in ("peak_gib", "predicted_gib") for name in bench_stages.STAGES]
        assert [float(n) for n in re.findall(r"[\d.]+", line.split("|")[7])] == pytest.approx(peaks, abs=0.051)


def test_the_readmes_runs_on_several_gpus_are_the_measured_ones():
    rows = measured("parallel")["rows"]
    took = {
        (row["case"], row["recipe"], row["ranks"], row["guidance"]): row["seconds"]
        for row in rows
        if row["axis"] in ("-", "auto")
    }
    for case in ("480p 2s", "480p 8s", "720p 2s"):
        line = README.split("two, guidance split", 1)[1].split(f"| {case} |", 1)[1].splitlines()[0]
        one, two, four, gain, _ = line.split("|")
        name, runs = case.replace(" ", "-"), ((one, 1, "together"), (two, 2, "apart"), (four, 4, "apart"))
        plain, kept = (took[name, recipe, 1, "together"] for recipe in ("none", "pab-246"))
        for cell, ranks, guidance in runs:
            each = [took[name, recipe, ranks, guidance] for recipe in ("none", "pab-246")]
            faster = [] if ranks == 1 else [plain / each[0], kept / each[1]]
            assert [float(n) for n in re.findall(r"[\d.]+", cell)] == pytest.approx([*each, *faster], abs=0.0051)
        assert float(gain.split()[0]) == pytest.approx(plain / took[name, "pab-246", 4, "apart"], abs=0.0051)
