import runpy
from dataclasses import replace
from pathlib import Path

import minidit
from minidit import Pyramid

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_example_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    model = minidit.load("tiny")
    model.config = replace(model.config, sampling=replace(model.config.sampling, steps=10))  # of 30: in a third
    monkeypatch.setattr(minidit, "load", lambda name: model)
    monkeypatch.chdir(tmp_path)
    ran = runpy.run_path(str(EXAMPLES / "generate.py"))
    said = capsys.readouterr().out
    assert said.startswith("7.5 M parameters, 3 pairs of blocks\n16 frames of 64x64 in 10 steps, guidance 3\n")
    heads, *calls = said.splitlines()[2:13]
    assert heads.split() == ["spatial", "cross", "mlp", "temporal", "cross", "mlp"]
    assert len({len(line) for line in (heads, *calls)}) == 1 and {"S", "R", "."} == {*" ".join(calls).split()}
    for name in ("pab-246 ", "mine ", "pab-579 "):
        (line,) = (line for line in said.splitlines() if line.startswith(name))
        assert "of the operations saved" in line and float(line.split("PSNR ")[1].removesuffix(" dB")) > 15
    assert minidit.load_video(tmp_path / "out" / "circle.mp4").shape[0] == 16
    assert (tmp_path / "out" / "circle.png").is_file()
    assert Pyramid.from_json((tmp_path / "out" / "mine.json").read_text()) == ran["mine"]
