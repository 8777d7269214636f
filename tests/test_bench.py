import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bench
import bench_kernels
import figures
import measuring
from minidit.broadcast import PAB_246, Act, Plan, Site, plan
from minidit.cost import cost
from minidit.presets import PRESETS
from strategies import plans

COPY, MATMUL = 3.02e12, 769e12  # of one H100: bytes and operations a second
OPENSORA = PRESETS["opensora-1.2"]
CPU = torch.device("cpu")
KERNELS = {case.name: case for case in bench_kernels.CASES}


def small(preset):
    config = replace(PRESETS[preset], depth=2, dim=16, heads=2, caption_dim=8)
    return replace(config, sampling=replace(config.sampling, height=32, width=48, steps=12))


# bytes, operations, targets


@pytest.mark.parametrize(
    "name, ms",
    [
        ("spatial 480p 2s", 0.147),
        ("spatial 720p 2s", 0.332),
        ("temporal 480p 2s", 0.147),
        ("temporal 480p 8s", 0.586),
        ("cross, 100 keys", 0.074),
        ("cross, 300 keys", 0.074),
        ("norm_modulate", 0.073),
        ("add_updates, 1", 0.110),
    ],
)
def test_the_floor_of_an_op_is_the_time_that_its_bytes_take_to_copy(name, ms):
    assert KERNELS[name].nbytes() / COPY * 1e3 == pytest.approx(ms, rel=0.015)


@pytest.mark.parametrize(
    "name, ms, tflop_s",
    [
        ("spatial 480p 2s", 1.634, 214),  # FlashAttention-2
        ("spatial 480p 2s", 1.221, 286),  # cuDNN
        ("spatial 720p 2s", 7.735, 232),
        ("spatial 720p 2s", 5.874, 305),
    ],
)
def test_operations_in_a_known_time_are_the_known_rate(name, ms, tflop_s):
    assert round(KERNELS[name].flops / ms / 1e9) == tflop_s


def test_operations_are_those_that_a_plan_counts():
    price = cost(OPENSORA, batch=2, latent=(15, 60, 106), caption_length=100, itemsize=2).parts
    spatial, temporal, cross = (KERNELS[name] for name in ("spatial 480p 2s", "temporal 480p 2s", "cross, 100 keys"))
    square = 2 * spatial.elements * spatial.dim  # of a product of the tokens with a (D, D) weight
    assert spatial.flops == price["spatial"] - 4 * square
    assert temporal.flops == price["temporal"] - 4 * square
    assert cross.flops == price["cross"] - 2 * square
    assert 2 * KERNELS["linear_gelu"].flops == price["mlp"]


def test_a_pass_over_memory_may_take_a_third_longer_than_its_bytes():
    limits = {"copy_bytes_s": COPY, "matmul_flops_s": MATMUL}
    case = KERNELS["norm_modulate, 1 update"]  # reads two tensors, writes two
    found = bench_kernels.floors(case, case.nbytes(), limits)
    assert found["bytes_floor_ms"] == pytest.approx(4 * 2 * 15 * 1590 * 1152 * 2 / COPY * 1e3)
    assert found["target_ms"] == pytest.approx(1.3 * found["bytes_floor_ms"])
    assert bench_kernels.floors(KERNELS["cross, 100 keys"], 1, limits)["target_ms"] == 0.16


# kernels


@pytest.mark.parametrize("case", bench_kernels.CASES, ids=lambda case: case.name)
def test_an_op_in_float32_is_what_it_means_in_float32(case):
    case = bench_kernels.small(case)
    limits = {"copy_bytes_s": 1e10, "matmul_flops_s": 1e10}
    row = bench_kernels.measure(case, limits, 1, False, CPU)
    eager = row["candidates"]["eager"]
    assert eager["error"] < 1e-5 and eager["ms"] > 0
    assert eager["of_copy"] == pytest.approx(row["bytes_floor_ms"] / eager["ms"])
    assert case.name in bench_kernels.report(row)


def test_an_error_is_the_largest_distance_in_the_measured_part():
    case = bench_kernels.small(KERNELS["norm_modulate, 1 update"])
    args = bench_kernels.arguments(case, CPU)
    expected = bench_kernels.meaning(case, args)
    total, out = bench_kernels.reference.norm_modulate(*args)
    out[-1, -1, 3, 5] += 2
    assert bench_kernels.error(case, (total, out), expected) == pytest.approx(2, abs=1e-5)


def kernel_row(**candidates):
    row = {"case": "spatial 480p 2s", "op": "self_attention", "flops": 10**11, "target_ms": 1.1}
    floors = {"bytes_floor_ms": 0.147, "flops_floor_ms": 0.45}
    rates = {"gb_s": 1.0, "of_copy": 0.2, "tflop_s": 1.0, "of_matmul": 0.45}
    found = {
        name: ms if isinstance(ms, dict) else {"ms": ms, "error": 0.01, **rates} for name, ms in candidates.items()
    }
    return row | floors | {"candidates": found}


KERNEL_ORIGIN = {
    "device": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "commit": "abc1234",
    "command": "python scripts/bench_kernels.py",
    "dtype": "bfloat16",
    "copy_bytes_s": COPY,
    "matmul_flops_s": MATMUL,
}


def test_a_kernel_is_compared_with_the_fastest_that_does_as_much():
    row = kernel_row(ours=1.0, eager=4.0, compiled=2.0, cudnn={"failed": "RuntimeError"}, **{"cudnn alone": 0.9})
    (line,) = bench_kernels.table({**KERNEL_ORIGIN, "rows": [row]}).splitlines()[2:3]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:8] == [
        "spatial 480p 2s",
        "1.000",
        "1.100",
        "2.000 compiled",
        "2.00 x",
        "4.000",
        "2.000",
        "0.900 cudnn",
    ]
    assert cells[8:] == ["0.147", "0.450", "20%", "45%", "1.0e-02", "1.0e-02"]


def test_a_table_of_kernels_says_how_it_was_measured_and_has_as_many_cells_in_every_line():
    text = bench_kernels.table({**KERNEL_ORIGIN, "rows": [kernel_row(ours={"failed": "no"}, eager=4.0), kernel_row()]})
    *lines, _, about = text.splitlines()
    assert {line.count("|") for line in lines} == {15}
    for fact in ("NVIDIA H100", "2.11.0", "3.6.0", "abc1234", "python scripts/bench_kernels.py", "3.02 TB/s", "769"):
        assert fact in about


def test_the_recorded_command_has_no_path_of_this_machine():
    argv = ["--only", "add_updates", "--json", "/home/me/k.json", "--quick"]
    found = measuring.origin(CPU, "bench_kernels", argv)
    assert found["command"] == "python scripts/bench_kernels.py --only add_updates --quick"


def test_a_section_is_written_over_itself_and_beside_others(tmp_path):
    file = tmp_path / "README.md"
    measuring.show("old", "kernels", file)
    measuring.show(r"| \1 |", "steps", file)
    measuring.show("new", "kernels", file)
    text = file.read_text()
    assert text.count("<!-- kernels -->") == text.count("<!-- /kernels -->") == text.count("<!-- steps -->") == 1
    assert "\nnew\n" in text and "old" not in text and r"| \1 |" in text


# plans


@given(plans, st.integers(1, 4))
def test_a_tour_has_the_rows_of_the_plan_each_often_enough(whole, least):
    short = measuring.tour(whole, least)  # a Plan: nothing is reused that was not stored
    often, all_of_them = Counter(short.acts), Counter(whole.acts)
    assert often.keys() == all_of_them.keys()
    assert all(min(least, all_of_them[row]) <= often[row] <= all_of_them[row] for row in often)
    assert max((most for most, _ in short.held()), default=0) == max((most for most, _ in whole.held()), default=0)


def test_a_tour_of_the_paper_s_run_leaves_out_much():
    run = bench.pipeline.predict(bench.CASES["480p-2s"].config, torch.bfloat16, PAB_246).plan
    assert (len(run), len(set(run.acts)), len(measuring.tour(run, 1))) == (30, 6, 10)
    assert len(measuring.tour(plan(None, run.timesteps, run.sites), 3)) == 3


def test_a_run_takes_what_its_rows_take():
    sites = (Site(0, "spatial"), Site(0, "mlp"))
    compute, store, reuse = ((act, Act.COMPUTE) for act in (Act.COMPUTE, Act.STORE, Act.REUSE))
    run = Plan((6.0, 5.0, 4.0, 3.0, 2.0, 1.0), sites, (compute, store, reuse, reuse, store, reuse))
    rows = measuring.by_row(run, [100.0, 7.0, 1.0, 2.0, 9.0, 6.0])
    assert rows == {compute: 100.0, store: 8.0, reuse: 2.0}
    assert measuring.whole_time(run, rows) == 100 + 8 + 2 + 2 + 8 + 2
    assert [measuring.letters(run, row) for row in rows] == [". .", "S .", "R ."]


def test_a_run_of_the_paper_takes_what_its_computed_sites_take():
    run = bench.pipeline.predict(OPENSORA, torch.bfloat16, PAB_246).plan
    rows = {row: float(sum(act is not Act.REUSE for act in row)) for row in run.acts}
    assert measuring.whole_time(run, rows) == 588 + 476 + 896 + 1680


# steps


@pytest.fixture
def cases(monkeypatch):
    """Small cases that a CPU runs, in place of the published ones."""
    monkeypatch.setattr(
        bench,
        "CASES",
        {
            "480p-2s": bench.Case(config=small("opensora-1.2"), recipes=("none", "pab-246"), whole=True),
            "latte": bench.Case(config=small("latte-t2v"), recipes=("none", "latte-236"), impls=("auto", "torch")),
        },
    )


def test_small_models_are_measured_on_a_cpu(cases, tmp_path, capsys):
    file = tmp_path / "steps.json"
    assert bench.main(["--device", "cpu", "--cases", "480p-2s", "latte", "--calls", "1", "--json", str(file)]) == 0
    measured = json.loads(file.read_text())
    rows = measured["rows"]
    assert measured["command"] == "python scripts/bench.py --device cpu --cases 480p-2s latte --calls 1"
    assert [(row["case"], row["recipe"], row["impl"]) for row in rows] == [
        ("480p-2s", "none", "auto"),
        ("480p-2s", "pab-246", "auto"),
        ("latte", "none", "auto"),
        ("latte", "latte-236", "auto"),
        ("latte", "none", "torch"),
        ("latte", "latte-236", "torch"),
    ]
    for row in rows:
        assert row["run_s"] == pytest.approx(sum(each["calls"] * each["ms"] for each in row["rows"]) / 1e3)
        assert row["steps"] == sum(each["calls"] for each in row["rows"]) == 12
        assert (row["whole_s"] is not None) == (row["case"] == "480p-2s")
    assert rows[1]["tflop"] < rows[0]["tflop"] and rows[0]["latent"] == [15, 4, 6]
    capsys.readouterr()
    assert bench.main(["table", "--json", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows) + 2


def test_a_model_to_measure_has_no_weights_of_zero():
    model, given_ = bench.build(small("opensora-1.2"), CPU)
    assert all(parameter.ne(0).any() for parameter in model.parameters())
    assert given_.lengths.tolist() == [100] and given_.text.shape[1] == 300


def step_row(**changes):
    parts = {"matmul": 150.0, "spatial": 30.0, "temporal": 6.0, "cross": 9.0, "elementwise": 40.0, "rest": 5.0}
    times = {"step_s": 0.24, "run_s": 10.36, "whole_s": 7.3, "frames_s": 7.1, "peak_gib": 4.0}
    rates = {"tflop_s": 460.0, "of_matmul": 0.6, "breakdown_ms": parts}
    return {"case": "480p-2s", "recipe": "none", "impl": "auto", "steps": 30, **times, **rates, **changes}


def test_a_table_of_steps_compares_with_the_peer_where_it_ran_the_same():
    other = step_row(steps=10, breakdown_ms=None, whole_s=None, peak_gib=None)
    text = bench.table({**KERNEL_ORIGIN, "rows": [step_row(), other]})
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:4])
    assert first[3:] == ["0.240", "10.36", "7.30", "7.10", "4.0", "460", "60%", "20.72", "3.9", "2.00 x"]
    assert second[5] == second[7] == "-" and second[10:] == ["-", "-", "-"]
    assert "VideoSys" in text and "same GPU model" in text
    assert "| 480p-2s | auto | 240.0 | 150.0 (62%) | 30.0 (12%) |" in text
    assert "same GPU model" not in bench.table({**KERNEL_ORIGIN, "device": "NVIDIA H200", "rows": [step_row()]})


def test_kernels_are_grouped_by_what_they_are_and_where_they_run():
    marker = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    kernels = [
        ("vectorized_elementwise_kernel", 1.0),
        (marker, 0.5),
        ("nvjet_tst_256x128_64x4_bias_TNT", 2.0),
        ("void pytorch_flash::flash_fwd_kernel<Traits<cutlass::bfloat16_t>>", 4.0),
        ("elementwise_kernel", 8.0),
        (marker, 0.5),
        ("_kernel", 16.0),
        ("Memcpy DtoD (Device -> Device)", 32.0),
        (marker, 0.5),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", 64.0),
    ]
    found = bench.grouped(kernels, ["spatial", "elementwise", "cross"])
    assert found == {"matmul": 2, "spatial": 12, "temporal": 0, "cross": 64, "elementwise": 17, "rest": 32}
    with pytest.raises(RuntimeError, match="lost kernels"):
        bench.grouped(kernels, ["spatial"])


def test_a_trace_is_read_in_the_order_of_the_device():
    events = [
        {"cat": "kernel", "name": "second", "ts": 20.5, "dur": 3},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1, "dur": 1},
        {"name": "process_name", "ph": "M"},
        {"cat": "gpu_memset", "name": "Memset", "ts": 10.0, "dur": 1500},
    ]
    assert measuring.read_trace({"traceEvents": events}) == [("Memset", 1.5), ("second", 0.003)]


@pytest.mark.parametrize(
    "script, argv",
    [
        (bench, []),
        (bench, ["--cases", "1080p"]),
        (bench, ["--recipes", "pab"]),
        (bench, ["--calls", "0"]),
        (bench, ["--steps", "x"]),
        (bench, ["--device", "cpu", "--impl", "triton"]),
        (bench, ["table", "--json", "absent.json"]),
        (bench_kernels, []),
        (bench_kernels, ["--only", "softmax"]),
        (bench_kernels, ["table", "--json", "absent.json"]),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(script, argv, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith(f"{script.__name__}.py: ")


def test_the_sheet_of_samples_is_judged(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "CAPTIONS", figures.CAPTIONS[:1])
    monkeypatch.setattr(figures.judge, "accepts", lambda video, wanted: video.shape[0] == 16 and len(wanted) == 1)
    assert figures.main(["samples", "--seed", "1", "--out", str(tmp_path / "samples.png")]) == 0
    assert capsys.readouterr().out == "seed 1: the judge accepts 1 of 1\n" and (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("what, row", [("kernels", kernel_row(ours=1.0, eager=4.0)), ("steps", step_row())])
def test_a_picture_of_the_same_figures_is_the_same_file(what, row, tmp_path):
    pytest.importorskip("matplotlib")
    source = tmp_path / "measured.json"
    source.write_text(json.dumps({**KERNEL_ORIGIN, "rows": [row]}))
    for name in ("a.svg", "b.svg"):
        assert figures.main([what, str(source), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The bars of a picture's axes, as (start, width), and what is written on it."""
    pytest.importorskip("matplotlib")

    def draw(what, *rows):
        kept = []
        monkeypatch.setattr(figures, "_save", lambda figure, *_: kept.append(figure))
        getattr(figures, what)({**KERNEL_ORIGIN, "rows": list(rows)}, tmp_path / "a.svg")
        bars = [[(bar.get_x(), bar.get_width()) for bar in axes.patches] for axes in kept[0].axes]
        labels = [[label.get_text() for label in axes.get_yticklabels()] for axes in kept[0].axes]
        return bars, labels

    return draw


def test_a_kernel_is_drawn_beside_its_target_the_best_of_pytorch_and_its_floor(drawn):
    row = kernel_row(ours=1.0, eager=4.0, compiled=2.0, **{"cudnn alone": 0.9})
    (bars, *empty), (labels, *_) = drawn("kernels", row)
    assert bars == [(0, 1.0), (0, 1.1), (0, 2.0), (0, 0.45)] and not any(empty)
    assert labels == ["ours", "target", "PyTorch, compiled", "floor of operations"]


def test_steps_are_drawn_by_group_and_runs_beside_the_peers_of_as_many_steps(drawn):
    rows = [
        step_row(),
        step_row(recipe="pab-246", run_s=7.5, breakdown_ms=None),
        step_row(impl="torch", breakdown_ms={group: 10.0 for group in bench.GROUPS}),
        step_row(case="240p-2s", run_s=2.0, breakdown_ms=None),
    ]
    (groups, runs), (cases, names) = drawn("steps", *rows)
    assert cases == ["480p-2s", "480p-2s, torch"]
    assert groups[:4] == [(0, 150), (0, 10), (150, 30), (10, 10)] and len(groups) == 2 * len(bench.GROUPS)
    assert names == ["480p-2s none", "480p-2s pab-246", "240p-2s none"]
    assert [width for _, width in runs] == [10.36, 7.5, 2.0, 20.72, 15.6]
    (_, fewer), _ = drawn("steps", step_row(steps=10))
    assert [width for _, width in fewer] == [10.36]


@pytest.mark.gpu
def test_on_a_gpu_our_kernels_are_timed_and_steps_broken_down():
    device = torch.device("cuda")
    limits = {"copy_bytes_s": COPY, "matmul_flops_s": MATMUL}
    for case in map(bench_kernels.small, bench_kernels.CASES):
        found = bench_kernels.measure(replace(case, dim=144), limits, 3, False, device)["candidates"]
        assert found["ours"]["ms"] > 0 and found["ours"]["error"] <= 2 * found["eager"]["error"] + 1e-2
    case = bench.Case(config=replace(small("opensora-1.2"), dim=144), recipes=("none",))
    model, given_ = bench.build(case.config, device)
    row = bench.measure("small", case, "none", "auto", model, given_, least=2, whole=True, limit=MATMUL)
    parts = row["breakdown_ms"]
    assert all(parts[group] > 0 for group in ("matmul", "spatial", "temporal", "cross", "elementwise"))
    assert sum(parts.values()) == pytest.approx(1e3 * row["step_s"], rel=0.5)


def test_a_row_that_fails_does_not_take_the_others_with_it_nor_the_full_file(tmp_path, capsys):
    full, own = tmp_path / "full.json", tmp_path / "own.json"

    def rows(fails):
        yield {"a": 1}
        if fails:
            raise RuntimeError
        yield {"a": 2}

    assert measuring.gather("it", rows(False), None, {"b": 3}, str(full), False) == [{"a": 1}, {"a": 2}]
    for file in (None, own):
        with pytest.raises(RuntimeError):
            measuring.gather("it", rows(True), file, {"b": 3}, str(full), False)
    measuring.gather("it", rows(False), None, {"b": 4}, str(full), True)  # a part of what there is to measure
    assert json.loads(full.read_text()) == {"b": 3, "rows": [{"a": 1}, {"a": 2}]}
    assert json.loads(own.read_text()) == {"b": 3, "rows": [{"a": 1}]}
    nothing = "it: nothing written, --json FILE does"
    assert capsys.readouterr().out.splitlines() == [f"it: {full}", nothing, f"it: {own}", nothing]
