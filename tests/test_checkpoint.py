import json
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minidit import tensors
from minidit.checkpoint import load, save
from minidit.config import CaptionConfig
from minidit.model import DiT
from minidit.presets import PRESETS

CONFIG = replace(
    PRESETS["opensora-1.2"],
    depth=1,
    dim=16,
    heads=2,
    mlp_ratio=2.0,
    caption_dim=8,
    caption_length=6,
    captions=CaptionConfig(vocabulary=("a", "circle", "red"), heads=2, depth=1),
)
SOME = ["final.table", "null_caption", "patch.bias"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DiT(CONFIG)


@pytest.fixture
def folder(model, tmp_path):
    save(model, tmp_path / "model")
    return tmp_path / "model"


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def edit(folder, change):
    """Write the tensors again as change(tensors) left them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder):
    """The one line that load refuses a folder with; it begins with the file."""
    with pytest.raises(ValueError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# there and back


def test_a_model_comes_back_bit_for_bit(model, folder):
    again = load(folder)
    assert equal(again, model) and again.config == CONFIG
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_loaded_model_is_for_use_and_not_for_training(folder):
    again = load(str(folder))
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())
    assert not any(tensor.is_meta for tensor in again.state_dict().values())


def test_a_loaded_model_reads_captions_and_runs(folder):
    model = load(folder)
    text, lengths = model.encoder(model.encoder.tokenize(["a red circle"]))
    cond = model.prepare(text, lengths, latent=(2, 4, 4), height=32, width=32, fps=torch.tensor([8.0]))
    assert model(torch.randn(1, 4, 2, 4, 4), 500.0, cond).isfinite().all()


def test_a_bfloat16_file_is_a_float32_model_on_a_cpu(model, folder):
    save(model, folder, dtype=torch.bfloat16)
    assert load_file(folder / "model.safetensors")["patch.weight"].dtype == torch.bfloat16
    again, rounded = load(folder), model.to(torch.bfloat16).float()
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float32}
    assert all(map(torch.equal, again.parameters(), rounded.parameters()))


def test_buffers_are_saved_as_they_are(model, folder):
    save(model, folder, dtype=torch.bfloat16)
    assert all(torch.equal(*pair) for pair in zip(load(folder).buffers(), model.buffers(), strict=True))
    assert len(list(model.buffers())) > 0


def test_a_folder_may_have_the_name_of_an_embedded_model(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(model, "tiny")
    assert equal(load("./tiny"), model) and equal(load(Path("tiny")), model)
    assert load("tiny").config != model.config


def test_numbers_that_float16_cannot_hold_are_not_read_as_infinite(model, folder):
    torch.nn.init.constant_(model.patch.bias, 1e5)
    save(model, folder)
    with pytest.raises(ValueError, match=r"'patch.bias' has numbers too large for float16: take bfloat16"):
        load(folder, dtype=torch.float16)


def test_a_model_is_not_saved_in_numbers_that_it_cannot_have(model, folder):
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"not {dtype}"):
            save(model, folder, dtype=dtype)
    assert equal(load(folder), model)


def test_a_bfloat16_model_turns_frames_by_float32_frequencies(model, folder):
    again = load(folder, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.rope_freqs, model.rope_freqs)


def test_saving_does_not_change_the_model(model, tmp_path):
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()}
    save(model, tmp_path, dtype=torch.bfloat16)
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()} == before


# what is missing or does not fit is named


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder / name} does not exist: give a folder with")):
        load(folder)


def test_a_name_that_is_no_model_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nosuch/config.json does not exist: .*, or tiny$"):
        load(tmp_path / "nosuch")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value"),
        ('{"depth": 1', "not JSON: Expecting ',' delimiter"),
        ("[]", "not a minidit model config: expected an object, got list"),
        ("{}", "not a minidit model config: '\\w+' is missing"),
        (json.dumps({**CONFIG.to_json(), "depth": 0}), "ModelConfig.depth must be a positive whole number, got 0"),
        (json.dumps({**CONFIG.to_json(), "depth": "1"}), "ModelConfig.depth must be a positive whole number, got '1'"),
        (json.dumps({**CONFIG.to_json(), "colour": 1}), "not a minidit model config: .*'colour'"),
    ],
)
def test_a_broken_config_is_named_with_what_is_wrong(folder, text, message):
    (folder / "config.json").write_text(text)
    assert re.match(re.escape(f"{folder / 'config.json'}: ") + message, refusal(folder))


def test_a_config_that_is_not_text_is_named(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert refusal(folder).startswith(f"{folder / 'config.json'}: ")


@pytest.mark.parametrize("left", [0, 7, 100, -1], ids=["nothing", "no header", "half a header", "a byte less"])
def test_a_truncated_file_is_named(folder, left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert refusal(folder).startswith(f"{path}: ")


def test_a_file_of_something_else_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" * 1000)
    assert refusal(folder).startswith(f"{folder / 'model.safetensors'}: ")


def test_missing_tensors_are_counted_and_named(folder):
    edit(folder, lambda tensors: [tensors.pop(name) for name in SOME])
    assert refusal(folder).endswith(
        "model.safetensors does not fit config.json, tensors are wrong: "
        "3 missing: 'null_caption' (6, 8), 'patch.bias' (16,), 'final.table' (2, 16)"
    )


def test_unknown_tensors_are_counted_and_the_first_ten_are_named(folder):
    edit(folder, lambda tensors: tensors.update({f"extra.{i:02}": torch.zeros(1) for i in range(12)}))
    names = ", ".join(f"'extra.{i:02}' (1,)" for i in range(10))
    assert refusal(folder).endswith(f"tensors are wrong: 12 unknown: {names}, ...")


def test_misshapen_tensors_are_named_with_both_shapes(folder):
    edit(folder, lambda tensors: tensors.update({"null_caption": torch.zeros(6, 9), "patch.bias": torch.zeros(1, 16)}))
    assert refusal(folder).endswith(
        "tensors are wrong: 2 misshapen: 'null_caption' (6, 9) expected (6, 8), 'patch.bias' (1, 16) expected (16,)"
    )


def test_whole_numbers_are_no_weights(folder):
    edit(folder, lambda tensors: tensors.update({"patch.bias": torch.zeros(16, dtype=torch.int64)}))
    assert refusal(folder).endswith("tensors are wrong: 1 not of floating point: 'patch.bias' torch.int64")


def test_all_that_is_wrong_with_the_tensors_is_one_line(folder):
    edit(folder, lambda tensors: tensors.update({"other": tensors.pop("patch.bias"), "final.table": torch.zeros(())}))
    assert refusal(folder).endswith(
        "1 missing: 'patch.bias' (16,); 1 unknown: 'other' (16,); 1 misshapen: 'final.table' () expected (2, 16)"
    )


def test_a_model_of_another_depth_is_refused(folder):
    (folder / "config.json").write_text(json.dumps(replace(CONFIG, depth=2).to_json()))
    assert re.search(r"tensors are wrong: \d+ missing: 'blocks\.2\.", refusal(folder))


# a save that fails


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("owner", "name"), [(tensors, "write_file"), (Path, "write_text")])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(model, folder, monkeypatch, owner, name, error):
    def fill_the_disk(path, *args, **kwargs):
        path.write_bytes(b"half")
        raise error

    other = DiT(replace(CONFIG, dim=32))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fill_the_disk)
        with pytest.raises(type(error)):
            save(other, folder)
    assert equal(load(folder), model)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    save(other, folder)
    assert equal(load(folder), other)


@contextmanager
def killed(monkeypatch, moves):
    """What replaces files ends after so many of them."""
    replace_file, done = os.replace, []

    def replace_or_end(*names):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(names)
        replace_file(*names)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace_or_end)
        yield


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_a_save_killed_between_its_files_is_refused_and_not_half_the_old_model(model, tmp_path, monkeypatch, moves):
    save(model, tmp_path, limit=2000)
    with killed(monkeypatch, moves):
        save(model, tmp_path, limit=2000)
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        load(tmp_path)
    save(model, tmp_path)
    assert equal(load(tmp_path), model)


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_an_interrupted_save_leaves_the_new_model_whole_beside(model, tmp_path, monkeypatch, moves):
    save(model, tmp_path, limit=2000)
    new = DiT(CONFIG)
    with killed(monkeypatch, moves):
        save(new, tmp_path, limit=2000)
    (beside,) = tmp_path.glob("model.unfinished-*")
    assert equal(load(beside), new) and not list(tmp_path.glob("*.partial"))


def test_a_save_that_cannot_remove_an_old_file_leaves_the_new_model_whole_beside(model, tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").mkdir()
    with pytest.raises(OSError):
        save(model, tmp_path)
    (beside,) = tmp_path.glob("model.unfinished-*")
    assert equal(load(beside), model)


@pytest.mark.parametrize("moves", [0, 1])
def test_a_save_of_one_file_that_is_killed_leaves_the_old_model_or_the_new_one(model, folder, monkeypatch, moves):
    other = DiT(CONFIG)
    with killed(monkeypatch, moves):
        save(other, folder)
    assert equal(load(folder), other if moves else model)


def test_a_save_of_another_config_that_is_killed_is_not_new_weights_under_the_old_one(model, folder, monkeypatch):
    other = DiT(replace(CONFIG, sampling=replace(CONFIG.sampling, steps=CONFIG.sampling.steps + 1)))
    with killed(monkeypatch, 1):
        save(other, folder)
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        load(folder)


def test_numbers_that_float16_cannot_hold_are_refused_and_not_saved_as_infinite(model, tmp_path):
    torch.nn.init.constant_(model.patch.bias, 1e5)
    with pytest.raises(ValueError, match=r"'patch.bias' has numbers too large for float16: take bfloat16"):
        save(model, tmp_path, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


# in several files


@pytest.fixture
def sharded(model, tmp_path):
    save(model, tmp_path / "sharded", limit=2000)
    return tmp_path / "sharded"


def test_a_large_model_is_several_files_and_comes_back_bit_for_bit(model, sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = sorted({*index["weight_map"].values()})
    assert len(shards) > 5
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert sorted(path.name for path in sharded.iterdir()) == ["config.json", *shards, "model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    for shard in shards:
        stored = load_file(sharded / shard)
        assert len(stored) == 1 or sum(tensor.nbytes for tensor in stored.values()) <= 2000
    assert equal(load(sharded), model)


def test_saving_over_a_model_leaves_no_file_of_the_old_one(model, sharded):
    (sharded / "README.md").write_text("a card")
    save(model, sharded)
    assert sorted(path.name for path in sharded.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    save(model, sharded, limit=2000)
    assert not (sharded / "model.safetensors").exists() and equal(load(sharded), model)


def test_two_layouts_in_one_folder_are_refused(model, sharded, folder):
    (folder / "model.safetensors").rename(sharded / "model.safetensors")
    assert refusal(sharded) == (
        f"{sharded} holds a model.safetensors and a model.safetensors.index.json: "
        "remove the one that is not the model's"
    )


def test_a_model_is_not_read_before_it_is_used(folder):
    path = folder / "model.safetensors"
    again = load(folder)
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(12345).tobytes())  # the last number of a file that is mapped and not copied
    assert [tensor.flatten()[-1].item() for tensor in again.state_dict().values()].count(12345) == 1
