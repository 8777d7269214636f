"""Every kernel against its meaning, kernels/reference.py: in Triton's interpreter on a CPU, compiled on a GPU.

The law of flash attention: a kernel is at most twice as far from float64 as torch in the same dtype. What only moves or
adds is equal bit for bit. All that a kernel should write is NaN before, so that what it leaves out is seen.
"""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from minidit import ops
from minidit.broadcast import PARTS, Broadcast, Pyramid, Window, plan
from minidit.cache import Cache
from minidit.embed import rope_frequencies, rope_table
from minidit.kernels import reference
from minidit.kernels.reference import Rope, Update
from minidit.model import DiT
from minidit.presets import PRESETS

triton = pytest.importorskip("triton")
from minidit.kernels import (  # noqa: E402
    add_updates,
    cross_attention,
    flash,
    launch,
    linear_gelu,
    norm_modulate,
    self_attention,
)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# the interpreter's bfloat16 is wrong (Triton 3.9)
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
HEADS = [72, 64, 80, 96, 128, 16, 24, 32, 8]  # channels of a head
few = settings(max_examples=25 if CUDA else 6)  # the interpreter takes a second for one
dtypes = st.sampled_from(DTYPES)
sizes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40))  # B, T, S
places = st.tuples(st.integers(1, 2), st.integers(1, 128 if CUDA else 20), st.integers(1, 40 if CUDA else 3))
pytestmark = pytest.mark.gpu if CUDA else []


@pytest.fixture(autouse=True, scope="module")
def unwritten_is_nan():
    """Kernels allocate with these."""

    def poisoned(allocate):
        def f(*args, **options):
            out = allocate(*args, **options)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return f

    names = {name: poisoned(getattr(torch, name)) for name in ("empty", "empty_like")}
    poisonous = SimpleNamespace(**{**vars(torch), **names})
    with pytest.MonkeyPatch.context() as patch:
        for module in (add_updates, norm_modulate, self_attention, cross_attention):
            patch.setattr(module, "torch", poisonous)
        yield


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def wide(tree):
    """The same in float64, where tensors are floats."""
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, tuple):
        parts = [wide(part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def obeys(module, *args, **options):
    """The law, for the kernel that a module is named after. args: of the kernel and of its meaning."""
    op = module.__name__.rpartition(".")[2]
    kernel, meaning = getattr(module, op), getattr(reference, op)
    exact = meaning(*wide(args), **options)
    ours, theirs = kernel(*args, **options), meaning(*args, **options)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    error, allowed = ((out.double() - exact).abs().max().item() for out in (ours, theirs))
    assert error <= 2 * allowed + 1e-6 * exact.abs().max().item(), (error, allowed)  # a NaN fails


# the residual


@st.composite
def residuals(draw, most=3):
    """Tokens and updates: with a gate a sample, a gate a frame, or none."""
    (b, t, s), dtype = draw(sizes), draw(dtypes)
    d = draw(st.sampled_from([8, 72, 288, 1152]))
    gates = draw(st.lists(st.sampled_from([None, 1, t]), max_size=most))
    x, *tensors = normal(len(gates) + 1, b, t, s, d, dtype=dtype)
    rows = [None if frames is None else normal(b, frames, 3, d, dtype=dtype)[:, :, 2, None] for frames in gates]
    return x, [Update(a, gate) for a, gate in zip(tensors, rows, strict=True)]


@few
@given(residuals())
def test_updates_are_added_bit_for_bit(drawn):
    x, updates = drawn
    assert torch.equal(add_updates.add_updates(x, *updates), reference.add_updates(x, *updates))


@few
@given(residuals(), st.booleans())
def test_norm_modulate_adds_bit_for_bit_and_norms_by_the_law(drawn, per_frame):
    x, updates = drawn
    b, t, _, d = x.shape
    shift, scale = normal(b, t if per_frame else 1, 2, d, dtype=x.dtype, seed=1)[:, :, :, None].unbind(2)
    total, out = norm_modulate.norm_modulate(x, shift, scale, *updates)
    expected = reference.add_updates(x, *updates)
    assert torch.equal(total, expected)
    exact = reference.norm_modulate(*wide((expected, shift, scale)))[1]
    error, allowed = (
        (z.double() - exact).abs().max() for z in (out, reference.norm_modulate(expected, shift, scale)[1])
    )
    assert error <= 2 * allowed + 1e-5


def test_tokens_of_a_large_mean_keep_their_variance():
    x = normal(1, 1, 4, 72) + 1000
    zero = torch.zeros(1, 1, 1, 72, device=DEVICE)
    exact = reference.norm_modulate(x.double(), zero.double(), zero.double())[1]
    assert (norm_modulate.norm_modulate(x, zero, zero)[1] - exact).abs().max() < 1e-3


def test_tokens_may_lie_anywhere():
    x, a = normal(2, 5, 3, 2, 72).transpose(2, 3)  # (B, T, S, D) = (5, 2, 3, 72)
    shift, scale = normal(2, 5, 1, 1, 72)
    ours = norm_modulate.norm_modulate(x, shift, scale, Update(a, shift))
    theirs = reference.norm_modulate(x, shift, scale, Update(a, shift))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


# attention


def test_a_head_is_cut_into_powers_of_two_that_cover_it():
    assert launch.cut(72) == (64, 16) and launch.cut(64) == (64, 0) and launch.cut(96) == (64, 32)
    for channels in range(1, 257):
        main, tail = launch.cut(channels)
        assert main + tail >= channels and main.bit_count() == 1 and tail.bit_count() <= 1
        assert tail == 0 or main < channels


@few
@given(sizes, st.integers(1, 3), st.sampled_from(HEADS), dtypes, st.booleans())
@example((1, 1, 129), 1, 72, torch.float32, True)  # more than one tile of queries and two of keys
@example((1, 1, 64), 2, 72, torch.float16, False)  # no ragged tile
@example((2, 1, 1), 2, 72, torch.float32, True)
def test_attention_within_a_frame(size, heads, channels, dtype, normed):
    qkv, weights = normal(*size, 3 * heads * channels, dtype=dtype), normal(2, channels, dtype=dtype)
    obeys(self_attention, qkv, heads, tuple(weights) if normed else None, None, "spatial")


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("channels", HEADS)
def test_attention_with_heads_of_many_sizes(channels, dtype):
    """In tiles of every shape: a compiler's mistake may be one of a single shape."""
    weights = tuple(normal(2, channels, dtype=dtype))
    turns = Rope(*(table.to(DEVICE) for table in rope_table(rope_frequencies(channels), 128)))
    for length in (130, 100, 64, 17) if CUDA else (70,):
        qkv, kv = normal(1, 1, length, 3 * channels, dtype=dtype), normal(1, length, 2, 1, channels, dtype=dtype)
        obeys(self_attention, qkv, 1, weights, None, "spatial", bound=reference.score_bound(*weights).item())
        obeys(self_attention, qkv, 1, weights, None, "spatial")
        obeys(self_attention, qkv, 1, None, None, "spatial")
        obeys(cross_attention, normal(1, 1, 130, channels, dtype=dtype), kv, None)
    for frames in (128, 100, 60, 33, 30, 15) if CUDA else (15,):
        qkv, rope = normal(2, frames, 3, 3 * 8 * channels, dtype=dtype), Rope(*(table[:frames] for table in turns))
        obeys(self_attention, qkv, 8, weights, rope, "temporal")
        obeys(self_attention, qkv, 8, None, None, "temporal")
        if channels == 72:  # what else a model may have
            obeys(self_attention, qkv, 8, weights, rope, "temporal", rope_first=True)
            obeys(self_attention, qkv, 8, weights, None, "temporal")
            obeys(self_attention, qkv, 8, None, rope, "temporal")


@few
@given(
    places,
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.sampled_from(HEADS),
    dtypes,
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@example((1, 15, 2), 2, 72, torch.float32, True, False, True)
@example((1, 17, 2), 8, 72, torch.float16, True, True, True)
@example((1, 40, 1), 1, 72, torch.float16, True, False, True)
@example((2, 1, 3), 1, 72, torch.float32, True, False, True)
@example((2, 3, 5), 3, 24, torch.float16, True, False, True)  # 30 heads in all, of which a program takes four
@example((1, 3, 1), 1, 24, torch.float16, False, True, True)  # nothing is turned first
def test_attention_along_the_frames_of_a_place(size, heads, channels, dtype, turned, rope_first, normed):
    assume(dtype != torch.float32 or size[1] <= 64)  # more are left to torch
    qkv, weights = normal(*size, 3 * heads * channels, dtype=dtype), normal(2, channels, dtype=dtype)
    turns = Rope(*(table.to(DEVICE) for table in rope_table(rope_frequencies(channels), size[1])))
    norm = tuple(weights) if normed else None
    obeys(self_attention, qkv, heads, norm, turns if turned else None, "temporal", rope_first=rope_first)


def test_queries_without_a_norm_to_speak_of_have_no_scores():
    """Of 1e20 the square is no float32, so that the norm's factor is zero, and not of the frames that are not there."""
    qkv, weights = normal(1, 5, 1, 3 * 16), tuple(normal(2, 16))
    qkv[..., :16] *= 1e20
    out = self_attention.self_attention(qkv, 1, weights, None, "temporal")
    torch.testing.assert_close(out, reference.self_attention(qkv, 1, weights, None, "temporal"))


def test_frames_that_a_gpu_has_no_room_for_are_left_to_torch(monkeypatch):
    def full(*_, **__):
        raise triton.runtime.errors.OutOfResources(270000, 232448, "shared memory")

    x, args = normal(1, 5, 2, 3 * 16), (1, None, None, "temporal")
    monkeypatch.setattr(self_attention, "_temporal_kernel", {(1,): full})  # two heads are one program
    with ops.using("triton"), pytest.raises(RuntimeError, match="5 frames of 16 channels are too many for this GPU"):
        ops.self_attention(x, *args)
    assert torch.equal(ops.self_attention(x, *args), reference.self_attention(x, *args))


@few
@given(sizes, st.integers(1, 3), st.sampled_from(HEADS), dtypes, st.integers(1, 150), st.data())
@example((1, 2, 70), 1, 72, torch.float32, 128, None)
def test_attention_to_captions_of_many_lengths(size, heads, channels, dtype, length, data):
    b = size[0]
    lengths = st.none() | st.lists(st.integers(1, length), min_size=b, max_size=b)
    drawn = data.draw(lengths) if data else None
    q, kv = normal(*size, heads * channels, dtype=dtype), normal(b, length, 2, heads, channels, dtype=dtype)
    obeys(cross_attention, q, kv, None if drawn is None else torch.tensor(drawn, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("large", [0.1, 1.0, 2.8, 10.0])
def test_a_bound_of_the_scores_changes_nothing(dtype, large):
    """With a weight of 2.8 the bound is just low enough; one of 10 makes the softmax a choice of one key."""
    qkv, weight = normal(1, 1, 150, 3 * 72, dtype=dtype), torch.full((72,), large, device=DEVICE, dtype=dtype)
    qkv[:, :, 5:, :72] = qkv[:, :, 4:5, :72]
    qkv[:, :, 50:, 72:144] = -qkv[:, :, 4:5, :72]  # keys that most queries have the smallest score with
    qkv[:, :, 60, 72:144] = qkv[:, :, 4, :72]  # and the largest
    bound = reference.score_bound(weight, weight).item()
    assert (bound * 1.4427 <= flash.BOUNDS[torch.float32]) == (large < 3)
    q, k = (reference.rms_norm(qkv[..., at : at + 72], weight).double() for at in (0, 72))
    scores = q @ k.mT
    assert scores.abs().max().item() / 72**0.5 == pytest.approx(bound, rel=0.02)
    obeys(self_attention, qkv, 1, (weight, weight), None, "spatial", bound=bound)


def test_a_caption_of_no_tokens_adds_nothing():
    q, kv = normal(2, 1, 3, 16), normal(2, 4, 2, 1, 16)
    out = cross_attention.cross_attention(q, kv, torch.tensor([0, 4], device=DEVICE))
    assert out[0].eq(0).all() and out[1].ne(0).all()


def test_what_lies_behind_the_length_of_a_caption_is_not_looked_at():
    q, kv = normal(1, 1, 3, 16), normal(1, 70, 2, 1, 16)
    lengths = torch.tensor([66], device=DEVICE)
    out = cross_attention.cross_attention(q, kv, lengths)
    kv[:, 66:] = 1e4
    assert torch.equal(cross_attention.cross_attention(q, kv, lengths), out)


def test_packed_projections_may_lie_anywhere():
    qkv, weights = normal(2, 5, 3, 3 * 16).transpose(1, 2), tuple(normal(2, 16))  # T 3, S 5
    obeys(self_attention, qkv, 1, weights, None, "spatial")
    obeys(self_attention, qkv, 1, weights, None, "temporal")


@pytest.mark.skipif(not CUDA, reason="cuBLASLt's epilogue")
@few
@given(st.tuples(st.integers(1, 3), st.integers(1, 70)), st.sampled_from([8, 72, 1152]), st.sampled_from(DTYPES[1:]))
def test_gelu_in_the_epilogue_of_a_linear_layer(shape, channels, dtype):
    x, weight, bias = normal(*shape, channels, dtype=dtype), normal(4 * channels, channels), normal(4 * channels)
    obeys(linear_gelu, x, (weight / channels**0.5).to(dtype), bias.to(dtype))


# the model

BASE = PRESETS["opensora-1.2"]
SMALL = replace(
    BASE,
    depth=1,
    dim=144,
    heads=2,
    caption_dim=8,
    caption_length=70,
    positions=replace(BASE.positions, base=32),
    sampling=replace(BASE.sampling, shift=1.0),
)


def built(dtype):
    torch.manual_seed(0)
    model = DiT(SMALL)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
    return model.to(DEVICE, dtype).requires_grad_(False)


def prepared(model, latent=(3, 4, 5)):
    text, lengths = normal(2, 70, 8, dtype=model.dtype), torch.tensor([66, 3], device=DEVICE)
    fps = torch.full((2,), 8.0, device=DEVICE)
    cond = model.prepare(text, lengths, latent=latent, height=32, width=32, fps=fps)
    return normal(2, SMALL.in_channels, *latent), cond


@pytest.mark.parametrize("dtype", DTYPES if CUDA else [torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_a_model_of_kernels_obeys_the_law_too(dtype, masked):
    mask = torch.tensor([[True, False, True], [True, True, True]], device=DEVICE) if masked else None

    def output(impl, dtype):
        model = built(dtype)
        x, cond = prepared(model)
        with ops.using(impl):
            return model(x, 500.0, cond, frame_mask=mask).double()

    exact, theirs, ours = output("torch", torch.float64), output("torch", dtype), output("triton", dtype)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@pytest.mark.parametrize("dtype", DTYPES if CUDA else [torch.float16])
def test_with_kernels_a_stored_and_then_reused_step_is_bitwise_the_computed_step(dtype):
    model = built(dtype)
    x, cond = prepared(model)
    always = Pyramid(**dict.fromkeys(PARTS, Broadcast(2, Window(-1, 1001))))
    twice = plan(always, [500.0, 500.0], model.sites)
    cache = Cache(twice)
    with ops.using("triton"):
        computed = model(x, 500.0, cond)
        assert computed.equal(model(x, 500.0, cond, twice[0], cache))
        assert computed.equal(model(x, 500.0, cond, twice[1], cache))


# what chooses


def arguments(**options):
    return normal(1, 2, 3, 8, **options), normal(1, 1, 1, 8, **options), normal(1, 1, 1, 8, **options)


def test_without_triton_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ops, "_kernel", ops._kernel.__wrapped__)  # which remembers
    x, *_ = arguments()
    with ops.using("triton"), pytest.raises(RuntimeError, match="add_updates .*: triton is not installed"):
        ops.add_updates(x)


def test_asking_for_triton_computes_by_the_kernel_or_says_why_not():
    x, shift, scale = arguments()
    with ops.using("triton"):
        assert torch.equal(ops.add_updates(x, Update(x, shift)), reference.add_updates(x, Update(x, shift)))
        for wrong, why in (
            (arguments(dtype=torch.float64), "the tensors are torch.float64, not all of float32, float16 or bfloat16"),
            ((x, shift.half(), scale), "the tensors are torch.float16 and torch.float32, not all of"),
            ((x.clone().requires_grad_(), shift, scale), "a gradient is needed, which kernels do not compute"),
        ):
            with pytest.raises(RuntimeError, match=f"norm_modulate cannot be computed by its Triton kernel: {why}"):
                ops.norm_modulate(*wrong)
            with pytest.raises(RuntimeError, match=why):
                norm_modulate.norm_modulate(*wrong)
    qkv = normal(1, 2, 3, 3 * 8)
    for options, axis, why in (
        ({"bias": normal(1, 2, 3)}, "spatial", "scores have a bias"),
        ({}, "spatial", "heads of 2 channels of 4 bytes are no multiples of 16 bytes"),
    ):
        with ops.using("triton"), pytest.raises(RuntimeError, match=why):
            ops.self_attention(qkv, 4, None, None, axis, **options)
    for x, axis, why in (
        (normal(1, 129, 1, 24, dtype=torch.float16), "temporal", "129 frames are more than 128"),
        (normal(1, 65, 1, 24), "temporal", "65 frames are more than 64"),
        (normal(1, 2, 4, 3 * 136), "spatial", "heads have 136 channels, more than 128"),
        (
            normal(1, 2, 4, 3 * 8 + 1).flatten()[1:193].view(1, 2, 4, 24),
            "temporal",
            "begins at no multiple of 16 bytes",
        ),
    ):
        with ops.using("triton"), pytest.raises(RuntimeError, match=why):
            ops.self_attention(x, 1, None, None, axis)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("t, s", [(0, 3), (2, 0)])
def test_a_rank_without_tokens_computes_none(t, s, impl):
    x, gate, qkv, kv, weight = (
        normal(*shape, dtype=torch.float16)
        for shape in ((1, t, s, 16), (1, 1, 1, 16), (1, t, s, 48), (1, 5, 2, 2, 8), (32, 16))
    )
    norm, rope = (weight[0, :8], weight[0, 8:]), Rope(*(part.float() for part in weight[:t, :8].chunk(2, 1)))
    with ops.using(impl):
        assert ops.add_updates(x, Update(x, gate)).shape == x.shape
        assert [out.shape for out in ops.norm_modulate(x, gate, gate)] == 2 * [x.shape]
        assert ops.self_attention(qkv, 2, norm, None, "spatial").shape == x.shape
        assert ops.self_attention(qkv, 2, norm, rope, "temporal").shape == x.shape
        assert ops.cross_attention(x, kv, None).shape == x.shape
        assert ops.linear_gelu(x, weight, weight[:, 0]).shape == (1, t, s, 32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a computer without a GPU")
def test_without_a_gpu_or_the_interpreter_a_kernel_refuses(monkeypatch):
    x, shift, scale = arguments()
    before = ops.norm_modulate(x, shift, scale)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with ops.using("triton"), pytest.raises(RuntimeError, match="norm_modulate cannot .*: the tensors are on cpu, not"):
        ops.norm_modulate(x, shift, scale)
    assert all(torch.equal(*pair) for pair in zip(before, ops.norm_modulate(x, shift, scale), strict=True))


def test_a_gradient_is_computed_by_torch_unless_it_is_not_needed():
    x, shift, scale = arguments()
    weight = torch.nn.Parameter(shift)
    total, out = ops.norm_modulate(x, weight, scale, Update(x, weight))
    (total.sum() + out.sum()).backward()
    assert weight.grad.abs().sum() > 0
    with torch.no_grad(), ops.using("triton"):
        assert torch.equal(ops.add_updates(x, Update(x, weight)), total)


def test_nothing_else_is_asked_for_and_what_was_asked_before_comes_back():
    with pytest.raises(ValueError, match="auto, torch, triton, shapes, not 'fast'"), ops.using("fast"):
        pass
    double = arguments(dtype=torch.float64)
    with ops.using("triton"):
        with ops.using("torch"):
            ops.norm_modulate(*double)
        with pytest.raises(RuntimeError):
            ops.norm_modulate(*double)
    ops.norm_modulate(*double)
