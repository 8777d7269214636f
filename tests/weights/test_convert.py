import argparse
import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from families import FAMILIES
from minidit import checkpoint, tensors
from minidit.model import DiT
from minidit.presets import PRESETS
from minidit.tensors import write
from minidit.weights.convert import prepare
from minidit.weights.families import PUBLISHED, upstream
from minidit.weights.rules import apply

ROOT = Path(__file__).parents[2]
STDIT3 = next(family for family in FAMILIES if family.preset == "opensora-1.2")
KNOWN = {"model": STDIT3.preset, "config": STDIT3.config}
TWINS = [name for name in PUBLISHED if name.startswith("opensora-1.0-")]  # of one shape


@cache
def good():
    return STDIT3.upstream()


@pytest.fixture(scope="module")
def weights():
    return good()


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Files of a test are named as a user names them, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bits(some):
    """Tensors as values that compare equal if and only if they are the same, bit for bit."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in some.items()
    }


def read(folder):
    return tensors.read(checkpoint.weights(Path(folder))).tensors


def report(folder):
    return json.loads((Path(folder) / "conversion.json").read_text())


def refusal(source, out="out", *, kind=ValueError, **options):
    """The one line that a conversion is refused with; it leaves nothing behind."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(kind) as error:
        prepare(str(source), out, **options).run(verify=True)
    assert "\n" not in str(error.value) and sorted(Path().rglob("*")) == before
    return str(error.value)


# every form of source


def one_file(weights):
    save_file(weights, "model.safetensors")
    return "model.safetensors"


def shards(weights):
    Path("shards").mkdir()
    write(Path("shards"), weights, {name: tensor.to("meta") for name, tensor in weights.items()}, limit=100_000)
    return "shards/model.safetensors.index.json"


def folder(weights):
    shards(weights)
    return "shards"


def diffusers(weights):
    Path("diffusers/transformer").mkdir(parents=True)
    save_file(weights, "diffusers/transformer/diffusion_pytorch_model.safetensors")
    return "diffusers"


def archive(*keys, prefix="", beside=None, name="model.pt"):
    def save(weights):
        tree = {prefix + name: tensor for name, tensor in weights.items()}
        for key in reversed(keys):
            tree = {"epoch": 3, key: tree, **(beside or {})}
        torch.save(tree, name)
        return name

    return save


OTHER = {"model": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=1e-4)}


@pytest.mark.parametrize(
    ("form", "container", "prefix", "ignored"),
    [
        (one_file, "", "", []),
        (shards, "", "", []),
        (folder, "", "", []),
        (diffusers, "", "", []),
        (archive(), "", "", []),
        (archive(prefix="module.", name="model.ckpt"), "", "module.", []),
        (archive("ema", beside=OTHER), "ema", "", ["epoch", "model", "args"]),
        (archive("model", "state_dict", name="m.pth"), "model.state_dict", "", ["epoch", "model.epoch"]),
        (archive("state_dict", prefix="module."), "state_dict", "module.", ["epoch"]),
        (archive(prefix="_orig_mod."), "", "_orig_mod.", []),
        (archive(prefix="module._orig_mod."), "", "module._orig_mod.", []),
    ],
)
def test_every_form_becomes_the_same_model(weights, form, container, prefix, ignored):
    source = form(weights)
    prepare(source, "out", **KNOWN).run()
    assert bits(read("out")) == bits(apply(PUBLISHED[STDIT3.preset].rules(STDIT3.config), weights))
    said = report("out")
    assert (said["source"], said["model"], said["dtype"]) == (source, "opensora-1.2", "as stored")
    assert (said["container"], said["prefix"], said["ignored"]) == (container, prefix, ignored)
    files = [path for path in Path().rglob("*") if path.name in said["sha256"] and "out" not in path.parts]
    assert said["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    model = checkpoint.load("out")
    assert model.config == STDIT3.config
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "config.json",
        "conversion.json",
        "model.safetensors",
    ]


def test_a_name_on_the_hub_is_fetched_and_its_commit_told(monkeypatch, weights):
    Path("cache/abc123").mkdir(parents=True)
    save_file(weights, "cache/abc123/model.safetensors")
    hub = argparse.Namespace(snapshot_download=lambda name, **_: "cache/abc123")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    prepare("org/name", "out", **KNOWN).run()
    assert (report("out")["source"], report("out")["revision"]) == ("org/name", "abc123")
    assert checkpoint.load("out").config == STDIT3.config


# there and back


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_is_loaded_and_comes_back_bit_for_bit(family):
    given = family.upstream()
    save_file(given, "model.safetensors")
    job = prepare("model.safetensors", "out", model=family.preset, config=family.config, limit=200_000)
    job.run(verify=True)
    state = DiT(family.config).state_dict()
    assert {name: tensor.shape for name, tensor in checkpoint.load("out").state_dict().items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    dropped = load_file("out/dropped.safetensors") if job.dropped else {}
    assert sorted(dropped) == sorted(f"dropped/{name}" for name in report("out")["dropped"])
    prepare("out", "back", back=True).run(verify=True)
    assert bits(read("back")) == bits(given)
    assert all(path.name.startswith("model") for path in Path("back").iterdir())


@pytest.fixture
def with_buffer():
    """A model of the first family with a tensor to drop; the name of that tensor."""
    family = next(family for family in FAMILIES if family.preset in TWINS)
    given = family.upstream()
    given["pos_embed"] = torch.randn(1, 4, 8).to(torch.float64)
    save_file(given, "buffer.safetensors")
    return {"model": family.preset, "config": family.config}, given


def test_what_is_dropped_is_kept_beside_the_model_as_it_was(with_buffer):
    known, given = with_buffer
    job = prepare("buffer.safetensors", "out", dtype=torch.bfloat16, **known)
    assert job.dropped["pos_embed"] == report_of_rules(known, "pos_embed")
    job.run(verify=True)
    assert report("out")["dropped"] == job.dropped
    kept = load_file("out/dropped.safetensors")
    assert bits({"a": kept["dropped/pos_embed"]}) == bits({"a": given["pos_embed"]})
    assert not any(name.startswith("dropped/") for name in read("out"))
    prepare("out", "back", back=True).run()
    assert bits({"a": read("back")["pos_embed"]}) == bits({"a": given["pos_embed"]})


def report_of_rules(known, name):
    (why,) = {rule.why for rule in PUBLISHED[known["model"]].rules(known["config"]) if getattr(rule, "old", "") == name}
    return why


def test_a_folder_that_was_converted_is_not_converted_again(weights):
    prepare(one_file(weights), "out", **KNOWN).run()
    message = "out was converted here already: --inverse goes back to the published names"
    assert refusal("out", "again", **KNOWN) == message


def test_a_way_back_without_what_was_dropped_is_refused(with_buffer):
    known, _ = with_buffer
    prepare("buffer.safetensors", "out", **known).run()
    Path("out/dropped.safetensors").unlink()
    message = refusal("out", "back", kind=FileNotFoundError, back=True)
    assert message.startswith("out/dropped.safetensors: of the tensors that conversion.json says were dropped, ")
    assert "missing: " in message and "'pos_embed'" in message


def test_a_model_that_was_saved_and_not_converted_goes_back_if_it_is_named(weights):
    save_file(weights, "model.safetensors")
    prepare("model.safetensors", "out", **KNOWN).run()
    checkpoint.save(checkpoint.load("out"), "saved")
    assert "saved: conversion.json names no known model, give --model, one of " in refusal("saved", "back", back=True)
    prepare("saved", "back", back=True, model=STDIT3.preset).run(verify=True)
    assert bits(read("back")) == bits(weights)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"model": [], "dropped": {}}', '{"model": "x"}', '{"model": "x", "dropped": 1}'],
)
def test_a_report_that_is_none_is_refused(weights, text):
    save_file(weights, "model.safetensors")
    prepare("model.safetensors", "out", **KNOWN).run()
    Path("out/conversion.json").write_text(text)
    assert refusal("out", "back", back=True).startswith("out/conversion.json: ")


def test_a_folder_whose_tensors_do_not_fit_its_config_does_not_go_back(weights):
    save_file(weights, "model.safetensors")
    prepare("model.safetensors", "out", **KNOWN).run()
    checkpoint.write_config(Path("out"), replace(STDIT3.config, depth=3))
    assert refusal("out", "back", back=True).startswith("out: the tensors do not fit config.json: 36 missing: ")


# files and dtypes


def test_a_large_model_is_written_as_shards_that_load(weights):
    job = prepare(one_file(weights), "out", **KNOWN, limit=150_000)
    job.run(verify=True)
    stored = {path.name: load_file(path) for path in Path("out").glob("*.safetensors")}
    assert len(stored) > 5 and stored.keys() == job.files.keys()
    assert job.files == {name: sum(t.nbytes for t in part.values()) for name, part in stored.items()}
    assert max(job.files.values()) <= 150_000
    assert bits(read("out")) == bits(apply(PUBLISHED[STDIT3.preset].rules(STDIT3.config), weights))
    assert checkpoint.load("out").config == STDIT3.config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_are_cast_and_buffers_keep_their_dtype(weights, dtype):
    prepare(one_file(weights), "out", **KNOWN, dtype=dtype).run(verify=True)
    ours = apply(PUBLISHED[STDIT3.preset].rules(STDIT3.config), weights)
    expected = {name: tensor if name == "rope_freqs" else tensor.to(dtype) for name, tensor in ours.items()}
    assert bits(read("out")) == bits(expected)
    assert report("out")["dtype"] == str(dtype).removeprefix("torch.")
    prepare("out", "back", back=True, dtype=torch.float32).run(verify=True)
    rounded = {name: tensor if name == "rope.freqs" else tensor.to(dtype).float() for name, tensor in weights.items()}
    assert bits(read("back")) == bits(rounded)


def test_a_number_too_large_for_float16_is_refused(weights):
    big = weights | {"t_block.1.bias": weights["t_block.1.bias"] * 0 - 1e6}
    message = refusal(one_file(big), **KNOWN, dtype=torch.float16)
    assert message == "'modulation.bias' has numbers too large for float16: take bfloat16"


def test_what_is_told_beforehand_is_what_is_written(weights):
    for verify in (False, True):
        done = []
        job = prepare(one_file(weights), f"out{verify}", **KNOWN, limit=400_000)
        assert not Path(f"out{verify}").exists()
        job.run(verify=verify, advance=done.append)
        assert sum(done) == job.work(verify=verify)
        done.clear()
        back = prepare(f"out{verify}", f"back{verify}", back=True)
        back.run(verify=verify, advance=done.append)
        assert sum(done) == back.work(verify=verify)


def test_a_prefix_that_not_all_names_have_is_a_part_of_a_name(weights):
    first, *rest = weights
    some = {f"module.{first}": weights[first]} | {name: weights[name] for name in rest}
    assert f"1 missing: '{first}' " in (message := refusal(one_file(some), **KNOWN))
    assert f"1 unknown: 'module.{first}' " in message


def test_a_tensor_that_comes_back_changed_is_found(weights, monkeypatch):
    def forget(name, tensor, dtype, cast=tensors.cast):
        return cast(name, tensor, dtype) * (name != "blocks.3.temporal.table")

    monkeypatch.setattr(tensors, "cast", forget)
    said = "1 came back as other numbers: 'temporal_blocks.1.scale_shift_table'; nothing was kept"
    assert said in refusal(one_file(weights), kind=OSError, **KNOWN)


def test_a_dtype_that_was_not_asked_for_is_found(weights, monkeypatch):
    def other(folder, made, meta, write=tensors.write, **options):
        write(folder, made, {name: tensor.double() for name, tensor in meta.items()}, **options)

    monkeypatch.setattr(tensors, "write", other)
    assert f"{len(weights)} came back as other numbers: " in refusal(one_file(weights), kind=OSError, **KNOWN)


# memory

MEMORY = """
import sys, threading, time, torch
from minidit import checkpoint
from minidit.weights.convert import prepare

def anonymous():
    # not the pages of mapped files, which are not ours to keep and which the system takes back when it needs them
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

limit, config = int(sys.argv[1]), checkpoint.read_config(checkpoint.Path("config.json"))
known = {"model": "opensora-1.2", "config": config, "limit": limit}
prepare(sys.argv[2], "out", **known)  # loads what torch loads late
peak = start = anonymous()
threading.Thread(target=watch, daemon=True).start()
for source in sys.argv[2:]:
    peak = start
    prepare(source, source + ".out", dtype=torch.bfloat16, **known).run(verify=True)
    print(peak - start)
model = checkpoint.load(source + ".out", dtype=torch.bfloat16)
print(anonymous() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux tells of a process")
def test_no_more_than_two_shards_are_in_memory_at_a_time():
    config = replace(STDIT3.config, dim=768, heads=8, mlp_ratio=4.0, depth=1)
    big = {name: torch.ones(tensor.shape) for name, tensor in upstream("opensora-1.2", config).items()}
    size, limit = sum(tensor.nbytes for tensor in big.values()), 25_000_000
    assert size > 3 * limit  # so that one that holds all of it is found out
    checkpoint.write_config(Path(), config)
    command = [sys.executable, "-c", MEMORY, str(limit), one_file(big), archive("ema")(big)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(int(held) < 2 * limit for held in result.stdout.split()), result.stdout


# what can be wrong


def store(weights, path):
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save({"ema": weights}, path)


@settings(max_examples=60)
@given(st.data())
def test_a_checkpoint_that_is_broken_in_any_way_is_named_and_leaves_nothing(tmp_path_factory, data):
    where = tmp_path_factory.mktemp("broken")
    weights, broken = good(), dict(good())
    name = data.draw(st.sampled_from(sorted(weights)))
    path = where / data.draw(st.sampled_from(["a.safetensors", "a.pt"]))
    match data.draw(st.sampled_from(["removed", "added", "reshaped", "cut", "index"])):
        case "removed":
            del broken[name]
            said = f"1 missing: {name!r} {tuple(weights[name].shape)}"
        case "added":
            broken[name + ".stray"] = torch.zeros(2)
            said = f"1 unknown: {name + '.stray'!r} (2,)"
        case "reshaped":
            broken[name] = broken[name][None]
            said = f"1 misshapen: {name!r} {(1, *weights[name].shape)} expected {tuple(weights[name].shape)}"
        case "cut":
            store(weights, path)
            os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 1)))
            said = f"{path}: not a whole "
        case "index":
            path = where / "model.safetensors.index.json"
            write(where, weights, {name: tensor.to("meta") for name, tensor in weights.items()}, limit=300_000)
            index = json.loads(path.read_text())
            files = {*index["weight_map"].values(), "gone.safetensors"} - {index["weight_map"][name]}
            index["weight_map"][name] = file = data.draw(st.sampled_from(sorted(files)))
            path.write_text(json.dumps(index))
            said = repr(file) if file == "gone.safetensors" else repr(name)
    if not path.exists():
        store(broken, path)
    before = sorted(where.iterdir())
    with pytest.raises((ValueError, OSError)) as error:
        prepare(str(path), where / "out", **KNOWN)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert sorted(where.iterdir()) == before


def test_every_problem_is_counted_and_the_first_ten_are_named(weights):
    few = {name: tensor for name, tensor in weights.items() if "spatial_blocks.1" not in name}
    message = refusal(one_file(few | {"stray": torch.zeros(1)}), **KNOWN)
    assert message.startswith("model.safetensors does not fit opensora-1.2, tensors are wrong: 17 missing: ")
    assert message.count("'spatial_blocks.1.") == 10 and message.endswith(", ...; 1 unknown: 'stray' (1,)")


def test_another_family_is_refused_with_the_closest(weights):
    assert "opensora-1.2 is closest, but there are 884 missing: " in refusal(one_file(weights))
    assert "does not fit opensora-1.1, tensors are wrong: " in refusal("model.safetensors", model="opensora-1.1")


def test_a_config_of_another_architecture_is_refused(weights):
    message = refusal(one_file(weights), model="opensora-1.1", config=STDIT3.config)
    assert message.startswith("the config is not that of a model like opensora-1.1: ") and "28 missing: " in message


def test_a_full_size_checkpoint_is_recognised_by_its_header_alone():
    config = PRESETS["opensora-1.2"]
    names = upstream("opensora-1.2", config)
    with open("model.safetensors", "wb") as file:  # all zeros, and takes no room on the disk
        end, entries = 0, {}
        for name, tensor in names.items():
            start, end = end, end + tensor.nbytes
            entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        header = json.dumps(entries).encode()
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    job = prepare("model.safetensors", "out", dtype=torch.bfloat16)
    assert (job.model, job.config) == ("opensora-1.2", config)
    assert job.files == {"model.safetensors": 2 * 1_208_872_772 + 2 * 36}  # the 36 frequencies stay float32
    assert list(prepare("model.safetensors", "out").files) == ["model.safetensors"]
    whole = prepare("model.safetensors", "out", dtype=torch.float64).files
    assert list(whole) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_checkpoints_that_look_the_same_need_a_name(monkeypatch, place):
    found = upstream(TWINS[0], PRESETS[TWINS[0]])
    monkeypatch.setattr(tensors, "read", lambda path: tensors.Stored((path,), found, found))
    Path("a.pt").touch()
    assert refusal("a.pt") == f"a.pt: these tensors may be those of {', '.join(TWINS)}: say which with --model NAME"
    assert prepare("a.pt", "out", model=TWINS[1]).config == PRESETS[TWINS[1]]
    for name in TWINS:
        hub = PUBLISHED[name].hub[0]
        repository, file = "/".join(hub.split("/")[:2]), hub.split("/")[2]
        (place / "cache" / name).mkdir(parents=True)
        (place / "cache" / name / file).touch()
        fake = argparse.Namespace(snapshot_download=lambda *_, name=name, **__: str(place / "cache" / name))
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
        assert prepare(f"{repository}/{file}", "out").model == name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "gpt-2"}, "unknown model 'gpt-2': give one of opensora-1.2, "),
        ({"config": STDIT3.config}, "a config needs a key map, give --model"),
        ({"back": True, **KNOWN}, "on the way back it is that of the folder"),
        ({"out": "."}, ". is no name of a new folder"),
    ],
)
def test_what_cannot_be_asked_for_is_told(weights, options, said):
    assert said in refusal(one_file(weights), **options)


def test_a_place_that_is_taken_is_refused(weights):
    source = one_file(weights)
    Path("taken").mkdir()
    Path("taken/file").touch()
    Path("link").symlink_to("nowhere")
    for out in ("taken", "taken/file", "link"):
        message = f"{out} exists: remove it, or name another folder to write"
        assert refusal(source, out, kind=FileExistsError, **KNOWN) == message
    assert refusal(source, "no/out", kind=FileNotFoundError, **KNOWN) == "no/out: the folder no does not exist"


def test_an_empty_folder_is_filled(weights):
    Path("out").mkdir()
    prepare(one_file(weights), "out", **KNOWN).run()
    assert checkpoint.load("out").config == STDIT3.config


def test_a_source_that_does_not_exist_is_told():
    assert refusal("gone.pt", kind=FileNotFoundError).startswith("gone.pt does not exist: ")
    assert refusal("gone", kind=FileNotFoundError, back=True).startswith("gone/model.safetensors does not exist: ")


# what fails on the way


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_conversion_that_stops_at_any_point_leaves_nothing(weights, error):
    source, points = one_file(weights), []
    job = prepare(source, "out", **KNOWN, limit=700_000)
    job.run(verify=True, advance=points.append)
    before = sorted(Path().iterdir())
    for stop in range(0, len(points), 9):
        steps = iter(range(len(points)))

        def advance(_, steps=steps, stop=stop):
            if next(steps) == stop:
                raise error

        with pytest.raises(error):
            replace(job, out=Path("other")).run(verify=True, advance=advance)
        assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("name", ["write_text", "rename", "mkdir"])
def test_a_conversion_that_stops_between_files_leaves_nothing(weights, monkeypatch, name):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    job = prepare(one_file(weights), "out", **KNOWN)
    monkeypatch.setattr(Path, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert [path.name for path in Path().iterdir()] == ["model.safetensors"]


class FullDisk(io.FileIO):
    room, error = 500_000, errno.ENOSPC

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(data)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_the_room_needed(weights, monkeypatch, error):
    job = prepare(one_file(weights), "out", **KNOWN)
    monkeypatch.setattr(FullDisk, "error", error)
    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(path, mode))
    with pytest.raises(OSError) as caught:
        job.run()
    assert str(caught.value) == (
        f"out: {os.strerror(error)}, nothing was kept: make room for 1.4 MB, or name another disk"
    )
    assert [path.name for path in Path().iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of this process")
def test_a_conversion_that_is_killed_leaves_nothing_that_looks_complete(weights):
    job = prepare(one_file(weights), "out", **KNOWN)
    if not (child := os.fork()):
        job.run(advance=lambda _: os.kill(os.getpid(), signal.SIGKILL))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = [path for path in Path().iterdir() if path.is_dir()]
    assert len(left) == 1 and left[0].name.startswith(".out.") and left[0].name.endswith(".partial")
    with pytest.raises(FileNotFoundError):
        checkpoint.load(left[0])
    job.run()
    assert checkpoint.load("out").config == STDIT3.config
