from math import exp, inf, log10

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidit.metrics import psnr, ssim

seeds = st.integers(0, 2**32 - 1)
C1, C2 = 6.5025, 58.5225  # (0.01 * 255) ** 2, (0.03 * 255) ** 2


def noise(seed, t=2, h=12, w=13):
    return torch.randint(256, (t, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def plain(value, t=2, h=12, w=12):
    return torch.full((t, h, w, 3), value, dtype=torch.uint8)


def ssim_by_loops(a, b):
    """Wang et al. 2004, equations 13 to 16, window by window with the eleven by eleven weights written out."""
    weights = np.array([[exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)])
    weights /= weights.sum()
    a, b = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    values = []
    for t, top, left, c in np.ndindex(a.shape[0], a.shape[1] - 10, a.shape[2] - 10, 3):
        x = a[t, top : top + 11, left : left + 11, c]
        y = b[t, top : top + 11, left : left + 11, c]
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        cov = (weights * (x - mx) * (y - my)).sum()
        values.append((2 * mx * my + C1) * (2 * cov + C2) / ((mx**2 + my**2 + C1) * (vx + vy + C2)))
    return np.mean(values)


@given(seeds, seeds)
@settings(max_examples=10, deadline=None)
def test_ssim_is_the_published_formula_summed_by_hand(first, second):
    a, b = noise(first), noise(second)
    near = (a.int() + noise(second).int() // 8).clamp(0, 255).to(torch.uint8)
    assert ssim(a, b) == pytest.approx(ssim_by_loops(a, b), abs=1e-10)
    assert ssim(a, near) == pytest.approx(ssim_by_loops(a, near), abs=1e-10)


@pytest.mark.parametrize(("x", "y"), [(0, 255), (100, 110), (0, 1), (255, 254)])
def test_ssim_of_plain_videos_is_that_of_their_luminance(x, y):
    # the variances are nought, so that the second factor is C2 / C2
    assert ssim(plain(x), plain(y)) == pytest.approx((2 * x * y + C1) / (x * x + y * y + C1), abs=1e-9)


def test_ssim_is_the_mean_over_frames_and_channels():
    a, b = plain(100, t=4), plain(100, t=4)
    b[3, :, :, 1] = 200  # one frame of four, one channel of three
    one = (2 * 100 * 200 + C1) / (100**2 + 200**2 + C1)
    assert ssim(a, b) == pytest.approx((11 + one) / 12, abs=1e-9)


@given(seeds, seeds)
@settings(max_examples=25, deadline=None)
def test_ssim_is_symmetric_within_one_of_nought_and_one_for_itself(first, second):
    a, b = noise(first), noise(second)
    assert ssim(a, b) == ssim(b, a)
    assert -1 <= ssim(a, b) <= 1
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_ssim_of_a_negative_is_below_nought():
    a = noise(0)
    assert ssim(a, 255 - a) < -0.5


def test_ssim_falls_as_noise_grows():
    a = noise(0, h=24, w=24)
    values = [ssim(a, (a.int() + noise(1, h=24, w=24).int() // part).clamp(0, 255).byte()) for part in (64, 16, 4, 1)]
    assert values == sorted(values, reverse=True) and values[0] > 0.99 and values[-1] < 0.8


def test_ssim_of_frames_smaller_than_its_window_is_refused():
    assert ssim(noise(0, h=11, w=11), noise(0, h=11, w=11)) == pytest.approx(1)
    with pytest.raises(ValueError, match="11x11 pixels at least, got 10x30"):
        ssim(noise(0, h=10, w=30), noise(0, h=10, w=30))


@pytest.mark.parametrize("error", [1, 5, 255])
def test_psnr_of_a_constant_error_is_its_closed_form(error):
    assert psnr(plain(0), plain(error)) == pytest.approx(20 * log10(255 / error), abs=1e-12)


def test_psnr_is_of_the_error_over_the_whole_video():
    a, b = plain(7, t=4, h=5, w=2), plain(7, t=4, h=5, w=2)
    b[3, 4, 1, 2] = 17  # a hundred squared, spread over 120 values
    assert psnr(a, b) == pytest.approx(10 * log10(255**2 / (100 / 120)), abs=1e-12)


def test_psnr_is_infinite_for_equal_videos_and_nought_for_black_against_white():
    assert psnr(noise(3), noise(3)) == inf
    assert psnr(plain(0), plain(255)) == 0


@given(seeds, seeds)
@settings(max_examples=25, deadline=None)
def test_psnr_is_symmetric_and_that_of_numpy(first, second):
    a, b = noise(first, h=3, w=4), noise(second, h=3, w=4)
    mean = np.mean((a.numpy().astype(np.float64) - b.numpy()) ** 2)
    assert psnr(a, b) == psnr(b, a)
    assert psnr(a, b) == (inf if mean == 0 else pytest.approx(10 * np.log10(255**2 / mean), abs=1e-10))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_are_not_two_videos_of_one_shape_is_refused(metric):
    with pytest.raises(ValueError, match=r"got \(2, 12, 12, 3\) and \(3, 12, 12, 3\)"):
        metric(plain(0), plain(0, t=3))
    with pytest.raises(ValueError, match=r"got \(12, 12, 3\)"):
        metric(plain(0)[0], plain(0)[0])
    with pytest.raises(ValueError, match=r"got torch.float32 and torch.uint8"):
        metric(plain(0).float(), plain(0))
