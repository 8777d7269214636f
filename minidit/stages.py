"""What stands before and behind the model: captions -> what it is told, and latents -> frames, one interface each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from minidit.caption import CaptionEncoder
from minidit.config import ModelConfig
from minidit.model import DiT
from minidit.offload import brought, layers
from minidit.text import T5Text, TextRules, label, layout_of
from minidit.tiling import Tile


class Told(NamedTuple):
    """What `sampling.sample` takes of a batch of captions."""

    text: Tensor | None  # features (B, L, C), or classes (B,), or nothing
    lengths: Tensor | None = None  # (B,) tokens that count
    null: Tensor | None = None  # (L or more, C) features of what guidance leads away from; None: what the model learned


class Text(Protocol):
    """Captions -> what the model is told."""

    def check(self, captions: Sequence[str], negative: str | None) -> None:
        """Raises ValueError, or OSError for files that are missing, for what `encode` would; as far as is known."""

    def encode(self, captions: Sequence[str], negative: str | None) -> Told:
        """negative: what a video is guided away from, None: as the model was trained."""

    @property
    def module(self) -> nn.Module:
        """What it computes with, which is on the device while it does."""


class Decodes(Protocol):
    """Latents (C, T, h, w) -> frames, piece by piece: a module; see decoders.Decoder."""

    def latent_frames(self, frames: int) -> int: ...
    def chunks(self, latents: Tensor, frames: int, *, tile: Tile | None = None) -> Iterator[Tensor]: ...
    def encode(self, video: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Words:
    """The caption encoder that a model carries, for the words that it knows."""

    encoder: CaptionEncoder

    def check(self, captions: Sequence[str], negative: str | None) -> None:
        self._tokens(captions, negative)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str], negative: str | None) -> Told:
        return Told(*self.encoder(self._tokens(captions, negative).to(self.encoder.places.device)))

    def _tokens(self, captions: Sequence[str], negative: str | None) -> Tensor:
        if negative is not None:
            raise ValueError("this model has learned one null caption and no words for others: give no negative prompt")
        return self.encoder.tokenize(captions)

    @property
    def module(self) -> CaptionEncoder:
        return self.encoder


@dataclass(frozen=True)
class Prompts:
    """A T5 beside the model, loaded when it is needed first, and its family's way to say a prompt."""

    source: str | Path  # see T5Text.load
    rules: TextRules
    length: int  # tokens of a prompt
    learned: bool  # the model has a null caption of its own
    dtype: torch.dtype

    @cached_property
    def t5(self) -> T5Text:
        return T5Text.load(self.source, length=self.length, dtype=self.dtype)

    def check(self, captions: Sequence[str], negative: str | None) -> None:
        if Path(self.source).is_dir():
            layout_of(Path(self.source))
        elif "/" not in str(self.source):
            raise FileNotFoundError(f"{self.source} does not exist: give a folder with a T5, or org/name on the hub")

    def encode(self, captions: Sequence[str], negative: str | None) -> Told:
        text, lengths = self.t5.encode([self.rules.prompt(caption) for caption in captions])
        if negative is None and self.learned:
            return Told(text, lengths)
        unscored = replace(self.rules, aesthetic=None, motion=None, camera=None)
        return Told(text, lengths, self.t5.null(unscored.prompt(negative) if negative else ""))

    @property
    def module(self) -> nn.Module:
        encoder: nn.Module = self.t5.encoder
        return encoder


@dataclass(frozen=True)
class Classes:
    """A number or a name of a class for a caption; of a model without classes, nothing."""

    config: ModelConfig

    def check(self, captions: Sequence[str], negative: str | None) -> None:
        if negative is not None:
            raise ValueError("this model reads no text: give no negative prompt")
        self._labels(captions)

    def encode(self, captions: Sequence[str], negative: str | None) -> Told:
        self.check(captions, negative)
        labels = self._labels(captions)
        return Told(None if labels is None else torch.tensor(labels))

    @property
    def module(self) -> nn.Module:
        return nn.Module()

    def _labels(self, captions: Sequence[str]) -> list[int] | None:
        if self.config.classes is not None:
            return [label(caption, self.config) for caption in captions]
        for caption in captions:
            if caption:
                raise ValueError(f'this model makes what it was trained on, untold: its caption is "", got {caption!r}')
        return None


class Pixels(nn.Module):
    """Of a model whose latents are the frames themselves."""

    def latent_frames(self, frames: int) -> int:
        return frames

    def chunks(self, latents: Tensor, frames: int, *, tile: Tile | None = None) -> Iterator[Tensor]:
        for part in latents.split(PIECE, 1):
            yield ((part + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu()

    def encode(self, video: Tensor) -> Tensor:
        return video


PIECE = 16  # frames of Pixels at a time
T5, VAES = "text_encoder", ("vae_temporal_decoder", "vae")  # of Latte T2V there are both, and the original takes one


def t5_folder(folder: Path) -> Path:
    if not (folder / T5).is_dir():
        raise FileNotFoundError(
            f"{folder} has no caption encoder of its own and no {T5}/: put a T5 there, or name its folder or org/name "
            "on the hub with --text"
        )
    return folder if (folder / "tokenizer").is_dir() else folder / T5


def vae_folder(folder: Path) -> Path:
    for name in VAES:
        if (folder / name).is_dir():
            return folder / name
    raise FileNotFoundError(
        f"{folder} has no vae/: put the decoder's folder there, or name it or org/name on the hub with --vae"
    )


Part = TypeVar("Part")


@dataclass
class Stages:
    """Brings each stage to the device while it runs, and measures what it holds there at most, if it is a GPU."""

    device: torch.device
    offload: bool = False  # of model and text encoder, a layer is there only while it runs
    resident: bool = False  # what was brought stays there, for the next time
    peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def on(self, name: str, part: Part) -> Iterator[Part]:
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            module = part if isinstance(part, nn.Module) else part.module  # type: ignore[attr-defined]
            with nullcontext() if self.resident else brought(module, self.device, self._units(part)):
                if self.resident:
                    module.to(self.device)
                yield part
        finally:
            if gpu:
                peak = torch.cuda.max_memory_allocated(self.device)
                self.peaks[name] = max(peak, self.peaks.get(name, 0))
                torch.cuda.empty_cache()

    def _units(self, part: object) -> Sequence[nn.Module]:
        if self.offload and isinstance(part, DiT):
            return layers(part)
        return part.t5.encoder.encoder.block if self.offload and isinstance(part, Prompts) else ()
