"""What the published models are sampled with, as their authors' code has it: the numbers of another reading of it."""

import pytest
import torch

from minidit import pipeline
from minidit.presets import PRESETS

RUNS = {  # method, guided channels, guidance, model calls; frames, height, width, fps; latents
    "opensora-1.2": ("rectified-flow", 4, 7.0, 30, (51, 480, 854, 24), (15, 60, 106)),
    "opensora-1.1": ("iddpm-float32", 3, 7.0, 100, (16, 240, 426, 24), (16, 30, 53)),
    "opensora-1.0-16x512x512": ("iddpm", 3, 7.0, 100, (16, 512, 512, 8), (16, 64, 64)),
    "opensora-1.0-16x256x256": ("iddpm", 3, 7.0, 100, (16, 256, 256, 8), (16, 32, 32)),
    "latte": ("iddpm", 4, 1.0, 250, (16, 256, 256, 8), (16, 32, 32)),
    "latte-ucf101": ("iddpm", 4, 7.0, 250, (16, 256, 256, 8), (16, 32, 32)),
    "latte-t2v": ("ddim", 4, 7.5, 50, (16, 512, 512, 8), (16, 64, 64)),
    "opensora-plan-1.1-65x512x512": ("pndm", 4, 7.5, 159, (65, 512, 512, 24), (17, 64, 64)),
    "opensora-plan-1.1-221x512x512": ("pndm", 4, 7.5, 159, (221, 512, 512, 24), (56, 64, 64)),
    "opensora-plan-1.0-65x512x512": ("pndm", 4, 7.5, 259, (65, 512, 512, 24), (17, 64, 64)),
    "opensora-plan-1.0-65x256x256": ("pndm", 4, 7.5, 259, (65, 256, 256, 24), (17, 32, 32)),
    "opensora-plan-1.0-17x256x256": ("pndm", 4, 7.5, 259, (17, 256, 256, 24), (5, 32, 32)),
}
TOKENS = {"opensora-1.2": 300, "opensora-1.1": 200, "opensora-1.0": 120, "latte-t2v": 120, "opensora-plan-1.1": 300}
TOKENS |= {"opensora-plan-1.0": 120, "latte": 0}


@pytest.mark.parametrize("name", PRESETS)
def test_a_published_model_is_sampled_as_its_authors_do(name):
    config = PRESETS[name]
    run, (sampler, latent) = config.sampling, pipeline.schedule(config, torch.bfloat16)
    video = (run.frames, run.height, run.width, run.fps)
    assert (run.method, run.guided, run.guidance, len(sampler.timesteps), video, latent) == RUNS[name]
    assert config.caption_length == next(tokens for start, tokens in TOKENS.items() if name.startswith(start))
    # Open-Sora casts the time to the model's dtype before it embeds it, learned a null caption, and its first release
    # takes even latents alone
    ours = name.startswith("opensora-1")
    assert (config.rounds_time, config.null_caption) == (ours, ours)
    assert (config.odd == "refuse") == (name.startswith("opensora-1.0") or config.positions.space == "stored")


def span(video_length, version):
    """Open-Sora-Plan: how many frames of the latents are one position."""
    if version == "1.0":
        return max(video_length // 5, 1)
    return max((video_length - video_length % 2) // 16, 1)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("opensora-plan")])
def test_positions_of_open_sora_plan_follow_from_the_size_it_was_trained_on(name):
    places, (frames, height, _) = PRESETS[name].positions, RUNS[name][-1]
    version = name.removeprefix("opensora-plan-").partition("-")[0]
    assert (places.space, places.base, places.scale) == ("grid", height // 2, max(height // 64, 1))
    assert (places.time, places.pace) == ("stream", span(frames, version))


@pytest.mark.parametrize(
    ("name", "space", "base", "scale", "time"),
    [
        ("opensora-1.2", "area", 512, 1.0, "rope-after-norm"),
        ("opensora-1.1", "area", 512, 1.0, "rope-before-norm"),
        ("opensora-1.0-16x512x512", "grid", None, 1.0, "branch"),
        ("opensora-1.0-16x256x256", "grid", None, 0.5, "branch"),
        ("latte", "stored", 256, 1.0, "stored"),
        ("latte-ucf101", "stored", 256, 1.0, "stored"),
        ("latte-t2v", "grid", 32, 1.0, "stream"),
    ],
)
def test_positions_of_the_other_models_are_their_authors(name, space, base, scale, time):
    places = PRESETS[name].positions
    assert (places.space, places.base, places.scale, places.time, places.pace) == (space, base, scale, time, 1.0)
    assert places.frames == (16 if time == "stored" else None)
