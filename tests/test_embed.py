from math import ceil, sqrt
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from minidit import embed
from minidit.kernels.reference import rotate

sizes = st.integers(1, 7)


@pytest.fixture(scope="module")
def golden():
    """What the original computes on its way: tests/goldens/intermediates.json says of what."""
    return load_file(Path(__file__).parent / "goldens/intermediates.safetensors")


def error(ours, theirs):
    """The largest difference as a part of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# patches


@given(sizes, sizes, sizes, st.integers(1, 4), st.integers(1, 4))
def test_unpatchify_gives_back_what_patchify_was_given(frames, height, width, ph, pw):
    x = torch.randn(2, 3, frames, height, width)
    grid = (ceil(height / ph), ceil(width / pw))
    tokens = embed.patchify(x, (1, ph, pw), grid)
    # a patch goes in channel by channel, as a convolution reads it, and comes out pixel by pixel
    tokens = rearrange(tokens, "b t s (c ph pw) -> b t s (ph pw c)", ph=ph, pw=pw)
    assert torch.equal(embed.unpatchify(tokens, (1, ph, pw), grid)[..., :height, :width], x)


def test_what_does_not_fill_a_patch_is_filled_with_zeros_or_cut_at_its_end():
    x = torch.randn(1, 2, 3, 5, 7)
    filled, cut = embed.patchify(x, (1, 4, 4), (2, 2)), embed.patchify(x, (1, 4, 4), (1, 1))
    assert torch.equal(filled, embed.patchify(F.pad(x, (0, 1, 0, 3)), (1, 4, 4), (2, 2)))
    assert torch.equal(cut, embed.patchify(x[..., :4, :4], (1, 4, 4), (1, 1)))


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 2, 3), (1, 1, 1)])
def test_a_linear_layer_on_patches_is_a_convolution_with_its_weights(patch):
    torch.manual_seed(0)
    conv, x = nn.Conv3d(4, 10, patch, patch), torch.randn(2, 4, 3, 4, 6)
    tokens = F.linear(embed.patchify(x, patch, (4 // patch[1], 6 // patch[2])), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(tokens, rearrange(conv(x), "b d t h w -> b t (h w) d"))


def test_unpatchify_puts_channels_where_the_original_does(golden):
    tokens = golden["unpatchify/stdit_tokens"].view(1, 2, 6, 32)  # 2 frames of 2 x 3 patches, cropped from 4 x 6
    assert torch.equal(embed.unpatchify(tokens, (1, 2, 2), (2, 3))[..., :3, :5], golden["unpatchify/stdit_out"])


# positions of places


@pytest.mark.parametrize(
    ("name", "rows", "columns", "scale", "base"),
    [
        ("d72_h2_w6_s0.4_bNone", 2, 6, 0.4, None),
        ("d72_h3_w5_s0.9_b4", 3, 5, 0.9, 4),
        ("d72_h4_w4_s1.0_b4", 4, 4, 1.0, 4),
    ],
)
def test_positions_of_places_are_the_originals(golden, name, rows, columns, scale, base):
    assert error(embed.positions(rows, columns, 72, scale=scale, base=base), golden[f"pos2d/{name}"][0]) < 1e-6


def test_positions_of_a_480p_frame_are_the_originals(golden):
    table = embed.positions(30, 54, 1152, scale=sqrt(480 * 854) / 512, base=40)
    assert error(table[golden["pos2d/full_480p_rows"]], golden["pos2d/full_480p"]) < 5e-6


@given(st.integers(1, 8), st.integers(1, 8))
def test_half_of_the_channels_tells_the_column_and_half_the_row(rows, columns):
    table = embed.positions(rows, columns, 16, scale=0.7, base=4).view(rows, columns, 16)
    assert torch.equal(table[..., :8], table[:1, :, :8].expand(rows, -1, -1))
    assert torch.equal(table[..., 8:], table[:, :1, 8:].expand(-1, columns, -1))


# numbers


# processors differ in the last bit of exp, and so by 1000 * 2**-24 in an angle of up to 1000
@pytest.mark.parametrize(("times", "expected"), [("t", "emb256"), ("bf16_t", "emb256_of_bf16_t")])
def test_a_time_of_any_dtype_is_embedded_in_float32_as_in_the_original(golden, times, expected):
    assert error(embed.sinusoid(golden[f"timestep/{times}"]), golden[f"timestep/{expected}"]) < 1e-4


# positions of frames


@pytest.mark.parametrize("dim", [18, 72])
def test_rotary_frequencies_are_the_originals_bit_for_bit(golden, dim):
    assert torch.equal(embed.rope_frequencies(dim), golden[f"rope/d{dim}/freqs"])


@pytest.mark.parametrize("dim", [18, 72])
def test_frames_are_rotated_as_in_the_original(golden, dim):
    x = golden[f"rope/d{dim}/x"]  # (B, H, T, E)
    table = embed.rope_table(golden[f"rope/d{dim}/freqs"], x.shape[2])
    assert error(rotate(x, *table), golden[f"rope/d{dim}/out"]) < 1e-6


@given(st.integers(1, 6), st.integers(0, 40), st.sampled_from([2, 18, 72]))
def test_the_rotated_product_of_two_frames_knows_their_distance_alone(distance, start, dim):
    q, k = torch.randn(2, 1, dim, dtype=torch.float64)
    cos, sin = embed.rope_table(embed.rope_frequencies(dim).double(), start + distance + 1)

    def product(one, other):
        turned = [rotate(x, cos[i : i + 1], sin[i : i + 1]) for x, i in ((q, one), (k, other))]
        return (turned[0] * turned[1]).sum().item()

    assert product(start, start + distance) == pytest.approx(product(0, distance), abs=1e-3)
