"""A linear layer whose GELU is computed in the epilogue of the matrix product, so that no pass is spent on it."""

from __future__ import annotations

import torch
from torch import Tensor

from minidit.kernels import launch


def why_not(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why it does not take these, None: it does."""
    if x.dtype == torch.float32:
        return "cuBLASLt's GELU errs by 5e-6, which float32 would show"
    return launch.why_not([x, weight, bias])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See reference.linear_gelu. cuBLASLt's GELU is the tanh formula, of the float32 sums."""
    elsewhere = None if x.device.type == "cuda" else f"the tensors are on {x.device}, and the epilogue is cuBLASLt's"
    launch.insist("linear_gelu", x, elsewhere or why_not(x, weight, bias))
    # private, but in every torch since 1.12, where TransformerEncoderLayer's fast path calls it
    out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])
