"""The decoders of the published models behind one interface: latents to frames, piece by piece, and videos to latents.

A video is decoded in pieces of so many frames as its decoder has to see together, each in one piece or in tiles of rows
and columns, so that memory does not grow with a video's length, nor, with tiles, with its size. Tiles change what is
decoded a little, also far from their edges: the norms of all these decoders take mean and variance over all places that
they see, and their attention sees them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from minidit.opensora_vae import SPATIAL_FRAMES, OpenSoraVAE
from minidit.plan_vae import CausalVAE
from minidit.tiling import Fused, Held, Map, Tile, mosaic, tiled, windows

OVERLAP = 8  # latents that tiles share, as a quarter of the 256 pixels of Open-Sora-Plan's
WINDOW = Tile(size=17, overlap=4)  # latents: 65 frames, which Open-Sora-Plan decodes together
TOGETHER = 14  # frames; Vchitect/Latte b27c24a1 sample/pipeline_latte.py decode_latents_with_temporal_decoder
Across = Callable[[Map, Tensor, Tile | None, int], Tensor]  # f, z, tile and space to f(z); see `_all_tiles`


class Decoder(nn.Module):
    """Latents (C, T, h, w), as the model makes them, to a video, and a video to such latents.

    Runs in the dtype and on the device of its parameters, see `to`.
    """

    vae: Any
    channels: int  # of a latent
    space: int  # pixels of one latent, each way

    def latent_frames(self, frames: int) -> int:
        """T of that many frames. Raises ValueError for a number that cannot be decoded."""
        if frames < 1:
            raise ValueError(f"a video has 1 frame at least, got {frames}")
        return self._latent_frames(frames)

    def chunks(self, latents: Tensor, frames: int, *, tile: Tile | None = None) -> Iterator[Tensor]:
        """Frames (t, H, W, 3) uint8 on the CPU, in order, decoded when they are asked for.

        tile: of rows and of columns, None: whole frames, four at a time where each is alone; see `fit`. Raises
        ValueError for latents of another size.
        """
        expected = self.latent_frames(frames)
        if latents.ndim != 4 or latents.shape[:2] != (self.channels, expected) or 0 in latents.shape:
            raise ValueError(
                f"latents of {frames} frames are ({self.channels}, {expected}, H/{self.space}, W/{self.space}), "
                f"got {tuple(latents.shape)}"
            )
        return self._chunks(latents, frames, tile)

    @torch.inference_mode()
    def _chunks(self, latents: Tensor, frames: int, tile: Tile | None) -> Iterator[Tensor]:
        parameter = next(self.parameters())
        z = latents[None].to(parameter.device, parameter.dtype)
        for piece in self._pieces(z, frames, tile, _all_tiles):
            yield _bytes(piece).cpu()

    @torch.inference_mode()
    def encode(self, video: Tensor) -> Tensor:
        """(3, T, H, W), -1 to 1 -> the mean of the latents, (C, T', H / space, W / space), float32.

        The originals draw latents from around the mean. Raises ValueError for a video of another size.
        """
        if video.ndim != 4 or len(video) != 3 or 0 in video.shape or any(n % self.space for n in video.shape[2:]):
            raise ValueError(
                f"a video to encode is (3, T, H, W) with H and W multiples of {self.space}, got {tuple(video.shape)}"
            )
        parameter = next(self.parameters())
        return self._encode(video[None].to(parameter.device, parameter.dtype))[0].float()

    def peak_bytes(self, latent: tuple[int, int, int], *, tile: Tile | None = None) -> int:
        """Bytes that `chunks` holds at most, beside the weights, for latents of size (T, h, w).

        Counted, tensor by tensor, in a run of the first pieces on the meta device, where tensors have shapes and no
        data. With tiles, one tile is run, and three times the frames of a piece are added for putting it together.
        Of the published shapes at 256x256 to 720p it is 1.0 to 1.3 times what torch 2.11 allocated on H100 and H200, if
        they had the room; what its allocator keeps in reserve (`max_memory_reserved`) can be twice as much.
        """
        dtype = next(self.parameters()).dtype
        bare = {id(t): nn.Parameter(t.to("meta"), requires_grad=False) for t in (*self.parameters(), *self.buffers())}
        twin = deepcopy(self, bare)  # without a copy of the weights
        with torch.no_grad(), Fused(), Held() as held:
            z = torch.empty(1, self.channels, *latent, dtype=dtype, device="meta")
            pieces = twin._pieces(z, self._frames(latent[0]), tile, _one_tile)
            sizes = [_bytes(piece).nbytes * piece.itemsize for piece in islice(pieces, 2)]
        return held.peak + (3 * max(sizes) if tile else 0)

    def fit(self, latent: tuple[int, int, int], memory: float) -> Tile | None:
        """The largest tile with which `peak_bytes` is at most memory; None, without tiles, if that is.

        Raises ValueError if not even the smallest does.
        """
        if self.peak_bytes(latent) <= memory:
            return None
        low, high = 2 * OVERLAP, 1 + max(2 * OVERLAP, *latent[1:])  # of which low fits and high is too large
        least = self.peak_bytes(latent, tile=Tile(size=low, overlap=OVERLAP))
        if least > memory:
            raise ValueError(
                f"decoding latents of {latent} takes {least:,} bytes with the smallest tiles, {low} latents wide, "
                f"got memory={memory:,}: free some, or make a smaller video"
            )
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.peak_bytes(latent, tile=Tile(size=middle, overlap=OVERLAP)) <= memory
            low, high = (middle, high) if fits else (low, middle)
        return Tile(size=low, overlap=OVERLAP)

    def _latent_frames(self, frames: int) -> int:
        return frames

    def _frames(self, latents: int) -> int:
        """The most frames that so many latents make."""
        return latents

    def _pieces(self, z: Tensor, frames: int, tile: Tile | None, across: Across) -> Iterator[Tensor]:
        """z: (1, C, T, h, w) -> (1, 3, t, H, W), -1 to 1, float32, until all frames are there."""
        raise NotImplementedError

    def _encode(self, video: Tensor) -> Tensor:
        """(1, 3, T, H, W) -> (1, C, T', h, w)."""
        raise NotImplementedError


def _all_tiles(f: Map, z: Tensor, tile: Tile | None, space: int) -> Tensor:
    """f(z), float32. z: (1, C, t, h, w) -> (1, 3, t', H, W)."""
    return f(z).float() if tile is None else mosaic(lambda part: f(part).float(), z, tile, space)


def _one_tile(f: Map, z: Tensor, tile: Tile | None, space: int) -> Tensor:
    """f of one tile, as all are of one size, in a tensor of the size that all of them make."""
    if tile is None:
        return f(z).float()
    rows, columns = (windows(size, tile)[0][1] for size in z.shape[3:])
    y = f(z[..., :rows, :columns]).float()
    return y.new_empty(*y.shape[:3], space * z.shape[3], space * z.shape[4])


def _bytes(piece: Tensor) -> Tensor:
    """(1, 3, t, H, W), -1 to 1 -> (t, H, W, 3) uint8."""
    return rearrange(((piece + 1) * 127.5).round().clamp(0, 255).byte(), "1 c t h w -> t h w c").contiguous()


def _contiguous_behind_attention(autoencoder: Any) -> None:
    """diffusers' attention leaves its images channels last, and all behind it, too: on a GPU, GroupNorm copies such."""
    for layer in autoencoder.decoder.mid_block.attentions:
        if layer is not None and _contiguous not in layer._forward_hooks.values():
            layer.register_forward_hook(_contiguous)


def _contiguous(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out.contiguous()


class Frames(Decoder):
    """Each frame alone, by diffusers' AutoencoderKL: Open-Sora 1.0 and 1.1, Latte.

    Source: hpcaitech/Open-Sora v1.1.0 opensora/models/vae/vae.py VideoAutoencoderKL.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        _contiguous_behind_attention(vae)
        self.channels, self.factor = vae.config.latent_channels, vae.config.scaling_factor
        self.space = 2 ** (len(vae.config.block_out_channels) - 1)

    def _pieces(self, z: Tensor, frames: int, tile: Tile | None, across: Across) -> Iterator[Tensor]:
        return (across(self._decode, part, tile, self.space) for part in z.split(1 if tile else SPATIAL_FRAMES, 2))

    def _decode(self, z: Tensor) -> Tensor:
        """(1, C, t, h, w) -> (1, 3, t, H, W)."""
        images = self.vae.decode(rearrange(z, "1 c t h w -> t c h w") / self.factor).sample
        return rearrange(images, "t c h w -> 1 c t h w")

    def _encode(self, video: Tensor) -> Tensor:
        means = [self.vae.encode(frame).latent_dist.mode() for frame in rearrange(video, "1 c t h w -> t 1 c h w")]
        return torch.stack(means, 2) * self.factor


class TemporalDecoder(Frames):
    """14 frames together, by diffusers' AutoencoderKLTemporalDecoder: Latte T2V. Encoded is each frame alone.

    Source: Vchitect/Latte b27c24a1 sample/pipeline_latte.py. Seams are kept: chunks see nothing of each other.
    """

    def _pieces(self, z: Tensor, frames: int, tile: Tile | None, across: Across) -> Iterator[Tensor]:
        return (across(self._decode, chunk, tile, self.space) for chunk in z.split(TOGETHER, 2))

    def _decode(self, z: Tensor) -> Tensor:
        images = rearrange(z, "1 c t h w -> t c h w") / self.factor
        return rearrange(self.vae.decode(images, num_frames=len(images)).sample, "t c h w -> 1 c t h w")


class OpenSora(Decoder):
    """Open-Sora 1.2: 17 frames together by the temporal part, each alone by the spatial one. Only that takes tiles."""

    def __init__(self, vae: OpenSoraVAE) -> None:
        super().__init__()
        self.vae = vae
        _contiguous_behind_attention(vae.spatial)
        self.channels, self.space = vae.config.channels, vae.config.space

    def _latent_frames(self, frames: int) -> int:
        return self.vae.config.latent_frames(frames)

    def _frames(self, latents: int) -> int:
        config = self.vae.config
        chunks, rest = divmod(latents, config.latent_frames(config.chunk))
        return chunks * config.chunk + min(rest * config.time, config.chunk)

    def _pieces(self, z: Tensor, frames: int, tile: Tile | None, across: Across) -> Iterator[Tensor]:
        config = self.vae.config
        z = (z * self.vae.scale + self.vae.shift).to(z.dtype)
        for part, n in zip(z.split(config.latent_frames(config.chunk), 2), config.chunks(frames), strict=True):
            for images in self.vae.decoder(part, n).split(1 if tile else SPATIAL_FRAMES, 2):
                yield across(self.vae.spatial_decode, images, tile, self.space)

    def _encode(self, video: Tensor) -> Tensor:
        return self.vae.encode(video)


class Causal(Decoder):
    """Open-Sora-Plan 1.0 and 1.1: a video of up to 65 frames in one piece, a longer one in tiles of time.

    The original cuts hard between chunks that share one latent. To carry on what the convolutions have seen instead
    would not make the chunks a whole either, as the norms see all frames of one: here the chunks share four latents and
    go over into each other.
    """

    def __init__(self, vae: CausalVAE, window: Tile = WINDOW) -> None:
        super().__init__()
        self.vae, self.window = vae, window
        self.channels, self.space = vae.config.latent, vae.config.space

    def _latent_frames(self, frames: int) -> int:
        time = self.vae.config.time
        if frames % time != 1 % time:
            raise ValueError(f"this decoder makes 1 + a multiple of {time} frames, got {frames}")
        return (frames - 1) // time + 1

    def _frames(self, latents: int) -> int:
        return 1 + (latents - 1) * self.vae.config.time

    def _pieces(self, z: Tensor, frames: int, tile: Tile | None, across: Across) -> Iterator[Tensor]:
        time = self.vae.config.time

        def decode(part: Tensor) -> Tensor:
            return across(self.vae.decode, part, tile, self.space)

        return tiled(decode, z, 2, self.window, scale=time, short=time - 1)

    def _encode(self, video: Tensor) -> Tensor:
        return self.vae.encode(video)
