"""minidit/cache.py, and the one place in minidit/model.py where reuse happens: what a run keeps and never mixes up.

The models here are a few tokens small and their weights are random, gates too, so that every update is seen in the
output. Equal means equal bit for bit, unless a test says otherwise.
"""

import contextlib
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache as once

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minidit import samplers, sampling
from minidit.broadcast import PARTS, Act, Broadcast, Pyramid, Site, TimestepTable, Window, plan
from minidit.cache import Cache
from minidit.cost import cost
from minidit.kernels import reference
from minidit.model import DiT
from minidit.presets import PRESETS
from strategies import blocks, windows

BASE = PRESETS["opensora-1.2"]
TINY = replace(
    BASE,
    depth=1,
    dim=16,
    heads=2,
    mlp_ratio=2.0,
    in_channels=2,
    out_channels=3,
    caption_dim=6,
    caption_length=4,
    positions=replace(BASE.positions, base=32),
    sampling=replace(BASE.sampling, shift=1.0, guided=2),
)
ALWAYS = Window(-1, 1001)
EVERY_SECOND = Pyramid(**dict.fromkeys(PARTS, Broadcast(2, ALWAYS)))
MIXED = Pyramid(spatial=Broadcast(2, ALWAYS), temporal=Broadcast(3, ALWAYS), cross=Broadcast(4, ALWAYS, blocks=(1,)))
LATE = Pyramid(temporal=Broadcast(4, Window(0, 450)), mlp=Broadcast(2, Window(0, 700)))  # nothing is stored in call 0


def built(config, dtype=torch.float32):
    """A model with random weights, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model.to(dtype).requires_grad_(False)


model_of = once(built)


@dataclass(frozen=True)
class Run:
    """All that a video depends on, beside the model."""

    pyramid: Pyramid | None = MIXED
    steps: int = 6
    batch: int = 1
    latent: tuple[int, int, int] = (2, 3, 4)  # T, H, W
    lengths: tuple[int, ...] | None = None  # of the captions
    guidance: float = 1.0
    two_calls: bool = False

    @property
    def sampler(self):
        return samplers.RectifiedFlow(self.steps, 1.0, "velocity")

    def plan(self, model):
        return plan(self.pyramid, samplers.seen(self.sampler.timesteps, model.dtype), model.sites)

    def tensors(self, config):
        """Noise, captions, and their lengths."""
        generator = torch.Generator().manual_seed(1)
        z = torch.randn(self.batch, config.in_channels, *self.latent, generator=generator)
        text = torch.randn(self.batch, config.caption_length, config.caption_dim, generator=generator)
        return z, text, None if self.lengths is None else torch.tensor(self.lengths)


def video(model, run, on_step=None):
    """The latents that sampling.sample makes of a run."""
    z, text, lengths = run.tensors(model.config)
    return sampling.sample(
        model,
        z,
        text.to(model.dtype),
        lengths,
        plan=run.plan(model),
        sampler=run.sampler,
        guidance=run.guidance,
        two_calls=run.two_calls,
        on_step=on_step,
        height=32,
        width=32,
        fps=8,
    )


def prepared(model, run):
    """Noise and conditioning for single calls of the model, without guidance."""
    z, text, lengths = run.tensors(model.config)
    fps = torch.full((run.batch,), 8.0)
    return z, model.prepare(text.to(model.dtype), lengths, latent=run.latent, height=32, width=32, fps=fps)


kept = []  # weak references to every update that a Watched cache was given


class Watched(Cache):
    """A cache that knows how much it held at most in the last call, and remembers in `kept` what it was given."""

    def begin(self, call, sites, x):
        super().begin(call, sites, x)
        self.most = self.nbytes

    def keep(self, site, update):
        super().keep(site, update)
        self.most = max(self.most, self.nbytes)
        kept.append(weakref.ref(update.a))


def alive():
    return sum(update() is not None for update in kept)


pyramids = st.builds(
    Pyramid,
    **{part: st.none() | st.builds(Broadcast, st.integers(1, 4), st.just(ALWAYS) | windows, blocks) for part in PARTS},
)


@st.composite
def runs(draw, guidance=(1.0,)):
    batch = draw(st.integers(1, 2))
    lengths = st.tuples(*[st.integers(1, TINY.caption_length)] * batch)
    return Run(
        pyramid=draw(pyramids),
        steps=draw(st.integers(1, 6)),
        batch=batch,
        latent=draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))),
        lengths=draw(st.none() | lengths),
        guidance=draw(st.sampled_from(guidance)),
        two_calls=draw(st.booleans()),
    )


# A kept update is the update.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stored_and_then_reused_step_is_bitwise_the_computed_step_on_the_same_input(dtype):
    model = model_of(TINY, dtype)
    x, cond = prepared(model, Run())
    twice = plan(EVERY_SECOND, [500.0, 500.0], model.sites)
    cache = Cache(twice)
    computed = model(x, 500.0, cond)
    assert computed.equal(model(x, 500.0, cond, twice[0], cache))
    assert computed.equal(model(x, 500.0, cond, twice[1], cache))


def tokens(layer, model, *call):
    """The tokens that reach a layer in one call of the model, with all that is to be added to them."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(reference.add_updates(inputs[0], *inputs[1])))
    model(*call)
    hook.remove()
    return seen[0]


def test_a_call_that_reuses_everything_adds_the_kept_updates_to_its_own_tokens_and_computes_no_sublayer():
    model = model_of(TINY)
    x, cond = prepared(model, Run())
    table = plan(EVERY_SECOND, [800.0, 400.0], model.sites)
    cache = Cache(table)
    model(x, 800.0, cond, table[0], cache)
    updates = [cache.take(site, last=False) for site in model.sites]
    other = x.flip(0, 2, 3)
    with sublayers_counted(model) as computed:
        last = tokens(model.final, model, other, 400.0, cond, table[1], cache)
    assert not computed
    first = tokens(model.sublayers[0], model, other, 400.0, cond)
    assert last.equal(reference.add_updates(first, *updates))


@pytest.mark.parametrize("site", TINY.sites)
def test_a_changed_update_changes_the_reusing_call_by_the_change(site):
    model = model_of(TINY)
    x, cond = prepared(model, Run())
    table = plan(EVERY_SECOND, [800.0, 400.0], model.sites)
    clean, poisoned = Cache(table), Cache(table)
    for cache in (clean, poisoned):
        model(x, 800.0, cond, table[0], cache)
    poison = torch.randn(2, generator=torch.Generator().manual_seed(2))[0]
    update = poisoned.take(site, last=False)
    update.a.add_(poison)
    ends = [tokens(model.final, model, x, 400.0, cond, table[1], cache) for cache in (poisoned, clean)]
    change = ends[0] - ends[1]
    expected = poison if update.gate is None else poison * update.gate
    torch.testing.assert_close(change, expected.expand_as(change), atol=1e-5, rtol=0)


def test_broadcast_is_seen_in_these_models_videos():
    plain, fast = video(model_of(TINY), Run(pyramid=None)), video(model_of(TINY), Run(pyramid=MIXED))
    assert (fast - plain).abs().max() > 0.1 * plain.abs().max()


@pytest.mark.parametrize("two_calls", [False, True])
@pytest.mark.parametrize(
    "nothing",
    [
        Pyramid(),
        Pyramid(**dict.fromkeys(PARTS, Broadcast(1, ALWAYS))),
        Pyramid(**dict.fromkeys(PARTS, Broadcast(3, Window(500, 500)))),
        Pyramid(**dict.fromkeys(PARTS, Broadcast(3, ALWAYS, blocks=()))),
        Pyramid(**dict.fromkeys(PARTS, TimestepTable((501,), skip=3))),
    ],
    ids=["no rule", "every 1", "empty window", "no block", "no start"],
)
def test_a_pyramid_that_reuses_nothing_makes_bitwise_the_video_of_none(nothing, two_calls):
    run = Run(pyramid=None, guidance=3.0, two_calls=two_calls)
    assert video(model_of(TINY), replace(run, pyramid=nothing)).equal(video(model_of(TINY), run))


def test_a_run_of_the_model_without_call_and_cache_is_the_run_of_a_plan_without_reuse():
    model = model_of(TINY)
    x, cond = prepared(model, Run())
    table = plan(None, [500.0], model.sites)
    assert model(x, 500.0, cond).equal(model(x, 500.0, cond, table[0], Cache(table)))


# What is held, and how long.


@torch.inference_mode()
@settings(max_examples=100)
@given(runs())
def test_bytes_held_are_the_plans_prediction_in_and_after_every_call(run):
    model = model_of(TINY)
    x, cond = prepared(model, run)
    size = {"batch": run.batch, "latent": run.latent, "caption_length": TINY.caption_length}
    update = cost(TINY, **size, itemsize=model.dtype.itemsize).update_bytes
    table = run.plan(model)
    cache, peak = Watched(table), 0
    for call, (most, after) in zip(table, table.held(), strict=True):
        model(x, call.timestep, cond, call, cache)
        assert cache.most == most * update
        assert cache.nbytes == after * update
        peak = max(peak, most * update)
        assert cache.peak_bytes == peak
    assert cache.nbytes == 0


def test_in_bfloat16_they_are_half():
    one, half = (cost(TINY, batch=1, latent=(2, 3, 4), caption_length=4, itemsize=n).update_bytes for n in (4, 2))
    model = model_of(TINY, torch.bfloat16)
    x, cond = prepared(model, Run())
    table = plan(EVERY_SECOND, [800.0, 400.0], model.sites)
    cache = Cache(table)
    model(x, 800.0, cond, table[0], cache)
    assert cache.nbytes == len(model.sites) * half == len(model.sites) * one // 2


@torch.inference_mode()
@settings(max_examples=50)
@given(runs())
def test_each_update_is_freed_in_the_call_of_its_last_reuse(run):
    model = model_of(TINY)
    x, cond = prepared(model, run)
    table = run.plan(model)
    kept.clear()
    cache = Watched(table)
    for call, (_, after) in zip(table, table.held(), strict=True):
        model(x, call.timestep, cond, call, cache)
        assert alive() == after


@pytest.mark.parametrize("two_calls", [False, True])
def test_sample_tells_on_step_the_bytes_of_all_its_caches(two_calls):
    model, told = model_of(TINY), []
    run = Run(guidance=3.0, two_calls=two_calls)
    video(model, run, told.append)
    # of both halves, in one cache or two
    update = cost(TINY, batch=2, latent=run.latent, caption_length=TINY.caption_length, itemsize=4).update_bytes
    held = run.plan(model).held()
    assert [step.cache_bytes for step in told] == [after * update for _, after in held]
    assert told[-1].peak_bytes == max(most for most, _ in held) * update
    assert [(step.call.index, step.steps) for step in told] == [(i, 6) for i in range(6)]


@pytest.mark.parametrize("two_calls", [False, True])
@pytest.mark.parametrize("interrupted", range(6))
def test_ctrl_c_in_on_step_leaves_no_update_behind(monkeypatch, interrupted, two_calls):
    monkeypatch.setattr(sampling, "Cache", Watched)
    kept.clear()

    def on_step(step):
        if step.call.index == interrupted:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        video(model_of(TINY), Run(guidance=3.0, two_calls=two_calls), on_step)
    assert kept
    assert alive() == 0


# What was planned is what is done: sublayers and operations, counted while a whole run goes on.


@contextlib.contextmanager
def sublayers_counted(model):
    """Counts the sites whose sublayer is run."""
    counts = Counter()
    with contextlib.ExitStack() as stack:
        for site, sublayer in zip(model.sites, model.sublayers, strict=True):
            hook = sublayer.register_forward_hook(lambda *_, site=site: counts.update([site]))
            stack.callback(hook.remove)
        yield counts


@settings(max_examples=50)
@given(runs(guidance=(1.0, 3.0)))
def test_a_run_computes_each_site_as_often_as_its_plan_says(run):
    model = model_of(TINY)
    table = run.plan(model)
    with sublayers_counted(model) as counts:
        video(model, run)
    halves = 2 if run.two_calls and run.guidance != 1 else 1
    for column, site in enumerate(model.sites):
        assert counts[site] == halves * sum(row[column] is not Act.REUSE for row in table.acts)


@st.composite
def models_and_runs(draw):
    """Models of all small and odd shapes, and a run of them."""
    dim, heads = draw(st.sampled_from([(4, 1), (4, 2), (8, 2), (12, 2), (12, 3), (16, 4)]))
    channels = draw(st.integers(1, 3))
    config = replace(
        TINY,
        depth=draw(st.integers(1, 2)),
        dim=dim,
        heads=heads,
        mlp_ratio=draw(st.sampled_from([0.3, 1.0, 2.5, 4.0])),
        patch=(1, draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        in_channels=channels,
        out_channels=channels + draw(st.integers(0, 2)),
        caption_dim=draw(st.integers(1, 9)),
        sampling=replace(TINY.sampling, guided=channels),
    )
    return config, draw(runs(guidance=(1.0, 3.0)))


@settings(max_examples=20)
@given(models_and_runs())
def test_a_runs_operations_are_the_plans_to_the_last_one(model_and_run):
    config, run = model_and_run
    model = built(config)
    batch = run.batch * (1 if run.guidance == 1 else 2)
    longest = max(run.lengths) if run.lengths else config.caption_length
    price = cost(config, batch=batch, latent=run.latent, caption_length=longest, itemsize=4)
    # attention as two matrix products, since PyTorch does not count the CPU's own kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        video(model, run)
    assert counter.get_total_flops() == run.plan(model).flops(price.parts, price.rest) + price.prepare


# The halves of guidance have different updates.


@settings(max_examples=50)
@given(runs(guidance=(3.0,)))
def test_guidance_in_two_calls_a_step_is_guidance_in_one_batch(run):
    one, two = (video(model_of(TINY), replace(run, two_calls=two_calls)) for two_calls in (False, True))
    torch.testing.assert_close(two, one, atol=1e-5 * float(one.abs().max()), rtol=0)


def test_each_half_keeps_updates_of_its_own(monkeypatch):
    caches = []
    monkeypatch.setattr(sampling, "Cache", lambda plan: caches.append(Cache(plan)) or caches[-1])
    model, different = model_of(TINY), []

    def on_step(step):
        cond, uncond = ([cache.take(site, last=False) for site in model.sites] for cache in caches)
        different.append([not one.a.equal(other.a) for one, other in zip(cond, uncond, strict=True)])
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        video(model, Run(pyramid=EVERY_SECOND, guidance=3.0, two_calls=True), on_step)
    # the first block's attention within a frame comes before any caption is read
    assert different == [[site != Site(0, "spatial") for site in model.sites]]


# The attention hooks of diffusers (58eb52c, pyramid_attention_broadcast.py) keep one state for both: there, the second
# half gets the attention of the first, and guidance does nothing in a step that reuses.
def test_in_a_call_that_reuses_everything_the_halves_are_as_different_as_in_the_one_that_stored():
    model = model_of(TINY)
    x, text, _ = Run().tensors(TINY)
    table = plan(EVERY_SECOND, [500.0, 500.0], model.sites)
    size = {"latent": (2, 3, 4), "height": 32, "width": 32, "fps": torch.tensor([8.0])}
    halves = [(model.prepare(words, None, **size), Cache(table)) for words in (text, model.null_caption[None])]
    stored, reused = ([model(x, 500.0, cond, call, cache) for cond, cache in halves] for call in table)
    assert (stored[0] - stored[1]).abs().max() > 0.01
    assert (reused[0] - reused[1]).equal(stored[0] - stored[1])


def test_one_cache_for_both_halves_is_refused():
    model = model_of(TINY)
    x, cond = prepared(model, Run())
    table = plan(EVERY_SECOND, [800.0, 600.0, 400.0], model.sites)
    cache = Cache(table)
    with pytest.raises(ValueError, match="call 1 came where call 2 of the plan was due"):
        for call in table:
            for _ in ("cond", "uncond"):
                model(x, call.timestep, cond, call, cache)


# What does not belong to the run is refused, and the run goes on as if nothing had been.

OTHER = Run(batch=2, latent=(1, 5, 4))


def skipped(model, table, x, cond, cache):
    return model(x, table[4].timestep, cond, table[4], cache)


def repeated(model, table, x, cond, cache):
    return model(x, table[2].timestep, cond, table[2], cache)


def of_another_plan(model, table, x, cond, cache):
    call = replace(table[3], acts=(Act.COMPUTE,) * len(model.sites), last=(False,) * len(model.sites))
    return model(x, call.timestep, cond, call, cache)


def first_of_another_plan(model, table, x, cond, cache):
    call = plan(None, table.timesteps, model.sites)[0]
    return model(x, call.timestep, cond, call, cache)


def of_another_model(model, table, x, cond, cache):
    other = model_of(replace(TINY, depth=2))
    _, cond = prepared(other, Run())
    return other(x, table[3].timestep, cond, table[3], cache)


def of_another_batch(model, table, x, cond, cache):
    x, cond = prepared(model, Run(batch=2))
    return model(x, table[3].timestep, cond, table[3], cache)


def of_another_size(model, table, x, cond, cache):
    x, cond = prepared(model, Run(latent=(3, 3, 4)))
    return model(x, table[3].timestep, cond, table[3], cache)


def of_another_dtype(model, table, x, cond, cache):
    other = model_of(TINY, torch.float64)
    _, cond = prepared(other, Run())
    return other(x, table[3].timestep, cond, table[3], cache)


def at_a_time_that_was_not_planned(model, table, x, cond, cache):
    return model(x, table[3].timestep + 1, cond, table[3], cache)


def at_a_time_that_is_a_tensor(model, table, x, cond, cache):
    return model(x, torch.tensor([table[3].timestep]), cond, table[3], cache)


def without_the_cache(model, table, x, cond, cache):
    return model(x, table[3].timestep, cond, table[3])


def without_the_call(model, table, x, cond, cache):
    return model(x, table[3].timestep, cond, cache=cache)


def of_a_size_that_was_not_prepared(model, table, x, cond, cache):
    return model(x[..., :2], table[3].timestep, cond, table[3], cache)


REFUSED = {
    skipped: "call 4 came where call 3 of the plan was due",
    repeated: "call 2 came where call 3 of the plan was due",
    of_another_plan: "call 3 is of another plan than this cache",
    first_of_another_plan: "call 0 is of another plan than this cache",
    of_another_model: "this cache's plan is for a model of 6 sites, this one has 12",
    of_another_batch: r"the run began with tokens \(torch.Size\(\[1, 2, .* call 3 has \(torch.Size\(\[2, 2",
    of_another_size: r"the run began with tokens \(torch.Size\(\[1, 2, .* call 3 has \(torch.Size\(\[1, 3",
    of_another_dtype: "the run began with tokens .*float32.*, call 3 has .*float64",
    at_a_time_that_was_not_planned: "call 3 was planned for the number t=500.0, got 501.0",
    at_a_time_that_is_a_tensor: r"call 3 was planned for the number t=500.0, got tensor\(\[500.\]\)",
    without_the_cache: "a call of a plan and the run's cache go together",
    without_the_call: "a call of a plan and the run's cache go together",
    of_a_size_that_was_not_prepared: r"latents of size \(2, 3, 2\), but prepared for \(2, 3, 4\)",
}


@pytest.mark.parametrize("refused", REFUSED)
def test_a_call_is_refused_and_the_run_goes_on(refused):
    model = model_of(TINY)
    x, cond = prepared(model, Run())
    table = Run().plan(model)
    cache, undisturbed = Cache(table), Cache(table)
    for call in table:
        if call.index == 3:
            with pytest.raises(ValueError, match=REFUSED[refused]):
                refused(model, table, x, cond, cache)
        output = model(x, call.timestep, cond, call, cache)
        assert output.equal(model(x, call.timestep, cond, call, undisturbed))
        assert cache.nbytes == undisturbed.nbytes


def test_a_call_after_the_plans_last_is_refused():
    model = model_of(TINY)
    x, cond = prepared(model, Run())
    short, long = (plan(EVERY_SECOND, [800.0, 600.0, 400.0][:n], model.sites) for n in (2, 3))
    cache = Cache(short)
    for call in short:
        model(x, call.timestep, cond, call, cache)
    with pytest.raises(ValueError, match="call 2 is of another plan"):
        model(x, 400.0, cond, long[2], cache)


def test_a_run_of_other_times_than_the_plans_is_refused():
    model, run = model_of(TINY), Run()
    z, text, _ = run.tensors(TINY)
    args = {"guidance": 1.0, "height": 32, "width": 32, "fps": 8}
    with pytest.raises(ValueError, match="the plan's 6 timesteps are not the run's 5"):
        sampling.sample(model, z, text, plan=run.plan(model), sampler=replace(run, steps=5).sampler, **args)


def test_so_is_one_of_times_that_the_models_dtype_rounds_otherwise():
    run = Run(steps=7)
    fine, rounded = model_of(TINY), model_of(TINY, torch.bfloat16)
    z, text, _ = run.tensors(TINY)
    args = {"sampler": run.sampler, "guidance": 1.0, "height": 32, "width": 32, "fps": 8}
    with pytest.raises(ValueError, match="timesteps are not the run's .* as the model sees them"):
        sampling.sample(rounded, z, text.bfloat16(), plan=run.plan(fine), **args)


def test_and_one_of_a_plan_for_another_model():
    run = Run()
    z, text, _ = run.tensors(TINY)
    args = {"sampler": run.sampler, "guidance": 1.0, "height": 32, "width": 32, "fps": 8}
    with pytest.raises(ValueError, match="plan is for a model of 12 sites, this one has 6"):
        sampling.sample(model_of(TINY), z, text, plan=run.plan(model_of(replace(TINY, depth=2))), **args)


def test_after_a_call_that_broke_off_half_way_the_next_is_refused_and_a_new_run_is_as_any_other():
    model = model_of(TINY)
    x, cond = prepared(model, Run())
    table = Run().plan(model)
    cache, fresh = Cache(table), Cache(table)
    for call in table[0], table[1]:
        model(x, call.timestep, cond, call, cache)

    def broken(*_):
        raise MemoryError

    with contextlib.ExitStack() as stack, pytest.raises(MemoryError):
        stack.callback(model.sublayers[0].register_forward_pre_hook(broken).remove)
        model(x, table[2].timestep, cond, table[2], cache)
    with pytest.raises(ValueError, match="call 2 broke off half way: begin a new run"):
        model(x, table[3].timestep, cond, table[3], cache)
    for call in table:
        output = model(x, call.timestep, cond, call, cache)
        assert output.equal(model(x, call.timestep, cond, call, fresh))
    assert cache.nbytes == 0


# Any runs, one after the other, in any state that the one before left.


class RunsInARow(RuleBasedStateMachine):
    """One model and one cache for each plan and guidance half, used by every run that is of that plan.

    Runs begin, go on a few steps, are abandoned where they are, and finish; in between, calls that do not belong are
    refused. A finished run must be the run that sampling.sample makes with fresh caches and a model that never ran.
    """

    fresh = {}  # videos of fresh runs, as they cannot change

    def __init__(self):
        super().__init__()
        self.model, self.caches, self.run = built(TINY), {}, None

    @rule(
        pyramid=st.sampled_from([None, EVERY_SECOND, MIXED, LATE]),
        steps=st.sampled_from([4, 6]),
        batch=st.integers(1, 2),
        latent=st.sampled_from([(2, 3, 4), (1, 4, 4)]),
        guidance=st.sampled_from([1.0, 3.0]),
        two_calls=st.booleans(),
    )
    def begin(self, **settings):
        """Abandons the run before, if there is one."""
        self.run = Run(**settings)
        self.table, self.call = self.run.plan(self.model), 0
        self.z, text, _ = self.run.tensors(TINY)
        texts = [text] if self.run.guidance == 1 else [text, self.model.null_caption.expand_as(text)]
        batches = texts if self.run.two_calls else [torch.cat(texts)]
        self.copies = len(texts) // len(batches)
        batch, latent = self.copies * self.run.batch, self.run.latent
        self.update_bytes = cost(TINY, batch=batch, latent=latent, caption_length=4, itemsize=4).update_bytes
        fps = torch.full((batch,), 8.0)
        size = {"latent": latent, "height": 32, "width": 32, "fps": fps}
        # the second half of two calls has its own caches; all other calls share them
        self.halves = [
            (self.model.prepare(words, None, **size), self.caches.setdefault((self.table, half), Cache(self.table)))
            for half, words in enumerate(batches)
        ]

    @precondition(lambda self: self.run)
    @rule()
    def step(self):
        call, many = self.table[self.call], self.z.repeat(self.copies, 1, 1, 1, 1)
        outputs = [self.model(many, call.timestep, cond, call, cache) for cond, cache in self.halves]
        t, then = ([*self.run.sampler.timesteps, 0.0][self.call + i] for i in (0, 1))
        halves = torch.cat(outputs).split(self.run.batch)
        guided = TINY.sampling.guided
        output = halves[0] if self.run.guidance == 1 else sampling.guide(*halves, self.run.guidance, guided)
        self.z = self.z + samplers.velocity(output, self.z, t, "velocity") * ((t - then) / 1000)
        held = self.table.held()[self.call][1] * self.update_bytes
        assert [cache.nbytes for _, cache in self.halves] == [held] * len(self.halves)
        self.call += 1
        if self.call == len(self.table):
            self.end()

    @precondition(lambda self: self.run)
    @rule()
    def finish(self):
        while self.run:
            self.step()

    def end(self):
        if self.run not in self.fresh:
            self.fresh[self.run] = video(model_of(TINY), self.run)
        assert self.z.equal(self.fresh[self.run])
        peak = max(most for most, _ in self.table.held()) * self.update_bytes
        assert [cache.peak_bytes for _, cache in self.halves] == [peak] * len(self.halves)
        self.run = None

    @precondition(lambda self: self.run and self.call > 0)
    @rule(index=st.integers(1, 5), two=st.booleans())
    def refused(self, index, two):
        """A call out of order, or in order but of tokens that are not the run's."""
        cond, cache = self.halves[0]
        if index >= len(self.table) or (index == self.call and two == (self.run.batch * self.copies == 2)):
            return
        x, cond = prepared(self.model, replace(self.run, batch=2 if two else 1))
        call = self.table[index]
        with pytest.raises(ValueError, match="was due|the run began with"):
            self.model(x, call.timestep, cond, call, cache)

    @rule()
    def clear(self):
        """Forgetting is only for those that are not running."""
        for cache in self.caches.values():
            if not self.run or all(cache is not running for _, running in self.halves):
                cache.clear()
                assert cache.nbytes == 0


TestRunsInARow = RunsInARow.TestCase
TestRunsInARow.settings = settings(max_examples=60, stateful_step_count=25)
