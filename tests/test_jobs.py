from functools import partial

import pytest
import torch

import minidit
from minidit.jobs import Job, jobs, numbered
from test_cli import SMALL


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a red circle\n\n  a circle moves \n")
    return path


def test_captions_have_the_number_of_their_line_or_place(captions):
    assert numbered(captions) == {0: "a red circle", 2: "a circle moves"}
    assert numbered(["a", "b"]) == {0: "a", 1: "b"} and numbered("captions.txt") == {0: "captions.txt"}
    with pytest.raises(ValueError, match="no caption is given"):
        numbered([])


def test_a_file_is_utf8_wherever_it_is_read_with_or_without_a_mark_and_its_lines_are_an_editors(tmp_path):
    path = tmp_path / "captions.txt"
    for mark in ("", "\ufeff"):
        path.write_bytes(f"{mark}a café\r\n\r\na red\u2028circle\n".encode())
        assert numbered(path) == {0: "a café", 2: "a red\u2028circle"}


@pytest.mark.parametrize(("data", "said"), [(b"\n \n", "has no caption in it"), (b"\xff", "give a text file")])
def test_a_file_without_captions_is_named(tmp_path, data, said):
    (tmp_path / "captions.txt").write_bytes(data)
    with pytest.raises(ValueError, match=f"captions.txt.*{said}"):
        jobs(tmp_path / "captions.txt", tmp_path / "videos")
    assert not (tmp_path / "videos").exists()


def test_what_is_there_is_not_made_again_and_the_others_keep_names_and_seeds(tmp_path, captions):
    videos = tmp_path / "videos"
    every = [Job("a red circle", videos / "0000.gif", 5), Job("a circle moves", videos / "0002.gif", 7)]
    assert jobs(captions, videos, kind="gif", seed=5) == every
    every[0].out.touch()
    assert jobs(captions, videos, kind="gif", seed=5) == every[1:]
    assert jobs(["a", "b"], videos, kind="gif", seed=5) == [Job("b", videos / "0001.gif", 6)]


def test_a_loop_that_is_interrupted_goes_on_with_the_same_videos(tmp_path, captions):
    torch.manual_seed(0)
    model = minidit.DiT(SMALL)

    def loop(folder):
        for job in jobs(captions, tmp_path / folder, kind="webp", seed=3):
            save = partial(minidit.save_video, path=job.out, fps=8)
            minidit.generate(model, job.caption, seed=job.seed, into=save)
            yield job.out.name

    assert next(loop("one")) == "0000.webp"  # and the loop ends there
    assert [*loop("one")] == ["0002.webp"] and [*loop("other")] == ["0000.webp", "0002.webp"]
    for name in ("0000.webp", "0002.webp"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    batch, _ = minidit.generate(model, captions, seed=3)
    assert batch.shape == (2, 3, 16, 16, 3)
    for video, name in zip(batch, ("0000.webp", "0002.webp"), strict=True):
        saved = minidit.load_video(tmp_path / "one" / name)[:, ::16, ::16]
        assert (video.int() - saved.int()).abs().max() <= 1  # in a batch sums are in another order
