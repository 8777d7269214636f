from math import isclose

import pytest

from minidit.presets import PRESETS
from minidit.sizes import FRAMES, RATIOS, SIZES, fps_told, frames, size

AREAS = {"144p": 36864, "240p": 102240, "360p": 230400, "480p": 409920, "720p": 921600}  # pixels, as in the original
EVERY = [(resolution, ratio) for resolution in SIZES for ratio in RATIOS]


@pytest.mark.parametrize(
    ("resolution", "ratio", "expected"),
    [
        ("144p", "9:16", (144, 256)),
        ("144p", "1:1", (192, 192)),
        ("240p", "9:16", (240, 426)),
        ("240p", "2:3", (262, 393)),
        ("360p", "16:9", (640, 360)),
        ("480p", "9:16", (480, 854)),
        ("480p", "12:25", (444, 925)),
        ("480p", "4:3", (740, 555)),
        ("720p", "3:8", (588, 1568)),
        ("720p", "9:16", (720, 1280)),
        ("720p", "50:27", (1386, 666)),
    ],
)
def test_the_sizes_are_the_originals(resolution, ratio, expected):
    assert size(resolution, ratio) == expected


def test_the_size_that_open_sora_makes_by_default_is_in_the_table():
    run = PRESETS["opensora-1.2"].sampling
    assert (run.height, run.width, run.frames) == (*size("480p", "9:16"), frames("2s"))


def test_every_resolution_has_a_size_of_every_ratio():
    assert {len(sizes) for sizes in SIZES.values()} == {len(RATIOS)} and set(SIZES) == set(AREAS)


@pytest.mark.parametrize(("resolution", "ratio"), EVERY)
def test_a_size_has_about_the_area_of_its_resolution_and_its_ratio_of_height_to_width(resolution, ratio):
    height, width = size(resolution, ratio)
    tall, wide = (25, 12) if ratio == "50:27" else map(int, ratio.split(":"))  # the name that the original gives it
    assert isclose(height * width, AREAS[resolution], rel_tol=0.014)
    assert isclose(height / width, tall / wide, rel_tol=0.013)


@pytest.mark.parametrize(
    ("name", "count"), [("image", 1), ("2s", 51), ("4s", 102), ("8s", 204), ("16s", 408), ("32s", 816)]
)
def test_a_duration_has_the_originals_frames(name, count):
    assert frames(name) == count


@pytest.mark.parametrize(("given", "count"), [(51, 51), ("51", 51), (1, 1), ("17", 17)])
def test_a_number_of_frames_is_itself(given, count):
    assert frames(given) == count


def test_every_duration_but_an_image_is_whole_chunks_of_the_video_autoencoder():
    assert all(count % 17 == 0 for name, count in FRAMES.items() if name != "image")


def test_an_unknown_resolution_names_the_known_ones():
    with pytest.raises(ValueError) as error:
        size("1080", "9:16")
    assert str(error.value) == "unknown resolution '1080', expected one of 144p, 240p, 360p, 480p, 720p"


@pytest.mark.parametrize("ratio", ["16/9", "0.56", "", "9:9"])
def test_an_unknown_ratio_names_the_known_ones_and_which_side_comes_first(ratio):
    with pytest.raises(ValueError) as error:
        size("480p", ratio)
    assert str(error.value) == f"unknown ratio {ratio!r}, expected height:width, one of {', '.join(RATIOS)}"


@pytest.mark.parametrize("duration", ["3s", "2 s", "", "0", 0, -1, "1.5", 2.5, "²"])
def test_an_unknown_duration_names_the_known_ones(duration):
    with pytest.raises(ValueError) as error:
        frames(duration)
    expected = "expected a number of frames or one of image, 2s, 4s, 8s, 16s, 32s"
    assert str(error.value) == f"unknown duration {duration!r}, {expected}"


@pytest.mark.parametrize(("count", "told"), [(1, 120), (2, 24), (51, 24)])
def test_a_model_is_told_120_frames_a_second_of_an_image(count, told):
    assert fps_told(count, 24) == told
