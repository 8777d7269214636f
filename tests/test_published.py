"""Broadcast on every published architecture, with its own sampler and the paper's recipe for it, at tiny size."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from families import FAMILIES, recipe
from minidit import pipeline, sampling
from minidit.broadcast import RECIPES, Act, Broadcast, Pyramid, Window, plan
from minidit.cache import Cache
from minidit.model import DiT
from minidit.presets import PRESETS

FEWER = {"latte": 60, "latte-ucf101": 60, "opensora-plan-1.0-65x512x512": 60}  # steps, than 250: a test of seconds
SIZES = {"latte": (5, 48, 48), "latte-ucf101": (5, 48, 48), "opensora-1.2": (17, 32, 48)}  # frames, height, width
CONFIGS = {
    family.preset: pipeline.asked(
        replace(family.config, depth=1, dim=24, heads=2, mlp_ratio=1.0),
        **dict(zip(("frames", "height", "width"), SIZES.get(family.preset, (3, 32, 48)), strict=True)),
        steps=FEWER.get(family.preset),
    )
    for family in FAMILIES
}


def built(config):
    """A model with random weights, the same ones each time."""
    torch.manual_seed(0)
    model = DiT(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


def run(model, pyramid, on_step=None):
    """The latents of one caption or class, after all the model calls that the published sampler makes."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    sampler, latent = pipeline.schedule(config, model.dtype)
    z = torch.randn(1, config.in_channels, *latent, generator=generator)
    text = torch.randn(1, config.caption_length, config.caption_dim, generator=generator)
    if not config.caption_dim:
        text = torch.tensor([3]) if config.classes else None
    return sampling.sample(
        model,
        z,
        text,
        plan=pipeline.predict(config, model.dtype, pyramid).plan,
        sampler=sampler,
        guidance=config.sampling.guidance,
        height=config.sampling.height,
        width=config.sampling.width,
        fps=config.sampling.fps,
        null=text[0] / 2 if config.caption_dim and not config.null_caption else None,
        noise=lambda z: torch.randn(z.shape, generator=generator),
        on_step=on_step,
    )


@pytest.mark.parametrize("preset", CONFIGS)
def test_the_papers_recipe_computes_and_keeps_what_the_plan_says(preset):
    model, pyramid, peaks = built(CONFIGS[preset]), RECIPES[recipe(preset)], []
    expected, counts = pipeline.predict(model.config, model.dtype, pyramid), Counter()
    for site, sublayer in zip(model.sites, model.sublayers, strict=True):
        sublayer.register_forward_hook(lambda *_, site=site: counts.update([site]))
    # attention as two matrix products, since PyTorch does not count the CPU's own kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made = run(model, pyramid, lambda step: peaks.append(step.peak_bytes))
    assert made.isfinite().all() and len(peaks) == len(expected.plan)
    columns = zip(*expected.plan.acts, strict=True)
    reused = {site: column.count(Act.REUSE) for site, column in zip(model.sites, columns, strict=True)}
    assert all(reused[site] for site in model.sites if site.part != "mlp")
    assert counts == {site: len(expected.plan) - reused[site] for site in model.sites}
    assert peaks[-1] == expected.peak_bytes
    assert counter.get_total_flops() == expected.flops < expected.flops_without


@pytest.mark.parametrize("preset", CONFIGS)
def test_a_call_that_reuses_everything_is_bitwise_the_one_that_stored_it(preset):
    model, always = built(CONFIGS[preset]), Broadcast(2, Window(-1, 1001))
    latent = pipeline.schedule(model.config, model.dtype)[1]
    x, text = torch.randn(1, 4, *latent), torch.randn(1, model.config.caption_length, model.config.caption_dim)
    if not model.config.caption_dim:
        text = torch.tensor([3]) if model.config.classes else None
    cond = model.prepare(text, None, latent=latent, height=32, width=48, fps=torch.tensor([8.0]))
    table = plan(Pyramid(spatial=always, temporal=always, cross=always, mlp=always), [500.0, 500.0], model.sites)
    cache, computed = Cache(table), model(x, 500.0, cond)
    assert computed.equal(model(x, 500.0, cond, table[0], cache))
    assert computed.equal(model(x, 500.0, cond, table[1], cache))
    assert not cache.nbytes


@pytest.mark.parametrize(
    ("preset", "calls", "reused"),
    [
        ("opensora-1.2", 30, {"spatial": 9, "temporal": 13, "cross": 14}),
        ("latte-t2v", 50, {"spatial": 17, "temporal": 23, "cross": 28}),
        ("opensora-plan-1.1-65x512x512", 159, {"spatial": 63, "temporal": 94, "cross": 104}),
    ],
)
def test_the_published_runs_reuse_as_often_as_in_the_papers_own_engine(preset, calls, reused):
    table = pipeline.predict(PRESETS[preset], torch.bfloat16, RECIPES[recipe(preset)]).plan
    assert len(table) == calls
    columns = dict(zip(table.sites, zip(*table.acts, strict=True), strict=True))
    counts = {(site.part, column.count(Act.REUSE)) for site, column in columns.items() if site.part in reused}
    assert counts == set(reused.items())
