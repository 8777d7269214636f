"""What modulates the sublayers beside the diffusion time: frames per second, the video's size, or a class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from minidit.config import ModelConfig
from minidit.embed import ScalarEmbed


class Told(NamedTuple):
    """What is added to the embedding of the time, (B, D) each; 0: nothing."""

    tokens: Tensor | float  # for spatial attention, cross-attention and MLPs
    temporal: Tensor | float
    final: Tensor | float
    clean: Tensor | float  # for the final layer of frames that a frame mask calls clean


class Condition(nn.Module):
    """Embeds what ModelConfig.told names.

    time: nothing. fps: Open-Sora 1.2. class: Latte's classes. size: Open-Sora 1.1, where the frame's size tells the
    tokens, the video's length tells temporal attention, and the final layer is told of neither unless a frame is
    clean: a quirk of the original (hpcaitech/Open-Sora v1.1.0, opensora/models/stdit/stdit2.py: STDiT2.forward).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.told, self.classes, dim = config.told, config.classes, config.dim
        if config.told in ("fps", "size"):
            self.fps = ScalarEmbed(dim)
        if config.told == "size":
            self.side, self.ratio, self.frames = ScalarEmbed(dim // 3), ScalarEmbed(dim // 3), ScalarEmbed(dim)
        if config.classes is not None:
            self.label = nn.Embedding(config.classes + 1, dim)

    def forward(
        self, fps: Tensor, *, height: float, width: float, frames: int, ratio: float | None, label: Tensor | None
    ) -> Told:
        """fps, label: (B,); height, width: pixels; frames: of the video; ratio: height / width, None: that."""
        match self.told:
            case "time":
                return Told(0.0, 0.0, 0.0, 0.0)
            case "fps":
                vector = self.fps(fps)
                return Told(vector, vector, vector, vector)
            case "class":
                assert label is not None
                vector = self.label(label)
                return Told(vector, vector, vector, vector)
            case "size":
                sides = (self.side(torch.full_like(fps, side)) for side in (height, width))
                ratio = height / width if ratio is None else ratio
                size = torch.cat((*sides, self.ratio(torch.full_like(fps, ratio))), -1)
                length = self.frames(torch.full_like(fps, frames)) + self.fps(fps)
                return Told(size, length, 0.0, size)
