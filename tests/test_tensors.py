import argparse
import json
import os
import pickle
import re
import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minidit.tensors import CODES, cast, misfits, read, scratch, split, told, write

names = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def collections(draw):
    """Tensors of any names, shapes, dtypes and bits; some with strides."""
    drawn = draw(st.dictionaries(names, st.tuples(shapes, st.sampled_from(list(CODES)), st.booleans()), max_size=6))
    return {name: noise(*what) for name, what in drawn.items()}


def noise(shape, dtype, strided=False):
    wide = (2, *shape) if strided else shape
    size = torch.Size(wide).numel() * dtype.itemsize
    most = 2 if dtype == torch.bool else 256
    tensor = torch.randint(most, (size,), dtype=torch.uint8).view(dtype).reshape(wide)
    return tensor.movedim(0, -1)[..., 1] if strided else tensor


def bits(some):
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, tensor in some.items()
    }


def meta(some):
    return {name: tensor.to("meta") for name, tensor in some.items()}


def refusal(path, kind=ValueError):
    """The one line that read refuses a file with; it names the file."""
    with pytest.raises(kind) as error:
        read(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


# written and read


@given(collections(), st.integers(1, 200))
def test_what_is_written_is_read_bit_for_bit_by_safetensors_and_by_us(tmp_path_factory, some, limit):
    folder = tmp_path_factory.mktemp("written")
    told = []
    write(folder, some, meta(some), limit=limit, advance=told.append)
    files = split(meta(some), limit)
    assert sum(told) == sum(tensor.nbytes for tensor in some.values())
    theirs = [load_file(folder / file) for file in files]
    assert [sorted(part) for part in theirs] == [sorted(names) for names in files.values()]
    assert bits({name: tensor for part in theirs for name, tensor in part.items()}) == bits(some)
    whole = folder / ("model.safetensors" if len(files) == 1 else "model.safetensors.index.json")
    stored = read(whole)
    assert bits(stored.tensors) == bits(some)
    assert {n: (t.shape, t.dtype) for n, t in stored.meta.items()} == {n: (t.shape, t.dtype) for n, t in some.items()}
    assert {path.name for path in stored.files} == {path.name for path in folder.iterdir()}


@given(collections(), st.integers(1, 200))
def test_files_hold_all_tensors_in_order_and_no_more_than_the_limit_or_one(some, limit):
    files = split(meta(some), limit)
    assert [name for names in files.values() for name in names] == list(some)
    sizes = [[some[name].nbytes for name in names] for names in files.values()]
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
    assert all(sum(a) + b[0] > limit for a, b in zip(sizes, sizes[1:], strict=False))  # none is started too early


def test_small_checkpoints_are_one_file_and_large_ones_are_named_as_on_the_hub():
    some = {name: torch.empty(1_000_000_000, dtype=torch.uint8, device="meta") for name in "abcdef"}
    assert split({"a": some["a"]}) == {"model.safetensors": ["a"]} and split({}) == {"model.safetensors": []}
    assert split(some) == {
        "model-00001-of-00002.safetensors": ["a", "b", "c", "d", "e"],
        "model-00002-of-00002.safetensors": ["f"],
    }


def test_wide_dtypes_come_first_so_that_all_are_aligned(tmp_path):
    some = {"a": noise((3,), torch.int8), "b": noise((5,), torch.float64), "c": noise((3,), torch.bfloat16)}
    write(tmp_path, some, meta(some))
    data = (tmp_path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert length % 8 == 0
    starts = {name: entry.get("data_offsets") for name, entry in json.loads(data[8 : 8 + length]).items()}
    assert starts == {"__metadata__": None, "b": [0, 40], "c": [40, 46], "a": [46, 49]}


def test_a_tensor_is_written_in_the_dtype_asked_for(tmp_path):
    some = {"a": torch.tensor([1.0, 2.00390625])}
    write(tmp_path, some, {"a": torch.empty(2, dtype=torch.bfloat16, device="meta")})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.tensor([1.0, 2.0], dtype=torch.bfloat16))


@pytest.mark.parametrize(("number", "fits"), [(65504.0, True), (65520.0, False), (-1e9, False), (float("inf"), True)])
def test_a_finite_number_does_not_become_infinite(number, fits):
    tensor = torch.tensor([0.0, number])
    if fits:
        assert cast("a", tensor, torch.float16).tolist() == [0.0, number]
    else:
        with pytest.raises(ValueError, match="^'a' has numbers too large for float16: take bfloat16$"):
            cast("a", tensor, torch.float16)


def test_a_folder_to_write_in_is_gone_after_any_end(tmp_path):
    for error in (KeyboardInterrupt, OSError, SystemExit):
        with pytest.raises(error), scratch(tmp_path / "model") as folder:
            (folder / "half").write_text("half")
            assert [path.name for path in tmp_path.iterdir()] == [folder.name]
            assert re.fullmatch(rf"\.model\.{os.getpid()}-[0-9a-f]{{8}}\.partial", folder.name)
            with scratch(tmp_path / "model") as another:  # of a process of the same number
                assert another != folder
            raise error
        assert list(tmp_path.iterdir()) == []


# broken files


@given(st.data())
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_file_that_ends_anywhere_is_named(tmp_path_factory, ending, data):
    path = tmp_path_factory.mktemp("cut") / f"model{ending}"
    some = {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    save_file(some, path) if ending == ".safetensors" else torch.save(some, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert refusal(path).startswith(": not a whole ")


@given(st.binary(max_size=200))
@example(b"PK\x03\x04" * 10)
@example(b"\x80\x02}q\x00.")
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_file_of_anything_is_named(tmp_path_factory, ending, data):
    path = tmp_path_factory.mktemp("noise") / f"model{ending}"
    path.write_bytes(data)
    refusal(path)


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pt"])
def test_a_file_that_does_not_exist_is_named(tmp_path, name):
    assert refusal(tmp_path / name, FileNotFoundError) == " does not exist"


def test_a_dtype_that_torch_lacks_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    assert refusal(tmp_path / "a.safetensors").startswith(": 'a' is of dtype F8_E8M0, expected one of F64, F32, ")


def test_one_name_in_two_files_is_refused(tmp_path):
    for file in ("a", "b"):
        save_file({"x": torch.zeros(1), file: torch.zeros(1)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors: 1 stored in another file, too: 'x'$"):
        read(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


@pytest.fixture
def index(tmp_path):
    some = {name: torch.zeros(10) for name in "abc"}
    write(tmp_path, some, meta(some), limit=40)
    return tmp_path / "model.safetensors.index.json"


def edit(index, change):
    data = json.loads(index.read_text())
    change(data["weight_map"])
    index.write_text(json.dumps(data))


FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda at: at.update(b=FIRST), ValueError, "1 not in the file it names: 'b'"),
        (lambda at: at.update(d=FIRST), ValueError, "tensors are 1 not in the file it names: 'd'"),
        (lambda at: at.update(a=SECOND, b=FIRST), ValueError, "2 not in the file it names: 'a', 'b'"),
        (lambda at: at.update(d="gone.safetensors"), FileNotFoundError, "got 1 that are not there: 'gone.safetensors'"),
        (lambda at: at.update(a=f"../{FIRST}"), FileNotFoundError, f"got 1 that are not there: '../{FIRST}'"),
        (lambda at: at.update(a=7), ValueError, "expected {'weight_map': {tensor: file}}: TypeError"),
        (lambda at: at.clear(), FileNotFoundError, "got none: fetch all of them"),
    ],
)
def test_an_index_that_is_wrong_is_named_with_what_is(index, change, kind, said):
    edit(index, change)
    assert said in refusal(index, kind)


def test_a_tensor_that_the_index_lacks_is_named(index):
    save_file({"a": torch.zeros(1), "stray": torch.zeros(1)}, index.parent / FIRST)
    assert refusal(index).endswith("tensors are 1 in its files alone: 'stray'")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": ["a"]}', "\udcff"])
def test_an_index_that_is_none_is_named(index, text):
    index.write_text(text, errors="surrogateescape")
    assert refusal(index).startswith(": not an index, expected {'weight_map': {tensor: file}}: ")


# what torch.save has written


INNER = {"a": torch.arange(3.0), "b": torch.zeros((), dtype=torch.int64)}


@pytest.mark.parametrize(
    ("tree", "container", "ignored"),
    [
        (INNER, "", ()),
        ({"ema": INNER}, "ema", ()),
        ({"model": {"a": INNER["b"]}, "ema": INNER, "opt": {"step": 3}}, "ema", ("model", "opt")),
        ({"state_dict": {"a": INNER["b"]}, "model": INNER}, "model", ("state_dict",)),
        ({"epoch": 7, "model": {"state_dict": INNER, "step": 1}}, "model.state_dict", ("epoch", "model.step")),
        ({"ema": INNER, "args": argparse.Namespace(lr=1e-4)}, "ema", ("args",)),
        ({"model": INNER["a"], "b": INNER["b"]}, "", ()),  # a tensor of that name is no container
    ],
)
def test_the_tensors_are_taken_out_of_their_container(tmp_path, tree, container, ignored):
    torch.save(tree, tmp_path / "a.pt")
    stored = read(tmp_path / "a.pt")
    assert (stored.container, stored.ignored, stored.files) == (container, ignored, (tmp_path / "a.pt",))
    expected = {"model": INNER["a"], "b": INNER["b"]} if "b" in tree and "model" in tree else INNER
    assert bits(stored.tensors) == bits(expected)
    assert {name: tensor.dtype for name, tensor in stored.meta.items()} == {n: t.dtype for n, t in expected.items()}


def test_parameters_are_read_as_tensors(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "a.ckpt")
    assert not read(tmp_path / "a.ckpt").tensors["a"].requires_grad


class Code:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": INNER, "more": Code()}, "a.pt")
    assert refusal(tmp_path / "a.pt") == (
        f": refused, loading it would call {os.mkdir.__module__}.mkdir. Save its tensors alone, better as .safetensors"
    )
    torch.save(torch.nn.Linear(1, 1), "b.pt")
    assert ": refused, loading it would call torch.nn.modules.linear.Linear" in refusal(tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Code()))
    refusal(tmp_path / "c.pt")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ([torch.zeros(1)], ": the file holds one list, expected a dictionary of tensors"),
        ({}, ": the file should hold tensors, by name, or one of ema, model, state_dict, got nothing"),
        ({"ema": {"a": INNER["a"], "step": 3}}, ": ema should hold tensors, by name, or one of "),
        ({"a": INNER["a"], "step": 3}, "got 1 others: 'step' (int)"),
        ({1: INNER["a"]}, "got 1 others: 1 (Tensor)"),
        ({"a": torch.zeros(1, dtype=torch.complex64)}, "got 1 others: 'a' (Tensor)"),
        ({"a": torch.eye(2).to_sparse()}, "got 1 others: 'a' (Tensor)"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path, tree, said):
    torch.save(tree, tmp_path / "a.pt")
    assert said in refusal(tmp_path / "a.pt")


def test_a_file_too_old_to_be_mapped_is_refused_with_what_helps(tmp_path):
    torch.save(INNER, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert "torch.save of before version 1.6 wrote it, or " in refusal(tmp_path / "a.pt")


# what fits


def test_what_does_not_fit_is_listed_by_kind_and_told_in_one_line():
    expected = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4), "n": torch.zeros(1, dtype=torch.int64)}
    found = {"b": torch.zeros(4), "c": torch.zeros(4, dtype=torch.uint8), "n": torch.zeros(1), "d": torch.zeros(5)}
    wrong = misfits(expected, found)
    assert wrong == {
        "missing": ["'a' (2,)"],
        "unknown": ["'d' (5,)"],
        "misshapen": ["'b' (4,) expected (3,)"],
        "not of floating point": ["'c' torch.uint8"],
    }
    assert told(wrong) == (
        "1 missing: 'a' (2,); 1 unknown: 'd' (5,); 1 misshapen: 'b' (4,) expected (3,); "
        "1 not of floating point: 'c' torch.uint8"
    )
    assert told(misfits(expected, {**expected, "a": torch.zeros(2, dtype=torch.bfloat16)})) == ""
