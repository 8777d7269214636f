import json
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minidit import pipeline
from minidit.broadcast import PAB_246, plan
from minidit.config import PRESETS
from minidit.model import DiT
from minidit.sampling import guide, integrate, opensora_shift, sample, seen, shifted, timesteps, velocity

GOLDENS = Path(__file__).parent / "goldens"
DECISIONS = [run for run in json.loads((GOLDENS / "pab_decisions.json").read_text()) if run["model"] == "opensora-1.2"]
TINY = replace(PRESETS["opensora-1.2"], depth=1, dim=16, heads=2, mlp_ratio=2.0, caption_dim=8, caption_length=6)
TIMES = timesteps(8, 3.0)
SIZE = {"height": 64, "width": 64, "fps": 8.0}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDENS / "sampler_rflow.safetensors")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DiT(TINY).eval().requires_grad_(False)


def error(ours, theirs):
    """The largest difference as a part of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# the schedule


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16_info")])
@pytest.mark.parametrize(
    ("name", "height", "width", "frames"),
    [
        ("240p_51f", 240, 426, 51),
        ("480p_51f", 480, 854, 51),
        ("720p_102f", 720, 1280, 102),
        ("image_1024", 1024, 1024, 1),
    ],
)
def test_timesteps_are_open_soras(golden, name, height, width, frames, dtype, kind):
    times = timesteps(30, opensora_shift(height, width, frames, dtype))
    assert error(torch.tensor(times), golden[f"timesteps30/{name}/{kind}"]) < 5e-7


@pytest.mark.parametrize(
    "run", DECISIONS, ids=[f"{run['height']}x{run['width']}-{run['frames']}-{run['steps']}" for run in DECISIONS]
)
def test_a_bfloat16_model_sees_the_timesteps_that_the_original_plans_with(run):
    shift = opensora_shift(run["height"], run["width"], run["frames"], torch.bfloat16)
    assert shift == run["ratio"]
    assert [int(t) for t in seen(timesteps(run["steps"], shift), torch.bfloat16)] == run["timesteps"]


@pytest.mark.parametrize("frames", range(2, 17))
def test_clips_too_short_for_open_soras_timesteps_are_refused(frames):
    with pytest.raises(ValueError, match=f"knows 1 frame or at least 17, got {frames}"):
        opensora_shift(720, 1280, frames)


@given(st.integers(1, 200), st.floats(0.1, 30))
def test_timesteps_fall_from_1000_and_stay_above_0(steps, shift):
    times = timesteps(steps, shift)
    assert len(times) == steps and times[0] == pytest.approx(1000, rel=1e-12)
    assert all(t > then for t, then in pairwise([*times, 0]))


def test_a_run_has_a_step():
    with pytest.raises(ValueError, match="a run has at least 1 step, got 0"):
        timesteps(0, 1.0)


def test_a_shift_above_1_stays_longer_at_the_noise():
    assert shifted(0.5, 1.0) == 0.5
    assert shifted(0.5, 3.0) == 0.75
    assert torch.equal(shifted(torch.tensor([0.0, 0.5, 1.0]), 3.0), torch.tensor([0.0, 0.75, 1.0]))


def test_a_float32_model_sees_other_times_than_a_bfloat16_model():
    assert seen([1000.0, 987.3, 500.25], torch.bfloat16) == [1000.0, 988.0, 500.0]
    assert seen([1000.0, 987.3, 500.25], torch.float32) == pytest.approx([1000.0, 987.3, 500.25])


# velocity


def test_a_velocity_is_the_networks_first_channels():
    output, z = torch.randn(2, 8, 3, 4, 4), torch.randn(2, 4, 3, 4, 4)
    assert torch.equal(velocity(output, z, 500.0, TINY), output[:, :4])


def test_a_predicted_sample_is_where_the_velocity_leads():
    output, z = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4)
    config = replace(TINY, sampling=replace(TINY.sampling, prediction="sample"))
    torch.testing.assert_close(z + velocity(output, z, 250.0, config) * 0.25, output)


def test_a_velocity_is_float32_whatever_the_model():
    assert velocity(torch.zeros(1, 4, 1, 2, 2).bfloat16(), torch.zeros(1, 4, 1, 2, 2), 9.0, TINY).dtype == torch.float32


# the integrator, on the toy velocity of tests/goldens/sampler_rflow.json


def toy(golden, times, guidance, watch):
    """tanh(z / 2) * (0.5 + t / 2000) + 3 * mean(y), guided; nothing for clean frames. watch is told each call's z."""

    def field(i, z, mask):
        watch.append((z, mask))
        halves = [
            torch.tanh(0.5 * z) * (0.5 + times[i] / 2000) + 3 * y.mean((1, 2, 3))[:, None, None, None, None]
            for y in (golden["traj/y"], golden["traj/y_null"])
        ]
        v = guide(*halves, guidance)
        return v if mask is None else v * mask[:, None, :, None, None]

    return field


@pytest.mark.parametrize("steps", [5, 30])
def test_a_trajectory_is_the_originals(golden, steps):
    times, watch = timesteps(steps, opensora_shift(480, 854, 51)), []
    out = integrate(toy(golden, times, 7.0, watch), golden["traj/z0"], times)
    assert error(torch.tensor(times), golden[f"traj/steps{steps}/timesteps"][:, 0]) < 5e-7
    assert error(torch.stack([z for z, _ in watch]), golden[f"traj/steps{steps}/z_each"]) < 2e-5
    assert error(out, golden[f"traj/steps{steps}/out"]) < 2e-5


def test_clean_frames_join_the_trajectory_as_in_the_original(golden):
    times, watch, drawn = timesteps(6, opensora_shift(480, 854, 51)), [], iter(golden["masked/noise_each"])
    frames = golden["masked/mask"]  # some join at once, one on the way, one never
    z0 = golden["masked/z_in_each"][0]
    out = integrate(toy(golden, times, 4.0, watch), z0, times, frames=frames, noise=lambda z: next(drawn))
    masks = torch.stack([mask for _, mask in watch])
    # the original's model is given both guidance halves
    assert torch.equal(masks.repeat(1, 2, 1), golden["masked/x_mask_each"].bool())
    assert error(torch.stack([z for z, _ in watch]), golden["masked/z_in_each"]) < 2e-5
    assert error(out, golden["masked/out"]) < 2e-5
    assert next(drawn, None) is None


def test_a_frame_of_value_0_comes_out_as_it_went_in():
    z, frames = torch.randn(2, 4, 3, 2, 2), torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
    out = integrate(lambda i, z, mask: torch.ones_like(z), z, TIMES, frames=frames)
    kept = (frames == 0)[:, None, :, None, None].expand_as(z)
    assert torch.equal(out[kept], z[kept]) and not torch.isclose(out[~kept], z[~kept]).any()


@given(st.integers(1, 50), st.floats(0.1, 30))
def test_frames_of_value_1_are_no_frames_at_all(steps, shift):
    z, times = torch.randn(1, 4, 2, 2, 2), timesteps(steps, shift)

    def field(i, z, mask):
        assert mask is None or mask.all()
        return z.sin()

    assert torch.equal(integrate(field, z, times, frames=torch.ones(1, 2)), integrate(field, z, times))


@given(st.integers(1, 50), st.floats(0.1, 30))
def test_a_constant_velocity_is_followed_for_a_time_of_1(steps, shift):
    z, v = torch.randn(2, 1, 4, 2, 3, 3)
    out = integrate(lambda i, z, mask: v, z, timesteps(steps, shift))
    torch.testing.assert_close(out, z + v, rtol=0, atol=2e-5)


@given(st.integers(1, 50), st.floats(0.1, 30))
def test_the_last_step_ends_on_the_predicted_sample(steps, shift):
    config = replace(TINY, sampling=replace(TINY.sampling, prediction="sample"))
    z, predicted, times = torch.randn(1, 4, 2, 3, 3), torch.randn(steps, 1, 4, 2, 3, 3), timesteps(steps, shift)
    out = integrate(lambda i, z, mask: velocity(predicted[i], z, times[i], config), z, times)
    torch.testing.assert_close(out, predicted[-1], rtol=0, atol=1e-5)


def test_guidance_goes_on_from_the_null_caption_through_the_caption():
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert [guide(cond, uncond, g).item() for g in (0, 1, 2, 7)] == [1, 3, 5, 15]


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


def run(model, *, plan_=None, times=TIMES, guidance=4.0, batch=2, **settings):
    z = torch.stack([pipeline.noise((4, 3, 4, 6), seed) for seed in range(batch)])
    text = torch.stack([pipeline.noise((5, 8), 100 + seed) for seed in range(batch)])
    plan_ = plan_ or plan(PAB_246, seen(times, model.dtype), model.sites)
    lengths = torch.tensor([3, 5][:batch])
    return sample(model, z, text, lengths, plan=plan_, times=times, guidance=guidance, **SIZE, **settings)


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
    assert [step.call.timestep for step in steps] == seen(TIMES, torch.float32)
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


def test_a_plan_of_other_times_is_refused(model):
    other = plan(PAB_246, seen(timesteps(8, 1.0), model.dtype), model.sites)
    with pytest.raises(ValueError, match=r"make the plan with seen\(times, model.dtype\)"):
        run(model, plan_=other)


def test_a_plan_of_the_times_of_another_dtype_is_refused(model):
    other = plan(PAB_246, seen(TIMES, torch.bfloat16), model.sites)
    with pytest.raises(ValueError, match="the plan's 8 timesteps are not the run's 8 as the model sees them"):
        run(model, plan_=other)


def test_a_plan_for_another_model_is_refused(model):
    other = plan(PAB_246, seen(TIMES, model.dtype), replace(TINY, depth=2).sites)
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
