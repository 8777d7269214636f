"""The command and the training on several processes, started as users start them."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import shapes
import train
from minidit import cli
from tests.test_train import SMALL

ROOT = Path(__file__).parents[1]
CAPTION = "a red circle moves to the right"


@pytest.fixture
def torchrun(tmp_path):
    """Starts a program on so many processes, in a folder of its own."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

    def start(ranks, *arguments):
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, str(ranks), *arguments], cwd=tmp_path, env=environment, **output)

    return start


def generated(torchrun, ranks, out, *options):
    made = torchrun(ranks, "-m", "minidit", "generate", CAPTION, "--steps", "4", "--out", out, *options)
    output, errors = made.communicate(timeout=120)
    assert made.returncode == 0, errors
    assert output.count("wrote") == 1  # one rank tells
    return output


def pixels(path):
    image = Image.open(path)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


@pytest.mark.parametrize("options", [[], ["--no-split-guidance"]], ids=["a half each", "tokens shared"])
def test_two_processes_make_the_video_of_one(options, torchrun, tmp_path):
    assert cli.main(["generate", CAPTION, "--steps", "4", "--out", str(tmp_path / "1.png")]) == 0
    generated(torchrun, 2, "2.png", *options)
    difference = (pixels(tmp_path / "2.png") - pixels(tmp_path / "1.png")).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.001  # sums in another order


def test_what_all_ranks_find_wrong_is_said_once(torchrun, tmp_path):
    refused = torchrun(2, "-m", "minidit", "generate", "a red dragon moves", "--out", "x.png")
    _, errors = refused.communicate(timeout=60)
    said = [line for line in errors.splitlines() if line.startswith("minidit: ")]
    assert len(said) == 1 and "unknown in the caption: 'dragon'" in said[0]
    assert refused.returncode != 0 and not list(tmp_path.iterdir())


def test_the_captions_of_a_file_are_shared_out_and_what_is_there_is_kept(torchrun, tmp_path):
    captions = ["a red circle rises", "a blue star grows", "", "a white square falls"]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "0001.png").write_text("made before")
    options = ["--prompts", "captions.txt", "--out", "videos", "--kind", "png", "--steps", "2", "--data", "2"]
    output, errors = torchrun(2, "-m", "minidit", "generate", *options).communicate(timeout=120)
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["0000.png", "0001.png", "0003.png"], errors
    assert (tmp_path / "videos" / "0001.png").read_text() == "made before"
    assert output.count("wrote") == 2 and "2 videos made in videos, of which 1 here" in output
    alone = ["generate", captions[3], "--seed", "3", "--steps", "2", "--out", str(tmp_path / "alone.png")]
    assert cli.main(alone) == 0
    assert torch.equal(pixels(tmp_path / "alone.png"), pixels(tmp_path / "videos" / "0003.png"))


def workers(parent):
    """The processes that torchrun started."""
    children = (Path(f"/proc/{parent}/task/{parent}/children")).read_text().split()
    return [int(child) for child in children]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as Linux shows them")
def test_a_rank_that_is_killed_ends_the_run_and_leaves_no_file(torchrun, tmp_path):
    run = torchrun(2, "-m", "minidit", "generate", CAPTION, "--steps", "2000", "--out", "x.png")
    while "with broadcast" not in run.stderr.read(40):  # the progress bar: it has begun
        assert run.poll() is None
    os.kill(workers(run.pid)[-1], signal.SIGKILL)
    start = time.monotonic()
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0 and time.monotonic() - start < 60
    assert not list(tmp_path.iterdir())


SMALL_TRAINING = """
import sys
from functools import partial
import shapes
import train
from tests.test_train import SMALL
train.TINY, shapes.draw = SMALL, partial(shapes.draw, frames=2, size=16)
sys.exit(train.main())
"""


def test_training_on_two_processes_is_training_on_one_with_the_same_batch(torchrun, tmp_path, monkeypatch):
    quiet = ["--steps", "3", "--batch", "4", "--warmup", "1", "--show", "0", "--workers", "0", "--device", "cpu"]
    (tmp_path / "train_small.py").write_text(SMALL_TRAINING)
    training = torchrun(2, "train_small.py", *quiet, "--no-compile", "--out", "2")
    monkeypatch.setattr(train, "TINY", SMALL)
    monkeypatch.setattr(shapes, "draw", partial(shapes.draw, frames=2, size=16))
    assert train.main([*quiet, "--no-compile", "--out", str(tmp_path / "1")]) == 0
    _, errors = training.communicate(timeout=200)
    assert training.returncode == 0, errors
    one, two = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("1", "2"))
    # what a step adds up in float32; Muon makes an update of it in bfloat16, which takes small differences far apart
    for optimizer, sums in (("muon", "momentum_buffer"), ("adamw", "exp_avg")):
        first, second = ([*run[optimizer]["state"].values()] for run in (one, two))
        assert len(first) == len(second) > 10 and any(state[sums].abs().max() > 0 for state in first)
        for ours, theirs in zip(first, second, strict=True):
            torch.testing.assert_close(theirs[sums], ours[sums], rtol=1e-3, atol=1e-3 * ours[sums].abs().max().item())
