"""Numbers into channels: patches <-> tokens, positions of places and frames, sinusoids of scalars."""

from __future__ import annotations

from math import log

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SINUSOID_DIM = 256  # channels of an embedded number, before its two linears


def patchify(x: Tensor, patch: tuple[int, int, int], grid: tuple[int, int]) -> Tensor:
    """x: (B, C, T, H, W) latents -> (B, T, S, C * patch) tokens, row by row of the grid of patches.

    H and W are zero-padded or cut at their ends to what the grid holds.
    """
    (_, ph, pw), (rows, columns) = patch, grid
    x = F.pad(x, (0, columns * pw - x.shape[4], 0, rows * ph - x.shape[3]))
    return rearrange(x, "b c t (h ph) (w pw) -> b t (h w) (c ph pw)", ph=ph, pw=pw)


def unpatchify(x: Tensor, patch: tuple[int, int, int], grid: tuple[int, int]) -> Tensor:
    """x: (B, T, S, patch * C), the channel fastest -> (B, C, T, H, W), all that the grid holds."""
    _, ph, pw = patch
    return rearrange(x, "b t (h w) (ph pw c) -> b c t (h ph) (w pw)", h=grid[0], ph=ph, pw=pw)


def positions(rows: int, columns: int, dim: int, *, scale: float, base: int | None) -> Tensor:
    """Sin-cos table of a frame's places, row by row: (rows * columns, dim) float32.

    The first half of the channels tells the column, the second the row, each as [sin | cos]. A position is
    index / scale * base / count, so that frames of one area share a range (base None: index / scale).
    Source: hpcaitech/Open-Sora v1.2.0, opensora/models/layers/blocks.py: PositionEmbedding2D.
    """

    def axis(count: int) -> Tensor:
        index = torch.arange(count, dtype=torch.float32) / scale
        return sin_cos(index if base is None else index * (base / count), dim // 2)

    column = axis(columns).expand(rows, columns, -1)
    row = axis(rows)[:, None].expand(rows, columns, -1)
    return torch.cat((column, row), -1).flatten(0, 1)


def moments(frames: int, dim: int, pace: float) -> Tensor:
    """Sin-cos table of the frames: (T, dim) float32, a position every `pace` frames."""
    return sin_cos(torch.arange(frames, dtype=torch.float32) / pace, dim)


def sin_cos(position: Tensor, dim: int) -> Tensor:
    """position: (N,) -> (N, dim), [sin | cos] of dim / 2 frequencies from 1 down to 1 / 10000."""
    angle = position[:, None] * (1.0 / 10000 ** (torch.arange(0, dim, 2, device=position.device) / dim))
    return torch.cat((angle.sin(), angle.cos()), -1)


def rope_frequencies(head_dim: int) -> Tensor:
    """(E / 2,) float32. Source: rotary-embedding-torch 0.5.3, RotaryEmbedding(freqs_for="lang")."""
    return 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))


def rope_table(frequencies: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, E / 2) in float32 of the angles frame * frequency."""
    angle = torch.arange(frames, device=frequencies.device)[:, None] * frequencies.float()
    return angle.cos(), angle.sin()


def sinusoid(t: Tensor) -> Tensor:
    """t: (B,) -> (B, 256) float32, [cos | sin] of t times 128 frequencies from 1 down to about 1 / 10000."""
    half = SINUSOID_DIM // 2
    # exp of a logarithm, as the original: 1e4 ** x rounds otherwise, which a t of 1000 makes visible
    angle = t.float()[:, None] * torch.exp(-log(1e4) * torch.arange(half, device=t.device) / half)
    return torch.cat((angle.cos(), angle.sin()), -1)


class ScalarEmbed(nn.Module):
    """A number a sample (diffusion time, frames per second) as a token-wide vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(SINUSOID_DIM, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,) -> (B, D)."""
        return self.fc2(F.silu(self.fc1(sinusoid(t).to(self.fc1.weight.dtype))))
