"""The model that comes with the repository, and what the documentation says of it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import judge
import minidit
import quality
import shapes
import train
from minidit import checkpoint, cli

ROOT = Path(__file__).parent.parent
FOLDER = checkpoint.EMBEDDED["tiny"]


def block(name):
    """The README's text between <!-- name --> and <!-- /name -->."""
    return re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", (ROOT / "README.md").read_text(), re.S)[1]


def test_it_is_what_the_training_script_trains():
    assert checkpoint.load_config("tiny") == train.TINY
    assert train.TINY.captions.vocabulary == shapes.VOCABULARY


def test_its_file_is_bfloat16_and_at_most_16_mb():
    assert (FOLDER / "model.safetensors").stat().st_size <= 16e6
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, not a dict
    assert {name for name, dtype in dtypes.items() if dtype != "BF16"} == {"rope_freqs"}


def test_the_first_command_of_the_readme_makes_a_video_that_the_judge_accepts(tmp_path, capsys):
    first = re.search(r"<!-- first -->\n```bash\n(.*?)\n```", (ROOT / "README.md").read_text(), re.S)[1]
    caption, out = re.search(r'minidit generate "(.*)" --out (\S+)$', first).groups()
    assert cli.main(["generate", caption, "--out", str(tmp_path / out), "--device", "cpu"]) == 0
    summary = capsys.readouterr().out
    assert "temporal      3        54      36  12 of 30\n" in summary  # broadcast is on, and said to be
    assert judge.main([str(tmp_path / out), caption]) == 0


def test_a_seed_makes_the_same_video_twice_and_another_seed_another_one():
    model = minidit.load("tiny")
    one, two, other = (minidit.generate(model, "a blue star grows", steps=3, seed=seed)[0] for seed in (1, 1, 2))
    assert one.equal(two)
    assert not one.equal(other)


def test_its_frequencies_are_those_that_it_was_trained_with():
    model = minidit.load("tiny", dtype=torch.bfloat16)
    assert model.rope_freqs.equal(train.DiT(train.TINY).rope_freqs)


def test_the_table_of_the_readme_is_that_of_the_measured_files():
    measured = (json.loads((ROOT / "benchmarks" / f"{name}.json").read_text()) for name in ("quality", "time"))
    assert block("quality").strip() == quality.table(*measured)


@pytest.mark.parametrize("name", ["quality", "time"])
def test_a_measured_file_says_with_what_it_was_measured(name):
    measured = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
    assert measured["command"].startswith("python scripts/quality.py")
    assert all(measured[key] for key in ("device", "torch", "python", "commit"))
    assert [row["recipe"] for row in measured["rows"]] == list(quality.NAMES)
