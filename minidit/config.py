"""What a model is, as frozen data: its shape, how its captions are read, how it is sampled. Saved as config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, inf, isfinite
from typing import Any, Literal, get_args

from minidit.broadcast import PARTS, Part, Site


def _check_positive(config: Any, *names: str, whole: bool = True) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < inf:
            kind = "whole number" if whole else "number"
            raise ValueError(f"{type(config).__name__}.{name} must be a positive {kind}, got {value!r}")


Method = Literal[
    "rectified-flow", "iddpm", "iddpm-float32", "iddpm-ddim", "ddim", "ddim-offset", "pndm", "euler-ancestral"
]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model was trained to be sampled, and the video it makes when nothing else is asked for."""

    method: Method  # see samplers.sampler
    prediction: Literal["velocity", "sample", "noise"]  # what the network's output means, see samplers.velocity
    guided: int  # the first channels, which guidance moves; the others are as with the caption
    shift: float | None  # r of rectified flow's timestep transform; None: Open-Sora's, from the size of the video
    steps: int
    guidance: float  # uncond + guidance * (cond - uncond)
    frames: int
    height: int  # pixels
    width: int  # pixels
    fps: float
    space: int  # pixels of one latent, each way
    chunk: int | None  # frames that the decoder takes together, None: all
    time: int  # frames of one latent within a chunk; a rest counts as one more

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            choices = ", ".join(map(repr, get_args(Method)))
            raise ValueError(f"Sampling.method must be one of {choices}, got {self.method!r}")
        flow = self.method == "rectified-flow"
        if self.prediction not in (("velocity", "sample") if flow else ("noise",)):
            choices = "'velocity' or 'sample'" if flow else "'noise'"
            raise ValueError(f"Sampling.prediction must be {choices} for {self.method}, got {self.prediction!r}")
        if self.shift is not None and not flow:
            raise ValueError(f"Sampling.shift must be None for {self.method}, got {self.shift!r}")
        _check_positive(self, "guided", "steps", "frames", "height", "width", "space", "time")
        _check_positive(self, *["chunk"] * (self.chunk is not None))
        _check_positive(self, "fps", *(() if self.shift is None else ("shift",)), whole=False)
        if type(self.guidance) not in (int, float) or not isfinite(self.guidance):
            raise ValueError(f"Sampling.guidance must be a finite number, got {self.guidance!r}")

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) of the latents of a video of that many frames and pixels."""
        if min(frames, height, width) < 1 or height < self.space or width < self.space:
            raise ValueError(
                f"a video needs at least 1 frame of {self.space}x{self.space} pixels, "
                f"got {frames} frames of {height}x{width}"
            )
        chunk = self.chunk or frames
        chunks, rest = divmod(frames, chunk)
        return chunks * ceil(chunk / self.time) + ceil(rest / self.time), height // self.space, width // self.space


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


Time = Literal["rope-after-norm", "rope-before-norm", "stream", "branch", "stored"]


@dataclass(frozen=True, kw_only=True)
class Positions:
    """How tokens are told where in a frame they are, and when."""

    # area: a place's position is its index in a frame of base x base pixels; other frames of one area share a range
    # grid: the places of a row and of a column span base positions, however many they are (None: as many)
    # stored: a table of base places is part of the checkpoint
    space: Literal["area", "grid", "stored"]
    base: int | None
    scale: float  # grid: positions are divided by it
    # rope: rotary, in temporal attention, after or before the norm of queries and keys
    # stream: a table, added to the tokens once, before the first temporal attention; stored: the checkpoint's
    # branch: a table, added to what the first temporal attention sees and not to the tokens
    time: Time
    pace: float  # stream, branch: frames from one position to the next
    frames: int | None  # stored: frames of the table

    def __post_init__(self) -> None:
        for name, values in (("space", ("area", "grid", "stored")), ("time", get_args(Time))):
            if getattr(self, name) not in values:
                choices = ", ".join(map(repr, values))
                raise ValueError(f"Positions.{name} must be one of {choices}, got {getattr(self, name)!r}")
        _check_positive(self, "scale", "pace", whole=False)
        _check_positive(self, *["base"] * (self.space != "grid" or self.base is not None))
        _check_positive(self, *["frames"] * (self.time == "stored"))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One spatio-temporal DiT. Raises ValueError, naming the field, for a shape that cannot be built."""

    depth: int  # times that `blocks` repeat
    blocks: tuple[tuple[Part, ...], ...]  # the parts of each block, in the order of the forward
    dim: int  # channels of a token
    heads: int
    mlp_ratio: float
    patch: tuple[int, int, int]  # latent frames x rows x columns in one token
    odd: Literal["pad", "cut", "refuse"]  # what becomes of rows and columns that do not fill a patch
    in_channels: int
    out_channels: int  # the first in_channels of them are the prediction
    qk_norm: bool  # RMSNorm of the queries and keys of self-attention
    modulation: Literal["shared", "block"]  # one linear layer for all blocks and a table in each, or a layer in each
    bare_temporal: bool  # temporal attention without norm and modulation, with the gate of its block's spatial one
    told: Literal["time", "fps", "size", "class"]  # what modulates beside the time, see condition.Condition
    classes: int | None  # told "class": labels, one more than which stands for none
    positions: Positions
    caption_dim: int  # 0: no captions
    caption_length: int  # tokens
    null_caption: bool  # a learned one; without, the null caption is an empty prompt
    rounds_time: bool  # to its own dtype before it is embedded, so that a plan has to be made of rounded times
    sampling: Sampling
    captions: CaptionConfig | None = None  # None: the text encoder lives outside of the checkpoint

    def __post_init__(self) -> None:
        _check_positive(self, "depth", "dim", "heads", "in_channels", "out_channels")
        _check_positive(self, "mlp_ratio", whole=False)
        self._check_choices()
        self._check_shapes()
        self._check_captions()

    def _check_choices(self) -> None:
        choices = {
            "odd": ("pad", "cut", "refuse"),
            "qk_norm": (True, False),
            "modulation": ("shared", "block"),
            "bare_temporal": (True, False),
            "told": ("time", "fps", "size", "class"),
            "null_caption": (True, False),
            "rounds_time": (True, False),
        }
        for name, values in choices.items():
            value = getattr(self, name)
            if type(value) not in map(type, values) or value not in values:
                raise ValueError(f"ModelConfig.{name} must be one of {', '.join(map(repr, values))}, got {value!r}")
        if not self.blocks or any(
            not block or len(set(block)) < len(block) or not set(block) <= set(PARTS) for block in self.blocks
        ):
            raise ValueError(
                f"ModelConfig.blocks must be blocks of different parts out of {', '.join(PARTS)}, got {self.blocks!r}"
            )
        if self.bare_temporal and any("temporal" in block and "spatial" not in block for block in self.blocks):
            raise ValueError("ModelConfig.bare_temporal needs a spatial part in every block with a temporal one")
        if (self.told == "class") != (self.classes is not None):
            raise ValueError(f"ModelConfig.classes go with told='class', got {self.classes!r} with {self.told!r}")
        if self.classes is not None:
            _check_positive(self, "classes")

    def _check_shapes(self) -> None:
        if self.dim % self.heads or self.head_dim % 2:
            raise ValueError(
                f"ModelConfig.dim must be a multiple of heads, with an even quotient for the rotary pairs, "
                f"got dim={self.dim} and heads={self.heads}"
            )
        if self.dim % 4:
            raise ValueError(f"ModelConfig.dim must be a multiple of 4 for the 2-D positions, got {self.dim}")
        if self.told == "size" and self.dim % 3:
            raise ValueError(f"ModelConfig.dim must be a multiple of 3 for told='size', got {self.dim}")
        if self.positions.time == "rope-before-norm" and not self.qk_norm:
            raise ValueError("Positions.time 'rope-before-norm' needs ModelConfig.qk_norm")
        if self.out_channels < self.in_channels:
            raise ValueError(
                f"ModelConfig.out_channels must be at least in_channels={self.in_channels}, got {self.out_channels}"
            )
        if self.sampling.guided > self.in_channels:
            raise ValueError(
                f"Sampling.guided must be at most ModelConfig.in_channels={self.in_channels}, "
                f"got {self.sampling.guided}"
            )
        if self.sampling.method.startswith("iddpm") and self.out_channels != 2 * self.in_channels:
            raise ValueError(
                f"ModelConfig.out_channels must be twice in_channels={self.in_channels} for {self.sampling.method}, "
                f"noise and its variance, got {self.out_channels}"
            )
        if len(self.patch) != 3 or self.patch[0] != 1 or any(type(n) is not int or n < 1 for n in self.patch):
            raise ValueError(f"ModelConfig.patch must be (1, rows, columns): one latent frame, got {self.patch}")

    def _check_captions(self) -> None:
        if any("cross" in block for block in self.blocks):
            _check_positive(self, "caption_dim", "caption_length")
        elif self.caption_dim or self.caption_length or self.null_caption or self.captions:
            raise ValueError(
                "ModelConfig.blocks have no 'cross', where captions are read: "
                "caption_dim and caption_length must be 0, null_caption False and captions None"
            )
        if self.captions and self.caption_dim % self.captions.heads:
            raise ValueError(
                "ModelConfig.caption_dim must be a multiple of CaptionConfig.heads, "
                f"got caption_dim={self.caption_dim} and heads={self.captions.heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def frame_masks(self) -> bool:
        """Whether it was trained with frames that are given, as Open-Sora 1.1 and 1.2 were, but no embedded model."""
        return self.told in ("fps", "size") and self.captions is None

    @property
    def mlp_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every sublayer, in the order of the forward."""
        return tuple(Site(block, part) for block, parts in enumerate(self.depth * self.blocks) for part in parts)

    def tokens(self, latent: tuple[int, int, int]) -> tuple[int, int]:
        """(T, S): frames and places of a frame that latents of size (T, H, W) have as tokens."""
        rows, columns = self.grid(latent)
        return latent[0], rows * columns

    def grid(self, latent: tuple[int, int, int]) -> tuple[int, int]:
        """Rows and columns of patches. Raises ValueError for latents that a model does not take."""
        sizes = list(zip(latent[1:], self.patch[1:], strict=True))
        if self.odd == "refuse" and any(size % patch for size, patch in sizes):
            height, width = (self.sampling.space * patch for patch in self.patch[1:])
            raise ValueError(
                f"this model takes latents of whole patches, {self.patch[1:]}, got {tuple(latent[1:])}: give a height "
                f"that is a multiple of {height} pixels and a width that is one of {width}"
            )
        rows, columns = (size // patch if self.odd == "cut" else ceil(size / patch) for size, patch in sizes)
        if not rows or not columns:
            raise ValueError(f"latents of {tuple(latent[1:])} have no patch of {self.patch[1:]}")
        if self.positions.space == "stored" and rows * columns != self.positions.base:
            raise ValueError(f"this model has positions for {self.positions.base} places, got {rows} x {columns}")
        if self.positions.time == "stored" and latent[0] != self.positions.frames:
            raise ValueError(f"this model has positions for {self.positions.frames} frames, got {latent[0]}")
        return rows, columns

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
            fields |= {
                "patch": tuple(fields["patch"]),
                "blocks": tuple(map(tuple, fields["blocks"])),
                "positions": Positions(**fields["positions"]),
                "sampling": Sampling(**fields["sampling"]),
            }
            return cls(**fields, captions=captions)
        except KeyError as error:
            raise ValueError(f"not a minidit model config: {error} is missing") from error
        except TypeError as error:
            raise ValueError(f"not a minidit model config: {error}") from error
