"""The three things a sublayer may do to the tokens, and the sublayer itself: x + gate * f(modulate(norm(x)))."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit import ops
from minidit.config import ModelConfig
from minidit.kernels.reference import Axis, Rope, Update
from minidit.parallel import Shares

Caption = tuple[Tensor, Tensor | None]  # keys and values (B, L, 2, H, E), lengths (B,)


class Around(NamedTuple):
    """What self-attention needs beside the tokens: None where it does not."""

    rope: Rope | None = None  # temporal: the frames' rotary positions
    table: Tensor | None = None  # temporal: the frames' positions (T, D), for what attention sees alone
    bias: Tensor | None = None  # spatial: (B, T, S), added to the scores of keys
    bound: float | None = None  # spatial: no score is larger, see reference.score_bound; None: unknown
    shares: Shares | None = None  # where the attended axis is shared among ranks


class SelfAttention(nn.Module):
    """Attention within a frame (axis "spatial") or along a place's frames ("temporal"), QK-RMSNorm, RoPE."""

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__()
        self.heads, self.axis = config.heads, axis
        self.rope_first = config.positions.time == "rope-before-norm"
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.q_norm = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, around: Around) -> Tensor:
        """x: (B, T, S, D) -> (B, T, S, D)."""
        if around.shares is not None:
            x = around.shares.whole(x)
        if around.table is not None:
            x = x + around.table[:, None]
        norm = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        x = ops.self_attention(
            self.qkv(x),
            self.heads,
            norm,
            around.rope,
            self.axis,
            rope_first=self.rope_first,
            bias=around.bias,
            bound=around.bound,
        )
        x = self.proj(x)
        return x if around.shares is None else around.shares.back(x)


class CrossAttention(nn.Module):
    """Attention of every token to its caption."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def prepare(self, text: Tensor, lengths: Tensor | None) -> Caption:
        """text: (B, L, D) -> packed keys and values (B, L, 2, H, E), the same at every call of a run; and lengths."""
        return self.kv(text).unflatten(-1, (2, self.heads, -1)), lengths

    def forward(self, x: Tensor, caption: Caption) -> Tensor:
        """x: (B, T, S, D) -> (B, T, S, D)."""
        return self.proj(ops.cross_attention(self.q(x), *caption))


class Mlp(nn.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        """x: (..., dim) -> (..., out)."""
        return self.fc2(ops.linear_gelu(x, self.fc1.weight, self.fc1.bias))


class Sublayer(nn.Module):
    """One site of the model: tokens -> what it adds to them, gate * f(norm(x) * (1 + scale) + shift).

    normed False leaves out norm, shift and scale, as Open-Sora 1.0's temporal attention does. Without rows (shift,
    scale, gate) it is f(x): cross-attention.

    What the time asks for becomes rows by what the sublayer has: a table (3, D) that is added to it, a linear layer
    that makes them of it, or neither, where the rows are those of another sublayer.
    """

    table: Tensor | None

    def __init__(
        self,
        f: SelfAttention | CrossAttention | Mlp,
        dim: int,
        rows: Literal["table", "linear"] | None,
        *,
        normed: bool = True,
    ) -> None:
        super().__init__()
        self.f, self.normed = f, normed
        self.table = nn.Parameter(torch.randn(3, dim) / dim**0.5) if rows == "table" else None
        self.linear = nn.Linear(dim, 3 * dim) if rows == "linear" else None

    def rows(self, modulation: Tensor) -> Tensor:
        """modulation: (B, T or 1, 3, D), or (B, T or 1, D) for a linear layer -> (B, T or 1, 3, D)."""
        if self.linear is not None:
            return self.linear(modulation).unflatten(-1, (3, -1))
        assert self.table is not None
        return self.table + modulation

    def forward(self, x: Tensor, pending: Sequence[Update], rows: Tensor | None, context: Any) -> tuple[Tensor, Update]:
        """The tokens with what is pending, added in the pass that norms them; and this site's own update, not added.

        x: (B, T, S, D); rows: (B, T or 1, 3, D) shift, scale, gate; context: what f needs beside the tokens.
        """
        if rows is None:
            x = ops.add_updates(x, *pending)
            return x, Update(self.f(x, context), None)
        shift, scale, gate = rows[:, :, :, None].unbind(2)  # each (B, T or 1, 1, D)
        if self.normed:
            x, z = ops.norm_modulate(x, shift, scale, *pending)
        else:
            x = z = ops.add_updates(x, *pending)
        return x, Update(self.f(z, context), gate)


class Final(nn.Module):
    """Norm, modulation by the time alone, and the linear that makes the channels of a patch."""

    def __init__(self, dim: int, out: int, rows: Literal["table", "linear"]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, dim) / dim**0.5) if rows == "table" else None
        self.modulation = nn.Linear(dim, 2 * dim) if rows == "linear" else None
        self.linear = nn.Linear(dim, out)

    def forward(
        self,
        x: Tensor,
        pending: Sequence[Update],
        time: Tensor,
        clean: Tensor | None,
        frame_mask: Tensor | None,
    ) -> Tensor:
        """x: (B, T, S, D); time, clean: (B, D) embeddings of t and of 0; frame_mask: (B, T) -> (B, T, S, out)."""
        z = self._modulate(x, time, *pending)
        if clean is not None and frame_mask is not None:
            # Open-Sora trained with it: a clean frame is normalised again, after the modulation of a noisy one
            # (v1.2.0, opensora/models/layers/blocks.py: T2IFinalLayer.forward)
            z = torch.where(frame_mask[:, :, None, None], z, self._modulate(z, clean))
        return self.linear(z)

    def _modulate(self, x: Tensor, time: Tensor, *pending: Update) -> Tensor:
        if self.modulation is not None:
            rows = self.modulation(F.silu(time)).unflatten(-1, (2, -1))  # (B, 2, D)
        else:
            assert self.table is not None
            rows = self.table + time[:, None]
        shift, scale = rows[:, :, None, None].unbind(1)
        return ops.norm_modulate(x, shift, scale, *pending)[1]
