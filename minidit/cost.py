"""What a model call costs, from sizes alone: floating-point operations and bytes. Nothing is built or run.

Operations are counted as torch.utils.flop_counter does: two for each multiply-add of a matrix product or of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from minidit.broadcast import Part
from minidit.config import ModelConfig
from minidit.embed import SINUSOID_DIM


@dataclass(frozen=True)
class Cost:
    """Of one model call of a batch."""

    parts: Mapping[Part, int]  # operations of one computed site of each part
    rest: int  # operations of everything else in a call: embeddings, modulation, final layer
    prepare: int  # operations before the first call, once a run: what is told, the caption's keys and values
    update_bytes: int  # of one kept update, or of the tokens
    output_bytes: int  # of what the final layer makes

    def share(self, groups: int) -> Cost:
        """Of each of so many equal parts of the batch."""
        parts = {part: operations // groups for part, operations in self.parts.items()}
        rest, prepare, update, output = (
            amount // groups for amount in (self.rest, self.prepare, self.update_bytes, self.output_bytes)
        )
        return Cost(parts, rest, prepare, update, output)


def cost(config: ModelConfig, *, batch: int, latent: tuple[int, int, int], caption_length: int, itemsize: int) -> Cost:
    """latent: (T, H, W); caption_length: tokens, the padded ones among them; itemsize: bytes of a number."""
    frames, places = config.tokens(latent)
    n, d, length, patch = batch * frames * places, config.dim, caption_length, prod(config.patch)
    modulated = 0 if config.modulation == "shared" else 2 * batch * d * 3 * d  # by a linear layer of the sublayer's own

    def attention(attended: int) -> int:
        return 4 * n * attended * d  # queries x keys, then weights x values

    def number(width: int) -> int:
        return 2 * batch * (SINUSOID_DIM * width + width * width)  # a ScalarEmbed

    parts: dict[Part, int] = {
        "spatial": 2 * n * d * 4 * d + attention(places) + modulated,
        "temporal": 2 * n * d * 4 * d + attention(frames) + modulated,
        "cross": 2 * n * d * 2 * d + attention(length),
        "mlp": 2 * n * d * 2 * config.mlp_dim + modulated,
    }
    rows = {"shared": 9 if config.told == "size" else 6, "block": 2}[config.modulation]  # block: of the final layer
    patches = 2 * n * d * patch * (config.in_channels + config.out_channels)
    told = {"time": 0, "class": 0, "fps": number(d), "size": 2 * number(d) + 3 * number(d // 3)}[config.told]
    outputs = n * patch * config.out_channels * itemsize
    crosses = sum(site.part == "cross" for site in config.sites)
    text = 2 * batch * length * (config.caption_dim * d + d * d + crosses * 2 * d * d) if config.caption_dim else 0
    return Cost(parts, number(d) + 2 * batch * d * rows * d + patches, told + text, n * d * itemsize, outputs)
