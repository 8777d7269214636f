"""The small caption encoder that a checkpoint may carry: known words -> text features (B, L, caption_dim)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from minidit.config import ModelConfig

PADDING = 0  # token of no word; word i of the vocabulary is token i + 1


class CaptionEncoder(nn.Module):
    """Word and place embeddings through a few transformer layers, so that every word knows its neighbours."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.captions is None:
            raise ValueError("ModelConfig.captions is None: this model's captions are encoded elsewhere")
        dim, captions = config.caption_dim, config.captions
        self.vocabulary, self.length = captions.vocabulary, config.caption_length
        self.tokens = {word: i + 1 for i, word in enumerate(captions.vocabulary)}
        self.words = nn.Embedding(len(self.tokens) + 1, dim)
        self.places = nn.Parameter(torch.randn(self.length, dim))
        layer = nn.TransformerEncoderLayer(
            dim, captions.heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, captions.depth, nn.LayerNorm(dim), enable_nested_tensor=False)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Captions -> tokens (B, L) on the CPU, padded. Raises ValueError, naming words, for what it cannot read."""
        return torch.tensor([self._tokens(caption) for caption in captions])

    def _tokens(self, caption: str) -> list[int]:
        words = re.findall(r"[^\s,.!?;:]+|,", caption.lower())
        unknown = [word for word in dict.fromkeys(words) if word not in self.tokens]
        if unknown:
            near = {word: get_close_matches(word, self.vocabulary, 1) for word in unknown}
            hints = ", ".join(
                f"{word!r}" + (f" (did you mean {near[word][0]!r}?)" if near[word] else "") for word in unknown
            )
            raise ValueError(f"unknown in the caption: {hints}. Known words: {' '.join(self.vocabulary)}")
        if not 0 < len(words) <= self.length:
            raise ValueError(
                f"a caption has 1 to {self.length} words and commas, this one has {len(words)}: {caption!r}"
            )
        return [self.tokens[word] for word in words] + [PADDING] * (self.length - len(words))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: (B, L) -> text features (B, L, caption_dim) and lengths (B,)."""
        empty = tokens == PADDING
        text = self.layers(self.words(tokens) + self.places, src_key_padding_mask=empty)
        return text, (~empty).sum(1)
