import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from families import error, of_batch, stage
from minidit.broadcast import Broadcast, Pyramid, Window, plan
from minidit.cache import Cache
from minidit.model import DiT
from minidit.presets import PRESETS
from minidit.weights.opensora import stdit3
from minidit.weights.rules import apply

TESTS = Path(__file__).parent
CONFIG = replace(
    PRESETS["opensora-1.2"], depth=2, dim=72, heads=4, mlp_ratio=2.0, caption_dim=32, caption_length=12
)  # of tests/goldens/stdit3_a.json
CASES = json.loads((TESTS / "goldens/stdit3_a.json").read_text())["cases"]
SIZE = {"height": 480, "width": 854}


@pytest.fixture(scope="module")
def golden():
    return load_file(TESTS / "goldens/stdit3_a.safetensors")


@pytest.fixture(scope="module")
def model(golden):
    upstream = {name[2:]: tensor.float() for name, tensor in golden.items() if name.startswith("w/")}
    model = DiT(CONFIG).eval().requires_grad_(False)
    model.load_state_dict(apply(stdit3(CONFIG), upstream))
    return model


def run_case(model, golden, case):
    """The model on a golden's inputs -> its output, and what was prepared."""
    given = {name.split("/")[2]: tensor for name, tensor in golden.items() if name.startswith(f"case{case}/in/")}
    x = given["x"]
    lengths = given["mask"].sum(1) if "mask" in given else None
    cond = model.prepare(
        given["y"][:, 0],
        lengths if lengths is None else of_batch(lengths, len(x)),
        latent=tuple(x.shape[2:]),
        height=given["height"][0].item(),
        width=given["width"][0].item(),
        fps=of_batch(given["fps"], len(x)),
    )
    mask = given["x_mask"].bool() if "x_mask" in given else None
    return model(x, given["timestep"], cond, frame_mask=mask), cond


def prepared(model, x, lengths=None, fps=24.0):
    torch.manual_seed(1)
    text = torch.randn(len(x), CONFIG.caption_length, CONFIG.caption_dim)
    return model.prepare(text, lengths, latent=tuple(x.shape[2:]), fps=torch.full((len(x),), fps), **SIZE)


# the original's numbers


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case["note"].split(",")[0] for case in CASES])
def test_the_output_is_that_of_the_original(model, golden, case):
    out, _ = run_case(model, golden, case)
    assert out.shape == golden[f"case{case}/out/out"].shape
    assert error(out, golden[f"case{case}/out/out"]) < 2e-5


def test_every_stage_on_the_way_is_that_of_the_original(model, golden):
    watched = {
        "x_embedder": model.patch,
        "t_embedder": model.timestep,
        "fps_embedder": model.condition.fps,
        "t_block": model.modulation,
        "y_embedder_all_tokens": model.caption,
        "spatial_block_0": model.blocks[0]["mlp"],
        "temporal_block_0": model.blocks[1]["mlp"],
        "spatial_block_1": model.blocks[2]["mlp"],
        "temporal_block_1": model.blocks[3]["mlp"],
        "final_layer": model.final,
    }
    stages = {}

    def watch(name):
        def hook(module, args, out):
            stages[name] = stage(out)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
    try:
        _, cond = run_case(model, golden, 0)
    finally:
        for hook in hooks:
            hook.remove()
    stages["pos_emb"] = cond.positions
    theirs = {name.split("/")[2]: tensor for name, tensor in golden.items() if name.startswith("case0/mid/")}
    packed = theirs.pop("y_packed")[0]
    errors = {name: error(stages[name].reshape(out.shape), out) for name, out in theirs.items()}
    assert len(errors) == 11 and max(errors.values()) < 2e-5, errors
    lengths = cond.contexts[1][1].tolist()
    rows = torch.cat([text[:length] for text, length in zip(stages["y_embedder_all_tokens"], lengths, strict=True)])
    assert error(rows, packed) < 2e-5


def test_the_published_model_has_as_many_elements_as_its_manifest():
    manifest = json.loads((TESTS / "manifests/opensora_v12_stdit3_xl2.json").read_text())
    with torch.device("meta"):
        state = DiT(PRESETS["opensora-1.2"]).state_dict()
    theirs = sum(torch.Size(shape).numel() for shape, _ in manifest["tensors"].values())
    assert sum(tensor.numel() for tensor in state.values()) == theirs == 1_208_872_772


# what a forward means


def test_a_lone_frame_has_no_place_in_time(model):
    x = torch.randn(2, 4, 1, 4, 6)
    cond = prepared(model, x)
    rope = cond.contexts[3].rope  # of the first temporal attention
    assert torch.equal(rope.cos, torch.ones_like(rope.cos)) and torch.equal(rope.sin, torch.zeros_like(rope.sin))
    assert model(x, 500.0, cond).shape == (2, 8, 1, 4, 6)


@pytest.mark.parametrize(("height", "width"), [(5, 6), (4, 7), (5, 7), (1, 1)])
def test_latents_that_do_not_fill_their_last_patches_are_filled_with_zeros(model, height, width):
    x = torch.randn(1, 4, 2, height, width)
    full = F.pad(x, (0, width % 2, 0, height % 2))
    out = model(x, 500.0, prepared(model, x))
    assert out.shape == (1, 8, 2, height, width)
    assert torch.equal(out, model(full, 500.0, prepared(model, full))[..., :height, :width])


def test_all_frames_noisy_is_no_frame_mask(model):
    x = torch.randn(2, 4, 3, 4, 6)
    cond = prepared(model, x)
    assert torch.equal(model(x, 500.0, cond, frame_mask=torch.ones(2, 3).bool()), model(x, 500.0, cond))


def test_a_number_is_the_time_of_every_sample(model):
    x = torch.randn(2, 4, 3, 4, 6)
    cond = prepared(model, x)
    assert torch.equal(model(x, 300.0, cond), model(x, torch.tensor([300.0, 300.0]), cond))


def test_samples_of_a_batch_do_not_see_each_other(model):
    x, lengths = torch.randn(2, 4, 3, 4, 6), torch.tensor([3, 12])
    cond = prepared(model, x, lengths)
    x2, t2 = x.clone(), torch.tensor([300.0, 900.0])
    x2[1] += 1
    one, other = model(x, torch.tensor([300.0, 300.0]), cond), model(x2, t2, cond)
    torch.testing.assert_close(one[0], other[0])
    assert (one[1] - other[1]).abs().max() > 0.1


def test_words_after_a_captions_length_do_not_count(model):
    x, size = torch.randn(1, 4, 2, 4, 6), {"latent": (2, 4, 6), "fps": torch.tensor([24.0]), **SIZE}
    text = torch.randn(1, 12, 32)
    longer, shorter = model.prepare(text, torch.tensor([5]), **size), model.prepare(text[:, :5], None, **size)
    torch.testing.assert_close(model(x, 500.0, longer), model(x, 500.0, shorter))


def test_a_forward_leaves_no_state_in_any_module(model):
    window = Window(-1, 1001)
    rule = Broadcast(2, window)
    table = plan(Pyramid(spatial=rule, temporal=rule, cross=rule, mlp=rule), [900.0, 600.0, 300.0], model.sites)
    x, cache, before = torch.randn(1, 4, 2, 4, 6), Cache(table), pickle.dumps(model)
    cond = prepared(model, x)
    for i in range(2):  # stops where updates are held
        model(x, table[i].timestep, cond, table[i], cache, torch.tensor([[True, False]]))
    assert pickle.dumps(model) == before


# even as many places in other rows, and a lone frame, which any rotary table fits
@pytest.mark.parametrize("size", [(2, 4, 8), (2, 6, 4), (3, 4, 6), (1, 4, 6)])
def test_latents_of_another_size_than_prepared_are_refused(model, size):
    cond = prepared(model, torch.randn(1, 4, 2, 4, 6))
    with pytest.raises(ValueError, match=re.escape(f"latents of size {size}, but prepared for (2, 4, 6)")):
        model(torch.randn(1, 4, *size), 500.0, cond)
