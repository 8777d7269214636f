import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidit import checkpoint
from minidit.checkpoint import load, save
from minidit.config import PRESETS, CaptionConfig
from minidit.model import DiT

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
        ("", "Expecting value"),
        ('{"depth": 1', "Expecting ',' delimiter"),
        ("[]", "not a minidit model config: expected an object, got list"),
        ("{}", "not a minidit model config: 'sampling' is missing"),
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


def test_missing_tensors_are_counted_and_the_first_is_named(folder):
    edit(folder, lambda tensors: [tensors.pop(name) for name in SOME])
    assert refusal(folder).endswith(
        "model.safetensors does not fit config.json, tensors are wrong: 3 missing, first null_caption"
    )


def test_unknown_tensors_are_counted_and_the_first_is_named(folder):
    edit(folder, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(2)}))
    assert refusal(folder).endswith("tensors are wrong: 2 unknown, first extra.0")


def test_misshapen_tensors_are_named_with_both_shapes(folder):
    edit(folder, lambda tensors: tensors.update({"null_caption": torch.zeros(6, 9), "patch.bias": torch.zeros(1, 16)}))
    assert refusal(folder).endswith("tensors are wrong: 2 misshapen, first null_caption [6, 9] instead of [6, 8]")


def test_all_that_is_wrong_with_the_tensors_is_one_line(folder):
    edit(folder, lambda tensors: tensors.update({"other": tensors.pop("patch.bias"), "final.table": torch.zeros(())}))
    assert refusal(folder).endswith(
        "1 missing, first patch.bias; 1 unknown, first other; 1 misshapen, first final.table [] instead of [2, 16]"
    )


def test_a_model_of_another_depth_is_refused(folder):
    (folder / "config.json").write_text(json.dumps(replace(CONFIG, depth=2).to_json()))
    assert re.search(r"tensors are wrong: \d+ missing, first blocks\.2\.", refusal(folder))


# a save that fails


@pytest.mark.parametrize(("owner", "name"), [(checkpoint, "save_file"), (Path, "write_text")])
def test_a_save_that_fails_leaves_the_old_model(model, folder, monkeypatch, owner, name):
    def fill_the_disk(*args, **kwargs):
        path = next(arg for arg in args if isinstance(arg, Path))
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    other = DiT(replace(CONFIG, dim=32))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fill_the_disk)
        with pytest.raises(OSError, match="no space left"):
            save(other, folder)
    assert equal(load(folder), model)
    save(other, folder)
    assert equal(load(folder), other)
