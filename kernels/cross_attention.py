"""Attention of every token to the tokens of its caption that are there: no mask, no work for those that are not."""

from __future__ import annotations

import torch
from torch import Tensor

from minidit.kernels import flash, launch


def why_not(q: Tensor, kv: Tensor, lengths: Tensor | None) -> str | None:
    """Why the kernel does not take these, None: it does."""
    return launch.why_not([q, kv]) or flash.why_not(q, kv.shape[-1])


def cross_attention(q: Tensor, kv: Tensor, lengths: Tensor | None) -> Tensor:
    """See reference.cross_attention."""
    launch.insist("cross_attention", why_not(q, kv, lengths))
    b, t, s, d = q.shape
    h, e = kv.shape[3:]
    packed = kv.contiguous().flatten(2, 3)  # (B, L, 2 H, E)
    out = torch.empty(b, t * s, h, e, dtype=q.dtype, device=q.device)
    flash.attend(q.contiguous().view(b, t * s, h, e), packed, packed, (0, 0, h), out, lengths, None)
    return out.view(b, t, s, d)
