from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidit import pipeline
from minidit.broadcast import PAB_246, plan
from minidit.model import DiT
from minidit.presets import PRESETS
from minidit.samplers import IDDPM, Diffusers, EulerAncestral, RectifiedFlow, seen
from minidit.sampling import guide, sample

TINY = replace(PRESETS["opensora-1.2"], depth=1, dim=16, heads=2, mlp_ratio=2.0, caption_dim=8, caption_length=6)
SAMPLER = RectifiedFlow(8, 3.0, "velocity")
SIZE = {"height": 64, "width": 64, "fps": 8.0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DiT(TINY).eval().requires_grad_(False)


# guidance


def test_guidance_goes_on_from_the_null_caption_through_the_caption():
    cond, uncond = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    assert [guide(cond, uncond, g, 1).item() for g in (0, 1, 2, 7)] == [1, 3, 5, 15]


@given(st.integers(0, 8), st.floats(-10, 10))
def test_guidance_moves_the_first_channels_and_leaves_the_others_as_with_the_caption(channels, guidance):
    cond, uncond = torch.randn(2, 2, 8, 1, 2, 2)
    guided = guide(cond, uncond, guidance, channels)
    assert torch.equal(guided[:, channels:], cond[:, channels:])
    assert torch.equal(guided[:, :channels], (uncond + guidance * (cond - uncond))[:, :channels])


# noise


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_seed_makes_one_noise(seed, shape):
    state = torch.random.get_rng_state()
    first = pipeline.noise(shape, seed)
    torch.rand(1)
    assert torch.equal(pipeline.noise(shape, seed), first) and first.shape == tuple(shape)
    torch.random.set_rng_state(state)


def test_drawing_noise_leaves_the_callers_random_numbers_alone():
    state = torch.random.get_rng_state()
    pipeline.noise((4, 4), 1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_seeds_differ_and_the_noise_is_normal():
    one, other = pipeline.noise((10000,), 1), pipeline.noise((10000,), 2)
    assert not torch.isclose(one, other).all() and abs(torch.stack((one, other)).std().item() - 1) < 0.02


# whole runs of a small model


def run(model, *, plan_=None, sampler=SAMPLER, guidance=4.0, batch=2, **settings):
    z = torch.stack([pipeline.noise((4, 3, 4, 6), seed) for seed in range(batch)])
    text = torch.stack([pipeline.noise((5, 8), 100 + seed) for seed in range(batch)])
    plan_ = plan_ or plan(PAB_246, seen(sampler.timesteps, model.dtype), model.sites)
    lengths = torch.tensor([3, 5][:batch])
    return sample(model, z, text, lengths, plan=plan_, sampler=sampler, guidance=guidance, **SIZE, **settings)


def batches(model, run_):
    """The sizes of the batches that the model is called with."""
    seen_ = []
    hook = model.register_forward_pre_hook(lambda module, args: seen_.append(len(args[0])))
    try:
        run_()
    finally:
        hook.remove()
    return seen_


def test_a_run_is_the_same_every_time(model):
    assert torch.equal(run(model), run(model))


def test_a_video_is_the_same_in_every_batch(model):
    torch.testing.assert_close(run(model, batch=1), run(model)[:1], rtol=0, atol=1e-4)


def test_on_step_is_called_once_a_step_in_order(model):
    steps = []
    run(model, on_step=steps.append)
    assert [step.call.index for step in steps] == list(range(8))
    assert [step.call.timestep for step in steps] == seen(SAMPLER.timesteps, torch.float32)
    assert {step.steps for step in steps} == {8}
    peaks = [step.peak_bytes for step in steps]
    assert peaks == sorted(peaks) and all(step.cache_bytes <= step.peak_bytes for step in steps)
    assert peaks[-1] > 0 and steps[-1].cache_bytes == 0


def test_guidance_runs_every_caption_beside_the_null_caption(model):
    assert batches(model, lambda: run(model)) == [4] * 8


def test_two_calls_a_step_are_one_call_of_both_halves(model):
    torch.testing.assert_close(run(model, two_calls=True), run(model), rtol=0, atol=1e-4)
    assert batches(model, lambda: run(model, two_calls=True)) == [2] * 16


def test_guidance_1_runs_the_captions_alone(model):
    assert batches(model, lambda: run(model, guidance=1)) == [2] * 8
    torch.testing.assert_close(run(model, guidance=1), run(model, guidance=1 + 1e-7), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("row", "guidance", "same"), [(0, 4.0, False), (5, 4.0, True), (0, 1, True)])
def test_the_null_caption_is_cut_to_the_captions_length(model, row, guidance, same):
    other = deepcopy(model)
    other.null_caption[row] += 1
    assert torch.equal(run(other, guidance=guidance), run(model, guidance=guidance)) == same


def test_a_null_caption_can_be_given_and_is_cut_as_the_learned_one_is(model):
    learned = model.null_caption.detach()
    assert torch.equal(run(model, null=learned), run(model))
    assert torch.equal(run(model, null=learned[:5]), run(model))
    assert not torch.isclose(run(model, null=learned + 1), run(model)).all()


def test_a_null_caption_shorter_than_the_captions_is_refused(model):
    with pytest.raises(ValueError, match="the null caption has 1 tokens, fewer than the captions' 5: pad it"):
        run(model, null=torch.zeros(1, 8))


def test_guidance_without_captions_is_refused(model):
    table = plan(None, seen(SAMPLER.timesteps, model.dtype), model.sites)
    with pytest.raises(ValueError, match="a guidance other than 1 needs captions or classes to guide to"):
        sample(model, torch.randn(1, 4, 3, 4, 6), None, plan=table, sampler=SAMPLER, guidance=2.0, **SIZE)


SAMPLERS = [IDDPM(6, torch.float32), IDDPM(6, torch.float64, ddim=True), EulerAncestral(6)]
SAMPLERS += [Diffusers("ddim", 6), Diffusers("ddim-offset", 6), Diffusers("pndm", 6)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_every_sampler_runs_a_model_by_a_plan_with_a_row_for_each_call(model, sampler):
    steps, generator = [], torch.Generator()

    def result(**settings):
        generator.manual_seed(0)
        noise = lambda z: torch.randn(z.shape, generator=generator)  # noqa: E731
        return run(model, sampler=sampler, noise=noise, on_step=steps.append, **settings)

    out = result()
    assert [step.call.timestep for step in steps] == list(sampler.timesteps)
    assert out.shape == (2, 4, 3, 4, 6) and out.isfinite().all() and steps[-1].cache_bytes == 0
    assert max(step.peak_bytes for step in steps) > 0
    torch.testing.assert_close(result(two_calls=True), out, rtol=1e-3, atol=1e-3 * float(out.abs().max()))


@pytest.mark.parametrize("guided", [1, 3])
def test_a_run_guides_the_channels_that_the_models_sampling_says(model, guided):
    other = DiT(replace(TINY, sampling=replace(TINY.sampling, guided=guided))).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    one_step = RectifiedFlow(1, 1.0, "velocity")
    some, every = run(other, sampler=one_step), run(model, sampler=one_step)
    none = run(model, sampler=one_step, guidance=1)
    torch.testing.assert_close(some[:, :guided], every[:, :guided])
    torch.testing.assert_close(some[:, guided:], none[:, guided:], rtol=0, atol=1e-4)


def test_a_plan_of_other_times_is_refused(model):
    other = plan(PAB_246, seen(replace(SAMPLER, shift=1.0).timesteps, model.dtype), model.sites)
    with pytest.raises(ValueError, match=r"make the plan with planned\(sampler, model.config, model.dtype\)"):
        run(model, plan_=other)


def test_a_plan_of_the_times_of_another_dtype_is_refused(model):
    other = plan(PAB_246, seen(SAMPLER.timesteps, torch.bfloat16), model.sites)
    with pytest.raises(ValueError, match="the plan's 8 timesteps are not the run's 8 as the model sees them"):
        run(model, plan_=other)


def test_a_plan_for_another_model_is_refused(model):
    other = plan(PAB_246, seen(SAMPLER.timesteps, model.dtype), replace(TINY, depth=2).sites)
    with pytest.raises(ValueError, match="a model of 12 sites, this one has 6"):
        run(model, plan_=other)


@settings(max_examples=10)
@given(st.lists(st.sampled_from([0.0, 0.7, 1.0]), min_size=6, max_size=6))
def test_given_frames_are_kept_and_a_seed_makes_the_rest(values):
    torch.manual_seed(0)
    model, frames = DiT(TINY).eval().requires_grad_(False), torch.tensor(values).view(2, 3)

    def masked(seed):
        generator = torch.Generator().manual_seed(seed)
        return run(model, frames=frames, noise=lambda z: torch.randn(z.shape, generator=generator))

    out, kept = masked(1), (frames == 0)[:, None, :, None, None].expand(2, 4, 3, 4, 6)
    given_ = torch.stack([pipeline.noise((4, 3, 4, 6), seed) for seed in range(2)])
    assert torch.equal(out, masked(1)) and torch.equal(out[kept], given_[kept])
    assert torch.equal(out, masked(2)) == (0.7 not in values)
