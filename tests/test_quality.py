import json
import math
from dataclasses import replace

import pytest
import torch

import quality
import train
from minidit import checkpoint, pipeline
from minidit.model import DiT

SAMPLING = replace(train.TINY.sampling, frames=2, height=16, width=16, steps=4)
SMALL = replace(train.TINY, depth=1, dim=16, heads=2, sampling=SAMPLING)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The files of a small model that has learnt nothing, two captions and one round."""
    folder = tmp_path_factory.mktemp("quality")
    checkpoint.save(DiT(SMALL), folder / "model")
    for what, more in (("judge", ["--captions", "3", "--batch", "2"]), ("time", ["--rounds", "1"])):
        assert quality.main([what, "--model", str(folder / "model"), "--out", str(folder), *more]) == 0
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("quality", "time")]


def test_a_model_that_has_learnt_nothing_has_nothing_right(measured):
    for row in measured[0]["rows"]:
        assert (row["right"], row["captions"], len(row["wrong"])) == (0, 3, 3)
        assert (row["held_out_right"], row["held_out"]) == (0, 1)


def test_likeness_is_against_the_same_seeds_without_broadcast(measured):
    plain, *others = measured[0]["rows"]
    assert (plain["psnr"], plain["ssim"], plain["saved"]) == (None, None, 0)
    assert all(20 < row["psnr"] < math.inf and 0.5 < row["ssim"] < 1 and row["saved"] > 0 for row in others)


def test_the_operations_are_of_one_video(measured):
    saved = {row["recipe"]: 1 - row["tflop"] / measured[0]["rows"][0]["tflop"] for row in measured[0]["rows"]}
    assert saved == pytest.approx({row["recipe"]: row["saved"] for row in measured[0]["rows"]}, abs=1e-9)
    one = pipeline.predict(SMALL, torch.float32, None).flops / 1e12
    assert measured[0]["rows"][0]["tflop"] == pytest.approx(one, rel=0.25)  # captions are shorter than can be


def test_a_table_has_a_row_for_every_recipe(measured):
    lines = quality.table(*measured).splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["recipe", "---", *quality.NAMES]
