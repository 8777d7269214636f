"""The published video autoencoders' parameter names, and ours.

Source: hpcaitech/Open-Sora, tag v1.2.0 (17cce908), opensora/models/vae: vae.py VideoAutoencoderPipeline,
vae_temporal.py VAE_Temporal. Spatial parts keep the names that huggingface/diffusers' AutoencoderKL has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise

from minidit.opensora_vae import VAEConfig
from minidit.weights.rules import Rename, Rule, linears

# names of linear layers in the attention of diffusers' autoencoders before 0.20 -> since
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def has_old_attention(names: Collection[str]) -> bool:
    """Whether a checkpoint with these names is of diffusers before 0.20."""
    return any(name.endswith(".query.weight") for name in names)


def opensora_vae(config: VAEConfig, *, old_attention: bool = False) -> tuple[Rule, ...]:
    """The key map of Open-Sora 1.2's autoencoder, upstream -> ours. old_attention: see `has_old_attention`."""
    return (
        Rename("scale", "scale"),
        Rename("shift", "shift"),
        *autoencoder_kl(config, old_attention, "spatial_vae.module.", "spatial."),
        *_temporal_encoder(config),
        *_temporal_decoder(config),
    )


def autoencoder_kl(config: VAEConfig, old_attention: bool, old: str, new: str) -> Iterator[Rule]:
    """Rules for a spatial part, after the prefixes old and new: the same names, but for an older attention's."""
    for layer in _spatial_layers(config.spatial_dims, config.spatial_depth):
        yield from linears({layer: layer}, old, new)
    for part in ("encoder", "decoder"):
        attention = f"{part}.mid_block.attentions.0."
        names = OLD_ATTENTION if old_attention else {name: name for name in OLD_ATTENTION.values()}
        yield from linears(names, old + attention, new + attention)


def _spatial_layers(dims: tuple[int, ...], depth: int) -> Iterator[str]:
    """Every layer with a weight and a bias but those of the attention, which have two names each."""
    yield from ("quant_conv", "post_quant_conv")
    parts = (("encoder", "down", dims, depth), ("decoder", "up", dims[::-1], depth + 1))
    for part, way, widths, blocks in parts:
        yield from (f"{part}.{name}" for name in ("conv_in", "conv_norm_out", "conv_out"))
        yield f"{part}.mid_block.attentions.0.group_norm"
        yield from _spatial_blocks(f"{part}.mid_block", 2)
        for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
            level = f"{part}.{way}_blocks.{i}"
            yield from _spatial_blocks(level, blocks)
            if before != width:
                yield f"{level}.resnets.0.conv_shortcut"
            if i < len(dims) - 1:
                yield f"{level}.{way}samplers.0.conv"


def _spatial_blocks(name: str, depth: int) -> Iterator[str]:
    return (f"{name}.resnets.{n}.{layer}{i}" for n in range(depth) for layer in ("norm", "conv") for i in (1, 2))


def _temporal_encoder(config: VAEConfig) -> Iterator[Rule]:
    old, new, dims = "temporal_vae.encoder.", "encoder.", config.temporal_dims
    yield Rename(f"{old}conv_in.conv.weight", f"{new}first.weight")
    for i, (before, dim) in enumerate(pairwise((dims[0], *dims))):
        yield from _temporal_blocks(config, f"{old}block_res_blocks.{i}", f"{new}levels.{i}", before, dim)
        if config.temporal_halves[i]:
            yield from linears({f"{old}conv_blocks.{i}.conv": f"{new}halves.{i}"})
    yield from _temporal_blocks(config, f"{old}res_blocks", f"{new}middle", dims[-1], dims[-1])
    yield from linears({"norm1": "norm", "conv2.conv": "last"}, old, new)
    yield from linears({"temporal_vae.quant_conv.conv": f"{new}moments"})


def _temporal_decoder(config: VAEConfig) -> Iterator[Rule]:
    """Upstream numbers the levels as the encoder's are; we keep the order they run in."""
    old, new, dims = "temporal_vae.decoder.", "decoder.", config.temporal_dims[::-1]
    yield from linears({"temporal_vae.post_quant_conv.conv": f"{new}latent"})
    yield from _temporal_blocks(config, f"{old}res_blocks", f"{new}middle", dims[0], dims[0])
    for i, (before, dim) in enumerate(pairwise((dims[0], *dims))):
        theirs = len(dims) - 1 - i
        if config.temporal_halves[theirs]:
            yield from linears({f"{old}conv_blocks.{theirs}.conv": f"{new}doubles.{i}"})
        yield from _temporal_blocks(config, f"{old}block_res_blocks.{theirs}", f"{new}levels.{i}", before, dim)
    yield from linears({"conv1.conv": "first", "norm1": "norm", "conv_out.conv": "last"}, old, new)


def _temporal_blocks(config: VAEConfig, old: str, new: str, inner: int, outer: int) -> Iterator[Rule]:
    for n in range(config.temporal_depth):
        yield from linears({"norm1": "norm1", "norm2": "norm2"}, f"{old}.{n}.", f"{new}.{n}.")
        yield from (Rename(f"{old}.{n}.conv{i}.conv.weight", f"{new}.{n}.conv{i}.weight") for i in (1, 2))
    if inner != outer:
        yield Rename(f"{old}.0.conv3.conv.weight", f"{new}.0.shortcut.weight")
