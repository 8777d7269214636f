import json
from dataclasses import FrozenInstanceError, replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidit.broadcast import PARTS
from minidit.config import CaptionConfig, Method, ModelConfig, Positions, Sampling
from minidit.presets import PRESETS

OPENSORA = PRESETS["opensora-1.2"]
WITH_WORDS = replace(OPENSORA, captions=CaptionConfig(vocabulary=("a", "red"), heads=4, depth=2))
IDDPM = replace(OPENSORA.sampling, method="iddpm", prediction="noise")
FIRST = replace(OPENSORA.positions, time="rope-before-norm")
counts = st.integers(1, 10**6)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)

SIZES = {name: counts for name in ("guided", "steps", "frames", "height", "width", "space", "chunk", "time")}
METHODS = get_args(Method)
samplings = st.builds(
    Sampling,
    method=st.just("rectified-flow"),
    prediction=st.sampled_from(["velocity", "sample"]),
    shift=st.none() | positive,
    guidance=st.floats(allow_nan=False, allow_infinity=False),
    fps=positive | counts,
    **SIZES,
) | st.builds(
    Sampling,
    method=st.sampled_from(METHODS[1:]),
    prediction=st.just("noise"),
    shift=st.none(),
    guidance=st.floats(allow_nan=False, allow_infinity=False),
    fps=positive | counts,
    **SIZES,
)
positions = st.builds(
    Positions,
    space=st.sampled_from(["area", "grid", "stored"]),
    base=counts,
    scale=positive,
    time=st.sampled_from(["rope-after-norm", "rope-before-norm", "stream", "branch", "stored"]),
    pace=positive,
    frames=counts,
)


def beginnings(parts):
    return st.integers(1, len(parts)).map(lambda n: tuple(parts[:n]))


@st.composite
def models(draw):
    """Every shape that can be built."""
    heads, caption_heads, in_channels = draw(st.integers(1, 32)), draw(st.integers(1, 8)), draw(counts)
    captions = st.builds(
        CaptionConfig,
        vocabulary=st.lists(st.text(), unique=True).map(tuple),
        heads=st.just(caption_heads),
        depth=counts,
    )
    blocks = draw(st.lists(st.permutations(PARTS).flatmap(beginnings), min_size=1, max_size=3).map(tuple))
    crosses = any("cross" in block for block in blocks)
    told, qk_norm = draw(st.sampled_from(["time", "fps", "size", "class"])), draw(st.booleans())
    place = draw(positions.filter(lambda place: qk_norm or place.time != "rope-before-norm"))
    run = draw(samplings)
    learned = run.method.startswith("iddpm")  # the variance
    alone = any("temporal" in block and "spatial" not in block for block in blocks)
    return ModelConfig(
        depth=draw(counts),
        blocks=blocks,
        dim=12 * heads * draw(st.integers(1, 100)),
        heads=heads,
        mlp_ratio=draw(positive),
        patch=(1, draw(counts), draw(counts)),
        odd=draw(st.sampled_from(["pad", "cut", "refuse"])),
        in_channels=in_channels,
        out_channels=2 * in_channels if learned else in_channels + draw(st.integers(0, 8)),
        qk_norm=qk_norm,
        modulation=draw(st.sampled_from(["shared", "block"])),
        bare_temporal=not alone and draw(st.booleans()),
        told=told,
        classes=draw(counts) if told == "class" else None,
        positions=place,
        caption_dim=caption_heads * draw(counts) if crosses else 0,
        caption_length=draw(counts) if crosses else 0,
        null_caption=crosses and draw(st.booleans()),
        rounds_time=draw(st.booleans()),
        sampling=replace(run, guided=min(run.guided, in_channels)),
        captions=draw(st.none() | captions) if crosses else None,
    )


@given(models())
def test_a_config_comes_back_from_its_json(config):
    again = ModelConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config and hash(again) == hash(config)


def test_nothing_writes_to_a_config():
    with pytest.raises(FrozenInstanceError):
        OPENSORA.depth = 1


# errors name the field


@pytest.mark.parametrize("name", ["depth", "dim", "heads", "in_channels", "caption_dim", "caption_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True])
def test_a_size_of_a_model_is_a_positive_whole_number(name, value):
    with pytest.raises(ValueError, match=f"ModelConfig.{name} must be a positive whole number, got {value!r}"):
        replace(OPENSORA, **{name: value})


@pytest.mark.parametrize("value", [0, -2.0, float("nan"), "4"])
def test_the_mlp_is_wider_than_nothing(value):
    with pytest.raises(ValueError, match=f"ModelConfig.mlp_ratio must be a positive number, got {value!r}"):
        replace(OPENSORA, mlp_ratio=value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 1150}, "ModelConfig.dim must be a multiple of heads.*got dim=1150 and heads=16"),
        ({"dim": 48, "heads": 16}, "ModelConfig.dim must be a multiple of heads, with an even quotient"),
        ({"dim": 18, "heads": 3}, "ModelConfig.dim must be a multiple of 4 .*got 18"),
        ({"out_channels": 3}, "ModelConfig.out_channels must be at least in_channels=4, got 3"),
        ({"patch": (2, 2, 2)}, r"ModelConfig.patch must be \(1, rows, columns\).*got \(2, 2, 2\)"),
        ({"patch": (1, 0, 2)}, r"ModelConfig.patch must be .*got \(1, 0, 2\)"),
        ({"patch": (1, 2)}, r"ModelConfig.patch must be .*got \(1, 2\)"),
        ({"odd": "wrap"}, "ModelConfig.odd must be one of 'pad', 'cut', 'refuse', got 'wrap'"),
        ({"qk_norm": 1}, "ModelConfig.qk_norm must be one of True, False, got 1"),
        ({"told": "class"}, "ModelConfig.classes go with told='class', got None with 'class'"),
        ({"classes": 3}, "ModelConfig.classes go with told='class', got 3 with 'fps'"),
        ({"blocks": ()}, "ModelConfig.blocks must be blocks of different parts"),
        ({"blocks": (("mlp", "mlp"),)}, "ModelConfig.blocks must be blocks of different parts"),
        ({"blocks": (("spatial", "conv"),)}, "ModelConfig.blocks must be blocks of different parts"),
        ({"blocks": (("spatial", "mlp"),)}, "ModelConfig.blocks have no 'cross'"),
        ({"bare_temporal": True}, "ModelConfig.bare_temporal needs a spatial part in every block with a temporal one"),
        ({"told": "size", "dim": 1120}, "ModelConfig.dim must be a multiple of 3 for told='size', got 1120"),
        ({"qk_norm": False, "positions": FIRST}, "Positions.time 'rope-before-norm' needs ModelConfig.qk_norm"),
        ({"in_channels": 3}, "Sampling.guided must be at most ModelConfig.in_channels=3, got 4"),
        ({"sampling": IDDPM, "out_channels": 4}, "out_channels must be twice in_channels=4 for iddpm"),
        ({"caption_dim": 30}, "ModelConfig.caption_dim must be a multiple of CaptionConfig.heads, got caption_dim=30"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(WITH_WORDS, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": "sphere"}, "Positions.space must be one of 'area', 'grid', 'stored', got 'sphere'"),
        ({"time": "late"}, "Positions.time must be one of 'rope-after-norm', .*, got 'late'"),
        ({"base": None}, "Positions.base must be a positive whole number, got None"),
        ({"scale": 0}, "Positions.scale must be a positive number, got 0"),
        ({"time": "stored"}, "Positions.frames must be a positive whole number, got None"),
    ],
)
def test_positions_that_say_too_little_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(OPENSORA.positions, **fields)


@pytest.mark.parametrize("name", ["fps", "shift", *SIZES])
def test_a_setting_of_the_sampling_is_positive(name):
    with pytest.raises(ValueError, match=f"Sampling.{name} must be a positive .*number, got 0"):
        replace(OPENSORA.sampling, **{name: 0})


@pytest.mark.parametrize("guidance", [None, "7", True, float("nan"), float("inf")])
def test_a_guidance_is_a_number(guidance):
    with pytest.raises(ValueError, match=f"Sampling.guidance must be a finite number, got {guidance!r}"):
        replace(OPENSORA.sampling, guidance=guidance)


def test_a_size_is_finite():
    with pytest.raises(ValueError, match="ModelConfig.mlp_ratio must be a positive number, got inf"):
        replace(OPENSORA, mlp_ratio=float("inf"))
    with pytest.raises(ValueError, match="Sampling.fps must be a positive number, got inf"):
        replace(OPENSORA.sampling, fps=float("inf"))


@pytest.mark.parametrize("prediction", ["noise", "score", None])
def test_rectified_flow_goes_by_a_velocity_or_a_sample(prediction):
    message = f"Sampling.prediction must be 'velocity' or 'sample' for rectified-flow, got {prediction!r}"
    with pytest.raises(ValueError, match=message):
        replace(OPENSORA.sampling, prediction=prediction)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("prediction", ["velocity", "sample", None])
def test_the_other_methods_go_by_the_noise(method, prediction):
    message = f"Sampling.prediction must be 'noise' for {method}, got {prediction!r}"
    with pytest.raises(ValueError, match=message):
        replace(OPENSORA.sampling, method=method, prediction=prediction)


@pytest.mark.parametrize("method", METHODS[1:])
def test_only_rectified_flow_has_a_shift(method):
    with pytest.raises(ValueError, match=f"Sampling.shift must be None for {method}, got 2.0"):
        replace(OPENSORA.sampling, method=method, prediction="noise", shift=2.0)


@pytest.mark.parametrize("method", ["rflow", "DDIM", "", None])
def test_a_method_is_one_of_those_that_are_known(method):
    with pytest.raises(ValueError, match=f"Sampling.method must be one of 'rectified-flow', .*, got {method!r}"):
        replace(OPENSORA.sampling, method=method)


def test_a_vocabulary_holds_a_word_once():
    with pytest.raises(ValueError, match="CaptionConfig.vocabulary holds a word twice"):
        CaptionConfig(vocabulary=("a", "red", "a"), heads=1, depth=1)


def without(name):
    return {key: value for key, value in OPENSORA.to_json().items() if key != name}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (without("depth"), "not a minidit model config: .*'depth'"),
        (without("sampling"), "not a minidit model config: 'sampling' is missing"),
        ({**OPENSORA.to_json(), "sampling": {}}, "not a minidit model config: .*'method', 'prediction'"),
        ({**OPENSORA.to_json(), "layers": 3}, "not a minidit model config: .*'layers'"),
        ({**OPENSORA.to_json(), "depth": 0}, "ModelConfig.depth must be a positive whole number, got 0"),
        ({**OPENSORA.to_json(), "captions": {"heads": 2}}, "not a minidit model config: 'vocabulary' is missing"),
        ([1], "not a minidit model config: expected an object, got list"),
        ("depth", "not a minidit model config: expected an object, got str"),
        (None, "not a minidit model config: expected an object, got NoneType"),
    ],
)
def test_json_that_is_no_config_is_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(data)


# sizes


@pytest.mark.parametrize(
    ("frames", "height", "width", "latent"),
    [
        (51, 480, 854, (15, 60, 106)),
        (102, 480, 854, (30, 60, 106)),
        (408, 144, 256, (120, 18, 32)),
        (68, 720, 1280, (20, 90, 160)),
        (17, 240, 426, (5, 30, 53)),
        (18, 240, 426, (6, 30, 53)),
        (21, 240, 426, (6, 30, 53)),
        (22, 240, 426, (7, 30, 53)),
        (1, 512, 512, (1, 64, 64)),
    ],
)
def test_latents_of_open_sora_take_5_frames_for_17_and_a_rest_by_4(frames, height, width, latent):
    assert OPENSORA.sampling.latent_size(frames, height, width) == latent


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_a_model_of_pixels_has_latents_of_the_videos_size(frames, height, width):
    pixels = replace(OPENSORA.sampling, space=1, chunk=1, time=1)
    assert pixels.latent_size(frames, height, width) == (frames, height, width)


@pytest.mark.parametrize("size", [(0, 480, 854), (51, 7, 854), (51, 480, 7)])
def test_a_video_has_a_frame_and_a_latent(size):
    frames, height, width = size
    message = f"at least 1 frame of 8x8 pixels, got {frames} frames of {height}x{width}"
    with pytest.raises(ValueError, match=message):
        OPENSORA.sampling.latent_size(*size)


@pytest.mark.parametrize(("latent", "tokens"), [((15, 60, 106), (15, 1590)), ((1, 5, 3), (1, 6))])
def test_tokens_are_patches_and_a_part_of_one_counts(latent, tokens):
    assert OPENSORA.tokens(latent) == tokens


@pytest.mark.parametrize(
    ("name", "latent", "message"),
    [
        ("opensora-1.0-16x512x512", (16, 63, 64), r"takes latents of whole patches, \(2, 2\), got \(63, 64\)"),
        ("opensora-1.0-16x512x512", (16, 64, 63), r"takes latents of whole patches, \(2, 2\), got \(64, 63\)"),
        ("latte-t2v", (16, 1, 64), r"latents of \(1, 64\) have no patch of \(2, 2\)"),
        ("latte", (16, 32, 30), "has positions for 256 places, got 16 x 15"),
        ("latte", (17, 32, 32), "has positions for 16 frames, got 17"),
    ],
)
def test_latents_that_a_model_does_not_take_are_refused(name, latent, message):
    with pytest.raises(ValueError, match=message):
        PRESETS[name].tokens(latent)


def test_a_rest_of_a_patch_is_filled_or_cut():
    assert PRESETS["opensora-1.2"].grid((1, 5, 7)) == (3, 4)
    assert PRESETS["latte-t2v"].grid((1, 5, 7)) == (2, 3)


# the order of the forward


def test_blocks_take_turns_and_each_is_attention_then_caption_then_mlp():
    sites = replace(OPENSORA, depth=2).sites
    assert [site.block for site in sites] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [site.part for site in sites] == ["spatial", "cross", "mlp", "temporal", "cross", "mlp"] * 2


def test_open_sora_has_heads_of_72_channels():
    assert (OPENSORA.head_dim, OPENSORA.mlp_dim, len(OPENSORA.sites)) == (72, 4608, 168)
