"""Every decoder gives the frames that its autoencoder makes, in pieces, in tiles, and within the memory it says."""

import json
import math
import weakref
from contextlib import contextmanager
from copy import deepcopy
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from families import GOLDENS, error
from minidit.decoders import Causal, Frames, OpenSora, TemporalDecoder, _all_tiles, _bytes
from minidit.opensora_vae import OpenSoraVAE
from minidit.plan_vae import SCALE
from minidit.presets import PRESETS
from minidit.tiling import Tile
from minidit.weights.rules import apply
from minidit.weights.vae import opensora_vae
from test_opensora_vae import TINY
from test_plan_vae import tiny

diffusers = pytest.importorskip("diffusers")
TEMPORAL = "temporal_decoder_vae_a"
SAID = json.loads((GOLDENS / f"{TEMPORAL}.json").read_text())


@contextmanager
def groups_of(number):
    """diffusers' temporal decoder has 32 groups, whatever it is told; the golden was made with fewer."""
    assert diffusers.AutoencoderKLTemporalDecoder  # imported now: diffusers has classes that are GroupNorms
    with pytest.MonkeyPatch.context() as patch:
        norm = nn.GroupNorm

        def fewer(num_groups, num_channels, **options):
            return norm(number if num_groups == 32 else num_groups, num_channels, **options)

        patch.setattr(nn, "GroupNorm", fewer)
        yield


@cache
def golden(name):
    return load_file(GOLDENS / f"{name}.safetensors")


def weights(name):
    return {key[2:]: tensor.float() for key, tensor in golden(name).items() if key.startswith("w/")}


@cache
def frames():
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=0.5, **levels)
    return Frames(vae).eval().requires_grad_(False)


@cache
def temporal():
    torch.manual_seed(0)
    config = SAID["config"]
    with groups_of(SAID["group_norm_groups"]):
        vae = diffusers.AutoencoderKLTemporalDecoder.from_config(config)
    missing, unexpected = vae.load_state_dict(weights(TEMPORAL), strict=False)
    assert not unexpected and all(name.startswith(("encoder.", "quant_conv.")) for name in missing)
    return TemporalDecoder(vae).eval().requires_grad_(False)


@cache
def opensora():
    vae = OpenSoraVAE(TINY)
    vae.load_state_dict(apply(opensora_vae(TINY), weights("opensora_vae12_a")))
    return OpenSora(vae).eval().requires_grad_(False)


@cache
def causal():
    return Causal(tiny())


# a decoder, frames, and its latents' size
CASES = {
    "frames": (frames, 6, (6, 4, 6)),
    "temporal": (temporal, 16, (16, 2, 3)),
    "opensora": (opensora, 22, (7, 2, 3)),
    "causal": (causal, 9, (3, 2, 3)),
}
kinds = pytest.mark.parametrize("kind", CASES)


def latents_of(size, seed=0):
    return torch.randn(4, *size, generator=torch.Generator().manual_seed(seed))


def whole(decoder, z, n):
    """The autoencoder itself, on all of a video, (3, T, H, W)."""
    with torch.no_grad():
        match decoder:
            case TemporalDecoder():
                parts = [
                    decoder.vae.decode(part / SCALE, num_frames=len(part)).sample
                    for part in z.transpose(0, 1).split(14)
                ]
                return torch.cat(parts).transpose(0, 1)
            case Frames():
                return decoder.vae.decode(z.transpose(0, 1) / 0.5).sample.transpose(0, 1)
            case OpenSora():
                return decoder.vae.decode(z[None], n)[0]
            case Causal():
                return decoder.vae.decode(z[None])[0]


def shown(video):
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0)


def near(ours, theirs):
    """As uint8: the order of a sum may carry a number over to the next."""
    assert ours.shape == theirs.shape
    return (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["frames", "temporal", "opensora"])
def test_behind_the_attention_no_norm_of_images_has_to_copy_them(kind):
    make, n, size = CASES[kind]
    decoder, seen = make(), []
    part = (decoder.vae.spatial if kind == "opensora" else decoder.vae).decoder
    behind = [part.mid_block.resnets[1], part.up_blocks, part.conv_norm_out]
    norms = [layer for each in behind for layer in each.modules() if isinstance(layer, nn.GroupNorm)]

    def look(norm, args):
        if args[0].ndim == 4:  # those over time, (B, C, T, H, W), read views of images
            seen.append(args[0].is_contiguous())

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    list(decoder.chunks(latents_of(size), n))
    for hook in hooks:
        hook.remove()
    assert seen and all(seen)
    type(decoder)(decoder.vae)  # a second one, of the same autoencoder
    assert len(part.mid_block.attentions[0]._forward_hooks) == 1


@kinds
def test_chunks_are_what_the_autoencoder_makes_of_the_whole_as_bytes_on_the_cpu(kind):
    make, n, size = CASES[kind]
    decoder, z = make(), latents_of(size)
    chunks = list(decoder.chunks(z, n))
    assert all(chunk.dtype == torch.uint8 and chunk.is_contiguous() for chunk in chunks)
    together = torch.cat(chunks)
    assert together.shape == (n, decoder.space * size[1], decoder.space * size[2], 3)
    assert near(together, shown(whole(decoder, z, n)))
    assert 20 < together.float().std() < 120  # it shows something


@kinds
def test_a_tile_that_takes_a_whole_frame_changes_nothing(kind):
    make, n, size = CASES[kind]
    z = latents_of(size)
    one = torch.cat(list(make().chunks(z, n, tile=Tile(size=6, overlap=3))))
    assert near(one, torch.cat(list(make().chunks(z, n))))


@pytest.mark.parametrize("case", range(len(SAID["cases"])))
def test_the_temporal_decoder_makes_the_golden_videos(case):
    z, theirs = (golden(TEMPORAL)[f"case{case}/{name}"] for name in ("in/z", "out/x"))
    n = SAID["cases"][case]["T"]
    for part, expected in zip(z.split(n), theirs.split(n), strict=True):
        ours = torch.cat(list(temporal().chunks(part.transpose(0, 1) * SCALE, n)))
        assert near(ours, shown(expected.transpose(0, 1)))
        assert error(whole(temporal(), part.transpose(0, 1) * SCALE, n), expected.transpose(0, 1)) < 2e-5


@pytest.mark.parametrize(("name", "make"), [("opensora_vae12_a", opensora), ("osp_causalvae110_a", causal)])
def test_our_own_autoencoders_make_the_golden_videos_and_latents(name, make):
    tensors, compared = golden(name), 0
    for case, said in enumerate(json.loads((GOLDENS / f"{name}.json").read_text())["cases"]):
        given = {key.rsplit("/", 1)[1]: value for key, value in tensors.items() if key.startswith(f"case{case}/")}
        if said.get("micro", 17) is None:
            continue  # in one piece, whatever its length, as nobody uses it
        compared += 1
        if said["mode"] == "decode":
            z = given["z"][0] * (SCALE if make is causal else 1)
            ours = torch.cat(list(make().chunks(z, given["x"].shape[2])))
            assert near(ours, shown(given["x"][0]))
        else:
            theirs = SCALE * given["moments"][0, :4] if make is causal else given["z"][0]
            assert error(make().encode(given["x"][0]), theirs) < 2e-5
    assert compared >= 4


@pytest.mark.parametrize("make", [frames, temporal])
def test_a_video_is_encoded_frame_by_frame_to_scaled_means(make):
    video = torch.rand(3, 3, 8, 12) * 2 - 1
    z = make().encode(video)
    means = make().vae.encode(video.transpose(0, 1)).latent_dist.mode().transpose(0, 1)
    assert z.shape == (4, 3, 4, 6) and z.dtype == torch.float32
    assert error(z, means * make().vae.config.scaling_factor) < 2e-5


@pytest.mark.parametrize(
    ("kind", "sizes"), [("frames", [4, 2]), ("temporal", [14, 2]), ("opensora", [4, 4, 4, 4, 1, 4, 1])]
)
def test_frames_come_as_many_at_a_time_as_are_decoded_together(kind, sizes):
    make, n, size = CASES[kind]
    assert [len(chunk) for chunk in make().chunks(latents_of(size), n)] == sizes
    if kind != "temporal":  # with tiles, one
        tile = Tile(size=6, overlap=3)
        assert {len(chunk) for chunk in make().chunks(latents_of(size), n, tile=tile)} == {1}


@kinds
def test_nothing_is_decoded_before_it_is_asked_for(kind):
    make, n, size = CASES[kind]
    decoder, calls = deepcopy(make()), []
    last = getattr(decoder.vae, "spatial", decoder.vae).decoder
    last.register_forward_pre_hook(lambda module, given: calls.append(torch.is_inference_mode_enabled()))
    chunks = decoder.chunks(latents_of(size), n)
    assert not calls
    next(chunks)
    assert calls == [True] and not torch.is_inference_mode_enabled()  # the caller's mode is its own


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_longer_causal_video_is_as_near_to_the_whole_as_with_hard_cuts_and_jumps_far_less(seed):
    z = nn.functional.interpolate(latents_of((6, 3, 3), seed)[None], (17, 3, 3), mode="trilinear")
    exact, tiles = whole(causal(), z[0], 65), Tile(size=9, overlap=4)
    with torch.no_grad():
        ours = torch.cat(list(Causal(tiny(), tiles)._pieces(z, 65, None, _all_tiles)), 2)[0]
        # the original's: chunks share one latent, whose first frame is dropped
        first, second = (tiny().decode(z[:, :, start : start + 9])[0] for start in (0, 8))
    cut = torch.cat((first, second[:, 1:]), 1)

    def distance(video):
        return (video - exact).square().mean().sqrt()

    def jump(video):
        """Between two frames, the most beside that of the whole."""
        return (video.diff(dim=1) - exact.diff(dim=1)).square().mean((0, 2, 3)).max().sqrt()

    assert distance(ours) < 1.02 * distance(cut)
    assert jump(ours) < 0.25 * jump(cut)


@pytest.mark.parametrize("tile", [None, Tile(size=2, overlap=1)])
def test_a_causal_video_in_tiles_of_time_has_its_first_frames_from_the_first_tile_alone(tile):
    decoder, z = Causal(tiny(), Tile(size=3, overlap=1)), latents_of((5, 3, 2))
    chunks = list(decoder.chunks(z, 17, tile=tile))
    assert [len(chunk) for chunk in chunks] == [8, 9]
    first = torch.cat(list(decoder.chunks(z[:, :3], 9, tile=tile)))
    assert near(chunks[0], first[:8])


# of the deviation of a video: by so much the norms and the attention of tiles differ from those of a frame, with these
# weights, drawn at random, and noise for latents, where a tile is as unlike another as can be
@pytest.mark.parametrize(("kind", "bound"), [("frames", 0.15), ("temporal", 0.15), ("opensora", 0.1), ("causal", 0.1)])
def test_tiles_are_near_the_whole(kind, bound):
    make, n = CASES[kind][0], {"causal": 1}.get(kind, 2)
    decoder = make()
    z = latents_of((decoder.latent_frames(n), 20, 20))
    exact, tiles = (
        torch.cat(list(decoder.chunks(z, n, tile=tile))).float() for tile in (None, Tile(size=16, overlap=8))
    )
    assert 0 < (tiles - exact).square().mean().sqrt() < bound * exact.std()


def test_but_for_norms_and_attention_tiles_are_the_whole():
    """What is left are convolutions, which see 12 latents to each side, a quarter of the overlap."""
    decoder = deepcopy(frames())
    for module in list(decoder.vae.decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    decoder.vae.decoder.mid_block.attentions = nn.ModuleList([None])
    z = latents_of((1, 3, 140))
    exact, tiles = (torch.cat(list(decoder.chunks(z, 1, tile=tile))) for tile in (None, Tile(size=100, overlap=48)))
    assert near(tiles, exact) and exact.float().std() > 5


class Measured(TorchDispatchMode):
    """The bytes of all tensors that are alive, weights apart."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage._cdata not in self.known:
            self.known[storage._cdata] = weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def drop(self, key, size):
        del self.known[key]
        self.now -= size


@pytest.mark.parametrize("tile", [None, Tile(size=6, overlap=2)])
@kinds
def test_memory_is_at_most_what_is_said_and_not_far_below(kind, tile):
    make, n, size = CASES[kind]
    decoder, size = make(), (size[0], 8, 10)
    with torch.no_grad(), Measured() as measured:
        for piece in decoder._pieces(latents_of(size).clone()[None], n, tile, _all_tiles):
            _bytes(piece)
    said = decoder.peak_bytes(size, tile=tile)
    assert measured.peak <= said + 4 * 4 * size[0] * 80  # the latents, which come from outside
    assert said < (1.5 if tile is None else 2.5) * measured.peak


@pytest.mark.parametrize(("kind", "short", "long"), [("frames", 8, 80), ("temporal", 28, 280), ("opensora", 10, 60)])
def test_memory_does_not_grow_with_length(kind, short, long):
    decoder = CASES[kind][0]()
    little, much = (decoder.peak_bytes((t, 4, 4)) for t in (short, long))
    assert much - little <= 3 * 4 * 4 * 16 * (long - short)  # the latents themselves, and as the decoder takes them


def test_memory_does_not_grow_with_the_length_of_a_causal_video():
    little, much = (causal().peak_bytes((t, 4, 4)) for t in (30, 82))
    assert causal().peak_bytes((17, 4, 4)) < little and much < 1.01 * little


@kinds
def test_memory_is_told_without_a_copy_of_the_weights_and_leaves_them_alone(kind):
    decoder = CASES[kind][0]()
    before = {name: tensor.data_ptr() for name, tensor in decoder.state_dict().items()}
    assert decoder.peak_bytes((1, 4, 4)) > 0
    assert {name: tensor.data_ptr() for name, tensor in decoder.state_dict().items()} == before


def test_fit_finds_the_largest_tile_for_the_memory_there_is():
    decoder, size = frames(), (5, 40, 56)
    memory = decoder.peak_bytes(size, tile=Tile(size=30, overlap=8))
    found = decoder.fit(size, memory)
    assert found.size >= 30 and decoder.peak_bytes(size, tile=found) <= memory
    assert decoder.peak_bytes(size, tile=Tile(size=found.size + 1, overlap=8)) > memory
    everything = decoder.peak_bytes(size)
    assert decoder.fit(size, everything) is decoder.fit(size, math.inf) is None
    assert decoder.fit(size, everything - 1) == Tile(size=56, overlap=8)  # one frame at a time, whole
    least = decoder.peak_bytes(size, tile=Tile(size=16, overlap=8))
    with pytest.raises(ValueError, match=f"takes {least:,} bytes with the smallest tiles, .* memory={least - 1:,}"):
        decoder.fit(size, least - 1)


@pytest.mark.parametrize(
    ("kind", "preset"),
    [("frames", "opensora-1.1"), ("temporal", "latte-t2v"), ("opensora", "opensora-1.2")]
    + [("causal", "opensora-plan-1.1-65x512x512")],
)
def test_latents_are_as_many_as_the_model_makes(kind, preset):
    decoder, sampling = CASES[kind][0](), PRESETS[preset].sampling
    for n in (1, 5, 17, 49, 65, 221):
        assert decoder.latent_frames(n) == sampling.latent_size(n, 64, 64)[0]
        assert decoder._frames(decoder.latent_frames(n)) >= n
    with pytest.raises(ValueError, match="1 frame at least, got 0"):
        decoder.latent_frames(0)


def test_a_causal_decoder_does_not_make_every_number_of_frames():
    with pytest.raises(ValueError, match="makes 1 . a multiple of 4 frames, got 66"):
        causal().latent_frames(66)


@pytest.mark.parametrize("shape", [(4, 2, 4, 4), (3, 3, 4, 4), (4, 3, 4, 0), (1, 4, 3, 4, 4)])
def test_latents_of_another_size_are_refused_before_anything_is_decoded(shape):
    with pytest.raises(ValueError, match=r"latents of 3 frames are \(4, 3, H/2, W/2\), got") as raised:
        frames().chunks(torch.zeros(shape), 3)
    assert str(raised.value).endswith(str(shape))


@pytest.mark.parametrize("shape", [(3, 1, 9, 8), (3, 0, 8, 8), (1, 1, 8, 8), (1, 3, 1, 8, 8)])
def test_a_video_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"is \(3, T, H, W\) with H and W multiples of 2, got"):
        frames().encode(torch.zeros(shape))


@kinds
def test_it_runs_in_the_dtype_of_its_parameters(kind):
    make, n, size = CASES[kind]
    half, z = deepcopy(make()).to(torch.bfloat16), latents_of(size)
    exact, ours = (torch.cat(list(decoder.chunks(z, n))).float() for decoder in (make(), half))
    assert 0 < (ours - exact).square().mean().sqrt() < 0.1 * exact.std()
    assert half.peak_bytes(size) < 0.7 * make().peak_bytes(size)
