"""scripts/judge.py: it sees what was drawn, through damage too, and is not taken in by what was not."""

import random
from collections import Counter
from dataclasses import astuple, replace

import pytest
import torch
import torch.nn.functional as F

import judge
from judge import Reading, accepts, read
from minidit.video import save_video
from shapes import COLOURS, MOTIONS, SHAPES, Actor, Scene, render, sample_scene

RIGHT = Actor(colour="red", shape="circle", motion="right", radius=9.0, centre=(32.0, 32.0), extent=30.0)
WANTED = [("red", "circle", "right")]


def filmed(*actors):
    """The actors as a uint8 video (16, 64, 64, 3)."""
    return as_video(render([Scene(actors=actors, background=0.1)])[0])


def as_video(video):
    """(3, T, H, W) in -1..1 -> uint8 (T, H, W, 3)."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0)


def noisy(video, generator):
    """Gaussian noise of sigma 0.05 of the way from black to white."""
    return video + 0.1 * torch.randn(video.shape, generator=generator)


def blurred(video):
    """A binomial blur of sigma 0.7 pixels."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel[:, None] * kernel)[None, None].expand(3, 1, 3, 3)
    frames = F.pad(video.transpose(0, 1), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(frames, kernel, groups=3).transpose(0, 1)


DAMAGE = {
    "none": lambda video, generator: video,
    "noise": noisy,
    "blur": lambda video, generator: blurred(video),
    "both": lambda video, generator: noisy(blurred(video), generator),
}


# what is there is seen


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("actors", [1, 2])
@pytest.mark.parametrize("held_out", [False, True])
def test_drawn_scenes_are_accepted_and_another_scenes_caption_is_not(damage, actors, held_out):
    rng, generator = random.Random(actors), torch.Generator().manual_seed(0)
    scenes = [sample_scene(rng, actors=actors, held_out=held_out) for _ in range(15)]
    videos = [as_video(DAMAGE[damage](video, generator)) for video in render(scenes)]
    seen = [Counter(map(astuple, read(video))) for video in videos]
    drawn = [Counter(actor.triple for actor in scene.actors) for scene in scenes]
    assert sum(one == other for one, other in zip(seen, drawn, strict=True)) == 15
    assert sum(one == other for one, other in zip(seen, drawn[1:] + drawn[:1], strict=True)) <= 2


@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_is_read(colour):
    assert read(filmed(replace(RIGHT, colour=colour))) == (Reading(colour, "circle", "right"),)


@pytest.mark.parametrize("radius", [7.0, 13.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read_small_and_large(shape, radius):
    assert read(filmed(replace(RIGHT, shape=shape, radius=radius))) == (Reading("red", shape, "right"),)


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_is_read(motion):
    extent = {"circle": 10.0, "grow": 2.0, "shrink": 2.0, "still": 0.0}.get(motion, 30.0)
    assert read(filmed(replace(RIGHT, motion=motion, extent=extent))) == (Reading("red", "circle", motion),)


def test_the_largest_object_is_named_first():
    small = replace(RIGHT, centre=(32.0, 16.0), radius=7.0)
    large = replace(RIGHT, colour="blue", shape="square", centre=(32.0, 48.0), radius=13.0)
    assert [reading.colour for reading in read(filmed(small, large))] == ["blue", "red"]


def test_the_order_of_what_is_wanted_does_not_matter():
    above, below = replace(RIGHT, centre=(32.0, 16.0)), replace(RIGHT, colour="blue", centre=(32.0, 48.0))
    video = filmed(above, below)
    assert accepts(video, [above.triple, below.triple]) and accepts(video, [below.triple, above.triple])


def test_a_larger_picture_is_read_the_same():
    large = filmed(RIGHT).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    assert accepts(large, WANTED)


def test_one_lost_frame_is_forgiven():
    video = filmed(RIGHT)
    video[7] = 26
    assert accepts(video, WANTED)


def test_an_empty_video_shows_nothing():
    assert read(torch.full((16, 64, 64, 3), 26, dtype=torch.uint8)) == ()


# what is not there is not


@pytest.mark.parametrize("wrong", [("blue", "circle", "right"), ("red", "star", "right"), ("red", "circle", "left")])
def test_one_wrong_attribute_is_enough_to_reject(wrong):
    assert not accepts(filmed(RIGHT), [wrong])


def test_a_missing_object_and_an_extra_one_are_rejected():
    blue = replace(RIGHT, colour="blue", centre=(32.0, 52.0))
    assert not accepts(filmed(RIGHT), [*WANTED, blue.triple])
    assert not accepts(filmed(RIGHT, blue), WANTED)


def test_an_object_that_vanishes_midway_is_rejected():
    video = filmed(RIGHT)
    video[8:] = 26  # the background
    assert read(video) == (Reading("red", None, None),)


@pytest.mark.parametrize("change", [{"colour": "orange"}, {"shape": "square"}, {"motion": "still"}, {"motion": "up"}])
def test_an_object_that_changes_midway_is_rejected(change):
    video = torch.cat([filmed(RIGHT)[:8], filmed(replace(RIGHT, **change))[8:]])
    assert not accepts(video, WANTED)
    assert not accepts(video, [replace(RIGHT, **change).triple])


@pytest.mark.parametrize("half", ["orange", "blue", "white"])
def test_an_object_of_two_colours_has_no_colour(half):
    still = replace(RIGHT, motion="still")
    video = filmed(still)
    video[:, 32:] = filmed(replace(still, colour=half))[:, 32:]
    assert [reading.colour for reading in read(video)] == [None]


@pytest.mark.parametrize("level", [90, 255])
@pytest.mark.parametrize("frames", [4, 16])
def test_a_blob_beside_the_object_is_rejected(level, frames):
    video = filmed(RIGHT)
    video[4 : 4 + frames, 2:8, 54:60] = level
    assert not accepts(video, WANTED)


def test_a_shape_that_nothing_draws_has_no_name():
    video = torch.full((16, 64, 64, 3), 26, dtype=torch.uint8)
    video[:, 30:34, 10:54] = 255  # a bar
    assert read(video) == (Reading("white", None, "still"),)


@pytest.mark.parametrize(
    "order",
    [range(15, -1, -1), [*range(0, 16, 2), *range(14, -1, -2)], [*range(6), *[5] * 10], [0, 1, 8, 9, 2, 3, 10, 11]],
    ids=["backwards", "there and back", "stops at once", "jumps"],
)
def test_another_path_is_not_a_motion_to_the_right(order):
    assert not accepts(filmed(RIGHT)[list(order)], WANTED)


def test_half_an_orbit_is_no_orbit():
    orbit = replace(RIGHT, motion="circle", extent=12.0)
    assert accepts(filmed(orbit), [orbit.triple]) and not accepts(filmed(orbit)[:9], [orbit.triple])


@pytest.mark.parametrize(
    ("video", "got"),
    [
        (torch.zeros(1, 4, 4, 3), r"torch.float32 \(1, 4, 4, 3\)"),
        (torch.zeros(0, 4, 4, 3, dtype=torch.uint8), r"torch.uint8 \(0, 4, 4, 3\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"torch.uint8 \(1, 3, 4, 4\)"),
    ],
)
def test_what_is_no_video_is_refused(video, got):
    with pytest.raises(ValueError, match=rf"expected a video of uint8 \(T, H, W, 3\), got {got}"):
        read(video)


# the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return str(save_video(filmed(RIGHT), tmp_path_factory.mktemp("judged") / "right.mp4", fps=8))


def test_a_compressed_video_of_its_caption_is_accepted(saved, capsys):
    assert judge.main([saved, "a red circle moves to the right"]) == 0
    assert capsys.readouterr().out == "asked: red circle right\nseen:  red circle right\naccepted\n"


def test_a_video_of_something_else_is_not_accepted(saved, capsys):
    assert judge.main([saved, "a blue star grows"]) == 1
    assert capsys.readouterr().out == "asked: blue star grow\nseen:  red circle right\nnot accepted\n"


@pytest.mark.parametrize(
    ("video", "caption", "message"),
    [("missing.mp4", "a red circle grows", "missing.mp4"), (None, "a red circle sings", "none of the motions")],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(saved, capsys, video, caption, message):
    assert judge.main([video or saved, caption]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("judge: ")
