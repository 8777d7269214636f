"""The causal VAE computes what Open-Sora-Plan's code computes, from its own weights, and reads its published files."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from families import GOLDENS, error
from minidit.plan_vae import PLAN_1_0, PLAN_1_1, SCALE, Attention, CausalVAE
from minidit.weights.plan_vae import causal_vae, loss
from minidit.weights.rules import DROPPED, KeyMapError, apply, invert

MANIFESTS = GOLDENS.parent / "manifests"
GOLDEN = "osp_causalvae110_a"
SAID = json.loads((GOLDENS / f"{GOLDEN}.json").read_text())
# the original's 32 groups were patched for so few channels
TINY = replace(PLAN_1_1, widths=(8, 8, 16, 16), depth=1, groups=SAID["group_norm_groups"])
FILES = {"opensoraplan_v110_causalvae": (PLAN_1_1, 246_859_499), "opensoraplan_v100_causalvae": (PLAN_1_0, 229_169_895)}
some = settings(max_examples=10)


@cache
def golden():
    return {name: tensor.float() for name, tensor in load_file(GOLDENS / f"{GOLDEN}.safetensors").items()}


def weights():
    return {name.removeprefix("w/"): tensor for name, tensor in golden().items() if name.startswith("w/")}


@cache
def tiny():
    vae = CausalVAE(TINY).requires_grad_(False)
    vae.load_state_dict(apply(causal_vae(TINY), weights()))
    return vae


@cache
def without_norms():
    """What is causal, without what is not."""
    vae = deepcopy(tiny())
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return vae


def video(latents, seed=0):
    """16x16 pixels, as many frames as make so many latents."""
    return torch.randn(1, 3, 4 * latents - 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def changed(x, frame):
    """Other numbers from that frame on."""
    x = x.clone()
    x[:, :, frame:] = -x[:, :, frame:]
    return x


def first_other(a, b):
    """The first frame that is not the same in both, bit for bit."""
    return (a != b).any(0).any(0).any(-1).any(-1).tolist().index(True)


@pytest.mark.parametrize("case", [n for n, said in enumerate(SAID["cases"]) if said["mode"] == "decode"])
def test_a_decoded_video_is_that_of_the_original(case):
    theirs = golden()[f"case{case}/out/x"]
    assert error(tiny().decode(golden()[f"case{case}/in/z"] * SCALE), theirs) < 2e-5


@pytest.mark.parametrize("case", [n for n, said in enumerate(SAID["cases"]) if said["mode"] == "encode"])
def test_latents_are_the_scaled_mean_of_the_original_and_the_moments_are_its(case):
    pixels, theirs = (golden()[f"case{case}/{name}"] for name in ("in/x", "out/moments"))
    assert error(torch.cat(tiny().moments(pixels), 1), theirs) < 2e-5
    assert error(tiny().encode(pixels), 0.18215 * theirs[:, :4]) < 2e-5


@some
@given(kept=st.integers(1, 3), more=st.integers(1, 2))
def test_but_for_the_norms_later_frames_do_not_change_earlier_latents(kept, more):
    pixels, vae = video(kept + more), without_norms()
    frame = 4 * kept - 3  # the first after those of the latents kept
    assert first_other(vae.encode(pixels), vae.encode(changed(pixels, frame))) == kept


@some
@given(latent=st.integers(0, 4))
def test_but_for_the_norms_a_decoded_frame_looks_three_frames_ahead(latent):
    latents, vae = without_norms().encode(video(5)), without_norms()
    own = 4 * latent - 3 if latent else 0  # the first frame of a latent; those of the first two look at no later one
    assert first_other(vae.decode(latents), vae.decode(changed(latents, latent))) == (own if latent < 2 else own - 3)


def test_a_norm_takes_all_frames_together_so_that_the_first_latent_is_not_the_first_frames_alone():
    pixels = video(2)
    assert first_other(tiny().encode(pixels), tiny().encode(changed(pixels, 1))) == 0
    assert error(tiny().encode(pixels)[:, :, :1], tiny().encode(pixels[:, :, :1])) > 1e-3


@pytest.mark.parametrize("latents", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoded_video_has_the_size_and_dtype_of_the_one_encoded(latents, dtype):
    vae, pixels = deepcopy(tiny()).to(dtype), video(latents).to(dtype)
    assert vae.encode(pixels).shape == (1, 4, latents, 2, 2)
    decoded = vae.decode(vae.encode(pixels))
    assert (decoded.shape, decoded.dtype) == (pixels.shape, dtype)


def test_videos_of_a_batch_do_not_mix():
    both = torch.cat((video(2, seed=1), video(2, seed=2)))
    alone = [tiny().encode(one[None]) for one in both]
    assert error(tiny().encode(both), torch.cat(alone)) < 2e-5
    assert error(tiny().decode(torch.cat(alone)), torch.cat([tiny().decode(one) for one in alone])) < 2e-5


@pytest.mark.parametrize("config", [PLAN_1_1, PLAN_1_0], ids=["1.1", "1.0"])
def test_a_latent_is_eight_by_eight_pixels_of_four_frames_after_the_first(config):
    with torch.device("meta"):
        vae = CausalVAE(config)
    latents = vae.encode(torch.empty(1, 3, 65, 256, 512, device="meta"))
    assert latents.shape == (1, 4, 17, 32, 64)
    assert vae.decode(latents).shape == (1, 3, 65, 256, 512)


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 4, 16, 16), (1, 3, 0, 16, 16), (1, 3, 5, 16, 20), (1, 3, 5, 12, 16), (1, 4, 5, 16, 16), (3, 5, 16, 16)],
)
def test_a_video_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError) as raised:
        tiny().encode(torch.zeros(shape))
    assert str(raised.value) == (
        f"a video must be (B, 3, T, H, W) with 1 + a multiple of 4 frames, and H and W multiples of 8, got {shape}"
    )


@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 2), (1, 4, 0, 2, 2), (4, 2, 2, 2)])
def test_latents_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError) as raised:
        tiny().decode(torch.zeros(shape))
    assert str(raised.value) == f"latents must be (B, 4, T, H, W), none of them 0, got {shape}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"widths": (8, 10)},
        {"widths": ()},
        {"depth": 0},
        {"groups": 0},
        {"latent": 0},
        {"flat": 5},
        {"flat": -1},
        {"halve": (1, 4)},
        {"halve": (1, 1)},
        {"double": (0,)},
        {"attended": "video"},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_is_refused_by_its_field(wrong):
    (field,) = wrong
    with pytest.raises(ValueError, match=rf"^CausalVAEConfig\.{field} must .+, got ") as raised:
        replace(TINY, **wrong)
    assert "\n" not in str(raised.value)


def test_scrambled_attention_takes_channels_then_frames_for_frames_then_channels():
    frame, scrambled = (Attention(8, 4, attended).requires_grad_(False) for attended in ("frame", "scrambled"))
    for attention in (frame, scrambled):
        attention.norm = nn.Identity()
        for conv in (attention.qkv, attention.proj):  # each a copy of its input
            conv.weight.copy_(torch.eye(8).repeat(len(conv.weight) // 8, 1)[:, :, None, None, None])
            conv.bias.zero_()
    x = torch.randn(2, 8, 3, 2, 2)
    other = x.reshape(2, 3, 8, 2, 2).transpose(1, 2)
    assert error(scrambled(x), frame(other).transpose(1, 2).reshape(x.shape)) < 1e-6
    assert error(scrambled(x), frame(x)) > 1e-3
    assert error(scrambled(x[:, :, :1]), frame(x[:, :, :1])) < 1e-6


def sizes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def published(manifest):
    tensors = json.loads((MANIFESTS / f"{manifest}.json").read_text())["tensors"]
    return {name: torch.empty(shape, device="meta") for name, (shape, _) in tensors.items()}


@pytest.mark.parametrize("manifest", FILES)
def test_the_map_covers_the_published_file_name_for_name_and_back(manifest):
    theirs, (config, elements) = published(manifest), FILES[manifest]
    assert sum(tensor.numel() for tensor in theirs.values()) == elements
    ours = apply(causal_vae(config), theirs)
    assert sizes(invert(causal_vae(config), ours)) == sizes(theirs)
    with torch.device("meta"):
        assert sizes(ours) == sizes(CausalVAE(config).state_dict())


def test_real_weights_come_back_bit_for_bit():
    back = invert(causal_vae(TINY), apply(causal_vae(TINY), weights()))
    assert sizes(back) == sizes(weights())
    assert all(torch.equal(back[name], tensor) for name, tensor in weights().items())


def test_what_it_was_trained_with_moves_aside_and_nothing_else():
    extra = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2)}
    theirs = {**weights(), **extra}
    assert loss(["lossy.weight", "encoder.loss.weight"]) == ()
    with pytest.raises(KeyMapError, match="2 without a rule: 'loss.logvar'"):
        apply(causal_vae(TINY), theirs)
    rules = causal_vae(TINY) + loss(theirs)
    ours = apply(rules, theirs)
    assert ours.keys() - apply(causal_vae(TINY), weights()).keys() == {DROPPED + name for name in extra}
    assert sizes(invert(rules, ours)) == sizes(theirs)


def test_norms_add_1e_6_to_the_variance_as_the_originals_do():
    assert {module.eps for module in tiny().modules() if isinstance(module, nn.GroupNorm)} == {1e-6}
