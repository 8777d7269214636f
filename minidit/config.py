"""What a model is, as frozen data: its shape, how its captions are read, how it is sampled. Saved as config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal

from minidit.broadcast import Site


def _check_positive(config: Any, *names: str, whole: bool = True) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) not in ((int,) if whole else (int, float)) or not value > 0:
            kind = "whole number" if whole else "number"
            raise ValueError(f"{type(config).__name__}.{name} must be a positive {kind}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model was trained to be sampled, and the video it makes when nothing else is asked for."""

    prediction: Literal["velocity", "sample"]  # what the network's output means, see sampling.velocity
    shift: float | None  # r of the timestep transform; None: Open-Sora's, from the size of the video
    steps: int
    guidance: float  # uncond + guidance * (cond - uncond)
    frames: int
    height: int  # pixels
    width: int  # pixels
    fps: float
    space: int  # pixels of one latent, each way
    chunk: int  # frames that the decoder takes together
    time: int  # frames of one latent within a chunk; a rest counts as one more

    def __post_init__(self) -> None:
        if self.prediction not in ("velocity", "sample"):
            raise ValueError(f"Sampling.prediction must be 'velocity' or 'sample', got {self.prediction!r}")
        _check_positive(self, "steps", "frames", "height", "width", "space", "chunk", "time")
        _check_positive(self, "fps", *(() if self.shift is None else ("shift",)), whole=False)

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) of the latents of a video of that many frames and pixels."""
        if min(frames, height, width) < 1 or height < self.space or width < self.space:
            raise ValueError(
                f"a video needs at least 1 frame of {self.space}x{self.space} pixels, "
                f"got {frames} frames of {height}x{width}"
            )
        chunks, rest = divmod(frames, self.chunk)
        return chunks * ceil(self.chunk / self.time) + ceil(rest / self.time), height // self.space, width // self.space


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Shape of the small caption encoder that a checkpoint may carry. Its words are part of the checkpoint."""

    vocabulary: tuple[str, ...]
    heads: int
    depth: int

    def __post_init__(self) -> None:
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("CaptionConfig.vocabulary holds a word twice")
        _check_positive(self, "heads", "depth")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One spatio-temporal DiT. Raises ValueError, naming the field, for a shape that cannot be built."""

    depth: int  # pairs of one spatial and one temporal block
    dim: int  # channels of a token
    heads: int
    mlp_ratio: float
    patch: tuple[int, int, int]  # latent frames x rows x columns in one token
    in_channels: int
    out_channels: int  # the first in_channels of them are the prediction
    caption_dim: int
    caption_length: int  # tokens
    base_size: int  # pixels a side at which a position is an index
    sampling: Sampling
    captions: CaptionConfig | None = None  # None: the text encoder lives outside of the checkpoint

    def __post_init__(self) -> None:
        _check_positive(self, "depth", "dim", "heads", "in_channels", "out_channels")
        _check_positive(self, "caption_dim", "caption_length", "base_size")
        _check_positive(self, "mlp_ratio", whole=False)
        if self.dim % self.heads or self.head_dim % 2:
            raise ValueError(
                f"ModelConfig.dim must be a multiple of heads, with an even quotient for the rotary pairs, "
                f"got dim={self.dim} and heads={self.heads}"
            )
        if self.dim % 4:
            raise ValueError(f"ModelConfig.dim must be a multiple of 4 for the 2-D positions, got {self.dim}")
        if self.out_channels < self.in_channels:
            raise ValueError(
                f"ModelConfig.out_channels must be at least in_channels={self.in_channels}, got {self.out_channels}"
            )
        if len(self.patch) != 3 or self.patch[0] != 1 or any(type(n) is not int or n < 1 for n in self.patch):
            raise ValueError(f"ModelConfig.patch must be (1, rows, columns): one latent frame, got {self.patch}")
        if self.captions and self.caption_dim % self.captions.heads:
            raise ValueError(
                "ModelConfig.caption_dim must be a multiple of CaptionConfig.heads, "
                f"got caption_dim={self.caption_dim} and heads={self.captions.heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def mlp_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every sublayer, in the order of the forward: STDiT3's spatial and temporal blocks take turns."""
        return tuple(
            Site(block, part)
            for block in range(2 * self.depth)
            for part in ("temporal" if block % 2 else "spatial", "cross", "mlp")
        )

    def tokens(self, latent: tuple[int, int, int]) -> tuple[int, int]:
        """(T, S): frames and places of a frame that latents of size (T, H, W) have as tokens."""
        frames, height, width = latent
        return frames, ceil(height / self.patch[1]) * ceil(width / self.patch[2])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of to_json. Raises ValueError for a field that is missing, unknown or impossible."""
        if not isinstance(data, dict):
            raise ValueError(f"not a minidit model config: expected an object, got {type(data).__name__}")
        try:
            fields = dict(data)
            captions = fields.pop("captions", None)
            if captions is not None:
                captions = CaptionConfig(**{**captions, "vocabulary": tuple(captions["vocabulary"])})
            sampling = Sampling(**fields.pop("sampling"))
            return cls(**{**fields, "patch": tuple(fields["patch"])}, sampling=sampling, captions=captions)
        except KeyError as error:
            raise ValueError(f"not a minidit model config: {error} is missing") from error
        except TypeError as error:
            raise ValueError(f"not a minidit model config: {error}") from error


PRESETS: dict[str, ModelConfig] = {
    # hpcaitech/Open-Sora v1.2.0: opensora/models/stdit/stdit3.py STDiT3_XL_2, configs/opensora-v1-2/inference/sample.py
    "opensora-1.2": ModelConfig(
        depth=28,
        dim=1152,
        heads=16,
        mlp_ratio=4.0,
        patch=(1, 2, 2),
        in_channels=4,
        out_channels=8,
        caption_dim=4096,
        caption_length=300,
        base_size=512,
        sampling=Sampling(
            prediction="velocity",
            shift=None,
            steps=30,
            guidance=7.0,
            frames=51,
            height=480,
            width=854,
            fps=24,
            space=8,
            chunk=17,
            time=4,
        ),
    ),
}
