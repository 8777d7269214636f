"""minidit/samplers.py: each published sampler against its original, on toy models that the golden files describe."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minidit.broadcast import RECIPES, plan
from minidit.presets import PRESETS
from minidit.samplers import (
    IDDPM,
    EulerAncestral,
    RectifiedFlow,
    opensora_shift,
    sampler,
    seen,
    shifted,
    velocity,
)
from minidit.sampling import guide

GOLDENS = Path(__file__).parent / "goldens"
DECISIONS = json.loads((GOLDENS / "pab_decisions.json").read_text())
OPEN_SORA_DECISIONS = [run for run in DECISIONS if run["model"] == "opensora-1.2"]
OPEN_SORA, FLOW = PRESETS["opensora-1.2"].sampling, RectifiedFlow(8, 3.0, "velocity")
METHODS = ("iddpm", "iddpm-float32", "iddpm-ddim", "ddim", "ddim-offset", "pndm", "euler-ancestral")


def golden(name):
    return load_file(GOLDENS / f"sampler_{name}.safetensors")


@pytest.fixture(scope="module")
def flow():
    return golden("rflow")


def of(method, steps=10):
    """The sampler of a method that predicts noise."""
    return sampler(replace(OPEN_SORA, method=method, prediction="noise", steps=steps), torch.float32)


def error(ours, theirs):
    """The largest difference as a part of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def drawn_from(values):
    """A noise that gives one of the values after the other, and those that are left."""
    left = iter(values)
    return lambda z: next(left), left


# the schedule of rectified flow


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
def test_timesteps_are_open_soras(flow, name, height, width, frames, dtype, kind):
    run = replace(OPEN_SORA, steps=30, height=height, width=width, frames=frames)
    assert error(torch.tensor(sampler(run, dtype).timesteps), flow[f"timesteps30/{name}/{kind}"]) < 5e-7


@pytest.mark.parametrize(
    "run",
    OPEN_SORA_DECISIONS,
    ids=[f"{run['height']}x{run['width']}-{run['frames']}-{run['steps']}" for run in OPEN_SORA_DECISIONS],
)
def test_a_bfloat16_model_sees_the_timesteps_that_the_original_plans_with(run):
    shift = opensora_shift(run["height"], run["width"], run["frames"], torch.bfloat16)
    assert shift == run["ratio"]
    times = RectifiedFlow(run["steps"], shift, "velocity").timesteps
    assert [int(t) for t in seen(times, torch.bfloat16)] == run["timesteps"]


@pytest.mark.parametrize("frames", range(2, 17))
def test_clips_too_short_for_open_soras_timesteps_are_refused(frames):
    with pytest.raises(ValueError, match=f"knows 1 frame or at least 17, got {frames}"):
        opensora_shift(720, 1280, frames)


@given(st.integers(1, 200), st.floats(0.1, 30))
def test_timesteps_fall_from_1000_and_stay_above_0(steps, shift):
    times = RectifiedFlow(steps, shift, "velocity").timesteps
    assert len(times) == steps and times[0] == pytest.approx(1000, rel=1e-12)
    assert all(t > then for t, then in pairwise([*times, 0]))


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
    assert torch.equal(velocity(output, z, 500.0, "velocity"), output[:, :4])


def test_a_predicted_sample_is_where_the_velocity_leads():
    output, z = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4)
    torch.testing.assert_close(z + velocity(output, z, 250.0, "sample") * 0.25, output)


def test_a_velocity_is_float32_whatever_the_model():
    output, z = torch.zeros(1, 4, 1, 2, 2).bfloat16(), torch.zeros(1, 4, 1, 2, 2)
    assert velocity(output, z, 9.0, "velocity").dtype == torch.float32


# rectified flow, on the toy velocity of tests/goldens/sampler_rflow.json


def toy_flow(golden, times, guidance, watch):
    """tanh(z / 2) * (0.5 + t / 2000) + 3 * mean(y), guided; nothing for clean frames. watch is told each call's z."""

    def field(i, z, mask):
        watch.append((z, mask))
        halves = [
            torch.tanh(0.5 * z) * (0.5 + times[i] / 2000) + 3 * y.mean((1, 2, 3))[:, None, None, None, None]
            for y in (golden["traj/y"], golden["traj/y_null"])
        ]
        v = guide(*halves, guidance, 4)
        v = v if mask is None else v * mask[:, None, :, None, None]
        return torch.cat((v, -v), 1)

    return field


@pytest.mark.parametrize("steps", [5, 30])
def test_a_trajectory_of_rectified_flow_is_the_originals(flow, steps):
    run, watch = RectifiedFlow(steps, opensora_shift(480, 854, 51), "velocity"), []
    out = run.integrate(toy_flow(flow, run.timesteps, 7.0, watch), flow["traj/z0"])
    assert error(torch.tensor(run.timesteps), flow[f"traj/steps{steps}/timesteps"][:, 0]) < 5e-7
    assert error(torch.stack([z for z, _ in watch]), flow[f"traj/steps{steps}/z_each"]) < 2e-5
    assert error(out, flow[f"traj/steps{steps}/out"]) < 2e-5


def test_clean_frames_join_the_trajectory_of_rectified_flow_as_in_the_original(flow):
    run, watch = RectifiedFlow(6, opensora_shift(480, 854, 51), "velocity"), []
    noise, left = drawn_from(flow["masked/noise_each"])
    frames = flow["masked/mask"]  # some join at once, one on the way, one never
    field = toy_flow(flow, run.timesteps, 4.0, watch)
    out = run.integrate(field, flow["masked/z_in_each"][0], frames=frames, noise=noise)
    masks = torch.stack([mask for _, mask in watch])
    # the original's model is given both guidance halves
    assert torch.equal(masks.repeat(1, 2, 1), flow["masked/x_mask_each"].bool())
    assert error(torch.stack([z for z, _ in watch]), flow["masked/z_in_each"]) < 2e-5
    assert error(out, flow["masked/out"]) < 2e-5
    assert not list(left)


def test_a_frame_of_value_0_comes_out_of_rectified_flow_as_it_went_in():
    z, frames = torch.randn(2, 4, 3, 2, 2), torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
    out = FLOW.integrate(lambda i, z, mask: torch.ones_like(z), z, frames=frames)
    kept = (frames == 0)[:, None, :, None, None].expand_as(z)
    assert torch.equal(out[kept], z[kept]) and not torch.isclose(out[~kept], z[~kept]).any()


@given(st.integers(1, 50), st.floats(0.1, 30))
def test_a_constant_velocity_is_followed_for_a_time_of_1(steps, shift):
    z, v = torch.randn(2, 1, 4, 2, 3, 3)
    out = RectifiedFlow(steps, shift, "velocity").integrate(lambda i, z, mask: v, z)
    torch.testing.assert_close(out, z + v, rtol=0, atol=2e-5)


@given(st.integers(1, 50), st.floats(0.1, 30))
def test_the_last_step_of_rectified_flow_ends_on_the_predicted_sample(steps, shift):
    z, predicted = torch.randn(1, 4, 2, 3, 3), torch.randn(steps, 1, 4, 2, 3, 3)
    out = RectifiedFlow(steps, shift, "sample").integrate(lambda i, z, mask: predicted[i], z)
    torch.testing.assert_close(out, predicted[-1], rtol=0, atol=1e-5)


# IDDPM, on the toy noise and variance of tests/goldens/sampler_iddpm10.json


def toy_iddpm(golden, times, guided, watch):
    """Noise 0.8 z (1 - t / 2000) + 2 mean(y), variance tanh(z), a guidance of 7. watch is told each call's z."""

    def field(i, z, mask):
        watch.append((z, mask))
        halves = [
            torch.cat((0.8 * z * (1 - times[i] / 2000) + 2 * y.mean((1, 2, 3))[:, None, None, None, None], z.tanh()), 1)
            for y in (golden["traj/y"], golden["traj/y_null"])
        ]
        return guide(*halves, 7.0, guided)

    return field


@pytest.mark.parametrize("steps", [10, 100])
# of float32 they are the originals' but for the last bit, in which exp, log and roots of processors differ
@pytest.mark.parametrize(("name", "dtype", "off"), [("10", torch.float64, 1e-12), ("11", torch.float32, 2**-22)])
def test_the_tables_of_iddpm_are_the_originals(name, dtype, off, steps):
    theirs, run = golden(f"iddpm{name}"), IDDPM(steps, dtype)
    assert torch.equal(torch.tensor(run.timesteps[::-1]), theirs[f"steps{steps}/timestep_map"].float())
    checked = 0
    for table, ours in run.tables._asdict().items():
        if table != "alphas_cumprod_prev":
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs[f"steps{steps}/{table}"], rtol=off, atol=0)
            checked += 1
    assert checked == sum(key.startswith(f"steps{steps}/") for key in theirs) - 1


@pytest.mark.parametrize(
    ("name", "kind", "method", "guided"),
    [
        ("10", "cfg3ch", "iddpm", 3),
        ("11", "cfg3ch", "iddpm-float32", 3),
        ("11", "cfgall", "iddpm-float32", 4),
        ("11", "masked", "iddpm-float32", 3),
    ],
)
def test_a_trajectory_of_iddpm_is_the_originals(name, kind, method, guided):
    theirs, watch, run = golden(f"iddpm{name}"), [], of(method)
    frames = theirs["traj/masked/mask"] if kind == "masked" else None
    noise, left = drawn_from(theirs[f"traj/{kind}/noise_each"][:, :2])
    field = toy_iddpm(theirs, run.timesteps, guided, watch)
    out = run.integrate(field, theirs["traj/z0"], frames=frames, noise=noise)
    assert list(run.timesteps) == theirs[f"traj/{kind}/t_each"][:, 0].tolist()
    assert error(torch.stack([z for z, _ in watch]), theirs[f"traj/{kind}/x_in_each"]) < 2e-5
    assert error(out, theirs[f"traj/{kind}/out"]) < 2e-5
    assert len(list(left)) == 1  # of the last step, which adds none
    if kind == "masked":
        masks = torch.stack([mask for _, mask in watch])
        assert torch.equal(masks.repeat(1, 2, 1), theirs["traj/masked/x_mask_each"].bool())


def test_the_precision_of_the_tables_and_the_guided_channels_are_seen_in_the_result():
    theirs = golden("iddpm11")
    for kind, wrong in (("cfg3ch", ("iddpm", 3)), ("cfg3ch", ("iddpm-float32", 4)), ("cfgall", ("iddpm-float32", 3))):
        noise, _ = drawn_from(theirs[f"traj/{kind}/noise_each"][:, :2])
        run = of(wrong[0])
        out = run.integrate(toy_iddpm(theirs, run.timesteps, wrong[1], []), theirs["traj/z0"], noise=noise)
        assert error(out, theirs[f"traj/{kind}/out"]) > 1e-4


@pytest.mark.parametrize(("kind", "method", "unused"), [("ddpm", "iddpm", 1), ("ddim", "iddpm-ddim", 10)])
def test_a_trajectory_of_lattes_classes_is_the_originals(kind, method, unused):
    theirs, run = golden("latte_class"), of(method)
    noise, left = drawn_from(theirs[f"{kind}/noise_each"].transpose(2, 3))  # frames come before channels there
    z = theirs["z0"].transpose(1, 2)

    def field(i, z, mask):
        return torch.cat((0.8 * z * (1 - run.timesteps[i] / 2000), z.tanh()), 1)

    out = run.integrate(field, z, noise=noise)
    assert error(out, theirs[f"{kind}/out"].transpose(1, 2)) < 2e-5
    assert len(list(left)) == unused


@pytest.mark.parametrize("steps", [50, 250])
def test_lattes_timesteps_are_those_of_iddpm(steps):
    assert list(of("iddpm", steps).timesteps[::-1]) == golden("latte_class")[f"timestep_map_{steps}"].tolist()


def test_the_timesteps_of_iddpm_are_sums_of_a_stride_with_the_rounding_errors_of_the_original():
    # 10 strides of 49.95 are 499.5 and would be rounded to 500, but their sum is a little less
    assert IDDPM(21, torch.float64).timesteps[10] == 499


@given(st.integers(2, 1000))
def test_the_timesteps_of_iddpm_are_different_whole_numbers_from_999_to_0(steps):
    times = IDDPM(steps, torch.float64).timesteps
    assert len(times) == steps and (times[0], times[-1]) == (999, 0)
    assert all(t > then and t == int(t) for t, then in pairwise(times))


@given(st.integers(2, 30), st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.99, 1.0]), min_size=3, max_size=3), st.booleans())
def test_frames_of_iddpm_stay_as_they_are_until_they_join_and_those_of_0_join_in_the_last_step(steps, values, ddim):
    run, z, frames, watch = IDDPM(steps, torch.float32, ddim), torch.randn(1, 2, 3, 2, 2), torch.tensor([values]), []

    def field(i, z, mask):
        watch.append((z, mask))
        return torch.cat((z.sin(), z.cos()), 1)

    out = run.integrate(field, z, frames=frames)
    joins = (frames * steps).int()[0].tolist()
    for k, (x, mask) in zip(reversed(range(steps)), watch, strict=True):
        assert mask.tolist() == [[join > k for join in joins]]
        for frame, join in enumerate(joins):
            assert torch.equal(x[:, :, frame], z[:, :, frame]) == (k > join or k == steps - 1 < join)
    assert not torch.isclose(out, z).all()


@pytest.mark.parametrize("channels", [2, 3, 8])
def test_iddpm_needs_a_variance_of_every_channel(channels):
    with pytest.raises(ValueError, match=f"needs a model of 4 channels, noise and variance, not {channels}"):
        of("iddpm").integrate(lambda i, z, mask: torch.zeros(1, channels, 1, 2, 2), torch.randn(1, 2, 1, 2, 2))


# The schedulers of diffusers, on the toy noise 0.8 z (1 - t / 2000) of the scaled input.


def toy_noise(times, watch):
    def field(i, z, mask):
        watch.append(z)
        return torch.cat((0.8 * z * (1 - times[i] / 2000), z * torch.nan), 1)  # the variance is not looked at

    return field


@pytest.mark.parametrize(
    ("name", "method", "steps"),
    [
        ("ddim50", "ddim", 50),
        ("ddim50_steps_offset1_alpha_not_one", "ddim-offset", 50),
        ("pndm10", "pndm", 10),
        ("pndm50", "pndm", 50),
    ],
)
def test_a_trajectory_of_a_diffusers_scheduler_is_the_originals(name, method, steps):
    theirs, run, watch = golden("diffusers"), of(method, steps), []
    for _ in range(2):  # the second run begins with nothing that the first one kept
        out = run.integrate(toy_noise(run.timesteps, watch), theirs[f"{name}/x0"])
        assert error(out, theirs[f"{name}/out"]) < 2e-5
    assert list(run.timesteps) == theirs[f"{name}/timesteps"].tolist()
    assert error(torch.stack(watch[1:4]), theirs[f"{name}/first3"]) < 2e-5


def test_pndm_calls_the_model_9_times_more_than_it_has_steps():
    times = of("pndm", 150).timesteps
    assert list(times) == golden("diffusers")["pndm150/timesteps"].tolist() and len(times) == 159


def test_a_trajectory_of_euler_ancestral_is_the_originals():
    theirs, run, watch = golden("diffusers"), of("euler-ancestral", 20), []
    assert torch.equal(torch.tensor(run.timesteps), theirs["euler_a20/timesteps"])
    torch.testing.assert_close(torch.tensor(run.sigmas), theirs["euler_a20/sigmas"], rtol=2**-22, atol=0)
    noise, left = drawn_from(theirs["euler_a20/noise_each"])
    z = theirs["euler_a20/x0"] / run.sigmas[0]  # there it is scaled already
    out = run.integrate(toy_noise(run.timesteps, watch), z, noise=noise)
    unscaled = [x * (sigma**2 + 1) ** 0.5 for x, sigma in zip(watch[1:4], run.sigmas[1:4], strict=True)]
    assert error(torch.stack(unscaled), theirs["euler_a20/first3"]) < 2e-5
    assert error(out, theirs["euler_a20/out"]) < 2e-5
    assert not list(left)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of torch, in diffusers
@given(st.integers(2, 60), st.integers(0, 2**32))
def test_euler_ancestral_is_that_of_diffusers_for_every_number_of_steps(steps, seed):
    z = torch.randn(1, 2, 2, 2, 2, generator=torch.Generator().manual_seed(seed))
    theirs, generator, run = diffusers.EulerAncestralDiscreteScheduler(), torch.Generator().manual_seed(seed), None
    theirs.set_timesteps(steps)
    x = z * theirs.init_noise_sigma
    for t in theirs.timesteps:
        eps = theirs.scale_model_input(x, t).sin()
        x = theirs.step(eps, t, x, generator=generator, return_dict=False)[0]
    generator, run = torch.Generator().manual_seed(seed), EulerAncestral(steps)
    out = run.integrate(lambda i, z, _: z.sin(), z, noise=lambda z: torch.randn(z.shape, generator=generator))
    assert list(run.timesteps) == theirs.timesteps.tolist()
    assert error(out, x) < 2e-5


# what holds for each of them


@pytest.mark.parametrize("method", METHODS)
def test_a_noise_makes_one_result(method):
    def result(seed):
        generator = torch.Generator().manual_seed(seed)
        noise = lambda z: torch.randn(z.shape, generator=generator)  # noqa: E731
        return run.integrate(lambda i, z, mask: torch.cat((z.sin(), z.cos()), 1), z, noise=noise)

    z, run = torch.randn(1, 2, 2, 2, 2), of(method)
    first, state = result(1), torch.random.get_rng_state()
    assert torch.equal(result(1), first)
    draws = method in ("iddpm", "iddpm-float32", "euler-ancestral")
    assert torch.equal(result(2), first) != draws
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing is drawn behind the noise's back


@pytest.mark.parametrize("run", [FLOW, IDDPM(6, torch.float64), IDDPM(6, torch.float32)], ids=repr)
def test_frames_of_value_1_are_no_frames_at_all(run):
    z, drawn = torch.randn(1, 2, 3, 2, 2), torch.randn(20, 1, 2, 3, 2, 2)

    def field(i, z, mask):
        assert mask is None or mask.all()
        return torch.cat((z.sin(), z.cos()), 1)

    def result(frames, values):
        return run.integrate(field, z, frames=frames, noise=drawn_from(values)[0])

    # with frames, a second noise is drawn in each step, before the other
    assert torch.equal(result(torch.ones(1, 3), drawn), result(None, drawn if run is FLOW else drawn[1::2]))


@pytest.mark.parametrize("method", ["ddim", "ddim-offset", "pndm", "euler-ancestral"])
def test_frame_masks_are_refused_where_there_are_none(method):
    with pytest.raises(ValueError, match="has no frame masks: frames must be None"):
        of(method).integrate(lambda i, z, mask: z, torch.randn(1, 2, 3, 2, 2), frames=torch.ones(1, 3))


@pytest.mark.parametrize(
    ("method", "steps", "message"),
    [
        ("iddpm", 1, "a run of IDDPM has at least 2 steps and at most 1000, got 1"),
        ("iddpm-ddim", 1001, "a run of IDDPM has at least 2 steps and at most 1000, got 1001"),
        ("ddim", 1, "a run of ddim has at least 2 steps and at most 1000, got 1"),
        ("ddim", 1001, "a run of ddim has at least 2 steps and at most 1000, got 1001"),
        ("ddim-offset", 1000, "a run of ddim-offset has at least 2 steps and at most 999, got 1000"),
        ("pndm", 3, "a run of pndm has at least 4 steps and at most 1000, got 3"),
        ("euler-ancestral", 1, "a run of Euler-ancestral has at least 2 steps and at most 1000, got 1"),
        ("euler-ancestral", 1001, "a run of Euler-ancestral has at least 2 steps and at most 1000, got 1001"),
    ],
)
def test_a_number_of_steps_that_a_sampler_cannot_have_is_refused(method, steps, message):
    with pytest.raises(ValueError, match=message):
        of(method, steps)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [4, 999])
def test_as_few_and_as_many_steps_as_can_be_end_in_numbers(method, steps):
    run = of(method, steps)
    out = run.integrate(lambda i, z, mask: torch.cat((z.sin(), z.cos()), 1), torch.randn(1, 1, 1, 2, 2))
    assert out.isfinite().all() and all(0 <= t < 1000 for t in run.timesteps)


def test_a_frame_that_has_joined_rectified_flow_is_not_noised_again():
    seen, frames = [], torch.tensor([[1.0, 0.75, 0.35]])

    def field(i, z, mask):
        seen.append((z[0, 0, :, 0, 0].tolist(), mask[0].tolist()))
        return torch.zeros_like(z)

    RectifiedFlow(10, 1.0, "velocity").integrate(field, torch.zeros(1, 1, 3, 1, 1), frames=frames)
    for frame, joins in ((1, 3), (2, 7)):  # the first call whose time is at most 750, 350
        values, inside = zip(*((values[frame], mask[frame]) for values, mask in seen), strict=True)
        assert inside == (False,) * joins + (True,) * (10 - joins)
        assert set(values[:joins]) == {0.0} and len(set(values[joins:])) == 1 and values[joins] != 0


def test_float16_holds_no_number_of_pixels_and_is_not_asked_to():
    assert opensora_shift(480, 854, 51, torch.float16) == opensora_shift(480, 854, 51) > 1


def test_a_run_of_rectified_flow_has_a_step():
    with pytest.raises(ValueError, match="a run of rectified flow has at least 1 step, got 0"):
        RectifiedFlow(0, 1.0, "velocity")


def test_ddim_and_pndm_need_diffusers_and_nothing_else_does(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises ImportError
    for method in METHODS:
        if method in ("ddim", "ddim-offset", "pndm"):
            with pytest.raises(ImportError, match=f"sampling by {method} needs the package diffusers") as error:
                print(of(method).timesteps)
            assert error.value.name == "diffusers"
        else:
            assert of(method).timesteps


# plans


@pytest.mark.parametrize("run", [run for run in DECISIONS if run["model"] in ("latte-1", "opensora-plan-1.1")])
def test_a_sampler_calls_the_model_at_the_timesteps_that_pyramid_attention_broadcast_planned_with(run):
    method = "ddim" if run["model"] == "latte-1" else "pndm"
    assert list(of(method, run["steps"]).timesteps) == run["timesteps"]


def test_a_plan_of_pndm_has_a_row_for_every_call_as_the_original_decided_them():
    (run,) = [run for run in DECISIONS if run["model"] == "opensora-plan-1.1" and run["spatial"]["range"] == 2]
    sites = replace(PRESETS["opensora-1.2"], depth=1).sites
    table = plan(RECIPES["open-sora-plan-246-mlp"], of("pndm", 150).timesteps, sites)
    decided = run["decisions"]
    originals = {"spatial": "spatial", "temporal": "temporal", "cross": "cross", "mlp": "mlp_block0"}
    assert len(table) == 159
    for site, column in zip(sites, zip(*table.acts, strict=True), strict=True):
        # the original stores attention whenever it computes, so only what it reused is a decision
        reused = [act.value == "R" for act in column]
        assert reused == [letter == "R" for letter in decided[originals[site.part]]]
