"""The causal video VAE of Open-Sora-Plan 1.0 and 1.1: video to latents and back, in one piece, without tiles.

Source: PKU-YuanGroup/Open-Sora-Plan v1.1.0 (2a8b2328) opensora/models/ae/videobase: causal_vae/modeling_causalvae.py
CausalVAEModel, Encoder, Decoder; modules/ conv.py, resnet_block.py, attention.py, updownsample.py, normalize.py, whose
classes are named below. Quirks kept:
  - Causal are the convolutions and what halves the frames. A GroupNorm takes mean and variance over all frames, so the
    latents of a video's start depend, a little, on how it goes on; except in `flat` levels, which see single frames.
  - What doubles the frames interpolates between neighbours, so a decoded frame looks up to three frames ahead.
  - Time is padded with copies of the first frame, space with zeros; halving the size pads on the right and below alone.

Shapes: B batch, C channels, T frames, H rows and W columns, S places in a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

COLORS = 3
SCALE = 0.18215  # latents, as the transformer sees them, over those of the VAE; causal_vae/__init__.py
Attended = Literal["frame", "scrambled"]


@dataclass(frozen=True, kw_only=True)
class CausalVAEConfig:
    """Shape of one causal VAE. Raises ValueError, naming the field, for a shape that cannot be built.

    Levels are counted in the order they run: those of the encoder from the video on, those of the decoder from the
    latents on. Each but the last halves the rows and columns, or doubles them.
    """

    widths: tuple[int, ...]  # channels of the encoder's levels; the decoder's are the same, from the last to the first
    depth: int  # residual blocks of an encoder's level; a decoder's has one more
    groups: int  # of channels, in every GroupNorm
    latent: int  # channels of a latent
    flat: int  # the encoder's first levels that see single frames, as, with any, its first convolution does; 0: none
    halve: tuple[int, ...]  # the encoder's levels that halve the frames after the first
    double: tuple[int, ...]  # the decoder's levels that double them
    mixed: bool  # halving and doubling frames is learned, in part
    attended: Attended  # see Attention

    def __post_init__(self) -> None:
        levels = range(len(self.widths))
        for name in ("depth", "groups", "latent"):
            if getattr(self, name) < 1:
                raise ValueError(f"CausalVAEConfig.{name} must be at least 1, got {getattr(self, name)}")
        if not self.widths or any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(f"CausalVAEConfig.widths must be multiples of groups={self.groups}, got {self.widths}")
        if not 0 <= self.flat <= len(levels):
            raise ValueError(f"CausalVAEConfig.flat must be 0 to {len(levels)} levels, got {self.flat}")
        for name in ("halve", "double"):
            counts = [getattr(self, name).count(level) for level in levels]
            if max(counts) > 1 or sum(counts) < len(getattr(self, name)):
                raise ValueError(
                    f"CausalVAEConfig.{name} must be different levels of 0 to {levels[-1]}, got {getattr(self, name)}"
                )
        if len(self.halve) != len(self.double):
            raise ValueError(
                f"CausalVAEConfig.double must have as many levels as halve={self.halve}, got {self.double}"
            )
        if self.attended not in get_args(Attended):
            choices = " or ".join(map(repr, get_args(Attended)))
            raise ValueError(f"CausalVAEConfig.attended must be {choices}, got {self.attended!r}")

    @property
    def space(self) -> int:
        """Pixels of one latent, each way."""
        return 2 ** (len(self.widths) - 1)

    @property
    def time(self) -> int:
        """Frames of one latent, after the first, which is one frame's."""
        return 2 ** len(self.halve)


# LanguageBind/Open-Sora-Plan-v1.1.0/vae: "the v1.1.0 version model configuration file", printed in
# docs/Train_And_Eval_CausalVideoVAE.md of later tags
PLAN_1_1 = CausalVAEConfig(
    widths=(128, 256, 512, 512),
    depth=2,
    groups=32,
    latent=4,
    flat=2,
    halve=(1, 2),
    double=(0, 1),
    mixed=True,
    attended="frame",
)

# LanguageBind/Open-Sora-Plan-v1.0.0/vae: scripts/causalvae/release.json. Which levels halve the frames has no trace in
# the names or shapes of the file: the same class's defaults are (1, 2)
PLAN_1_0 = CausalVAEConfig(
    widths=(128, 256, 512, 512),
    depth=2,
    groups=32,
    latent=4,
    flat=0,
    halve=(0, 1),
    double=(0, 1),
    mixed=False,
    attended="scrambled",
)


class CausalVAE(nn.Module):
    """Video, -1 to 1, to the latents that the transformer sees, and back. Raises ValueError for sizes that do not fit.

    The sizes are those of Open-Sora-Plan: 1 + 4k frames make 1 + k latents, 8x8 pixels one.
    """

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, video: Tensor) -> Tensor:
        """video: (B, 3, 1 + 4k, 8h, 8w) -> (B, 4, 1 + k, h, w).

        The mean of the latents, where upstream's wrapper draws a sample of them: `moments` has what that takes.
        """
        return self.moments(video)[0] * SCALE

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """video: (B, 3, 1 + 4k, 8h, 8w) -> mean and log variance of the latents, unscaled, (B, 4, 1 + k, h, w) each."""
        space, time = self.config.space, self.config.time
        shape = tuple(video.shape)
        if not (len(shape) == 5 and min(shape) > 0 and shape[1] == COLORS and shape[2] % time == 1 % time) or any(
            size % space for size in shape[3:]
        ):
            raise ValueError(
                f"a video must be (B, {COLORS}, T, H, W) with 1 + a multiple of {time} frames,"
                f" and H and W multiples of {space}, got {shape}"
            )
        mean, log_variance = self.encoder(video).chunk(2, 1)
        return mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        """latents: (B, 4, 1 + k, h, w) -> (B, 3, 1 + 4k, 8h, 8w), about -1 to 1: nothing is clipped."""
        shape, channels = tuple(latents.shape), self.config.latent
        if len(shape) != 5 or min(shape) < 1 or shape[1] != channels:
            raise ValueError(f"latents must be (B, {channels}, T, H, W), none of them 0, got {shape}")
        return self.decoder(latents / SCALE)


class Encoder(nn.Module):
    """Video to the mean and log variance of its latents."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.first = CausalConv(COLORS, widths[0], (1 if config.flat else 3, 3, 3))
        self.levels = nn.Sequential()
        for i, width in enumerate(widths):
            flat, halves = i < config.flat, i in config.halve
            blocks = _blocks(widths[max(i - 1, 0)], width, config.depth, config.groups, frames=1 if flat else 3)
            space = HalfSize(width) if i < last else nn.Identity()
            self.levels.append(Level(blocks, space, HalfTime(width, config.mixed) if halves else nn.Identity(), flat))
        self.middle = _middle(config)
        self.norm = _norm(config.groups, widths[-1])
        self.last = CausalConv(widths[-1], 2 * config.latent, (3, 3, 3))
        self.moments = CausalConv(2 * config.latent, 2 * config.latent, (1, 1, 1))

    def forward(self, video: Tensor) -> Tensor:
        """video: (B, 3, 1 + 4k, 8h, 8w) -> mean, then log variance: (B, 2 * 4, 1 + k, h, w)."""
        x = self.middle(self.levels(self.first(video)))
        return self.moments(self.last(F.silu(self.norm(x))))


class Decoder(nn.Module):
    """Latents to video. Upstream counts its levels the other way."""

    def __init__(self, config: CausalVAEConfig) -> None:
        super().__init__()
        widths, last = config.widths[::-1], len(config.widths) - 1
        self.latents = CausalConv(config.latent, config.latent, (1, 1, 1))
        self.first = CausalConv(config.latent, widths[0], (3, 3, 3))
        self.middle = _middle(config)
        self.levels = nn.Sequential()
        for i, width in enumerate(widths):
            blocks = _blocks(widths[max(i - 1, 0)], width, config.depth + 1, config.groups, frames=3)
            space = DoubleSize(width) if i < last else nn.Identity()
            doubles = i in config.double
            self.levels.append(Level(blocks, space, DoubleTime(width, config.mixed) if doubles else nn.Identity()))
        self.norm = _norm(config.groups, widths[-1])
        self.last = CausalConv(widths[-1], COLORS, (3, 3, 3))

    def forward(self, latents: Tensor) -> Tensor:
        """latents: (B, 4, 1 + k, h, w), unscaled -> (B, 3, 1 + 4k, 8h, 8w)."""
        x = self.levels(self.middle(self.first(self.latents(latents))))
        return self.last(F.silu(self.norm(x)))


class Level(nn.Module):
    """Residual blocks, then half or twice the size, then half or twice the frames."""

    def __init__(self, blocks: nn.Sequential, space: nn.Module, time: nn.Module, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat
        self.blocks, self.space, self.time = blocks, space, time

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W) -> the same of other C, T, H and W."""
        if self.flat:  # each frame is normalised by itself
            frames = self.blocks(rearrange(x, "b c t h w -> (b t) c 1 h w"))
            x = rearrange(frames, "(b t) c 1 h w -> b c t h w", b=x.shape[0])
        else:
            x = self.blocks(x)
        return self.time(self.space(x))


class CausalConv(nn.Conv3d):
    """A convolution in which a frame sees those before it. Source: conv.py CausalConv3d, and Conv2d as one frame's."""

    def __init__(self, dim: int, out: int, kernel: tuple[int, int, int], every: int = 1) -> None:
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(dim, out, kernel, (every, 1, 1), padding)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W) -> (B, C', T, H, W), or every so many of the T frames from the first on."""
        return super().forward(_behind_first(x, self.kernel_size[0] - 1))


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))). Source: resnet_block.py ResnetBlock3D; ResnetBlock2D has frames=1."""

    def __init__(self, dim: int, out: int, groups: int, frames: int) -> None:
        super().__init__()
        self.norm1 = _norm(groups, dim)
        self.conv1 = CausalConv(dim, out, (frames, 3, 3))
        self.norm2 = _norm(groups, out)
        self.conv2 = CausalConv(out, out, (frames, 3, 3))
        self.skip = CausalConv(dim, out, (1, 1, 1)) if dim != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W) -> (B, C', T, H, W)."""
        update = self.conv1(F.silu(self.norm1(x)))
        update = self.conv2(F.silu(self.norm2(update)))
        return self.skip(x) + update


class Attention(nn.Module):
    """x + attention, of one head, among the places of a frame. Source: attention.py AttnBlock3DFix.

    Scrambled: AttnBlock3D, which reads (C, T) as if it were (T, C). What it takes for the channels of a frame are some
    channels of all frames; with one frame there is no difference.
    """

    def __init__(self, dim: int, groups: int, attended: Attended) -> None:
        super().__init__()
        self.scrambled = attended == "scrambled"
        self.norm = _norm(groups, dim)
        self.qkv = CausalConv(dim, 3 * dim, (1, 1, 1))
        self.proj = CausalConv(dim, dim, (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W) -> (B, C, T, H, W)."""
        q, k, v = (self._frames(part) for part in self.qkv(self.norm(x)).chunk(3, 1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)  # (B, T, C, S)
        out = out.reshape(x.shape) if self.scrambled else out.transpose(1, 2).reshape(x.shape)
        return x + self.proj(out)

    def _frames(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W) -> (B, T, S, C)."""
        b, c, t = x.shape[:3]
        x = x.reshape(b, t, c, -1) if self.scrambled else rearrange(x, "b c t h w -> b t c (h w)")
        # what fuses attention asks for rows of C numbers side by side
        return x.transpose(2, 3).contiguous()


class HalfSize(nn.Module):
    """Source: updownsample.py Downsample; SpatialDownsample2x is the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, (1, 3, 3), stride=(1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W) -> (B, C, T, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DoubleSize(nn.Module):
    """Source: updownsample.py SpatialUpsample2x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = CausalConv(dim, dim, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T, H, W) -> (B, C, T, 2 * H, 2 * W)."""
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))


class HalfTime(nn.Module):
    """The mean of every other frame and the two before it. Source: updownsample.py TimeDownsampleRes2x, if mixed; else
    TimeDownsample2x."""

    def __init__(self, dim: int, mixed: bool) -> None:
        super().__init__()
        self.mixed = Mixed(dim, every=2) if mixed else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, 1 + 2k, H, W) -> (B, C, 1 + k, H, W)."""
        mean = _behind_first(x, 2).unfold(2, 3, 2).mean(-1)  # torch's avg_pool3d knows no bfloat16 on a CPU
        return mean if self.mixed is None else self.mixed(mean, x)


class DoubleTime(nn.Module):
    """The first frame as it is, the others interpolated. Source: updownsample.py TimeUpsampleRes2x, if mixed; else
    TimeUpsample2x."""

    def __init__(self, dim: int, mixed: bool) -> None:
        super().__init__()
        self.mixed = Mixed(dim, every=1) if mixed else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, 1 + k, H, W) -> (B, C, 1 + 2k, H, W)."""
        if x.shape[2] > 1:
            rest = F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear", align_corners=False)
            x = torch.cat((x[:, :, :1], rest), 2)
        return x if self.mixed is None else self.mixed(x, x)


class Mixed(nn.Module):
    """A fixed way to make frames, and a learned one: share * fixed + (1 - share) * conv(x), share = sigmoid(mix)."""

    def __init__(self, dim: int, every: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((1,), 2.0))
        self.conv = CausalConv(dim, dim, (3, 3, 3), every)

    def forward(self, fixed: Tensor, x: Tensor) -> Tensor:
        """fixed: (B, C, T', H, W); x: (B, C, T, H, W), every so many of T make T' -> (B, C, T', H, W)."""
        share = torch.sigmoid(self.mix)
        return share * fixed + (1 - share) * self.conv(x)


def _behind_first(x: Tensor, copies: int) -> Tensor:
    """x: (B, C, T, H, W) behind copies of its first frame -> (B, C, copies + T, H, W)."""
    return torch.cat((x[:, :, :1].expand(-1, -1, copies, -1, -1), x), 2) if copies else x


def _norm(groups: int, dim: int) -> nn.GroupNorm:
    """Source: normalize.py Normalize."""
    return nn.GroupNorm(groups, dim, eps=1e-6)


def _blocks(dim: int, out: int, depth: int, groups: int, frames: int) -> nn.Sequential:
    return nn.Sequential(*(Residual(out if i else dim, out, groups, frames) for i in range(depth)))


def _middle(config: CausalVAEConfig) -> nn.Sequential:
    dim, groups = config.widths[-1], config.groups
    return nn.Sequential(
        Residual(dim, dim, groups, 3), Attention(dim, groups, config.attended), Residual(dim, dim, groups, 3)
    )
