"""A run over several ranks is the run of one rank, with less communication the more is broadcast."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from families import FAMILIES, error
from minidit import parallel, pipeline, samplers, sampling
from minidit.broadcast import RECIPES, Broadcast, Pyramid, Window, plan
from minidit.cost import Cost, cost
from minidit.model import DiT
from minidit.parallel import Layout, Speed, choose_axis, seconds, shares, traffic
from minidit.presets import PRESETS
from ranks import SIZES, Ranks
from strategies import plans

OPENSORA = PRESETS["opensora-1.2"]
PREDICTIONS = {name: pipeline.predict(OPENSORA, torch.bfloat16, RECIPES[name]) for name in ("none", "pab-246")}
PLAIN, PAB, PRICE = PREDICTIONS["none"].plan, PREDICTIONS["pab-246"].plan, PREDICTIONS["none"].cost
TOKENS = (15, 1590)  # of 480p, two seconds
CONFIGS = {family.preset: replace(family.config, depth=1, dim=24, heads=2, mlp_ratio=1.0) for family in FAMILIES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


# the paper's table


def gigabytes(table, axis="frames"):
    return traffic(table, PRICE, TOKENS, axis=axis, ranks=8).mean / 1e9


def test_a_run_hands_over_as_many_bytes_as_the_paper_says():
    assert gigabytes(PLAIN) == pytest.approx(23.08, abs=0.005)
    assert gigabytes(PAB) == pytest.approx(13.08, abs=0.005)
    assert gigabytes(PAB) / gigabytes(PLAIN) == pytest.approx(17 / 30)


def test_sharing_places_saves_less_because_spatial_attention_is_broadcast_less():
    assert gigabytes(PAB, "places") / gigabytes(PLAIN, "places") == pytest.approx(21 / 30)


def test_the_axis_is_the_one_that_is_done_earlier():
    slow, fast = Speed(link=10e9), Speed(link=1e15)
    assert choose_axis(PAB, PRICE, TOKENS, ranks=8, speed=slow) == "frames"  # fewer bytes
    assert choose_axis(PAB, PRICE, TOKENS, ranks=8, speed=fast) == "places"  # 199 of 1590 are more even than 2 of 15
    assert choose_axis(PAB, PRICE, TOKENS, ranks=5, speed=fast) == "frames"  # both are even
    computing, communicating = seconds(PAB, PRICE, TOKENS, axis="frames", ranks=8, speed=Speed(1e12, 1e9))
    assert computing == pytest.approx(PAB.flops(PRICE.parts, PRICE.rest) / 1e12 * 2 / 15)
    busiest = 17 * 28 * 2 * 1152 * 2 * (2 * 1590 + 15 * 199)
    gathers = 30 * 8 * 2 * 32 * 2 * 2 * 1590
    assert communicating == pytest.approx((busiest + gathers) * 7 / 8 / 1e9)


def test_half_of_a_batch_costs_half():
    for config in PRESETS.values():
        latent = pipeline.schedule(config, torch.bfloat16)[1]
        four, two = (cost(config, batch=b, latent=latent, caption_length=5, itemsize=2) for b in (4, 2))
        assert four.share(2) == two and four.share(1) == four


@given(st.integers(0, 100), st.integers(1, 12))
def test_shares_are_even_and_add_up(size, ranks):
    own = shares(size, ranks)
    assert sum(own) == size and len(own) == ranks and max(own) - min(own) <= 1
    assert sorted(own, reverse=True) == list(own)


@given(plans, st.integers(1, 9), st.integers(1, 30), st.sampled_from(["frames", "places"]), st.integers(2, 8))
def test_all_ranks_together_hand_over_all_tokens_twice_a_computed_attention(table, t, s, axis, ranks):
    price = Cost({}, 0, 0, update_bytes=40 * t * s, output_bytes=24 * t * s)
    found = traffic(table, price, (t, s), axis=axis, ranks=ranks)
    assert sum(found.sent) == found.trades * 40 * t * s
    assert found.gathers == len(table)


# the same video


@cache
def built(preset):
    """A model with random weights, the same on every rank."""
    torch.manual_seed(0)
    model = DiT(CONFIGS[preset]).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


def latents(preset, latent, pyramid, guidance, frames=None, layout=parallel.ALONE, **other):
    """What six steps make."""
    model, generator = built(preset), torch.Generator().manual_seed(1)
    config = model.config
    sampler = samplers.RectifiedFlow(6, 1.0, "velocity")
    z = torch.randn(1, config.in_channels, *latent, generator=generator)
    text = torch.randn(1, config.caption_length, config.caption_dim, generator=generator)
    if not config.caption_dim:
        text = torch.tensor([3]) if config.classes else None
    options = dict(
        z=z,
        text=text,
        plan=plan(pyramid, samplers.planned(sampler, config, model.dtype), model.sites),
        sampler=sampler,
        guidance=guidance if text is not None else 1.0,
        height=32,
        width=48,
        fps=8,
        null=text[0] / 2 if config.caption_dim and not config.null_caption else None,
        frames=frames,
        noise=lambda z: torch.randn(z.shape, generator=generator),
        layout=layout,
    )
    return sampling.sample(model, **{**options, **other})


class Counted:
    """Counts what goes through torch.distributed, on the tensors that are handed to it, but for digests."""

    def __enter__(self):
        self.nbytes, self.collectives, self.before = 0, 0, dist.all_to_all_single

        def counting(output, given, *args, **kwargs):
            if given.is_floating_point():
                self.nbytes, self.collectives = self.nbytes + given.nbytes, self.collectives + 1
            return self.before(output, given, *args, **kwargs)

        dist.all_to_all_single = counting
        return self

    def __exit__(self, *_):
        dist.all_to_all_single = self.before


def shared(groups, pairs, size, axis, preset, latent, pyramid, guidance, frames=None):
    """A rank's part of a run: the latents, and what it communicated."""
    with Counted() as counted:
        made = latents(preset, latent, pyramid, guidance, frames, Layout(groups[size], axis=axis))
    return made, (counted.nbytes, counted.collectives)


ALWAYS = Window(-1, 1001)
MIXED = Pyramid(spatial=Broadcast(2, ALWAYS), temporal=Broadcast(3, ALWAYS), cross=Broadcast(4, ALWAYS))


@pytest.mark.parametrize("axis", ["frames", "places"])
@pytest.mark.parametrize("preset", CONFIGS)
def test_every_architecture_makes_the_same_latents_on_two_ranks(ranks, preset, axis):
    latent = (5, 6, 6) if CONFIGS[preset].positions.space == "stored" else (3, 4, 6)
    alone = latents(preset, latent, MIXED, 3.0)
    for made, _ in ranks.run(shared, 2, 2, axis, preset, latent, MIXED, 3.0):
        assert error(made, alone) < 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_so_does_every_recipe(ranks, name):
    alone = latents("opensora-1.2", (3, 5, 3), RECIPES[name], 3.0)
    for made, _ in ranks.run(shared, 3, 3, None, "opensora-1.2", (3, 5, 3), RECIPES[name], 3.0):
        assert error(made, alone) < 1e-5


sizes = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
always = st.builds(Broadcast, st.integers(1, 4), st.just(ALWAYS))
fast = st.builds(Pyramid, spatial=always, temporal=always, cross=always, mlp=always)


@settings(max_examples=40)
@given(st.sampled_from(SIZES), st.sampled_from(["frames", "places"]), sizes, fast, st.sampled_from([1.0, 3.0]))
@example(8, "frames", (3, 4, 6), MIXED, 3.0)  # more ranks than frames
@example(4, "places", (5, 1, 3), MIXED, 1.0)  # more ranks than places
@example(2, "frames", (1, 3, 3), MIXED, 3.0)  # one frame
def test_a_run_makes_the_same_latents_and_communicates_what_was_predicted(ranks, size, axis, latent, pyramid, guidance):
    model = built("opensora-1.2")
    answers = ranks.run(shared, size, size, axis, "opensora-1.2", latent, pyramid, guidance)
    alone = latents("opensora-1.2", latent, pyramid, guidance)
    assert all(error(made, alone) < 1e-5 for made, _ in answers)
    times = samplers.planned(samplers.RectifiedFlow(6, 1.0, "velocity"), model.config, model.dtype)
    said = traffic(
        plan(pyramid, times, model.sites),
        cost(model.config, batch=1 if guidance == 1 else 2, latent=latent, caption_length=12, itemsize=4),
        model.config.tokens(latent),
        axis=axis,
        ranks=size,
    )
    everything = [sum(both) for both in zip(said.sent, said.gathered, strict=True)]
    assert [counts for _, counts in answers] == [(nbytes, said.trades + said.gathers) for nbytes in everything]


@pytest.mark.parametrize("axis", ["frames", "places"])
@pytest.mark.parametrize("preset", ["opensora-1.2", "opensora-1.1"])
def test_frame_masks_are_shared_out_with_the_frames(ranks, preset, axis):
    frames = torch.tensor([[0.0, 1.0, 0.5]])
    alone = latents(preset, (3, 4, 6), MIXED, 3.0, frames)
    for made, _ in ranks.run(shared, 2, 2, axis, preset, (3, 4, 6), MIXED, 3.0, frames):
        assert error(made, alone) < 1e-5


def masked(groups, pairs, size, axis):
    """What one call makes of latents some of which no attention looks at, in every frame others."""
    model, generator = built("opensora-1.2"), torch.Generator().manual_seed(2)
    config, latent = model.config, (3, 4, 6)
    z = torch.randn(2, config.in_channels, *latent, generator=generator)
    text = torch.randn(2, config.caption_length, config.caption_dim, generator=generator)
    valid = torch.rand(2, *latent, generator=generator) < 0.2
    group = Layout(groups[size], axis=axis) if groups else parallel.ALONE
    price = cost(config, batch=2, latent=latent, caption_length=12, itemsize=4)
    given = group.shares(plan(None, (500.0,), model.sites), price, config.tokens(latent))
    fps = torch.full((2,), 8.0)
    prepared = model.prepare(text, None, latent=latent, height=32, width=48, fps=fps, valid=valid, shares=given)
    everything = model.prepare(text, None, latent=latent, height=32, width=48, fps=fps, shares=given)
    return model(z, 500.0, prepared), model(z, 500.0, everything)


@pytest.mark.parametrize("axis", ["frames", "places"])
def test_masked_latents_are_shared_out_with_the_frames(ranks, axis):
    alone, unmasked = masked(None, None, 1, axis)
    assert error(alone, unmasked) > 1e-3
    for made, _ in ranks.run(masked, 2, 2, axis):
        assert error(made, alone) < 1e-5


def halved(groups, pairs, preset, latent, pyramid):
    """Four ranks: two halves of guidance, two ranks each. Ranks 0 and 1 have the captions."""
    rank = dist.get_rank()
    sequence, guidance = pairs[(0, 1) if rank < 2 else (2, 3)], pairs[(0, 2) if rank % 2 == 0 else (1, 3)]
    return latents(preset, latent, pyramid, 3.0, layout=Layout(sequence, guidance))


@pytest.mark.parametrize("preset", ["opensora-1.2", "latte-t2v", "latte-ucf101"])
def test_the_halves_of_guidance_may_be_on_ranks_of_their_own(ranks, preset):
    latent = (5, 6, 6) if CONFIGS[preset].positions.space == "stored" else (3, 4, 6)
    alone = latents(preset, latent, MIXED, 3.0)
    for made in ranks.run(halved, 4, preset, latent, MIXED):
        assert error(made, alone) < 1e-5


# what goes wrong


def told(groups, pairs, size, name):
    """Rank 1 is given another one."""
    config = CONFIGS["opensora-1.2"]
    others = {
        "z": torch.zeros(1, config.in_channels, 3, 4, 6),
        "text": torch.zeros(1, config.caption_length, config.caption_dim),
        "lengths": torch.tensor([config.caption_length]),
        "null": torch.zeros(config.caption_length, config.caption_dim),
        "frames": torch.ones(1, 3),
        "guidance": 3.0,
        "two_calls": True,
        "height": 64,
        "width": 64,
        "fps": 30,
    }
    other = {name: others[name]} if name in others and dist.get_rank() else {}
    pyramid = Pyramid(cross=Broadcast(2, Window(0, 1000))) if name == "plan" and dist.get_rank() else None
    guidance = other.pop("guidance", 4.0)
    try:
        latents("opensora-1.2", (3, 4, 6), pyramid, guidance, layout=Layout(groups[size]), **other)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "name", ["z", "text", "lengths", "null", "guidance", "two_calls", "height", "width", "fps", "plan", "frames"]
)
def test_ranks_that_were_given_different_things_say_which(ranks, name):
    message = f"the ranks of a run were given different {name}: start all alike"
    assert ranks.run(told, 2, 2, name) == [message, message]


def test_a_world_that_does_not_divide_is_refused(ranks):
    assert set(ranks.run(undivided, 8)) == {
        "8 ranks do not divide into 3 x 2 groups (data x guidance): start a multiple of 6"
    }


def undivided(groups, pairs):
    try:
        parallel.layout(torch.device("cpu"), guidance=2, data=3)
    except ValueError as error:
        return str(error)


def laid_out(groups, pairs):
    own, at = parallel.layout(torch.device("cpu"), guidance=2, data=2, axis="places")
    return dist.get_world_size(own.sequence), own.half, dist.get_rank(own.sequence), at, own.axis


def test_a_layout_is_data_groups_of_guidance_halves_of_sequence_ranks(ranks):
    answers = ranks.run(laid_out, 8)
    assert answers == [(2, half, rank, at, "places") for at in (0, 1) for half in (0, 1) for rank in (0, 1)]
