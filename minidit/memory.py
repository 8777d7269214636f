"""What each stage of a run holds at most, weights among it, counted before anything is loaded.

Counted, tensor by tensor, on the meta device, where tensors have shapes and no data; attention as all fused kernels do
it. An allocator that keeps pieces in reserve takes more.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from minidit.config import ModelConfig
from minidit.model import DiT
from minidit.text import CONFIG, layout_of
from minidit.tiling import Fused, Held


def of_text(folder: Path, *, captions: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of encoding captions with a folder's T5."""
    transformers = import_module("transformers")
    config = json.loads((folder / layout_of(folder)[0] / CONFIG).read_text())
    with torch.device("meta"):
        encoder = transformers.T5EncoderModel(transformers.T5Config(**config)).to(dtype).eval().requires_grad_(False)
        tokens = torch.zeros(captions, length, dtype=torch.long)
        with _held(encoder) as held:
            encoder(input_ids=tokens)
    return held.peak


def of_model(
    config: ModelConfig, dtype: torch.dtype, *, latent: tuple[int, int, int], batch: int, cache_bytes: int
) -> int:
    """Bytes of a run. batch: samples in one model call; cache_bytes: held by the run's cache at most."""
    with torch.device("meta"):
        model = DiT(config).to(dtype).requires_grad_(False)
        shape = (batch, config.caption_length, config.caption_dim) if config.caption_dim else (batch,)
        text = torch.zeros(shape, dtype=dtype if config.caption_dim else torch.long)
        z, fps = torch.zeros(batch, config.in_channels, *latent), torch.zeros(batch)
    told = text if config.caption_dim or config.classes is not None else None
    run = config.sampling
    with torch.enable_grad(), Fused(), _held(model) as held:  # without, it would read its weights for bounds
        cond = model.prepare(told, None, latent=latent, height=run.height, width=run.width, fps=fps)
        model(z, 500.0, cond).float()
    return held.peak + cache_bytes


def weights(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _held(module: nn.Module) -> Held:
    """With the weights counted, all of which are views of themselves in a matrix product, only once."""
    held = Held()
    for tensor in (*module.parameters(), *module.buffers()):
        held.hold(tensor.untyped_storage())
    return held
