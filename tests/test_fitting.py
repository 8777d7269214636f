"""What is refused for its memory is told what would fit; here whatever is told is tried."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
import bench_parallel
import bench_stages
from families import FAMILIES
from minidit import memory
from minidit.broadcast import PAB_246, RECIPES
from minidit.decoders import OpenSora
from minidit.fitting import Run, fit, model, peaks
from minidit.opensora_vae import OPENSORA_VAE_12, OpenSoraVAE
from minidit.options import size
from minidit.parallel import halves, shares
from minidit.pipeline import Pipeline, asked, predict, schedule
from minidit.stages import Classes, Pixels, Prompts

CPU = torch.device("cpu")
GPU = torch.device("cuda")
STEPS, LATER, STAGES, ROWS = (
    json.loads((Path(__file__).parents[1] / "benchmarks" / f"{name}.json").read_text())["rows"]
    for name in ("steps", "steps_h200", "stages", "parallel")
)
WAY = ("case", "recipe", "ranks", "guidance", "shared")
PARALLEL = list({tuple(row[name] for name in WAY): row for row in ROWS}.values())
FAMILY = next(family for family in FAMILIES if family.preset == "opensora-1.1")
BASE = replace(FAMILY.config, dim=192, heads=4, depth=2, caption_length=8)


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(BASE, torch.float32, Classes(BASE), lambda: pytest.fail("a model was loaded"), Pixels(), CPU)


@pytest.fixture
def run():
    return Run(config=asked(BASE, frames=8, height=128, width=192, steps=9), pyramid=PAB_246)


def held(run):
    """Bytes of sampling, and of them those that broadcast keeps."""
    return model(run, torch.float32, CPU)


def changed(run, option):
    """The run that an option of the message asks for."""
    name, _, value = option.rpartition(" ") if option[-1].isdecimal() else ("", "", option)
    match name or value:
        case "--frames":
            return replace(run, config=asked(run.config, frames=int(value)))
        case "--size":
            height, width = size(value)
            return replace(run, config=asked(run.config, height=height, width=width))
        case "torchrun with":
            return replace(run, ranks=int(value), halves=halves(int(value), run.config.sampling.guidance))
        case "--pyramid none":
            return replace(run, pyramid=None)
        case "--two-calls":
            return replace(run, two_calls=True)
        case "--offload":
            return replace(run, offload=True)
        case "--pyramid none --two-calls --offload together":
            return replace(run, pyramid=None, two_calls=True, offload=True)
    pytest.fail(f"unknown option {option}")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (0.95, "--frames 7, --size 120x176, --pyramid none, --two-calls, --offload, torchrun with 2 ranks"),
        (0.5, "--frames 2, --size 64x96, --pyramid none --two-calls --offload together, torchrun with 4 ranks"),
    ],
)
def test_what_is_said_to_fit_fits_and_a_frame_or_step_of_the_size_more_does_not(pipe, run, part, said):
    free = part * sum(held(run))
    with pytest.raises(ValueError, match="the model takes .* kept by broadcast, free are .*: .* would fit$") as error:
        fit(pipe, run, free)
    options = re.split(", | or ", str(error.value).rpartition(": ")[2].removesuffix(" would fit"))
    options = [option.removesuffix(" ranks") for option in options]
    assert options == [option.removesuffix(" ranks") for option in said.split(", ")]
    for option in options:
        assert fit(pipe, changed(run, option), free)[0]["model"] <= free
    frames, (height, _) = int(options[0].split()[1]), size(options[1].split()[1])
    for more in ({"frames": frames + 1}, {"height": height + 8, "width": (height + 8) * 3 // 2}):
        assert peaks(pipe, replace(run, config=asked(run.config, **more)))["model"] > free


def test_a_rank_with_a_half_of_guidance_holds_what_one_of_two_calls_does_and_keeps_half(run):
    (_, kept), (one_call, both) = held(run), held(replace(run, two_calls=True))
    assert kept == both > 0
    one, half = held(replace(run, ranks=2, halves=2))
    assert half == kept // 2
    # of two calls, each is conditioned on something of its own: the captions' keys and values of every layer
    crosses, config = sum(site.part == "cross" for site in BASE.sites), run.config
    assert one_call - one >= crosses * 2 * config.caption_length * config.dim * torch.float32.itemsize
    four, tokens = replace(run, ranks=4, halves=2), replace(run, ranks=2)
    assert sum(held(four)) < sum(held(tokens)) < sum(held(run))


def test_where_nothing_fits_there_is_the_cpu(pipe, run):
    with pytest.raises(ValueError, match=": only --device cpu would fit$"):
        fit(pipe, run, 1e5)


def test_a_model_of_one_size_is_offered_no_other():
    config = next(family for family in FAMILIES if family.preset == "latte-ucf101").config
    pipe = Pipeline(config, torch.float32, Classes(config), lambda: pytest.fail("loaded"), Pixels(), CPU)
    run = Run(config=asked(config, frames=5, height=48, width=48), pyramid=None)
    with pytest.raises(ValueError) as error:
        fit(pipe, run, 0.99 * sum(held(run)))
    assert "--frames" not in str(error.value) and "--size" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"ranks": 4}])
def test_every_layer_after_the_third_is_predicted_to_take_as_much_as_it(options):
    latent, config = schedule(BASE, torch.float32)[1], replace(BASE, depth=5)
    frames, places = (shares(size, options.get("ranks", 1)) for size in config.tokens(latent))
    run = {"dtype": torch.float32, "latent": latent, "batch": 2, "offload": "offload" in options}
    run["shares"] = memory.Alone("places", frames, places) if "ranks" in options else None
    assert memory.of_model(config, **run, cache_bytes=7) == memory._of_model(config, **run, kernels=False, calls=1) + 7


@pytest.mark.parametrize("row", [*STEPS, *LATER], ids=lambda row: f"{row['case']} {row['recipe']} {row['impl']}")
def test_the_model_is_predicted_to_hold_what_was_measured(row):
    config, pyramid = bench.CASES[row["case"]].config, RECIPES[row["recipe"]]
    if row["impl"] == "auto":
        found = sum(model(Run(config=config, pyramid=pyramid), torch.bfloat16, GPU))
    else:
        latent, keeps = schedule(config, torch.bfloat16)[1], predict(config, torch.bfloat16, pyramid).peak_bytes
        found = memory.of_model(config, torch.bfloat16, latent=latent, batch=2, cache_bytes=keeps) + memory.LIBRARIES
    assert 1 <= found / 2**30 / row["peak_gib"] < 1.05


@pytest.mark.parametrize("row", PARALLEL, ids=lambda row: "-".join(str(row[name]) for name in WAY))
def test_each_of_several_ranks_is_predicted_to_hold_what_was_measured(row):
    run = Run(
        config=bench.CASES[row["case"]].config,
        pyramid=RECIPES[row["recipe"]],
        ranks=row["ranks"],
        halves=bench_parallel.GUIDANCE[row["guidance"]],
        axis=row["shared"],
    )
    found = sum(model(run, torch.bfloat16, GPU))
    # with frames shared, a linear layer copies what it is given
    assert 0.998 < found / 2**30 / max(row["peak_gib"]) < (1.11 if row["shared"] == "frames" else 1.03)


def test_stages_are_predicted_to_hold_what_was_measured(tmp_path):
    pytest.importorskip("transformers")
    for row in STAGES:
        config = bench.CASES[row["case"]].config
        folder = bench_stages.t5_folder(tmp_path, bench_stages.T5_XXL)
        with torch.device("meta"):
            decoder = OpenSora(OpenSoraVAE(OPENSORA_VAE_12)).to(torch.bfloat16)
        rules = bench_stages.rules_of(config)
        prompts = Prompts(folder, rules, config.caption_length, config.null_caption, torch.bfloat16)
        pipe = Pipeline(config, torch.bfloat16, prompts, lambda: pytest.fail("loaded"), decoder, GPU)
        found = peaks(pipe, Run(config=config, pyramid=RECIPES[row["recipe"]]))
        for name, stage in row["stages"].items():
            assert 1 <= found[name] / 2**30 / stage["peak_gib"] < (1.2 if name == "decoder" else 1.05)
