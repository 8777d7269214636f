import errno
import os
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minidit import video as video_module
from minidit.metrics import psnr
from minidit.video import PAPER, check_output, load_video, save_video, sheet, side_by_side, upscale

ENDINGS = (".mp4", ".gif", ".webp", ".png")
COLOURS = [(220, 40, 30), (30, 60, 220), (240, 200, 40), (30, 170, 80), (240, 240, 240)]


def clip(t=6, h=12, w=16):
    """A square that walks down a field, both of the saturated colours in which a wrong matrix shows."""
    frames = torch.tensor(COLOURS[1], dtype=torch.uint8).expand(t, h, w, 3).clone()
    for i in range(t):
        frames[i, i % h : i % h + 4, 2:6] = torch.tensor(COLOURS[i % 3], dtype=torch.uint8)
    return frames


@pytest.mark.parametrize("ending", [".gif", ".webp"])
def test_a_gif_or_webp_of_few_colours_comes_back_as_it_was(tmp_path, ending):
    path = save_video(clip(), tmp_path / f"clip{ending}", fps=8, scale=3)
    assert torch.equal(load_video(path), upscale(clip(), 3))


def test_a_webp_of_any_colours_comes_back_as_it_was(tmp_path):
    noise = torch.randint(256, (3, 9, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_video(save_video(noise, tmp_path / "noise.webp", fps=8, scale=1)), noise)


def test_an_mp4_comes_back_nearly_as_it_was(tmp_path):
    path = save_video(clip(), tmp_path / "clip.mp4", fps=8, scale=8)
    assert psnr(load_video(path), upscale(clip(), 8)) > 35


@pytest.mark.parametrize("colour", COLOURS)
def test_an_mp4_keeps_a_colour_within_three_of_255(tmp_path, colour):
    plain = torch.tensor(colour, dtype=torch.uint8).expand(2, 16, 16, 3)
    loaded = load_video(save_video(plain, tmp_path / "plain.mp4", fps=8, scale=1))
    assert (loaded.int() - plain.int()).abs().max() <= 3


def test_an_mp4_is_one_that_browsers_play(tmp_path):
    path = save_video(clip(), tmp_path / "clip.mp4", fps=30000 / 1001)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # faststart
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (Fraction(30000, 1001), 6)
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)  # BT.709, limited


def test_an_mp4_of_odd_size_is_padded_with_its_edge(tmp_path):
    odd = torch.zeros(2, 15, 17, 3, dtype=torch.uint8)
    odd[:, :, 10:] = 255
    loaded = load_video(save_video(odd, tmp_path / "odd.mp4", fps=8, scale=1))
    assert loaded.shape == (2, 16, 18, 3)
    assert loaded[:, :, 12:].min() > 240 and loaded[:, :, :8].max() < 15


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".webp"])
def test_a_video_of_one_frame_is_saved_and_loaded(tmp_path, ending):
    loaded = load_video(save_video(clip(t=1), tmp_path / f"one{ending}", fps=8))
    assert loaded.shape == (1, 264, 352, 3)
    assert psnr(loaded, upscale(clip(t=1), 22)) > 35


@pytest.mark.parametrize("ending", [".gif", ".webp"])
def test_a_held_frame_comes_back_as_often_as_it_was_shown(tmp_path, ending):
    held = clip()[[0, 1, 1, 1, 2, 2, 3]]
    assert torch.equal(load_video(save_video(held, tmp_path / f"held{ending}", fps=24, scale=1)), held)


@pytest.mark.parametrize(("ending", "fps", "ms"), [(".gif", 8, 120), (".gif", 100, 20), (".webp", 8, 125)])
def test_an_animation_plays_at_its_rate(tmp_path, ending, fps, ms):
    with Image.open(save_video(clip(), tmp_path / f"clip{ending}", fps=fps)) as image:
        image.seek(1)
        image.load()
        assert (image.info["duration"], image.info["loop"], image.n_frames) == (ms, 0, 6)


@pytest.mark.parametrize(
    ("t", "grid"), [(1, (1, 1)), (4, (4, 1)), (6, (3, 2)), (8, (4, 2)), (16, (4, 4)), (17, (6, 3))]
)
def test_a_png_is_a_sheet_of_all_frames_in_reading_order(tmp_path, t, grid):
    frames = torch.arange(t, dtype=torch.uint8).mul(15)[:, None, None, None].expand(t, 5, 7, 3)
    picture = np.asarray(Image.open(save_video(frames, tmp_path / "sheet.png", fps=8, scale=1)))
    columns, rows = grid
    assert picture.shape == (rows * (5 + 4) - 4, columns * (7 + 4) - 4, 3)
    for i in range(t):
        row, column = divmod(i, columns)
        assert (picture[row * 9 : row * 9 + 5, column * 11 : column * 11 + 7] == 15 * i).all()


@pytest.mark.parametrize(
    ("size", "scale"), [((64, 64), 4), ((64, 96), 4), ((100, 120), 3), ((256, 300), 1), ((720, 260), 1)]
)
def test_small_videos_are_saved_with_a_short_side_of_256_pixels_at_least(tmp_path, size, scale):
    path = save_video(torch.zeros(1, *size, 3, dtype=torch.uint8), tmp_path / "clip.webp", fps=8)
    assert load_video(path).shape == (1, size[0] * scale, size[1] * scale, 3)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_stood_at_the_path_is_replaced_and_nothing_else_is_left(tmp_path, ending):
    path = tmp_path / f"clip{ending.upper()}"
    path.write_bytes(b"before")
    assert save_video(clip(), str(path), fps=8, scale=2) == path
    assert path.read_bytes() != b"before"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_video_in_parts_is_the_file_of_the_whole(tmp_path, ending):
    whole = save_video(clip(t=7), tmp_path / f"whole{ending}", fps=8)
    parts = save_video(iter(clip(t=7).split([1, 4, 2])), tmp_path / f"parts{ending}", fps=8)
    assert parts.read_bytes() == whole.read_bytes()


def test_an_mp4s_part_is_written_while_the_next_one_is_made_and_no_further_one(tmp_path, monkeypatch):
    order, second, encode = [], threading.Event(), video_module._encode

    def parts():
        for number, part in enumerate(clip(t=6).split(2)):
            order.append(f"made {number}")
            if number == 1:
                second.set()
            yield part

    def written(*given):
        assert second.wait(60)
        encode(*given)
        order.append(f"written {sum(event.startswith('written') for event in order)}")

    monkeypatch.setattr(video_module, "_encode", written)
    save_video(parts(), tmp_path / "clip.mp4", fps=8, scale=1)
    assert sorted(order) == ["made 0", "made 1", "made 2", "written 0", "written 1", "written 2"]
    assert order.index("made 1") < order.index("written 0") < order.index("made 2")


def test_what_fails_while_a_part_is_written_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*given):
        raise OSError("no space left")

    monkeypatch.setattr(video_module, "_encode", full)
    for parts in (1, 2, 3):
        with pytest.raises(OSError, match="no space left"):
            save_video(clip(t=6).split(6 // parts), tmp_path / "clip.mp4", fps=8)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("made", [0, 1, 40])
def test_a_part_that_cannot_be_made_leaves_what_was_there(tmp_path, ending, made):
    def parts():
        for _ in range(made):
            yield clip(t=2)
        raise RuntimeError("out of memory")

    path = tmp_path / f"clip{ending}"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError, match="out of memory"):
        save_video(parts(), path, fps=8, scale=1)
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"before"


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "a frame at least, got no part"),
        ([clip(), clip(h=14)], r"frames of one shape, got \(12, 16, 3\) and \(14, 16, 3\)"),
        ([clip(), clip()[:0]], "a frame and a pixel"),
        ([clip(), clip().float()], "must be .* uint8"),
    ],
    ids=["none", "shapes", "empty", "floats"],
)
def test_parts_that_are_no_video_are_refused(tmp_path, ending, parts, said):
    with pytest.raises(ValueError, match=said):
        save_video(parts, tmp_path / f"clip{ending}", fps=8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, b"before"])
def test_a_writer_that_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch, failure, before):
    def half(video, path, fps):
        path.write_bytes(b"half a video")
        raise failure("stop")

    monkeypatch.setitem(video_module.WRITERS, ".mp4", half)
    path = tmp_path / "clip.mp4"
    if before:
        path.write_bytes(before)
    with pytest.raises(failure, match="stop"):
        save_video(clip(), path, fps=8)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_an_interrupt_half_way_through_an_mp4_leaves_nothing(tmp_path, monkeypatch):
    beside = []  # what the folder holds as each frame is encoded

    def interrupted(array, format):
        beside.append(os.listdir(tmp_path))
        if len(beside) == 100:
            raise KeyboardInterrupt
        return from_ndarray(array, format=format)

    from_ndarray = av.VideoFrame.from_ndarray
    monkeypatch.setattr(av, "VideoFrame", SimpleNamespace(from_ndarray=interrupted))
    with pytest.raises(KeyboardInterrupt):
        save_video(clip(t=120), tmp_path / "clip.mp4", fps=8, scale=1)
    assert len(beside[-1]) == 1 and beside[-1] != ["clip.mp4"]  # it was being written, under another name
    assert os.listdir(tmp_path) == []


def test_an_interrupt_while_a_part_is_made_does_not_wait_for_all_of_the_one_that_is_written(tmp_path, monkeypatch):
    written, begun, from_ndarray = [], threading.Event(), av.VideoFrame.from_ndarray

    def slowly(array, format):
        written.append(array)
        begun.set()
        time.sleep(0.01)
        return from_ndarray(array, format=format)

    def parts():
        yield clip(t=1000)
        assert begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(av, "VideoFrame", SimpleNamespace(from_ndarray=slowly))
    with pytest.raises(KeyboardInterrupt):
        save_video(parts(), tmp_path / "clip.mp4", fps=8, scale=1)
    assert 0 < len(written) < 500 and os.listdir(tmp_path) == []


def test_a_saved_video_may_be_read_by_whom_the_umask_allows(tmp_path):
    umask = os.umask(0o022)
    try:
        assert save_video(clip(), tmp_path / "clip.gif", fps=8).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(umask)


@pytest.mark.parametrize("name", ["clip.avi", "clip", "clip.mp4.txt", ".mp4"])
def test_another_ending_is_refused_with_the_four_there_are(tmp_path, name):
    with pytest.raises(ValueError, match=r"\.mp4, \.gif, \.webp, \.png") as raised:
        check_output(tmp_path / name)
    assert name in str(raised.value)


def test_a_place_that_cannot_be_written_to_is_refused_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(IsADirectoryError, match=r"folder\.mp4 is a folder"):
        check_output(tmp_path / "folder.mp4")
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        check_output(tmp_path / "absent" / "clip.mp4")
    with pytest.raises(NotADirectoryError, match="file is a file, not a folder"):
        check_output(tmp_path / "file" / "clip.mp4")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match="no permission to write"):
        save_video(clip(), tmp_path / "clip.mp4", fps=8)


def test_a_place_that_takes_no_file_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    def refuse(path, *given, **options):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(
        OSError, match=r"a.mp4: the folder .* takes no file \(No such file or directory\); name another"
    ):
        check_output(tmp_path / "a.mp4")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_is_told_with_the_name_that_was_asked_for(tmp_path, monkeypatch, ending):
    def full(parts, path, fps):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(video_module.WRITERS, ending, full)
    path = tmp_path / f"clip{ending}"
    with pytest.raises(OSError, match="No space left") as error:
        save_video(clip(), path, fps=8)
    assert error.value.filename == str(path) and os.listdir(tmp_path) == []


def test_a_good_place_is_accepted_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ending in ENDINGS:
        check_output(f"clip{ending}")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.zeros(2, 4, 4, 3), r"\(2, 4, 4, 3\) float32 on cpu"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"\(4, 4, 3\) uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"\(2, 3, 4, 4\) uint8"),
        (torch.zeros(0, 4, 4, 3, dtype=torch.uint8), "a frame and a pixel"),
    ],
)
def test_what_is_not_a_video_is_refused_with_what_it_is(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        save_video(wrong, tmp_path / "clip.mp4", fps=8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fps": 0}, "fps must be .* got 0"),
        ({"fps": float("nan")}, "got nan"),
        ({"fps": 8, "scale": 0}, "scale must be a whole number, 1 or more, got 0"),
        ({"fps": 8, "scale": 1.5}, "got 1.5"),
    ],
)
def test_a_rate_or_scale_without_meaning_is_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        save_video(clip(), tmp_path / "clip.mp4", **options)


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".webp"])
@pytest.mark.parametrize("part", [0, 0.001, 0.6, 0.98])
def test_a_broken_file_is_refused_by_its_name(tmp_path, ending, part):
    path = save_video(clip(), tmp_path / f"clip{ending}", fps=8)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=f"clip{ending} is not a whole"):
        load_video(path)


def test_a_missing_file_or_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4: no such video file"):
        load_video(tmp_path / "absent.mp4")
    with pytest.raises(ValueError, match=r"clip\.png: a video is read from one of \.mp4, \.gif, \.webp"):
        load_video(save_video(clip(), tmp_path / "clip.png", fps=8))


@given(n=st.integers(1, 4), gap=st.integers(0, 3), t=st.integers(1, 3), w=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_videos_side_by_side_are_whole_with_white_between(n, gap, t, w):
    videos = [torch.full((t, 2, w, 3), 10 * i, dtype=torch.uint8) for i in range(n)]
    joined = side_by_side(*videos, gap=gap)
    assert joined.shape == (t, 2, n * w + (n - 1) * gap, 3)
    for i, video in enumerate(videos):
        left = i * (w + gap)
        assert torch.equal(joined[:, :, left : left + w], video)
        assert (joined[:, :, left + w : left + w + gap] == 255).all()


def test_videos_of_two_shapes_are_not_put_side_by_side():
    with pytest.raises(ValueError, match=r"video 1 and video 2 have \(6, 12, 16, 3\) and \(5, 12, 16, 3\)"):
        side_by_side(clip(), clip(t=5))
    with pytest.raises(ValueError, match="got none"):
        side_by_side()


def test_a_sheet_shows_evenly_spaced_frames_from_the_first_to_the_last():
    frames = torch.arange(15, dtype=torch.uint8).mul(10)[:, None, None, None].expand(15, 20, 20, 3)
    picture = np.asarray(sheet([frames], ["grey"], frames=8, scale=1))
    shown = [int(picture[36 + 10, 36 + 10 + i * 23, 0]) for i in range(8)]  # 36: the margin; 23: a frame and its gap
    assert shown == [0, 20, 40, 60, 80, 100, 120, 140]


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (3, 1), (4, 2), (5, 2)])
def test_a_sheet_has_two_columns_from_four_videos_on(n, columns):
    width = 8 * (128 + 3) - 3  # of a strip: 8 frames of 16 pixels, 8 times as wide
    picture = sheet([clip(t=9)] * n, ["a square"] * n)
    assert picture.width == columns * (width + 36) + 36


def test_a_sheet_has_its_captions_below_the_strips_on_light_paper():
    picture = np.asarray(sheet([clip()], ["a square walks"], scale=8))
    caption = picture[36 + 96 :]
    assert (picture[:36] == PAPER).all() and (picture[:, :36] == PAPER).all()
    assert caption.min() < 80
    assert (np.asarray(sheet([clip()], [""], scale=8))[36 + 96 :] == PAPER).all()


def test_a_long_caption_is_wrapped_and_none_of_it_leaves_the_sheet():
    short, long = (sheet([clip()], [caption]) for caption in ("a square", "a square that walks " * 20))
    assert long.width == short.width and long.height > short.height + 40
    assert (np.asarray(long)[:, -36:] == PAPER).all() and (np.asarray(long)[-30:] == PAPER).all()


def test_a_video_shorter_than_its_strip_shows_each_frame_once():
    assert sheet([clip(t=3)], [""], scale=1).width == 3 * (16 + 3) - 3 + 2 * 36


def test_a_sheet_without_a_caption_for_each_video_is_refused():
    with pytest.raises(ValueError, match="got 2 videos and 1 captions"):
        sheet([clip(), clip()], ["one"])
    with pytest.raises(ValueError, match="got 0 videos"):
        sheet([], [])
    with pytest.raises(ValueError, match="frames must be 1 or more, got 0"):
        sheet([clip()], ["one"], frames=0)
