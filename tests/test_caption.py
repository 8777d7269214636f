from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minidit.caption import PADDING, CaptionEncoder
from minidit.config import CaptionConfig
from minidit.presets import PRESETS

WORDS = (",", "a", "blue", "circle", "moves", "red", "right", "square")
CONFIG = replace(
    PRESETS["opensora-1.2"],
    caption_dim=16,
    caption_length=6,
    captions=CaptionConfig(vocabulary=WORDS, heads=2, depth=2),
)
captions = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6)


def encoder(length=6):
    torch.manual_seed(0)
    return CaptionEncoder(replace(CONFIG, caption_length=length)).eval().requires_grad_(False)


ENCODER = encoder()


# reading


@given(captions)
def test_word_i_of_the_vocabulary_is_token_i_plus_1(words):
    (tokens,) = ENCODER.tokenize([" ".join(words)]).tolist()
    assert tokens == [WORDS.index(word) + 1 for word in words] + [PADDING] * (6 - len(words))


@pytest.mark.parametrize(
    "caption", ["A Red CIRCLE moves", "a red circle moves.", " a red\tcircle\n moves! ", "a red: circle; moves?"]
)
def test_capitals_punctuation_and_spaces_do_not_matter(caption):
    assert torch.equal(ENCODER.tokenize([caption]), ENCODER.tokenize(["a red circle moves"]))


def test_a_comma_is_a_word_with_or_without_a_space():
    assert torch.equal(ENCODER.tokenize(["a circle, a square"]), ENCODER.tokenize(["a circle ,a square"]))
    assert ENCODER.tokenize(["circle, square"])[0, 1] == WORDS.index(",") + 1


def test_unknown_words_are_named_once_each_with_the_nearest_known_word():
    with pytest.raises(ValueError) as error:
        ENCODER.tokenize(["a circle", "a Rad xyzzy squares xyzzy"])
    assert str(error.value) == (
        "unknown in the caption: 'rad' (did you mean 'red'?), 'xyzzy', 'squares' (did you mean 'square'?). "
        "Known words: , a blue circle moves red right square"
    )


@pytest.mark.parametrize(("caption", "words"), [("", 0), (" .! ", 0), ("a " * 7, 7), ("a," * 4, 8)])
def test_a_caption_has_from_1_word_to_as_many_as_the_model_reads(caption, words):
    with pytest.raises(ValueError, match=f"a caption has 1 to 6 words and commas, this one has {words}"):
        ENCODER.tokenize([caption])


def test_a_model_without_words_has_no_encoder():
    with pytest.raises(ValueError, match="ModelConfig.captions is None"):
        CaptionEncoder(PRESETS["opensora-1.2"])


# encoding


@given(st.lists(captions, min_size=1, max_size=3))
def test_lengths_count_the_words(batch):
    text, lengths = ENCODER(ENCODER.tokenize([" ".join(words) for words in batch]))
    assert text.shape == (len(batch), 6, 16)
    assert lengths.tolist() == [len(words) for words in batch]


@given(captions)
def test_padding_does_not_change_the_features_of_the_words(words):
    state = ENCODER.state_dict()
    exact = encoder(length=len(words))
    exact.load_state_dict({**state, "places": state["places"][: len(words)]})
    padded, unpadded = (model(model.tokenize([" ".join(words)]))[0] for model in (ENCODER, exact))
    torch.testing.assert_close(padded[:, : len(words)], unpadded, rtol=0, atol=1e-6)


@given(captions, captions)
def test_a_caption_is_encoded_the_same_beside_any_other(one, other):
    tokens = ENCODER.tokenize([" ".join(one), " ".join(other)])
    torch.testing.assert_close(ENCODER(tokens)[0][:1], ENCODER(tokens[:1])[0], rtol=0, atol=1e-6)


def test_every_word_knows_the_order_of_the_others():
    text, _ = ENCODER(ENCODER.tokenize(["a red circle , blue square", "a blue circle , red square"]))
    assert (text[0] - text[1]).abs().amax(1).min() > 0.01
