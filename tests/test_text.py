import fnmatch
import json
import shutil
import sys
import warnings
from dataclasses import replace

import huggingface_hub
import pytest
import sentencepiece
import torch
from diffusers import LattePipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from bench_stages import words
from families import FAMILIES
from minidit.checkpoint import load_config
from minidit.presets import PRESETS
from minidit.text import RULES, UCF101, T5Text, clean, label, rules_of

CAPTIONS = ("a red circle moves to the right", "two cats on a beach, at sunset.", "a fox", "")
LENGTH = 32
LATTE = LattePipeline.__new__(LattePipeline)  # cleaning needs none of its models


# cleaning


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A Cat on the BEACH.", "a cat on the beach."),
        ("  a\tcat \n on  a beach ", "a cat on a beach"),
        ("a+cat%2C%20asleep", "a cat, asleep"),
        ("a <person> and a dog", "a person and a dog"),
        ("a cat from https://cats.com/photos/1 asleep", "a cat from asleep"),
        ("see www.cats.org/x, a cat", "see , a cat"),
        ("a <b>red</b> <img src='x'>cat<!-- why -->", "a red cat"),
        ("black &amp; white &quot;cat&quot;", 'black white "cat"'),
        ("tom &amp;amp; jerry", "tom ; jerry"),  # once more escaped than it is read
        ("a cat by @kitty_1", "a cat by"),
        ("一只 cat 在睡觉", "cat"),
        ("a cat — asleep – at last", "a cat - asleep - at last"),
        ("a “cat” and a «dog», it’s", 'a "cat" and a "dog", it\'s'),
        ("at 192.168.0.1 a cat", "at a cat"),
        (r"a cat\nasleep", "a cat asleep"),
        ("cat #12 of 123456", "cat of"),
        ("cat.jpg a cat", "a cat"),
        ("a cat... asleep", "a cat asleep"),
        ("***a*** (cat) [on] {a} beach/sea | © #", "a cat on a beach sea"),
        ("this-is-my_cute-cat", "this is my cute cat"),
        ("a well-lit, half-open door", "a well-lit, half-open door"),
        ("ab1234 x1y 1z2 a cat", "a cat"),
        ("a cat free shipping worldwide free download", "a cat worldwide"),
        ("a cat click for more", "a cat"),
        ("png image of page 12", "of"),
        ("a poster, 30x40, of a cat", "a poster, , of a cat"),
        ("a cat : asleep,purring", "a cat: asleep, purring"),
        ('"a cat"', "a cat"),
        ("a cat:", "a cat"),
        ("ｆｕｌｌ ﬁsh", "full fish"),  # mended by ftfy
        ("aesthetic score: 6.5. motion score: 5.0.", "aesthetic score: 6.5. motion score: 5.0."),
        ("", ""),
    ],
)
def test_a_caption_is_cleaned(caption, expected, trim):
    assert clean(clean(caption, trim=trim), trim=trim) == expected


PIECES = """a cat 猫 ー — “ ’ ` ' " "" http://x.com/a https: www:/a x.org me@x.org <b> </b> <person> <!--
    <script>x</script> &amp; &quot &lt;b&gt; &#65; &copyx; @nick 1.2.3.4 5:30 \\n #123 #12345 123456 a.png .. . ...
    *** ( ] ~ this-is _ - jc6640 j6c 6c6 free shipping download click for png images page 12 j2d1a2 1x2 3.5х4 : ,
    a,b + %20 %2541 é ã© ﬁ ß < & ; K"""
pasted = st.lists(st.tuples(st.sampled_from(PIECES.split()), st.sampled_from(["", " "])), max_size=12).map(
    lambda all: "".join(map("".join, all))
)


@settings(max_examples=300)
@given(pasted | st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "<!" not in text))
@example("K 5:30 ")
@example("it costs R&D; 100×200 and more_or-less_or-so")
def test_cleaning_is_that_of_diffusers(caption):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bs4
        expected = LATTE._clean_caption(caption)
    assert clean(caption, trim=False) == expected


def test_open_sora_trims_before_article_numbers_go_and_diffusers_does_not():
    caption = '(): "a cat"'
    assert clean(clean(caption, trim=True), trim=True) == "a cat"
    assert clean(clean(caption, trim=False), trim=False) == '"a cat"'


def test_what_the_first_cleaning_uncovers_the_second_removes():
    once = clean("%2541 cat", trim=True)
    assert (once, clean(once, trim=True)) == ("%41 cat", "a cat")


@pytest.mark.parametrize("caption", ["cats.txt", "/cats/1", "a.b"])
def test_a_caption_that_looks_like_a_file_is_cleaned_without_a_warning(caption, recwarn):
    clean(caption, trim=True)
    assert not recwarn


def test_markup_that_no_parser_takes_is_told_of():
    with pytest.raises(ValueError, match=r"the caption 'a <!\[ cat' cannot be cleaned of its markup"):
        clean("a <![ cat", trim=True)


# rules


def test_there_are_rules_for_every_published_model_of_captions():
    assert set(RULES) == {name for name, config in PRESETS.items() if config.caption_dim}


@pytest.mark.parametrize("name", RULES)
def test_a_models_rules_are_those_of_its_preset(name):
    assert rules_of(PRESETS[name]) == RULES[name]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.config.caption_dim], ids=str)
def test_rules_do_not_depend_on_size(family):
    assert rules_of(family.config) == RULES[family.preset]


@pytest.mark.parametrize("config", [PRESETS["latte"], PRESETS["latte-ucf101"], load_config("tiny")])
def test_a_model_without_a_t5_has_no_rules(config):
    with pytest.raises(ValueError, match="this model's captions are not a T5's to encode: .*opensora-1.2"):
        rules_of(config)


@pytest.mark.parametrize("name", RULES)
def test_only_open_sora_12_adds_a_score_to_the_prompt(name):
    added = " aesthetic score: 6.5." if name == "opensora-1.2" else ""
    assert RULES[name].prompt("A Cat asleep.") == "a cat asleep." + added


def test_scores_and_the_camera_are_said_at_the_end():
    rules = replace(RULES["opensora-1.2"], aesthetic=7, motion=5, camera="Pan Right")
    assert rules.prompt("A cat.") == "a cat. aesthetic score: 7.0. motion score: 5.0. camera motion: pan right."


def test_what_a_caption_says_itself_is_not_said_again():
    rules = replace(RULES["opensora-1.2"], motion=5.0, camera="pan right")
    caption = "a cat. motion score: 1.5. aesthetic score: 5.0. camera motion: static."
    assert rules.prompt(caption) == caption


def test_a_score_can_be_left_out():
    assert replace(RULES["opensora-1.2"], aesthetic=None).prompt("a cat") == "a cat"


@pytest.mark.parametrize(("name", "left"), [("opensora-1.2", "aesthetic score: 6.5."), ("latte-t2v", "")])
def test_a_caption_of_which_nothing_is_left_is_told_of(name, left):
    with pytest.warns(UserWarning, match="nothing is left of the caption '一只猫'"):
        assert RULES[name].prompt("一只猫") == left


@pytest.mark.parametrize("name", RULES)
def test_an_empty_caption_is_a_caption(name, recwarn):
    assert RULES[name].prompt(" ") in ("", "aesthetic score: 6.5.")
    assert not recwarn


# a tiny T5, in the layouts that are published


@pytest.fixture(scope="module")
def spiece():
    """A sentencepiece model with T5's special tokens, as bytes."""
    return words([*CAPTIONS[:3], "the quick brown fox jumps over the lazy dog 0123456789 :"], 60)


@pytest.fixture(scope="module")
def reference():
    """transformers' own encoder, of T5 v1.1's shape."""
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 128}
    encoder = T5EncoderModel(T5Config(**shape, feed_forward_proj="gated-gelu", relative_attention_num_buckets=8))
    with torch.no_grad():  # its own start lets neighbours see nothing of each other
        for parameter in encoder.parameters():
            parameter.normal_(0, 0.5)
    return encoder.eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, spiece, reference):
    """As in Latte's repository: text_encoder/ and tokenizer/ of a diffusers pipeline, in safetensors."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(spiece)
    (folder / "model_index.json").write_text("{}")
    reference.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory, spiece, reference):
    """As DeepFloyd/t5-v1_1-xxl, which Open-Sora and Open-Sora-Plan use: one folder, pickled shards and their index."""
    folder = tmp_path_factory.mktemp("flat")
    (folder / "spiece.model").write_bytes(spiece)
    (folder / "config.json").write_text(json.dumps(reference.config.to_dict()))
    state = {name: value for name, value in reference.state_dict().items() if name != "encoder.embed_tokens.weight"}
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    places = {name: shards[i % 2] for i, name in enumerate(state)}
    for shard in shards:
        torch.save({name: state[name] for name, place in places.items() if place == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def load(folder, length=LENGTH, dtype=torch.float32):
    return T5Text.load(folder, length=length, dtype=dtype)


@pytest.fixture(scope="module")
def t5(pipeline):
    return load(pipeline)


@pytest.fixture(scope="module")
def diffusers_pipeline(spiece, reference):
    words = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    vocabulary = [(words.id_to_piece(i), words.get_score(i)) for i in range(words.vocab_size())]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    return LattePipeline(tokenizer, reference, vae=None, transformer=None, scheduler=None)


def close(own, expected):
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


# loading


def test_both_layouts_give_the_same_features(pipeline, flat):
    (own, lengths), (other, others) = load(pipeline).encode(CAPTIONS), load(flat).encode(CAPTIONS)
    assert torch.equal(own, other) and torch.equal(lengths, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_of_the_dtype_that_is_asked_for(pipeline, t5, dtype):
    own, _ = load(pipeline, dtype=dtype).encode(CAPTIONS)
    expected, _ = t5.encode(CAPTIONS)
    assert own.dtype == dtype and (own.float() - expected).norm() < 0.03 * expected.norm()


def test_the_encoder_is_where_it_was_moved(pipeline):
    t5 = load(pipeline)
    assert t5.device.type == "cpu"
    assert t5.to("meta") is t5 and t5.device.type == "meta"


def test_an_encoder_is_not_trained(t5):
    assert not t5.encoder.training and not any(parameter.requires_grad for parameter in t5.encoder.parameters())


@pytest.mark.parametrize("layout", ["pipeline", "flat"])
def test_from_the_hub_is_fetched_what_is_needed(layout, request, tmp_path, monkeypatch, t5):
    source, cache = request.getfixturevalue(layout), tmp_path / "cache"
    shutil.copytree(source, tmp_path / "repository")
    unwanted = ("README.md", "tf_model.h5", "transformer/config.json", "transformer/model.safetensors")
    for name in (*unwanted, "pytorch_model.bin" if layout == "pipeline" else "text_encoder.bin"):
        (tmp_path / "repository" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "repository" / name).write_text("")

    def snapshot_download(repository, *, allow_patterns, ignore_patterns):
        assert repository == "org/t5"
        for path in (tmp_path / "repository").rglob("*"):
            name = path.relative_to(tmp_path / "repository").as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert torch.equal(load("org/t5").encode(CAPTIONS)[0], t5.encode(CAPTIONS)[0])
    fetched = {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}
    expected = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert fetched == expected - {"model_index.json"}


def test_what_the_hub_does_not_give_is_told_of(monkeypatch):
    def snapshot_download(repository, *, allow_patterns, ignore_patterns):
        raise RuntimeError("no\nconnection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError) as error:
        load("org/t5")
    assert str(error.value) == "org/t5 does not exist, and could not be had from the hub: no connection"


@pytest.mark.parametrize("source", ["nowhere", "./nowhere/t5", "org/t5/text_encoder"])
def test_a_folder_that_does_not_exist_is_told_of(source):
    with pytest.raises(FileNotFoundError, match=f"{source} does not exist: expected a folder with a T5, or org/name"):
        load(source)


@pytest.mark.parametrize("missing", ["text_encoder/config.json", "tokenizer/spiece.model"])
def test_a_folder_without_a_t5_says_what_belongs_there(pipeline, tmp_path, missing):
    folder = shutil.copytree(pipeline, tmp_path / "t5")
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load(folder)
    expected = "text_encoder/config.json and tokenizer/spiece.model, or config.json and spiece.model"
    assert str(error.value) == f"{folder} holds no T5: expected {expected}"


def test_a_folder_without_weights_is_told_of(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "t5")
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        load(folder)


def test_missing_tensors_are_not_made_up(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "t5")
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    del state["encoder.final_layer_norm.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no T5 encoder: 1 tensors are missing, first 'encoder.final_layer_norm"):
        load(folder)


@pytest.mark.parametrize("spoil", ["shape", "file"])
def test_weights_that_do_not_fit_are_told_of(pipeline, tmp_path, spoil):
    folder = shutil.copytree(pipeline, tmp_path / "t5")
    path = folder / "text_encoder" / "model.safetensors"
    if spoil == "file":
        path.write_bytes(b"nothing")
    else:
        save_file({**load_file(path), "encoder.final_layer_norm.weight": torch.ones(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="holds no T5 that fits its config.json"):
        load(folder)


def test_words_that_the_encoder_does_not_know_are_told_of(pipeline, tmp_path, reference):
    folder = shutil.copytree(pipeline, tmp_path / "t5")
    small = T5EncoderModel(T5Config(**{**reference.config.to_dict(), "vocab_size": 10}))
    small.save_pretrained(folder / "text_encoder")
    with pytest.raises(ValueError, match=r"spiece.model has \d+ tokens, the encoder only 10"):
        load(folder)


@pytest.mark.parametrize("package", ["transformers", "sentencepiece"])
def test_a_missing_package_is_named_when_a_t5_is_loaded(package, pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"need the package {package}, of minidit's extra 'hub'") as error:
        load(pipeline)
    assert error.value.name == package


@pytest.mark.parametrize("package", ["ftfy", "bs4"])
def test_a_missing_package_is_named_when_a_caption_is_cleaned(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"need the package {package}, of minidit's extra 'hub'") as error:
        clean("a cat", trim=True)
    assert error.value.name == package


# encoding


def test_tokens_are_those_of_transformers(t5, diffusers_pipeline):
    for caption in CAPTIONS:
        assert t5._tokens(caption) == diffusers_pipeline.tokenizer(caption).input_ids


def test_features_are_those_of_each_prompt_alone_and_unpadded(t5, reference):
    text, lengths = t5.encode(CAPTIONS)
    tokens = [t5._tokens(caption) for caption in CAPTIONS]
    assert lengths.tolist() == [len(row) for row in tokens] and lengths[-1] == 1  # of no words, the end
    assert text.shape == (4, max(lengths), 16)
    for row, length, own in zip(text, lengths, tokens, strict=True):
        with torch.no_grad():
            close(row[:length], reference(torch.tensor([own])).last_hidden_state[0])


@pytest.mark.parametrize("i", range(len(CAPTIONS)))
def test_a_prompt_is_encoded_alone_as_in_a_batch(t5, i):
    (text, lengths), (alone, length) = t5.encode(CAPTIONS), t5.encode([CAPTIONS[i]])
    assert alone.shape[1] == length == lengths[i]
    close(alone[0], text[i, :length])


def test_how_far_prompts_are_padded_does_not_matter(pipeline, t5):
    text, lengths = t5.encode(CAPTIONS)
    other, others = load(pipeline, length=2 * LENGTH).encode(CAPTIONS)
    assert torch.equal(lengths, others)
    for own, expected, length in zip(text, other, lengths, strict=True):
        close(own[:length], expected[:length])


@pytest.mark.parametrize("caption", ["A Red CIRCLE moves &amp; a fox", "two cats", ""])
def test_one_prompt_and_its_null_are_those_of_lattes_pipeline(pipeline, diffusers_pipeline, caption):
    t5 = load(pipeline, length=120)
    text, lengths = t5.encode([RULES["latte-t2v"].prompt(caption)])
    with torch.no_grad():
        expected, negative = diffusers_pipeline.encode_prompt(
            caption, negative_prompt="", device="cpu", clean_caption=True, mask_feature=True
        )
    assert text.shape == expected.shape
    close(text, expected)
    close(t5.null()[None, : lengths[0]], negative)


def test_the_null_prompt_is_as_long_as_any_caption_and_its_padding_is_not_zero(t5):
    null = t5.null()
    assert null.shape == (LENGTH, 16)
    close(null[:1], t5.encode([""])[0][0])
    assert null[1:].abs().sum(1).min() > 0


@pytest.mark.parametrize("more", [1, 3])
def test_a_prompt_that_is_too_long_is_cut_and_its_end_is_told(pipeline, t5, more):
    caption = "a red circle moves to the right"
    tokens = t5._tokens(caption)
    short = load(pipeline, length=len(tokens) - more)
    with pytest.warns(UserWarning, match=f"a prompt of more than {short.length} tokens is cut, .* not read: '") as told:
        text, lengths = short.encode([caption, "a fox"])
    assert len(told) == 1 and caption.endswith(str(told[0].message).split("'")[1].strip())
    assert lengths[0] == text.shape[1] == short.length
    with torch.no_grad():
        close(text[0], t5.encoder(torch.tensor([[*tokens[: short.length - 1], 1]])).last_hidden_state[0])


def test_a_prompt_that_just_fits_is_not_cut(pipeline, t5, recwarn):
    text, lengths = load(pipeline, length=len(t5._tokens(CAPTIONS[0]))).encode(CAPTIONS[:1])
    close(text, t5.encode(CAPTIONS[:1])[0])
    assert not recwarn


@pytest.mark.parametrize("prompts", ["a cat", []])
def test_prompts_are_a_sequence_of_them(t5, prompts):
    with pytest.raises(ValueError, match="expected a sequence of one prompt or more, got"):
        t5.encode(prompts)


# classes


def test_there_are_as_many_names_as_classes_in_the_order_of_sorted_folders():
    assert len(set(UCF101)) == PRESETS["latte-ucf101"].classes == 101
    assert list(UCF101) == sorted(UCF101)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (0, 0),
        ("100", 100),
        ("ApplyEyeMakeup", 0),
        ("HammerThrow", 34),  # before Hammering, other than in UCF101's own list
        ("Hammering", 35),
        ("jumping jack", 47),
        ("PLAYING_GUITAR", 62),
        ("yo-yo", 100),
    ],
)
def test_a_class_is_named_or_numbered(name, expected):
    assert label(name, PRESETS["latte-ucf101"]) == expected


@pytest.mark.parametrize("name", [-1, 101, "101", "1.5", "xyzzy"])
def test_an_unknown_class_says_which_are_known(name):
    with pytest.raises(ValueError) as error:
        label(name, PRESETS["latte-ucf101"])
    expected = "expected a number from 0 to 100 or a name of UCF101, as ApplyEyeMakeup, YoYo"
    assert str(error.value) == f"unknown class {name!r}, {expected}"


def test_a_class_that_is_misspelt_says_what_is_near():
    with pytest.raises(ValueError, match="or a name of UCF101, as PlayingGuitar"):
        label("playing gitar", PRESETS["latte-ucf101"])


def test_the_classes_of_another_model_have_numbers_alone():
    config = replace(PRESETS["latte-ucf101"], classes=10)
    assert label("9", config) == 9
    with pytest.raises(ValueError, match="unknown class 'Archery', expected a number from 0 to 9$"):
        label("Archery", config)


def test_a_model_without_classes_is_told_of():
    with pytest.raises(ValueError, match="this model knows no classes: give it captions"):
        label(0, PRESETS["latte-t2v"])
