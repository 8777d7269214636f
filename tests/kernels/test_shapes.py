"""What kernels/shapes.py makes is what an op means, but for the numbers, and what refuses a kernel refuses it."""

import pytest
import torch

from minidit import ops
from minidit.kernels import reference, shapes
from minidit.kernels.reference import Rope, Update
from minidit.tiling import Held

pytest.importorskip("triton")
HEADS, CHANNELS = 2, 8
D = HEADS * CHANNELS


def normal(*shape):
    return torch.randn(shape, device="meta", dtype=torch.bfloat16)


def alike(one, other):
    """Tensors, or tuples of them, of the same shape and dtype."""
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return (one.shape, one.dtype) == (other.shape, other.dtype)


X, ROW = normal(2, 3, 5, D), normal(2, 1, 1, D)
UPDATES = [Update(normal(2, 3, 5, D), ROW), Update(normal(2, 3, 5, D), None)]
NORM = (normal(CHANNELS), normal(CHANNELS))
ROPE = Rope(torch.randn(3, CHANNELS // 2, device="meta"), torch.randn(3, CHANNELS // 2, device="meta"))
QKV = normal(2, 3, 5, 3 * D)
GIVEN = {
    "add_updates": [(X,), (X, *UPDATES)],
    "norm_modulate": [(X, ROW, ROW), (X, ROW, ROW, *UPDATES)],
    "linear_gelu": [(X, normal(4 * D, D), normal(4 * D))],
    "self_attention": [(QKV, HEADS, NORM, None, "spatial"), (QKV, HEADS, None, ROPE, "temporal")],
    "cross_attention": [(X, normal(2, 7, 2, HEADS, CHANNELS), torch.zeros(2, dtype=torch.long, device="meta"))],
}


@pytest.mark.parametrize("op", GIVEN)
def test_what_a_kernel_takes_is_made_by_shapes(op, monkeypatch):
    monkeypatch.setattr(shapes, op, lambda *args, **options: "made")
    with ops.using("shapes"):
        assert all(getattr(ops, op)(*args) == "made" for args in GIVEN[op])


def test_attention_within_frames_holds_normed_keys_beside_its_result():
    peaks = []
    for norm in (None, NORM):
        with Held() as held, ops.using("shapes"):
            ops.self_attention(QKV, HEADS, norm, None, "spatial")
        peaks.append(held.peak)
    result = X.numel() * X.itemsize
    assert peaks == [result, 2 * result]


@pytest.mark.parametrize("op", GIVEN)
def test_what_is_made_has_the_shape_of_what_is_meant(op):
    for args in GIVEN[op]:
        with ops.using("shapes"):
            found = getattr(ops, op)(*args)
        assert alike(found, getattr(reference, op)(*args)) and alike(found, getattr(shapes, op)(*args))


def test_what_a_kernel_does_not_take_is_made_as_torch_makes_it(monkeypatch):
    monkeypatch.setattr(shapes, "self_attention", lambda *args, **options: pytest.fail("taken"))
    monkeypatch.setattr(reference, "self_attention", lambda *args, **options: "torch's")
    with ops.using("shapes"):
        assert ops.self_attention(QKV, HEADS, NORM, None, "spatial", bias=normal(2, 3, 5)) == "torch's"
        assert ops.self_attention(normal(1, 129, 1, 3 * D), HEADS, NORM, ROPE, "temporal") == "torch's"
