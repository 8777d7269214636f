"""diffusers' own LattePipeline, with diffusers' transformer and with ours."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LattePipeline, LatteTransformer3DModel, PNDMScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st

from families import error
from minidit.broadcast import RECIPES, Act, plan
from minidit.integrations.diffusers import LatteTransformer
from minidit.model import DiT
from minidit.presets import PRESETS
from minidit.samplers import Diffusers
from minidit.sampling import sample

SHAPE = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 16,
    "video_length": 3,
}
VIDEO = {"frames": 3, "height": 64, "width": 64, "steps": 5, "guidance": 7.5, "batch": 1, "temporal": True, "seed": 0}
SCHEDULERS = {
    "ddim": DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False),
    "pndm": PNDMScheduler(beta_start=1e-4, beta_end=0.02),  # most of its first timesteps come twice
    "euler": EulerDiscreteScheduler(timestep_spacing="linspace"),  # its timesteps are no whole numbers
}
NO_TIMESTEPS = "the scheduler has no timesteps to plan with: call scheduler.set_timesteps"


class Stop(Exception):
    pass


def theirs(scheduler="ddim", **shape):
    """diffusers' pipeline with diffusers' transformer, its weights always the same."""
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(**{**SHAPE, **shape}).eval()
    scheduler = type(SCHEDULERS[scheduler]).from_config(SCHEDULERS[scheduler].config)
    pipe = LattePipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(scheduler="ddim", **options):
    pipe = theirs(scheduler)
    pipe.transformer = LatteTransformer.from_diffusers(pipe.transformer, pipe.scheduler, **options)
    return pipe


def inputs(video):
    """Noise, features of the prompts and of no prompt."""
    generator = torch.Generator().manual_seed(video["seed"])
    z = torch.randn(video["batch"], 4, video["frames"], video["height"] // 8, video["width"] // 8, generator=generator)
    text, null = torch.randn(2, video["batch"], 7, 16, generator=generator)
    return z, text, null


def run(pipe, stop=None, **video):
    """Latents of a run, which breaks off after `stop` calls."""
    video = {**VIDEO, **video}
    z, text, null = inputs(video)
    dtype = pipe.transformer.dtype

    def on_step(pipe, i, t, given):
        if i + 1 == stop:
            raise Stop
        return given

    return pipe(
        prompt_embeds=text.to(dtype),
        negative_prompt=None,
        negative_prompt_embeds=null.to(dtype),
        latents=z.to(dtype),
        num_inference_steps=video["steps"],
        guidance_scale=video["guidance"],
        video_length=video["frames"],
        height=video["height"],
        width=video["width"],
        enable_temporal_attentions=video["temporal"],
        callback_on_step_end=on_step,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames


def computed(model):
    """A list that each call of the model adds the sites to that it computes."""
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append([]))
    for site, sublayer in zip(model.sites, model.sublayers, strict=True):
        sublayer.register_forward_hook(lambda module, args, out, site=site: calls[-1].append(site))
    return calls


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_without_broadcast_latents_are_those_of_diffusers_own_transformer(scheduler):
    assert error(run(ours(scheduler, pyramid=None)), run(theirs(scheduler))) < 2e-5


@pytest.mark.parametrize(
    "video",
    [
        {"temporal": False},
        {"frames": 1},
        {"frames": 1, "temporal": False},
        {"guidance": 1.0},
        {"batch": 2},
        {"height": 96, "width": 48},
    ],
    ids=str,
)
def test_so_they_are_of_other_videos_and_of_images(video):
    assert error(run(ours(pyramid=None), **video), run(theirs(), **video)) < 2e-5


def test_rows_and_columns_that_fill_no_patch_are_cut_as_by_diffusers():
    z, text, _ = inputs({**VIDEO, "height": 72, "width": 88})  # latents of 9 x 11
    transformer = ours(pyramid=None).transformer
    transformer.scheduler.set_timesteps(1)
    given = {"hidden_states": z, "timestep": torch.tensor([0]), "encoder_hidden_states": text}
    with torch.no_grad():
        assert error(transformer(**given).sample, theirs().transformer(**given).sample) < 2e-5


def test_the_published_transformer_is_the_preset():
    size = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "cross_attention_dim": 1152}
    published = {**SHAPE, **size, "sample_size": 64, "caption_channels": 4096, "video_length": 16}
    with torch.device("meta"):
        transformer = LatteTransformer3DModel(**published)
    assert LatteTransformer.from_diffusers(transformer, DDIMScheduler()).dit.config == PRESETS["latte-t2v"]


@pytest.mark.parametrize("sample_size", [64, 128])
def test_positions_are_those_of_the_size_it_was_trained_for(sample_size):
    pipe = theirs(sample_size=sample_size)
    wanted = run(pipe, steps=1)
    pipe.transformer = LatteTransformer.from_diffusers(pipe.transformer, pipe.scheduler, pyramid=None)
    assert error(run(pipe, steps=1), wanted) < 2e-5
    assert pipe.transformer.config.sample_size == sample_size


def by_our_loop(model, scheduler):
    """Our plan of the run, and the latents that our own loop makes by it."""
    sampler, (z, text, null) = Diffusers(scheduler, VIDEO["steps"]), inputs(VIDEO)
    table = plan(RECIPES["latte-236"], sampler.timesteps, model.sites)
    size = {"height": 64, "width": 64, "fps": 8.0}
    return table, sample(model, z, text, plan=table, sampler=sampler, guidance=7.5, null=null[0], **size)


@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
def test_with_broadcast_latents_are_those_of_our_own_loop_and_each_call_computes_what_is_planned(scheduler):
    pipe = ours(scheduler)
    table, wanted = by_our_loop(pipe.transformer.dit, scheduler)
    calls = computed(pipe.transformer.dit)
    assert error(run(pipe), wanted) < 1e-5
    assert calls == [
        [site for site, act in zip(table.sites, row, strict=True) if act is not Act.REUSE] for row in table.acts
    ]
    assert all(count[Act.REUSE] for part, count in table.counts().items() if part != "mlp")
    assert error(wanted, run(theirs(scheduler))) > 1e-4


def test_images_with_broadcast_are_those_of_our_own_loop():
    pipe = ours()
    table, wanted = by_our_loop(pipe.transformer.dit.spatial(), "ddim")
    assert {part for part, count in table.counts().items() if count[Act.REUSE]} == {"spatial", "cross"}
    assert error(run(pipe, temporal=False), wanted) < 1e-5
    assert error(wanted, run(theirs(), temporal=False)) > 1e-4


videos = st.fixed_dictionaries(
    {
        "frames": st.sampled_from([1, 3, 4]),
        "height": st.sampled_from([16, 64]),
        "steps": st.integers(1, 6),
        "guidance": st.sampled_from([1.0, 7.5]),
        "batch": st.integers(1, 2),
        "temporal": st.booleans(),
        "seed": st.integers(0, 1),
        "stop": st.none() | st.integers(1, 4),
    }
)
HALF = {**VIDEO, "stop": 2}


@settings(max_examples=12)
@given(st.lists(videos, min_size=2, max_size=4))
@example([HALF, {**HALF, "seed": 1, "stop": None}])
@example([HALF, {**HALF, "height": 16, "stop": None}, {**HALF, "batch": 2, "stop": None}])
@example([HALF, {**HALF, "temporal": False, "stop": None}])
def test_a_run_is_the_same_whatever_was_run_or_left_half_way_before(runs):
    pipe = ours()
    for video in runs:
        again = []
        for one in (pipe, ours()):
            try:
                again.append(run(one, **video))
            except Stop:
                again.append(torch.zeros(1))
        assert torch.equal(*again)


@pytest.mark.parametrize("times", [(800, 600, 400, 200), (800, 800, 600, 600, 400)], ids=str)
def test_a_run_begins_at_the_first_timestep_again_when_nobody_sets_new_ones(times):
    dit, (z, text, _) = ours().transformer.dit, inputs(VIDEO)
    scheduler = SimpleNamespace(timesteps=torch.tensor(times))
    transformer = LatteTransformer(dit, scheduler)

    def outputs(transformer, calls):
        with torch.no_grad():
            return [transformer(z + t, t[None], text, return_dict=False)[0] for t in scheduler.timesteps[:calls]]

    outputs(transformer, 2)
    fresh = outputs(LatteTransformer(dit, scheduler), None)
    for out in (outputs(transformer, None), outputs(transformer, None)):
        assert all(map(torch.equal, out, fresh))


def test_nothing_is_kept_after_a_run_or_an_interrupted_one():
    pipe, running = ours(), []

    def interrupt(pipe, i, t, given):
        running.append(pipe.transformer._run is not None)
        pipe._interrupt = i == 1
        return given

    run(pipe)
    assert pipe.transformer._run is None
    z, text, null = inputs(VIDEO)
    given = {"prompt_embeds": text, "negative_prompt": None, "negative_prompt_embeds": null, "latents": z}
    pipe(**given, video_length=3, height=64, width=64, output_type="latent", callback_on_step_end=interrupt)
    assert running == [True, True] and pipe.transformer._run is None


def test_captions_that_change_within_a_run_are_read_anew():
    pipe = ours(pyramid=None)
    pipe.scheduler.set_timesteps(2)
    z, text, other = inputs(VIDEO)
    first, then = pipe.scheduler.timesteps[:, None]
    with torch.no_grad():
        out = pipe.transformer(z, first, text, return_dict=False)
        assert isinstance(out, tuple) and error(out[0], theirs().transformer(z, first, text).sample) < 2e-5
        out = pipe.transformer(z, then, other).sample
        assert error(out, theirs().transformer(z, then, other).sample) < 2e-5


def test_a_pipeline_that_is_moved_takes_all_of_the_weights_along():
    pipe, reference = ours(pyramid=None), theirs()
    run(pipe, temporal=False)
    for one in (pipe, reference):
        one.to(torch.float64)
    assert pipe.transformer.dtype == torch.float64 and pipe.device == torch.device("cpu")
    for temporal in (False, True):
        out = run(pipe, temporal=temporal)
        assert out.dtype == torch.float64 and error(out, run(reference, temporal=temporal)) < 2e-5


def test_weights_are_shared_where_they_need_not_be_fused():
    pipe = theirs()
    transformer = LatteTransformer.from_diffusers(pipe.transformer, pipe.scheduler)
    there = {parameter.untyped_storage().data_ptr() for parameter in pipe.transformer.parameters()}
    own = {
        name
        for name, parameter in transformer.dit.named_parameters()
        if parameter.untyped_storage().data_ptr() not in there
    }
    assert own and all(".f.qkv." in name or ".f.kv." in name for name in own)


def test_a_model_of_ours_is_taken_as_it_is():
    made = ours().transformer
    pipe = theirs()
    pipe.transformer = LatteTransformer(made.dit, pipe.scheduler)
    assert torch.equal(run(pipe), run(ours()))


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), PNDMScheduler()], ids=["ddim", "pndm"])
def test_a_scheduler_without_timesteps_is_refused(scheduler):
    transformer = LatteTransformer(ours().transformer.dit, scheduler)
    z, text, _ = inputs(VIDEO)
    with pytest.raises(ValueError, match=NO_TIMESTEPS):
        transformer(z, torch.tensor([800]), text)


def test_another_scheduler_than_the_pipelines_is_refused():
    pipe = ours()
    run(pipe)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="begins at the scheduler's first timestep, 800, got 750: LatteTransformer's"):
        run(pipe, steps=4)
    pipe.transformer.scheduler = pipe.scheduler
    assert run(pipe, steps=4).isfinite().all()


def test_a_timestep_out_of_order_is_refused():
    transformer, (z, text, _) = ours().transformer, inputs(VIDEO)
    transformer.scheduler.set_timesteps(5)
    transformer(z, torch.tensor([800]), text)
    with pytest.raises(ValueError, match="call 1 was planned for the number t=600, got 400"):
        transformer(z, torch.tensor([400]), text)
    with pytest.raises(ValueError, match="a run begins at the scheduler's first timestep, 800, got 600"):
        transformer(z, torch.tensor([600]), text, enable_temporal_attentions=False)
    with pytest.raises(ValueError, match=r"one timestep for the whole batch, got \[600, 800\]"):
        transformer(z, torch.tensor([800, 600]), text)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_model_of_another_architecture_is_refused(preset):
    with torch.device("meta"):
        model = DiT(replace(PRESETS[preset], depth=1, dim=48, heads=2))
    if preset.startswith(("latte-t2v", "opensora-plan")):  # those of Open-Sora-Plan are LatteT2V's, of other sizes
        assert LatteTransformer(model, DDIMScheduler()).config.in_channels == 4
        return
    with pytest.raises(ValueError, match=r"LattePipeline runs models like the preset 'latte-t2v', \w+=.*, got "):
        LatteTransformer(model, DDIMScheduler())


def test_a_model_with_other_positions_is_refused():
    latte = PRESETS["latte-t2v"]
    with torch.device("meta"):
        model = DiT(replace(latte, depth=1, positions=replace(latte.positions, time="branch")))
    with pytest.raises(ValueError, match=r"'latte-t2v', positions.time='stream', got 'branch'"):
        LatteTransformer(model, DDIMScheduler())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"activation_fn": "gelu"}, "of activation_fn='gelu-approximate', got 'gelu'"),
        ({"norm_eps": 1e-5}, "of norm_eps=1e-06, got 1e-05"),
        ({"norm_elementwise_affine": True}, "not those of LatteT2V: 16 unknown"),
        ({"attention_bias": False}, "not those of LatteT2V: 18 missing"),
    ],
)
def test_a_transformer_of_another_architecture_is_refused(shape, message):
    transformer = theirs(**shape).transformer
    with pytest.raises(ValueError, match=message):
        LatteTransformer.from_diffusers(transformer, DDIMScheduler())
