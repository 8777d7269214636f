"""What each stage of a run holds at most, weights among it, counted before anything is loaded.

Counted, tensor by tensor, on the meta device, where tensors have shapes and no data; attention as all fused kernels do
it. An allocator that keeps pieces in reserve takes more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from minidit import ops
from minidit.config import ModelConfig
from minidit.model import DiT
from minidit.offload import layers
from minidit.parallel import Shares
from minidit.text import CONFIG, layout_of
from minidit.tiling import Fused, Held

LIBRARIES = 2**26  # bytes, of a stage on a GPU: cuBLAS takes 32 MiB at its first call, and an allocator rounds up


class Alone(Shares):
    """The shares of one of several ranks, without the others: on the meta device there is nothing to trade."""

    def _trade(self, packed: Tensor, blocks: Sequence[Tensor], sizes: list[int]) -> Tensor:
        return packed.new_empty(sum(sizes))

    def gather(self, x: Tensor) -> Tensor:
        sent = x.repeat(self.ranks, 1, 1, 1)
        return sent.new_empty(len(x), sum(self.frames), sum(self.places), x.shape[3])


def of_text(folder: Path, *, captions: int, length: int, dtype: torch.dtype, offload: bool = False) -> int:
    """Bytes of encoding captions with a folder's T5. offload: see offload.py."""
    transformers = import_module("transformers")
    config = json.loads((folder / layout_of(folder)[0] / CONFIG).read_text())
    with torch.device("meta"):
        encoder = transformers.T5EncoderModel(transformers.T5Config(**config)).to(dtype).eval().requires_grad_(False)
        tokens = torch.zeros(captions, length, dtype=torch.long)
        with _held(encoder) as held:
            encoder(input_ids=tokens)
    return held.peak - (_at_home(encoder.encoder.block) if offload else 0)


def of_model(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    latent: tuple[int, int, int],
    batch: int,
    cache_bytes: int,
    offload: bool = False,
    shares: Shares | None = None,
    kernels: bool = False,
    calls: int = 1,
) -> int:
    """Bytes of a run. batch: samples in one model call; cache_bytes: held by the run's cache at most.

    offload: see offload.py. shares: what this rank has of the tokens, None: all. kernels: of a run on a GPU with
    Triton, which holds less. calls: of a step, each of which is conditioned on something of its own.
    """
    whole = partial(
        _of_model,
        dtype=dtype,
        latent=latent,
        batch=batch,
        offload=offload,
        shares=shares,
        kernels=kernels,
        calls=calls,
    )
    if config.depth <= 3:
        return whole(config) + cache_bytes
    # every further layer holds as much as the third, and a run of 28 takes seconds also on the meta device
    two, three = (whole(replace(config, depth=depth)) for depth in (2, 3))
    return two + (config.depth - 2) * (three - two) + cache_bytes


def _of_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    latent: tuple[int, int, int],
    batch: int,
    offload: bool,
    shares: Shares | None,
    kernels: bool,
    calls: int,
) -> int:
    with torch.device("meta"):
        model = DiT(config).to(dtype).requires_grad_(False)
        shape = (batch, config.caption_length, config.caption_dim) if config.caption_dim else (batch,)
        text = torch.zeros(shape, dtype=dtype if config.caption_dim else torch.long)
        z, fps = torch.zeros(batch, config.in_channels, *latent), torch.zeros(batch)
    told = text if config.caption_dim or config.classes is not None else None
    run = config.sampling
    impl: ops.Impl = "shapes" if kernels else "torch"
    # with gradients it does not read its weights for bounds
    with torch.enable_grad(), Fused(), ops.using(impl), _held(model) as held:
        conds = [
            model.prepare(told, None, latent=latent, height=run.height, width=run.width, fps=fps, shares=shares)
            for _ in range(calls)
        ]
        model(z, 500.0, conds[0]).float()
    return held.peak - (_at_home(layers(model)) if offload else 0)


def _at_home(units: Iterable[nn.Module]) -> int:
    """Bytes of weights that are not on the device, of layers of which two are there at a time."""
    sizes = sorted(map(weights, units))
    return sum(sizes[:-2])


def weights(module: nn.Module) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _held(module: nn.Module) -> Held:
    """With the weights counted, all of which are views of themselves in a matrix product, only once."""
    held = Held()
    for tensor in (*module.parameters(), *module.buffers()):
        held.hold(tensor.untyped_storage())
    return held
