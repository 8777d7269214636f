from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minidit.embed import rope_frequencies, rope_table
from minidit.kernels import reference as ops

small = st.integers(1, 5)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "goldens/intermediates.safetensors")


def attend(q, k, v):
    """The definition, one query at a time, in float64. q: (N, E); k, v: (L, E) -> (N, E)."""
    rows = []
    for query in q.double():
        weight = (k.double() @ query / q.shape[1] ** 0.5).exp()
        rows.append(weight @ v.double() / weight.sum())
    return torch.stack(rows)


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


# norms


@pytest.mark.parametrize("kind", ["", "bf16_"])
def test_rms_norm_is_the_originals_bit_for_bit(golden, kind):
    x, weight, out = (golden[f"rmsnorm/{kind}{name}"] for name in ("x", "weight", "out"))
    assert torch.equal(ops.rms_norm(x, weight), out)


def test_rms_norm_in_bfloat16_rounds_before_the_weight(golden):
    x, weight = golden["rmsnorm/bf16_x"], golden["rmsnorm/bf16_weight"]
    late = ops.rms_norm(x.float(), weight.float()).bfloat16()
    assert not torch.equal(ops.rms_norm(x, weight), late)


@given(small, small, small)
def test_norm_modulate_is_the_formula(b, t, s):
    x, shift, scale = torch.randn(b, t, s, 12), torch.randn(b, t, 1, 12), torch.randn(b, t, 1, 12)
    wide = x.double()
    mean = wide.mean(-1, keepdim=True)
    norm = (wide - mean) / ((wide - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()
    close(ops.norm_modulate(x, shift, scale)[1], norm * (1 + scale.double()) + shift.double())


def test_one_shift_serves_all_frames():
    x, shift, scale = torch.randn(2, 3, 4, 8), torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 8)
    every = [part.expand(2, 3, 1, 8) for part in (shift, scale)]
    assert all(map(torch.equal, ops.norm_modulate(x, shift, scale), ops.norm_modulate(x, *every)))


# residuals: what sublayers add, now or at a later call


@given(small, small, dtypes, st.booleans())
def test_an_update_is_rounded_before_it_is_added(b, t, dtype, gated):
    x, a = torch.randn(2, b, t, 3, 8).to(dtype)
    gate = torch.randn(b, t, 1, 8).to(dtype) if gated else None
    update = (gate.double() * a.double()).to(dtype) if gated else a
    out = ops.add_updates(x, ops.Update(a, gate))
    assert torch.equal(out, (x.double() + update.double()).to(dtype)) and out.dtype == dtype


@given(st.integers(0, 4), dtypes)
def test_many_updates_are_added_as_one_after_the_other(count, dtype):
    x, *tensors = torch.randn(count + 1, 2, 3, 4, 8).to(dtype)
    gate, shift, scale = torch.randn(3, 2, 3, 1, 8).to(dtype)
    updates, out = [ops.Update(a, gate) for a in tensors], x
    for update in updates:
        out = ops.add_updates(out, update)
    assert torch.equal(ops.add_updates(x, *updates), out)
    together, apart = ops.norm_modulate(x, shift, scale, *updates), ops.norm_modulate(out, shift, scale)
    assert all(map(torch.equal, together, apart))


def test_residuals_leave_their_arguments_alone():
    x, a, gate = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 1, 4)
    before = x.clone(), a.clone(), gate.clone()
    ops.norm_modulate(x, gate, gate, ops.Update(a, gate), ops.Update(a, None))
    assert all(map(torch.equal, (x, a, gate), before))


# self-attention


@settings(max_examples=25)
@given(small, small, small, st.sampled_from([1, 3]), st.sampled_from([4, 18]), st.booleans())
def test_self_attention_is_softmax_within_a_frame_or_along_a_place(b, t, s, heads, e, over_time):
    qkv = torch.randn(b, t, s, 3 * heads * e)
    q_weight, k_weight = torch.rand(2, e) + 0.5
    cos, sin = rope_table(rope_frequencies(e), t)
    rope, axis = (ops.Rope(cos, sin), "temporal") if over_time else (None, "spatial")
    out = ops.self_attention(qkv, heads, (q_weight, k_weight), rope, axis)
    q, k, v = rearrange(qkv, "b t s (three h e) -> three b h t s e", three=3, h=heads)
    q, k = ops.rms_norm(q, q_weight), ops.rms_norm(k, k_weight)
    expected = torch.empty(b, heads, t, s, e, dtype=torch.float64)
    for at in torch.cartesian_prod(torch.arange(b), torch.arange(heads)).tolist():
        if over_time:
            for i in range(s):
                line = [x[*at, :, i] for x in (q, k, v)]  # (T, E)
                expected[*at, :, i] = attend(ops.rotate(line[0], cos, sin), ops.rotate(line[1], cos, sin), line[2])
        else:
            for i in range(t):
                expected[*at, i] = attend(q[*at, i], k[*at, i], v[*at, i])
    close(out, rearrange(expected, "b h t s e -> b t s (h e)"))


def test_a_lone_token_attends_to_itself():
    qkv, weight = torch.randn(2, 1, 1, 3 * 8), torch.ones(4)
    for axis in ("spatial", "temporal"):
        torch.testing.assert_close(ops.self_attention(qkv, 2, (weight, weight), None, axis), qkv[..., 16:])


def test_rope_may_come_before_the_norm_and_the_norm_may_be_left_out():
    qkv, weights = torch.randn(1, 5, 2, 3 * 8), torch.rand(2, 4) + 0.5
    rope = ops.Rope(*rope_table(rope_frequencies(4), 5))
    q, k, v = rearrange(qkv, "b t s (three h e) -> three (b s) h t e", three=3, h=2)
    turned = [ops.rms_norm(ops.rotate(x, *rope), weight) for x, weight in zip((q, k), weights, strict=True)]
    back = "(b s) h t e -> b t s (h e)"
    expected = rearrange(F.scaled_dot_product_attention(*turned, v), back, b=1)
    torch.testing.assert_close(ops.self_attention(qkv, 2, tuple(weights), rope, "temporal", rope_first=True), expected)
    bare = rearrange(F.scaled_dot_product_attention(q, k, v), back, b=1)
    torch.testing.assert_close(ops.self_attention(qkv, 2, None, None, "temporal"), bare)


def test_a_place_with_a_bias_of_minus_10000_is_seen_by_none_in_its_frame():
    qkv, bias = torch.randn(2, 3, 4, 3 * 8), torch.zeros(2, 3, 4)
    bias[1, 2, 3] = -10000
    out, free = (ops.self_attention(qkv, 2, None, None, "spatial", bias=b) for b in (bias, None))
    alone = ops.self_attention(qkv[1:, 2:, :3], 2, None, None, "spatial")
    torch.testing.assert_close(out[1, 2, :3], alone[0, 0])
    torch.testing.assert_close(out[0], free[0])
    torch.testing.assert_close(out[1, :2], free[1, :2])


# captions


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_the_caption_mask_is_true_for_the_first_words(lengths):
    mask = ops.caption_mask(torch.tensor(lengths), 6)
    assert mask.tolist() == [[True] * length + [False] * (6 - length) for length in lengths]


def test_the_mask_selects_the_rows_that_the_original_packs(golden):
    rows = golden["pack/y"][:, 0]  # (B, L, C)
    mask = ops.caption_mask(golden["pack/y_lens"], rows.shape[1])
    assert torch.equal(mask, golden["pack/mask"].bool())
    assert torch.equal(rows[mask], golden["pack/packed"][0])


@settings(max_examples=25)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), small, small, st.sampled_from([1, 3]))
def test_every_sample_attends_to_its_own_words_and_no_others(lengths, t, s, heads):
    b, e = len(lengths), 6
    q, kv = torch.randn(b, t, s, heads * e), torch.randn(b, 6, 2, heads, e)
    out = ops.cross_attention(q, kv, torch.tensor(lengths)).view(b, t * s, heads, e)
    for i, length in enumerate(lengths):
        for head in range(heads):
            k, v = kv[i, :length, :, head].unbind(1)
            close(out[i, :, head], attend(q.view(b, t * s, heads, e)[i, :, head], k, v))


def test_no_lengths_are_full_lengths():
    q, kv = torch.randn(2, 3, 4, 12), torch.randn(2, 5, 2, 3, 4)
    torch.testing.assert_close(ops.cross_attention(q, kv, None), ops.cross_attention(q, kv, torch.tensor([5, 5])))
