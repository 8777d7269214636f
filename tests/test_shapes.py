"""scripts/shapes.py: the scenes, their pixels and their captions."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shapes import (
    COLOURS,
    FRAMES,
    HELD_OUT,
    MOTIONS,
    OPENINGS,
    SHAPES,
    TRIPLES,
    VOCABULARY,
    Actor,
    Scene,
    caption,
    draw,
    pack,
    parse,
    prompts,
    render,
    sample_scene,
    verb_phrases,
    words,
)

patient = settings(deadline=None, max_examples=50)  # a pair of actors may need thousands of tries to place
seeds = st.integers(0, 2**32 - 1)
scenes = st.builds(
    lambda seed, actors, held_out: sample_scene(random.Random(seed), actors=actors, held_out=held_out),
    seeds,
    st.sampled_from([1, 2]),
    st.booleans(),
)
STILL = Actor(colour="red", shape="circle", motion="still", radius=10.0, centre=(32.0, 32.0), extent=0.0)


def lit(video):
    """(3, T, H, W) in -1..1 -> (T, H, W) bool: where a pixel is not background."""
    return (video - video[:, :1, :1, :1]).abs().amax(dim=0) > 0.2


# the world


def test_a_tenth_of_the_triples_is_held_out():
    assert len(HELD_OUT) / len(TRIPLES) == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2)])
def test_training_sees_every_pair_of_attributes(axes):
    one, other = axes
    trained = {(triple[one], triple[other]) for triple in TRIPLES if triple not in HELD_OUT}
    assert trained == {(triple[one], triple[other]) for triple in TRIPLES}


def test_every_attribute_is_held_out_somewhere():
    assert {name for triple in HELD_OUT for name in triple} == {*COLOURS, *SHAPES, *MOTIONS}


@patient
@given(seeds, st.sampled_from([None, 1, 2]), st.booleans())
def test_all_actors_are_held_out_or_none_is(seed, actors, held_out):
    scene = sample_scene(random.Random(seed), actors=actors, held_out=held_out)
    assert all((actor.triple in HELD_OUT) == held_out for actor in scene.actors)


@patient
@given(seeds)
def test_a_seed_makes_one_scene(seed):
    assert sample_scene(random.Random(seed)) == sample_scene(random.Random(seed))


def test_seven_scenes_in_ten_have_one_actor():
    rng = random.Random(0)
    assert sum(len(sample_scene(rng).actors) == 1 for _ in range(400)) == pytest.approx(280, abs=30)


def test_training_reaches_every_triple_it_may():
    rng = random.Random(0)
    seen = {sample_scene(rng, actors=1).actors[0].triple for _ in range(4000)}
    assert seen == set(TRIPLES) - HELD_OUT


def test_three_actors_are_refused():
    with pytest.raises(ValueError, match="actors must be 1, 2 or None, got 3"):
        sample_scene(random.Random(0), actors=3)


@patient
@given(scenes)
def test_actors_stay_inside_the_frame_and_apart(scene):
    for frame in range(FRAMES):
        places = [actor.at(frame / (FRAMES - 1)) for actor in scene.actors]
        assert all(radius <= min(x, y, 64 - x, 64 - y) for x, y, radius in places)
        for (x, y, radius), (x2, y2, radius2) in itertools.combinations(places, 2):
            assert math.hypot(x - x2, y - y2) >= radius + radius2 + 3


@patient
@given(scenes)
def test_two_actors_differ_in_colour(scene):
    assert len({actor.colour for actor in scene.actors}) == len(scene.actors)


@patient
@given(scenes)
def test_motions_are_large_enough_to_be_read(scene):
    for actor in scene.actors:
        (x, y, radius), (x2, y2, radius2) = actor.at(0), actor.at(1)
        travelled = {"right": x2 - x, "left": x - x2, "down": y2 - y, "up": y - y2}
        if actor.motion in travelled:
            assert travelled[actor.motion] >= (28 if len(scene.actors) == 1 else 16) - 1e-9
        elif actor.motion == "circle":
            assert actor.extent >= 8 and math.hypot(x - x2, y - y2) < 1e-9
        elif actor.motion == "still":
            assert (x, y, radius) == (x2, y2, radius2)
        else:
            assert (radius2 / radius if actor.motion == "grow" else radius / radius2) >= 1.8 - 1e-9


def test_an_orbit_goes_clockwise():
    orbit = replace(STILL, motion="circle", extent=10.0)
    assert [orbit.at(u)[:2] for u in (0, 0.25, 0.5)] == [
        pytest.approx((42, 32)),  # right, then below, then left
        pytest.approx((32, 42)),
        pytest.approx((22, 32)),
    ]


# the pixels


def test_render_is_a_float_video_from_black_to_white():
    video = render([sample_scene(random.Random(seed)) for seed in range(8)])
    assert video.shape == (8, 3, 16, 64, 64) and video.dtype == torch.float32
    assert video.min() >= -1 and video.max() <= 1


def test_render_draws_what_was_packed():
    batch = [sample_scene(random.Random(seed)) for seed in range(4)]
    assert pack(batch).shape[:2] == (4, 2)
    assert torch.equal(render(batch), draw(pack(batch)))


def test_a_scene_is_drawn_the_same_in_any_batch():
    batch = [sample_scene(random.Random(seed)) for seed in range(4)]
    torch.testing.assert_close(render(batch)[2:3], render(batch[2:3]))


@pytest.mark.parametrize("colour", COLOURS)
def test_pixels_are_the_colour_inside_and_grey_outside(colour):
    video = render([Scene(actors=(replace(STILL, colour=colour),), background=0.1)])[0]
    inside, outside = (video[:, 7, 32, 32] + 1) / 2, (video[:, 7, 2, 2] + 1) / 2
    assert inside.tolist() == pytest.approx(COLOURS[colour], abs=1e-6)
    assert outside.tolist() == pytest.approx([0.1] * 3, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "area"),  # of a radius of 1
    [("circle", math.pi), ("square", 2.0), ("triangle", 3 * 3**0.5 / 4), ("star", 5 * math.sin(math.pi / 5) * 0.459)],
)
def test_a_shape_has_its_area_and_fits_in_its_disc(shape, area):
    video = render([Scene(actors=(replace(STILL, shape=shape, colour="white", radius=20.0),), background=0.0)])[0]
    assert (video[0, 0].sum() + 64 * 64).item() / 2 == pytest.approx(400 * area, rel=0.02)
    rows, columns = lit(video)[0].nonzero().T + 0.5
    assert torch.hypot(rows - 32, columns - 32).max() <= 20.75  # half a pixel's diagonal more


@pytest.mark.parametrize("shape", ["triangle", "star"])
def test_points_are_up(shape):
    mask = lit(render([Scene(actors=(replace(STILL, shape=shape, radius=20.0),), background=0.0)])[0])[0]
    top, bottom = mask.nonzero()[:, 0].aminmax()
    assert 32 - top == pytest.approx(20, abs=1) and bottom - 32 < 18
    assert mask[top + 1].sum() < 4


def test_a_square_is_upright():
    mask = lit(render([Scene(actors=(replace(STILL, shape="square", radius=14.0),), background=0.0)])[0])[0]
    top, bottom = mask.nonzero()[:, 0].aminmax()
    assert mask.sum() == (bottom - top + 1) ** 2


@settings(deadline=None, max_examples=20)
@given(seeds, st.booleans())
def test_pixels_move_as_the_actor_does(seed, held_out):
    scene = sample_scene(random.Random(seed), actors=1, held_out=held_out)
    cover = lit(render([scene])[0]).float()  # (T, 64, 64)
    places = torch.arange(64) + 0.5
    for frame in (0, 6, 15):
        x, y, radius = scene.actors[0].at(frame / (FRAMES - 1))
        area = cover[frame].sum()
        assert (cover[frame].sum(0) * places).sum() / area == pytest.approx(x, abs=0.6)
        assert (cover[frame].sum(1) * places).sum() / area == pytest.approx(y, abs=0.6)
        assert 1 < area / radius**2 < 3.7


def test_a_second_actor_adds_itself_and_changes_nothing_else():
    left = replace(STILL, centre=(16.0, 32.0))
    right = replace(STILL, colour="blue", shape="star", centre=(48.0, 32.0))
    alone, other, both = render([Scene(actors=who, background=0.1) for who in ((left,), (right,), (left, right))])
    assert torch.equal(both[..., :32], alone[..., :32])
    torch.testing.assert_close(both[..., 32:], other[..., 32:])


def test_a_larger_picture_of_a_scene_shows_the_same():
    packed = pack([sample_scene(random.Random(3))])
    large = draw(packed, frames=4, size=256)
    assert large.shape == (1, 3, 4, 256, 256)
    small = torch.nn.functional.avg_pool3d(large, (1, 4, 4))
    assert (small - draw(packed, frames=4)).abs().mean() < 0.005


# the captions


@patient
@given(scenes, seeds)
def test_parse_undoes_caption(scene, seed):
    asked = parse(caption(scene, random.Random(seed)))
    assert sorted(asked) == sorted(actor.triple for actor in scene.actors)


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_phrase_of_a_motion_is_read_back(motion):
    for way in OPENINGS:
        for phrase in verb_phrases(motion, way):
            assert parse(f"a red circle {phrase}") == (("red", "circle", motion),)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_motion_is_said_in_a_dozen_ways_and_no_two_alike(motion):
    said = [phrase for way in OPENINGS for phrase in verb_phrases(motion, way)]
    assert len(said) >= 12 and len(set(said)) == len(said)


@patient
@given(scenes, seeds)
def test_captions_use_the_vocabulary_and_at_most_24_words(scene, seed):
    said = words(caption(scene, random.Random(seed)))
    assert set(said) <= set(VOCABULARY) and len(said) <= 24


def test_captions_use_all_of_the_vocabulary():
    rng = random.Random(0)
    batch = [sample_scene(rng) for _ in range(100)]
    said = {word for _ in range(40) for scene in batch for word in words(caption(scene, rng))}
    assert said == set(VOCABULARY)


def test_the_vocabulary_is_sorted_lower_case_words_and_a_comma():
    assert list(VOCABULARY) == sorted(set(VOCABULARY)) and "," in VOCABULARY
    assert all(word == "," or (word.isalpha() and word.islower()) for word in VOCABULARY)


@patient
@given(scenes, seeds)
def test_a_size_is_only_said_of_what_has_it(scene, seed):
    said = set(words(caption(scene, random.Random(seed))))
    sizes = {actor.size for actor in scene.actors}
    assert "small" in sizes or not said & {"small", "little", "tiny"}
    assert "large" in sizes or not said & {"large", "big", "huge"}


@pytest.mark.parametrize(("radius", "size"), [(7.0, "small"), (8.0, "small"), (9.0, None), (11.5, "large")])
def test_only_the_clearly_small_and_large_have_a_size(radius, size):
    assert replace(STILL, radius=radius).size == size


def test_a_red_circle_moves_to_the_right_is_said():
    scene = Scene(actors=(replace(STILL, motion="right", radius=9.0, extent=30.0),), background=0.1)
    rng = random.Random(0)
    assert "a red circle moves to the right" in {caption(scene, rng) for _ in range(1000)}


def test_parse_forgives_capitals_and_a_full_stop():
    assert parse("A small red disc rises.") == (("red", "circle", "up"),)


def test_parse_reads_two_actors_in_the_order_they_are_named():
    asked = parse("there is an orange star orbiting, and a blue box moving to the left")
    assert asked == (("orange", "star", "circle"), ("blue", "square", "left"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a pink circle grows", "'pink' in 'a pink circle grows' is none of the colours: red, "),
        ("a red horse grows", "'horse' in 'a red horse grows' is none of the shapes: circle, "),
        ("a red circle sings", "'sings' in 'a red circle sings' is none of the motions: try 'moves right', "),
        ("hello", "cannot read 'hello': expected something like 'a red circle moves to the right'"),
        ("", "cannot read ''"),
    ],
)
def test_parse_says_what_it_does_not_understand(text, message):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert str(error.value).startswith(message)


@patient
@given(seeds)
def test_every_fifth_prompt_is_held_out_of_training(seed):
    asked = prompts(10, seed)
    assert [held for _, held in asked] == [i % 5 == 0 for i in range(10)]
    assert all((triple in HELD_OUT) == held for text, held in asked for triple in parse(text))
    assert asked == prompts(10, seed)
