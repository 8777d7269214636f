import copy
import json
import re
import sys
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from safetensors.torch import load_file

from families import GOLDENS, error
from minidit.opensora_vae import OPENSORA_VAE_12, CausalConv, OpenSoraVAE, VAEConfig
from minidit.presets import PRESETS
from minidit.weights.rules import apply
from minidit.weights.vae import opensora_vae

GOLDEN = json.loads((GOLDENS / "opensora_vae12_a.json").read_text())
SPATIAL, TEMPORAL = GOLDEN["config"]["vae_2d"], GOLDEN["config"]["vae_temporal"]
TINY = VAEConfig(
    channels=TEMPORAL["embed_dim"],
    chunk=GOLDEN["config"]["micro_frame_size"],
    spatial_dims=tuple(SPATIAL["block_out_channels"]),
    spatial_depth=SPATIAL["layers_per_block"],
    spatial_groups=SPATIAL["norm_num_groups"],
    spatial_scale=0.18215,
    temporal_dims=tuple(TEMPORAL["filters"] * multiplier for multiplier in TEMPORAL["channel_multipliers"]),
    temporal_halves=(*TEMPORAL["temporal_downsample"], False),
    temporal_depth=TEMPORAL["num_res_blocks"],
    temporal_groups=TEMPORAL["num_groups"],
)
CASES = list(enumerate(GOLDEN["cases"]))
DECODED = [(i, case["num_frames"]) for i, case in CASES if case["mode"] == "decode"]
ENCODED = [i for i, case in CASES if case["mode"] == "encode"]
TOLERANCE = 2e-5  # of the largest value


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDENS / "opensora_vae12_a.safetensors")


@pytest.fixture(scope="module")
def vae(golden):
    theirs = {name[2:]: tensor.float() for name, tensor in golden.items() if name.startswith("w/")}
    model = OpenSoraVAE(TINY)
    model.load_state_dict(apply(opensora_vae(TINY), theirs))
    return model.eval().requires_grad_(False)


def latents_of(frames, *, batch=1):
    return torch.randn(batch, 4, TINY.latent_frames(frames), 2, 1, generator=torch.Generator().manual_seed(frames))


def video_of(frames, *, batch=1):
    return torch.rand(batch, 3, frames, 16, 8, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize(("case", "frames"), DECODED)
def test_decoded_videos_and_what_the_temporal_part_gives_are_the_originals(vae, golden, case, frames):
    latents, seen = golden[f"case{case}/in/z"], []
    with vae.decoder.register_forward_hook(lambda module, given, out: seen.append(out)):
        video = vae.decode(latents, frames)
    assert error(torch.cat(seen, 2), golden[f"case{case}/mid/x_z"]) < TOLERANCE
    assert error(video, golden[f"case{case}/out/x"]) < TOLERANCE


@pytest.mark.parametrize("case", ENCODED)
def test_latents_and_what_the_spatial_part_gives_are_the_originals(vae, golden, case):
    seen = []
    with vae.encoder.register_forward_pre_hook(lambda module, given: seen.extend(given)):
        latents = vae.encode(golden[f"case{case}/in/x"])
    assert error(torch.cat(seen, 2), golden[f"case{case}/mid/x_z"]) < TOLERANCE
    assert error(latents, golden[f"case{case}/out/z"]) < TOLERANCE


def test_every_array_of_the_golden_is_compared(golden):
    compared = {f"case{i}/{name}" for i, _ in DECODED for name in ("in/z", "mid/x_z", "out/x")}
    compared |= {f"case{i}/{name}" for i in ENCODED for name in ("in/x", "mid/x_z", "out/z")}
    assert {name for name in golden if not name.startswith("w/")} == compared and len(compared) == 15


@pytest.mark.parametrize(("frames", "chunks"), [(1, [1]), (17, [17]), (18, [17, 1]), (38, [17, 17, 4])])
def test_a_video_is_the_videos_of_its_chunks_decoded_alone(vae, frames, chunks):
    latents = latents_of(frames, batch=2)
    parts = list(vae.decode_chunks(latents, frames))
    assert [part.shape for part in parts] == [(2, 3, n, 16, 8) for n in chunks]
    starts = [0, *accumulate(map(TINY.latent_frames, chunks))]
    for part, n, start in zip(parts, chunks, starts, strict=False):
        alone = vae.decode(latents[:, :, start : start + TINY.latent_frames(n)], n)
        assert error(part, alone) < TOLERANCE
    assert torch.equal(torch.cat(parts, 2), vae.decode(latents, frames))


@pytest.mark.parametrize("frames", [17, 18, 38])
def test_latents_are_those_of_chunks_encoded_alone(vae, frames):
    video = video_of(frames, batch=2)
    alone = torch.cat([vae.encode(chunk) for chunk in video.split(17, 2)], 2)
    assert alone.shape == (2, 4, TINY.latent_frames(frames), 2, 1)
    assert error(vae.encode(video), alone) < TOLERANCE


def test_a_batch_is_its_videos_one_by_one(vae):
    latents, video = latents_of(6, batch=2), video_of(6, batch=2)
    assert error(vae.decode(latents, 6), torch.cat([vae.decode(one, 6) for one in latents.split(1)])) < TOLERANCE
    assert error(vae.encode(video), torch.cat([vae.encode(one) for one in video.split(1)])) < TOLERANCE


def test_a_chunk_is_decoded_when_it_is_asked_for_and_four_frames_at_a_time(vae):
    chunks, images = vae.decode_chunks(latents_of(38), 38), []
    with vae.spatial.decoder.register_forward_pre_hook(lambda module, given: images.append(len(given[0]))):
        assert not images
        next(chunks)
        assert images == [4, 4, 4, 4, 1]
        next(chunks)
        assert sum(images) == 34


@pytest.mark.parametrize("stride", [1, 2])
def test_a_causal_convolution_sees_no_later_frame(stride):
    conv, x = CausalConv(2, 3, stride=stride), torch.randn(1, 2, 8, 4, 4)
    later = x.clone()
    later[:, :, 4:] += 1
    same = conv(x).isclose(conv(later)).all(dim=-1).all(dim=-1).all(dim=1)[0].tolist()
    assert same == [n * stride + stride - 1 < 4 for n in range(8 // stride)]


def test_it_counts_latent_frames_as_the_model_does():
    sampling = PRESETS["opensora-1.2"].sampling
    assert (OPENSORA_VAE_12.space, OPENSORA_VAE_12.time) == (sampling.space, sampling.time)
    for frames in range(1, 120):
        assert OPENSORA_VAE_12.latent_frames(frames) == sampling.latent_size(frames, 8, 8)[0]
    assert [OPENSORA_VAE_12.latent_frames(frames) for frames in (1, 17, 51, 102)] == [1, 5, 15, 30]


def test_it_runs_in_the_dtype_of_its_parameters(vae):
    half, latents, video = copy.deepcopy(vae).bfloat16(), latents_of(5), video_of(5)
    half.scale, half.shift = vae.scale, vae.shift  # as `load` keeps buffers
    for out, exact in ((half.decode(latents, 5), vae.decode(latents, 5)), (half.encode(video), vae.encode(video))):
        assert out.dtype == torch.bfloat16
        assert error(out.float(), exact) < 0.1


@pytest.mark.parametrize(
    ("shape", "frames", "told"),
    [
        ((1, 4, 5, 2, 2), 18, r"latents of 18 frames, .* are \(B, 4, 6, H/8, W/8\), got \(1, 4, 5, 2, 2\)"),
        ((1, 4, 5, 2, 2), 16, r"\(B, 4, 4, H/8, W/8\), got \(1, 4, 5, 2, 2\)"),
        ((1, 8, 5, 2, 2), 17, r"\(B, 4, 5, H/8, W/8\), got \(1, 8, 5, 2, 2\)"),
        ((4, 5, 2, 2), 17, r"got \(4, 5, 2, 2\)"),
        ((1, 4, 0, 2, 2), 0, "latents of 0 frames, of which there must be 1"),
        ((1, 4, 0, 2, 2), -3, "latents of -3 frames, of which there must be 1"),
    ],
)
def test_latents_of_another_number_of_frames_are_refused_before_anything_is_decoded(vae, shape, frames, told):
    with pytest.raises(ValueError, match=told) as refusal:
        vae.decode_chunks(torch.zeros(shape), frames)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("shape", [(1, 3, 1, 12, 8), (1, 3, 1, 8, 9), (1, 4, 1, 8, 8), (1, 3, 0, 8, 8), (3, 8, 8)])
def test_videos_that_are_not_of_whole_latents_are_refused(vae, shape):
    told = r"^a video to encode is \(B, 3, T, H, W\) with H and W multiples of 8, got "
    with pytest.raises(ValueError, match=f"{told}{re.escape(str(shape))}$"):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("chunk", 0, "VAEConfig.chunk must be at least 1, got 0"),
        ("spatial_dims", (8, 6), r"VAEConfig.spatial_dims must be multiples of spatial_groups=4, got \(8, 6\)"),
        ("temporal_dims", (), "VAEConfig.temporal_dims must be multiples of temporal_groups=2"),
        ("temporal_halves", (True,), "VAEConfig.temporal_halves must be as many as temporal_dims"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(field, value, told):
    with pytest.raises(ValueError, match=told):
        replace(TINY, **{field: value})


def test_it_needs_diffusers_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises ImportError
    with pytest.raises(ImportError, match="needs the package diffusers, of minidit's extra 'hub'") as refusal:
        OpenSoraVAE(TINY)
    assert refusal.value.name == "diffusers"
