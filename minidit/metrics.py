"""How far a video is from another of the same shape. Both are uint8 (T, H, W, 3); 255 is the range of the data."""

from math import exp, inf, log10

import torch
from torch import Tensor

RANGE = 255.0
WINDOW, SIGMA = 11, 1.5  # pixels; these and K1, K2 are those of Wang et al. 2004, section III.C
K1, K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of the error over the whole video; inf if a and b are equal."""
    _check_pair(a, b)
    # in whole numbers, so that the order of the sum cannot matter
    squares = (a.int() - b.int()).square().sum(dtype=torch.int64).item()
    return 10 * log10(RANGE**2 * a.numel() / squares) if squares else inf


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), at most 1: the mean over frames, channels and windows.

    As scikit-image's with gaussian_weights=True and use_sample_covariance=False; the windows lie within the frame.
    """
    _check_pair(a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"ssim needs frames of {WINDOW}x{WINDOW} pixels at least, got {a.shape[1]}x{a.shape[2]}")
    # one frame at a time: a long video in float64 would need gigabytes
    frames = [_ssim_map(x, y).mean() for x, y in zip(a, b, strict=True)]
    return torch.stack(frames).mean().item()


def _ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """x, y: (H, W, 3) -> (3, H - 10, W - 10) float64, the similarity of each window."""
    x, y = (image.permute(2, 0, 1).double().contiguous() for image in (x, y))  # (3, H, W)
    mean_x, mean_y = _blur(x), _blur(y)
    variances = _blur(x * x + y * y) - (mean_x**2 + mean_y**2)  # of x and of y, added
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def _blur(x: Tensor) -> Tensor:
    """The gaussian mean of each whole window. x: (3, H, W) -> (3, H - 10, W - 10)."""
    gaussian = [exp(-((i - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for i in range(WINDOW)]
    # the window is the product of a column and a row; in shifts, as conv2d takes three times as long in float64
    for dim in (1, 2):
        places = x.shape[dim] - WINDOW + 1
        total = torch.zeros_like(x.narrow(dim, 0, places))
        for i, weight in enumerate(gaussian):
            total.add_(x.narrow(dim, i, places), alpha=weight / sum(gaussian))
        x = total
    return x


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or a.numel() == 0:
        raise ValueError(f"two videos of one shape (T, H, W, 3) expected, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(f"two uint8 videos expected, got {a.dtype} and {b.dtype}; bring them to 0..255 first")
