import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minidit.weights.rules import (
    Applied,
    Drop,
    Fuse,
    KeyMapError,
    Rename,
    Reshape,
    Split,
    apply,
    check,
    convert,
    inverse,
    invert,
    present,
    reads,
    writes,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64]
shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@st.composite
def maps(draw):
    """A key map with any number of each kind of rule, and tensors that it fits; some to be dropped are not there."""
    rules, tensors = [], {}
    generator = torch.Generator().manual_seed(0)
    kinds = draw(st.lists(st.sampled_from([renames, splits, fuses, reshapes, drops]), max_size=6))
    for n, kind in enumerate(kinds):
        rule, wanted = draw(kind(f"old.{n}", f"new.{n}"))
        dtype = draw(st.sampled_from(DTYPES))
        rules.append(rule)
        if isinstance(rule, Drop) and draw(st.booleans()):
            continue
        tensors.update((name, noise(shape, dtype, generator)) for name, shape in zip(reads(rule), wanted, strict=True))
    return tuple(rules), dict(draw(st.permutations(list(tensors.items()))))


@st.composite
def renames(draw, old, new):
    return Rename(old, new), [draw(shapes)]


@st.composite
def drops(draw, old, new):
    return Drop(old, "of no use"), [draw(shapes)]


@st.composite
def splits(draw, old, new):
    rule, wanted = draw(fuses(old, new))
    parts, dim = len(rule.old), rule.dim
    whole = list(wanted[0])
    whole[dim] *= parts
    return Split(old, tuple(f"{new}.{i}" for i in range(parts)), dim), [tuple(whole)]


@st.composite
def fuses(draw, old, new):
    part = draw(shapes.filter(len))
    dim = draw(st.integers(-len(part), len(part) - 1))
    parts = draw(st.integers(1, 4))
    return Fuse(tuple(f"{old}.{i}" for i in range(parts)), new, dim), [part] * parts


@st.composite
def reshapes(draw, old, new):
    shape = draw(shapes)
    other = draw(st.permutations(shape).map(tuple) | st.just((torch.Size(shape).numel(),)))
    return Reshape(old, new, shape, other), [shape]


def noise(shape, dtype, generator):
    """Every bit pattern of the dtype, NaN among them: a map moves bits and knows no numbers."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensors):
    """Tensors as values that compare equal if and only if they are the same, bit for bit."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, tensor in tensors.items()
    }


def zeros(**shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@given(maps())
def test_a_map_and_its_inverse_give_every_bit_back(drawn):
    rules, tensors = drawn
    assert bits(invert(rules, apply(rules, tensors))) == bits(tensors)


@given(maps())
def test_a_map_writes_what_its_rules_name_and_keeps_every_element(drawn):
    rules, tensors = drawn
    converted = apply(rules, tensors)
    assert list(converted) == [name for rule in present(rules, tensors) for name in writes(rule)]
    assert sum(tensor.nbytes for tensor in converted.values()) == sum(tensor.nbytes for tensor in tensors.values())


@given(maps())
def test_on_the_meta_device_a_map_tells_the_shapes_it_will_give(drawn):
    rules, tensors = drawn
    meta = apply(rules, {name: tensor.to("meta") for name, tensor in tensors.items()})
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in meta.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in apply(rules, tensors).items()
    }


@given(maps(), st.data())
def test_a_tensor_taken_away_or_added_is_named(drawn, data):
    rules, tensors = drawn
    with pytest.raises(KeyMapError, match="1 without a rule: 'stray' \\(2, 3\\)$"):
        apply(rules, {**tensors, "stray": torch.zeros(2, 3)})
    needed = sorted(tensors.keys() - {rule.old for rule in rules if isinstance(rule, Drop)})
    if needed:
        lost = data.draw(st.sampled_from(needed))
        with pytest.raises(KeyMapError, match=f"1 missing: '{lost}'$"):
            apply(rules, {name: tensor for name, tensor in tensors.items() if name != lost})


@given(maps())
def test_a_map_back_is_as_strict_as_a_map_forth(drawn):
    rules, tensors = drawn
    with pytest.raises(KeyMapError, match="1 without a rule: 'stray'"):
        invert(rules, {**apply(rules, tensors), "stray": torch.zeros(1)})


def test_what_is_dropped_moves_aside_and_may_be_absent_on_both_ways():
    rules = (Rename("a", "b"), Drop("buffer", "computed"))
    tensors = zeros(a=(1,), buffer=(2,))
    assert list(apply(rules, tensors)) == ["b", "dropped/buffer"]
    assert bits(invert(rules, apply(rules, tensors))) == bits(tensors)
    assert list(apply(rules, zeros(a=(1,)))) == ["b"] and list(invert(rules, zeros(b=(1,)))) == ["a"]


@given(maps())
def test_the_inverse_of_an_inverse_is_the_rule(drawn):
    rules, _ = drawn
    assert tuple(inverse(inverse(rule)) for rule in rules) == rules


@given(maps(), st.data())
def test_one_tensor_is_made_of_no_more_than_its_rule_reads(drawn, data):
    rules, tensors = drawn
    if made := Applied(rules, tensors):
        name = data.draw(st.sampled_from(sorted(made)))
        (rule,) = (rule for rule in present(rules, tensors) if name in writes(rule))
        made.tensors = {old: tensors[old] for old in reads(rule)}  # the others are gone
        assert bits({name: made[name]}) == bits({name: apply(rules, tensors)[name]})


def test_a_split_gives_the_parts_in_order_and_a_fuse_puts_them_back():
    tensors = {"table": torch.arange(6.0)[:, None]}
    rules = (Split("table", ("attention", "mlp")),)
    parts = apply(rules, tensors)
    assert parts["attention"].flatten().tolist() == [0, 1, 2]
    assert parts["mlp"].flatten().tolist() == [3, 4, 5]
    assert invert(rules, parts)["table"].flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_only_a_fuse_copies():
    rules = (Rename("a", "b"), Split("c", ("d", "e"), dim=1), Reshape("f", "g", (2, 3), (6,)))
    tensors = zeros(a=(2,), c=(2, 4), f=(2, 3))
    converted = apply(rules, tensors)
    for old, new in (("a", "b"), ("c", "d"), ("c", "e"), ("f", "g")):
        assert converted[new].untyped_storage().data_ptr() == tensors[old].untyped_storage().data_ptr()


def test_one_rule_needs_no_more_than_the_tensors_it_reads():
    rule = Fuse(("q", "k", "v"), "qkv")
    assert reads(rule) == ("q", "k", "v")
    (qkv,) = convert(rule, *(torch.full((1,), value) for value in (1.0, 2.0, 3.0)))
    assert qkv.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("rule", "tensors", "message"),
    [
        (Split("a", ("b", "c")), zeros(a=(5, 2)), "1 misshapen: 'a' (5, 2) expected 2 equal parts along dim 0"),
        (Split("a", ("b", "c"), dim=1), zeros(a=(4,)), "'a' (4,) expected 2 equal parts along dim 1"),
        (Split("a", ()), zeros(a=(4,)), "'a' (4,) expected 0 equal parts along dim 0"),
        (Fuse(("a", "b"), "c"), zeros(a=(4,), b=(3,)), "1 misshapen: 'a' (4,), 'b' (3,) expected parts of 'c'"),
        (Fuse(("a", "b"), "c"), zeros(a=(), b=()), "'a' (), 'b' () expected parts of 'c'"),
        (Fuse((), "c"), {}, "expected parts of 'c'"),
        (Reshape("a", "b", (2, 3), (6,)), zeros(a=(3, 2)), "1 misshapen: 'a' (3, 2) expected (2, 3)"),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_the_shape_expected(rule, tensors, message):
    with pytest.raises(KeyMapError) as error:
        check((rule,), tensors)
    assert message in str(error.value)


def test_parts_of_two_dtypes_are_refused_since_fusing_would_change_one():
    with pytest.raises(KeyMapError, match="one dtype"):
        apply((Fuse(("a", "b"), "c"),), {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float16)})


def test_a_reshape_that_loses_elements_cannot_be_written():
    with pytest.raises(ValueError, match=r"'a' \(2, 3\) and 'b' \(5,\)"):
        Reshape("a", "b", (2, 3), (5,))


def test_a_tensor_read_or_written_twice_is_named():
    with pytest.raises(KeyMapError, match="1 read by more than one rule: 'a'$"):
        apply((Rename("a", "b"), Rename("a", "c")), zeros(a=()))
    with pytest.raises(KeyMapError, match="1 written by more than one rule: 'c'$"):
        apply((Rename("a", "c"), Rename("b", "c")), zeros(a=(), b=()))


def test_an_error_counts_all_tensors_and_names_the_first_ten():
    with pytest.raises(KeyMapError) as error:
        apply((), {f"layer.{n}": torch.zeros(n) for n in range(25)})
    message = str(error.value)
    assert "25 without a rule: 'layer.0' (0,)" in message
    assert "'layer.9' (9,), ..." in message
    assert "layer.10" not in message
    assert "\n" not in message
