import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidit.config import PRESETS, CaptionConfig, ModelConfig, Sampling

OPENSORA = PRESETS["opensora-1.2"]
WITH_WORDS = replace(OPENSORA, captions=CaptionConfig(vocabulary=("a", "red"), heads=4, depth=2))
counts = st.integers(1, 10**6)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)

samplings = st.builds(
    Sampling,
    prediction=st.sampled_from(["velocity", "sample"]),
    shift=st.none() | positive,
    steps=counts,
    guidance=st.floats(allow_nan=False),
    frames=counts,
    height=counts,
    width=counts,
    fps=positive | counts,
    space=counts,
    chunk=counts,
    time=counts,
)


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
    return ModelConfig(
        depth=draw(counts),
        dim=4 * heads * draw(st.integers(1, 100)),
        heads=heads,
        mlp_ratio=draw(positive),
        patch=(1, draw(counts), draw(counts)),
        in_channels=in_channels,
        out_channels=in_channels + draw(st.integers(0, 8)),
        caption_dim=caption_heads * draw(counts),
        caption_length=draw(counts),
        base_size=draw(counts),
        sampling=draw(samplings),
        captions=draw(st.none() | captions),
    )


@given(models())
def test_a_config_comes_back_from_its_json(config):
    again = ModelConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config and hash(again) == hash(config)


def test_nothing_writes_to_a_config():
    with pytest.raises(FrozenInstanceError):
        OPENSORA.depth = 1


# errors name the field


@pytest.mark.parametrize("name", ["depth", "dim", "heads", "in_channels", "caption_dim", "caption_length", "base_size"])
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
        ({"caption_dim": 30}, "ModelConfig.caption_dim must be a multiple of CaptionConfig.heads, got caption_dim=30"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(WITH_WORDS, **fields)


@pytest.mark.parametrize("name", ["steps", "frames", "height", "width", "fps", "space", "chunk", "time", "shift"])
def test_a_setting_of_the_sampling_is_positive(name):
    with pytest.raises(ValueError, match=f"Sampling.{name} must be a positive .*number, got 0"):
        replace(OPENSORA.sampling, **{name: 0})


def test_a_network_predicts_one_of_two_things():
    with pytest.raises(ValueError, match="Sampling.prediction must be 'velocity' or 'sample', got 'noise'"):
        replace(OPENSORA.sampling, prediction="noise")


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
        ({**OPENSORA.to_json(), "sampling": {}}, "not a minidit model config: .*'prediction'"),
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


# the order of the forward


def test_blocks_take_turns_and_each_is_attention_then_caption_then_mlp():
    sites = replace(OPENSORA, depth=2).sites
    assert [site.block for site in sites] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [site.part for site in sites] == ["spatial", "cross", "mlp", "temporal", "cross", "mlp"] * 2


def test_open_sora_has_heads_of_72_channels():
    assert (OPENSORA.head_dim, OPENSORA.mlp_dim, len(OPENSORA.sites)) == (72, 4608, 168)
