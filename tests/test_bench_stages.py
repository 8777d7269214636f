"""The benchmark of whole pipelines, rehearsed at tiny size on this machine's CPU."""

import json
from dataclasses import replace

import pytest
import torch

import bench_stages
from minidit.broadcast import RECIPES
from minidit.fitting import Run, fit
from minidit.stages import Stages
from minidit.text import layout_of

CPU = torch.device("cpu")
SMALL = bench_stages.pipeline.asked(bench_stages.small(bench_stages.bench.CASES["480p-2s"].config), frames=17, steps=12)
REHEARSED = ["--device", "cpu", "--cases", "480p-2s", "--steps", "4"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = bench_stages.t5_folder(tmp_path_factory.mktemp("t5"), {**bench_stages.T5_SMALL, "d_model": 8})
    return bench_stages.build(SMALL, bench_stages.VAE_SMALL, folder, CPU)


@pytest.fixture(scope="module")
def row(pipe, tmp_path_factory):
    return bench_stages.measure(pipe, "480p-2s", SMALL, "pab-246", tmp_path_factory.mktemp("video") / "a.mp4")


def test_a_row_says_what_every_stage_took_and_what_was_predicted_of_it(pipe, row):
    assert (row["frames"], row["height"], row["width"], row["steps"]) == (17, 32, 48, 12)
    assert 100 < row["tokens"] < 300 and row["tile"] is None and row["file_bytes"] > 0
    peaks, _ = fit(pipe, Run(config=SMALL, pyramid=RECIPES["pab-246"]), 2**40)
    assert list(row["stages"]) == list(peaks) == ["text", "model", "decoder"]
    for name, stage in row["stages"].items():
        assert stage["predicted_gib"] == peaks[name] / 2**30 > 0 and stage["finite"]
        assert stage["seconds"] > 0 and stage["moving_s"] >= 0 and stage["peak_gib"] is None
    assert row["cache_gib"] > 0
    assert row["all_s"] >= sum(stage["seconds"] for stage in row["stages"].values())


def test_a_pipeline_of_random_weights_is_of_the_asked_sizes(pipe):
    assert layout_of(pipe.text.source) == ("", "")
    assert pipe.text.t5.encoder.config.d_model == SMALL.caption_dim
    assert all(parameter.ne(0).any() for parameter in pipe.model.parameters())
    assert pipe.decoder.vae.scale.dtype == torch.float32


def test_times_of_stages_are_told_apart_and_stages_are_as_before_afterwards():
    before, module = Stages.on, torch.nn.Linear(1, 1)
    with bench_stages.timed(CPU) as found, Stages(CPU).on("text", module) as part:
        assert part is module
    assert Stages.on is before and list(found) == ["text"] and found["text"]["seconds"] < 1


def test_what_is_no_number_is_noticed_wherever_it_comes_first(pipe, tmp_path):
    bias = next(parameter for name, parameter in pipe.model.named_parameters() if name.endswith("bias"))
    kept = bias.clone()
    bias.fill_(float("nan"))
    try:
        found = bench_stages.measure(pipe, "480p-2s", SMALL, "none", tmp_path / "a.mp4")
    finally:
        bias.copy_(kept)
    assert bench_stages.strange(found) == ["model", "decoder"]
    assert "NOT FINITE" in bench_stages.report(found)
    text = bench_stages.table({**ORIGIN, "rows": [found]})
    assert "Not finite were 480p-2s none: model, decoder." in text


ORIGIN = {
    "device": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "commit": "abc1234",
    "command": "python scripts/bench_stages.py",
    "dtype": "bfloat16",
}


def test_a_table_has_a_line_a_run_of_times_and_three_of_memory():
    stage = {"seconds": 1.0, "moving_s": 0.5, "peak_gib": 8.0, "reserved_gib": 9.0, "predicted_gib": 10.0}
    stages = {name: {**stage, "finite": True} for name in bench_stages.STAGES}
    run = {"case": "720p-2s", "recipe": "none", "frames": 51, "tile": 40, "all_s": 6.5}
    text = bench_stages.table({**ORIGIN, "rows": [{**run, "stages": stages}]}).splitlines()
    assert text[2] == "| 720p-2s | none | 1.00 | 1.00 | 1.00 | 1.50 | 6.50 | 7.85 |"
    assert text[6:9] == [
        "| 720p-2s | none | text | 8.00 | 10.00 | 1.25 | 9.00 | - |",
        "| 720p-2s | none | model | 8.00 | 10.00 | 1.25 | 9.00 | - |",
        "| 720p-2s | none | decoder | 8.00 | 10.00 | 1.25 | 9.00 | 40 |",
    ]
    for fact in ("H100", "2.11.0", "3.6.0", "abc1234", "`python scripts/bench_stages.py`", "bfloat16", "finite"):
        assert fact in text[-1]


def test_the_whole_is_rehearsed_on_a_cpu(tmp_path, capsys):
    file, into = tmp_path / "stages.json", tmp_path / "README.md"
    assert bench_stages.main([*REHEARSED, "--recipes", "none", "--json", str(file)]) == 0
    measured = json.loads(file.read_text())
    assert measured["command"] == "python scripts/bench_stages.py --device cpu --cases 480p-2s --steps 4 --recipes none"
    assert [(found["case"], found["recipe"]) for found in measured["rows"]] == [("480p-2s", "none")]
    assert measured["rows"][0]["cache_gib"] == 0
    capsys.readouterr()
    assert bench_stages.main(["table", "--json", str(file), "--into", str(into)]) == 0
    assert "<!-- stages -->\n| case | recipe |" in into.read_text()


@pytest.mark.parametrize("argv", [[], ["--cases", "latte"], ["--steps", "0"], ["table", "--json", "absent.json"]])
def test_what_cannot_be_measured_is_said_in_one_line(argv, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_stages.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("bench_stages.py: ")


@pytest.mark.gpu
def test_on_a_gpu_each_stage_holds_what_was_predicted_of_it(tmp_path):
    config, device = replace(SMALL, dim=144), torch.device("cuda")
    folder = bench_stages.t5_folder(tmp_path, {**bench_stages.T5_SMALL, "d_model": 8})
    pipe = bench_stages.build(config, bench_stages.VAE_SMALL, folder, device)
    bench_stages.settle(pipe)
    found = bench_stages.measure(pipe, "480p-2s", config, "none", tmp_path / "a.mp4")
    assert not bench_stages.strange(found)
    for stage in found["stages"].values():
        assert 0 < stage["peak_gib"] <= stage["reserved_gib"] and stage["moving_s"] > 0
        assert stage["peak_gib"] < stage["predicted_gib"] + 2**-3  # what cuBLAS takes is more than such small parts
