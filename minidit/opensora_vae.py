"""Open-Sora 1.2's video autoencoder: frames into latents and back, first each frame alone, then over time.

Sources: hpcaitech/Open-Sora, tag v1.2.0 (17cce908), opensora/models/vae: vae.py VideoAutoencoderPipeline and
OpenSoraVAE_V1_2, vae_temporal.py VAE_Temporal. The spatial part is the library diffusers' AutoencoderKL.

A video is taken in chunks of 17 frames that see nothing of each other, as the original was trained and is used. Quirks
that are kept: frames before a chunk's first are zeros, and the rest of a chunk is made whole in front, with more zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

SPATIAL_FRAMES = 4  # that the spatial part takes together, as upstream; only memory depends on it


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of one autoencoder. Raises ValueError, naming the field, for a shape that cannot be built."""

    channels: int  # of a latent
    chunk: int  # frames that are taken together
    spatial_dims: tuple[int, ...]  # channels of each level; every level but the last halves rows and columns
    spatial_depth: int  # residual blocks of a level
    spatial_groups: int  # of a GroupNorm
    spatial_scale: float  # of the spatial part's latents, as the temporal part sees them
    temporal_dims: tuple[int, ...]  # channels of each level
    temporal_halves: tuple[bool, ...]  # whether a level halves the frames
    temporal_depth: int  # residual blocks of a level
    temporal_groups: int  # of a GroupNorm

    def __post_init__(self) -> None:
        for name in ("channels", "chunk", "spatial_depth", "spatial_groups", "temporal_depth", "temporal_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"VAEConfig.{name} must be at least 1, got {getattr(self, name)}")
        for part in ("spatial", "temporal"):
            dims, groups = getattr(self, f"{part}_dims"), getattr(self, f"{part}_groups")
            if not dims or any(dim % groups for dim in dims):
                raise ValueError(f"VAEConfig.{part}_dims must be multiples of {part}_groups={groups}, got {dims}")
        if len(self.temporal_halves) != len(self.temporal_dims):
            raise ValueError(
                f"VAEConfig.temporal_halves must be as many as temporal_dims={self.temporal_dims}, "
                f"got {self.temporal_halves}"
            )

    @property
    def space(self) -> int:
        """Pixels of one latent, each way."""
        return 2 ** (len(self.spatial_dims) - 1)

    @property
    def time(self) -> int:
        """Frames of one latent within a chunk; a rest counts as one more."""
        return 2 ** sum(self.temporal_halves)

    def chunks(self, frames: int) -> list[int]:
        """Frames of each chunk of a video: 22 are [17, 5]."""
        return [min(self.chunk, frames - start) for start in range(0, frames, self.chunk)]

    def latent_frames(self, frames: int) -> int:
        return sum(ceil(chunk / self.time) for chunk in self.chunks(frames))


# hpcaitech/Open-Sora v1.2.0: opensora/models/vae/vae.py OpenSoraVAE_V1_2, vae_temporal.py VAE_Temporal_SD; the spatial
# part is SDXL's, but scaled by Stable Diffusion's 0.18215 and not by its own 0.13025. hpcai-tech/OpenSora-VAE-v1.2
OPENSORA_VAE_12 = VAEConfig(
    channels=4,
    chunk=17,
    spatial_dims=(128, 256, 512, 512),
    spatial_depth=2,
    spatial_groups=32,
    spatial_scale=0.18215,
    temporal_dims=(128, 256, 256, 512),
    temporal_halves=(False, True, True, False),
    temporal_depth=4,
    temporal_groups=32,
)


class OpenSoraVAE(nn.Module):
    """Video (B, 3, T, H, W) in -1..1 <-> latents (B, C, T', H/8, W/8) of mean 0 and deviation 1, as the DiT sees them.

    17 frames are 5 latent ones, and a rest of n frames ceil(n/4). Runs in the dtype of its parameters, whatever that of
    its input. Raises ImportError where diffusers is not installed.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial = _autoencoder(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        # the deviation and mean of each channel, part of the checkpoint
        self.register_buffer("scale", torch.ones(1, config.channels, 1, 1, 1))
        self.register_buffer("shift", torch.zeros(1, config.channels, 1, 1, 1))

    def encode(self, video: Tensor) -> Tensor:
        """Video -> the mean of its latents. Raises ValueError for a video that is not of whole latents."""
        space = self.config.space
        if video.dim() != 5 or video.shape[1] != 3 or 0 in video.shape or any(n % space for n in video.shape[3:]):
            raise ValueError(
                f"a video to encode is (B, 3, T, H, W) with H and W multiples of {space}, got {tuple(video.shape)}"
            )
        chunks = video.to(self.encoder.first.weight.dtype).split(self.config.chunk, 2)
        z = torch.cat([self.encoder(self.spatial_encode(chunk)) for chunk in chunks], 2)
        return ((z - self.shift) / self.scale).to(z.dtype)

    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """Latents -> a video of that many frames. Raises ValueError for latents of another number."""
        return torch.cat(list(self.decode_chunks(latents, frames)), 2)

    def decode_chunks(self, latents: Tensor, frames: int) -> Iterator[Tensor]:
        """The same video as `decode`, in chunks of frames that are decoded when they are asked for."""
        config = self.config
        channels, expected = config.channels, config.latent_frames(frames)
        if latents.dim() != 5 or latents.shape[1] != channels or latents.shape[2] != expected or 0 in latents.shape:
            raise ValueError(
                f"latents of {frames} frames, of which there must be 1, are (B, {channels}, {expected}, "
                f"H/{config.space}, W/{config.space}), got {tuple(latents.shape)}"
            )
        z = (latents * self.scale + self.shift).to(self.decoder.first.weight.dtype)
        chunks = zip(z.split(config.latent_frames(config.chunk), 2), config.chunks(frames), strict=True)
        return (self.spatial_decode(self.decoder(chunk, n)) for chunk, n in chunks)

    def spatial_encode(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, C, T, H/8, W/8), each frame alone."""
        images = rearrange(video, "b c t h w -> (b t) c h w").split(SPATIAL_FRAMES)
        z = torch.cat([self.spatial.encode(image).latent_dist.mode() for image in images])
        return rearrange(z * self.config.spatial_scale, "(b t) c h w -> b c t h w", b=len(video))

    def spatial_decode(self, z: Tensor) -> Tensor:
        """(B, C, T, H/8, W/8) -> (B, 3, T, H, W), each frame alone."""
        images = rearrange(z / self.config.spatial_scale, "b c t h w -> (b t) c h w").split(SPATIAL_FRAMES)
        video = torch.cat([self.spatial.decode(image).sample for image in images])
        return rearrange(video, "(b t) c h w -> b c t h w", b=len(z))


def _autoencoder(config: VAEConfig) -> Any:
    try:
        diffusers = import_module("diffusers")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        message = "Open-Sora 1.2's video autoencoder needs the package diffusers, of minidit's extra 'hub'"
        raise ModuleNotFoundError(message, name="diffusers") from error
    levels = len(config.spatial_dims)
    return diffusers.AutoencoderKL(
        block_out_channels=config.spatial_dims,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=config.channels,
        layers_per_block=config.spatial_depth,
        norm_num_groups=config.spatial_groups,
    )


# The temporal part. D is the channels of a level; rows and columns stay as they are


class Encoder(nn.Module):
    """Spatial latents of one chunk -> the mean of its latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims, depth, groups = config.temporal_dims, config.temporal_depth, config.temporal_groups
        self.time = config.time
        self.first = CausalConv(config.channels, dims[0], bias=False)
        self.levels, self.halves = nn.ModuleList(), nn.ModuleList()
        for (before, dim), halve in zip(pairwise((dims[0], *dims)), config.temporal_halves, strict=True):
            self.levels.append(_blocks(before, dim, depth, groups))
            self.halves.append(CausalConv(dim, dim, stride=2) if halve else nn.Identity())
        self.middle = _blocks(dims[-1], dims[-1], depth, groups)
        self.norm = nn.GroupNorm(groups, dims[-1])
        self.last = CausalConv(dims[-1], 2 * config.channels, 1)
        self.moments = CausalConv(2 * config.channels, 2 * config.channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W) -> (B, C, ceil(T/4), H, W)."""
        x = self.first(_with_zeros(x, -x.shape[2] % self.time))  # (B, D, T, H, W), T a multiple of 4
        for level, halve in zip(self.levels, self.halves, strict=True):
            x = halve(level(x))
        x = self.last(F.silu(self.norm(self.middle(x))))
        mean, _ = self.moments(x).chunk(2, 1)  # and the logarithm of the variance
        return mean


class Decoder(nn.Module):
    """Latents of one chunk -> its spatial latents. The levels are the encoder's, the last one first."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims, depth, groups = config.temporal_dims[::-1], config.temporal_depth, config.temporal_groups
        self.latent = CausalConv(config.channels, config.channels, 1)
        self.first = CausalConv(config.channels, dims[0])
        self.middle = _blocks(dims[0], dims[0], depth, groups)
        self.doubles, self.levels = nn.ModuleList(), nn.ModuleList()
        for (before, dim), halve in zip(pairwise((dims[0], *dims)), config.temporal_halves[::-1], strict=True):
            self.doubles.append(Double(before) if halve else nn.Identity())
            self.levels.append(_blocks(before, dim, depth, groups))
        self.norm = nn.GroupNorm(groups, dims[-1])
        self.last = CausalConv(dims[-1], config.channels)

    def forward(self, z: Tensor, frames: int) -> Tensor:
        """z: (B, C, ceil(frames/4), H, W) -> (B, C, frames, H, W)."""
        x = self.middle(self.first(self.latent(z)))  # (B, D, T', H, W)
        for double, level in zip(self.doubles, self.levels, strict=True):
            x = level(double(x))
        x = self.last(F.silu(self.norm(x)))
        return x[:, :, x.shape[2] - frames :]  # without what the encoder put in front


class CausalConv(nn.Conv3d):
    """A 3-D convolution that sees no later frame; before the first there are zeros. vae_temporal.py CausalConv3d."""

    def __init__(self, inner: int, outer: int, kernel: int = 3, *, stride: int = 1, bias: bool = True) -> None:
        side = kernel // 2
        super().__init__(inner, outer, kernel, (stride, 1, 1), (0, side, side), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D, T, H, W) -> (B, outer, T/stride, H, W)."""
        return super().forward(_with_zeros(x, self.kernel_size[0] - self.stride[0]))


class Double(CausalConv):
    """Each frame becomes two."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D, T, H, W) -> (B, D, 2T, H, W)."""
        return rearrange(super().forward(x), "b (d two) t h w -> b d (t two) h w", two=2)


class ResBlock(nn.Module):
    """vae_temporal.py ResBlock. Its norms are over all frames of a chunk, so that only its convolutions are causal."""

    def __init__(self, inner: int, outer: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inner), CausalConv(inner, outer, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outer), CausalConv(outer, outer, bias=False)
        self.shortcut = nn.Identity() if inner == outer else CausalConv(inner, outer, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, inner, T, H, W) -> (B, outer, T, H, W)."""
        update = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(update)))


def _blocks(inner: int, outer: int, depth: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(outer if i else inner, outer, groups) for i in range(depth)))


def _with_zeros(x: Tensor, frames: int) -> Tensor:
    """(B, D, T, H, W) -> (B, D, frames + T, H, W), the new ones in front."""
    return F.pad(x, (0, 0, 0, 0, frames, 0))
