"""Tiles put together are the whole, for what sees no farther than they allow."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from families import error
from minidit.tiling import Fused, Held, Tile, mosaic, tiled, windows

some = settings(max_examples=60)


@st.composite
def tiles(draw, least=1):
    overlap = draw(st.integers(0, 6))
    return Tile(size=draw(st.integers(max(least, 2 * overlap), 2 * overlap + 8)), overlap=overlap)


def wide(places, lead=0):
    """A convolution that sees so many places to each side, of numbers that are not all alike."""
    kernel = torch.randn(1, 1, 2 * places + 1, generator=torch.Generator().manual_seed(places), dtype=torch.float64)
    return lambda x: F.conv1d(x, kernel, padding=places).repeat_interleave(4, -1)[..., lead:]


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@some
@given(length=st.integers(1, 60), tile=tiles())
def test_tiles_are_few_of_one_size_and_share_at_least_what_they_should(length, tile):
    found = windows(length, tile)
    sizes = {stop - start for start, stop in found}
    assert found[0][0] == 0 and found[-1][1] == length
    assert len(sizes) == 1 and max(sizes) <= tile.size
    for (_, stop), (start, _) in zip(found, found[1:], strict=False):
        assert stop - start >= tile.overlap
    fewer = len(found) - 1  # could not cover it
    assert not fewer or fewer * tile.size - (fewer - 1) * tile.overlap < length


@some
@given(length=st.integers(1, 50), tile=tiles())
def test_tiles_of_what_sees_a_quarter_of_their_overlap_are_the_whole(length, tile):
    f, x = wide(tile.overlap // 4), numbers(2, 1, length)
    parts = list(tiled(f, x, -1, tile, scale=4))
    assert error(torch.cat(parts, -1), f(x)) < 1e-12


@some
@given(length=st.integers(1, 50), tile=tiles().filter(lambda tile: tile.overlap > 0))
def test_tiles_that_each_begin_with_fewer_places_are_the_whole_too(length, tile):
    f, x = wide((4 * tile.overlap - 3) // 16, lead=3), numbers(1, 1, length)
    assert error(torch.cat(list(tiled(f, x, 2, tile, scale=4, short=3)), 2), f(x)) < 1e-12


@some
@given(size=st.tuples(st.integers(1, 20), st.integers(1, 20)), tile=tiles(least=2))
def test_a_mosaic_of_what_is_local_is_the_whole(size, tile):
    kernel = numbers(3, 2, *[2 * (tile.overlap // 4) + 1] * 2)

    def f(z):
        return F.interpolate(F.conv2d(z, kernel, padding="same"), scale_factor=2)

    z = numbers(1, 2, *size)
    assert error(mosaic(f, z, tile, 2), f(z)) < 1e-12


def test_two_tiles_go_over_into_each_other_in_a_straight_line_over_the_half_of_what_they_share():
    made = iter((0.0, 1.0))
    parts = tiled(lambda x: torch.full_like(x, next(made)), torch.zeros(12), 0, Tile(size=8, overlap=4), scale=1)
    assert torch.cat(list(parts)).tolist() == [0] * 5 + [0.25, 0.75] + [1] * 5


def test_a_part_is_made_when_it_is_asked_for_and_never_changes():
    made = []

    def f(x):
        made.append(x.tolist())
        return x.clone()

    parts = tiled(f, torch.arange(10.0), 0, Tile(size=4, overlap=1), scale=1)
    assert not made
    first = next(parts)
    assert made == [[0, 1, 2, 3]] and first.tolist() == [0, 1, 2]
    assert torch.cat([first, *parts]).tolist() == list(range(10)) and len(made) == 3
    assert first.tolist() == [0, 1, 2]


def test_one_tile_is_f_itself_bit_for_bit():
    x = torch.randn(3, 5)
    assert torch.equal(mosaic(torch.exp, x, Tile(size=5, overlap=2), 1), x.exp())


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (4, 3), (4, -1)])
def test_a_tile_that_shares_more_than_half_is_refused(size, overlap):
    with pytest.raises(ValueError, match=f"got size={size}, overlap={overlap}"):
        Tile(size=size, overlap=overlap)


def test_tiles_that_would_leave_a_gap_are_refused():
    with pytest.raises(ValueError, match=r"each makes 3 places less must overlap, got Tile\(size=4, overlap=0\)"):
        list(tiled(torch.exp, torch.zeros(8), 0, Tile(size=4, overlap=0), scale=4, short=3))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_held_counts_tensors_while_they_are_alive_and_views_once(device):
    with Held() as held:
        a = torch.empty(1000, device=device)
        b = a.view(10, 100)[2:] + 1
        del a
        c = torch.empty(50, device=device)
        assert held.now == 4 * (800 + 50)
        del b, c
    assert (held.now, held.peak) == (0, 4 * 1800)


def test_a_convolution_needs_room_for_its_input_and_output_again_and_attention_none_for_its_scores():
    conv = nn.Conv2d(2, 3, 1, bias=False, device="meta").requires_grad_(False)
    with Held() as held:
        x = torch.empty(1, 2, 10, 10, device="meta")
        y = conv(x)
    assert held.now == x.nbytes + y.nbytes and held.peak == 2 * held.now
    with torch.no_grad(), Fused(), Held() as held:
        q = torch.empty(1, 1, 1000, 8, device="meta")
        F.scaled_dot_product_attention(q, q, q)
    assert held.peak == 2 * q.nbytes
