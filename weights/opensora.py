"""Open-Sora's parameter names, and ours.

Source: hpcaitech/Open-Sora, tag v1.2.0 (17cce908), opensora/models/stdit/stdit3.py, STDiT3.
"""

from math import prod

from minidit.config import ModelConfig
from minidit.weights.rules import Rename, Reshape, Rule, Split

# a linear layer's upstream name -> ours; both have a weight and a bias
STEM = {
    "t_embedder.mlp.0": "timestep.fc1",
    "t_embedder.mlp.2": "timestep.fc2",
    "fps_embedder.mlp.0": "fps.fc1",
    "fps_embedder.mlp.2": "fps.fc2",
    "t_block.1": "modulation",
    "y_embedder.y_proj.fc1": "caption.fc1",
    "y_embedder.y_proj.fc2": "caption.fc2",
    "final_layer.linear": "final.linear",
}
BLOCK = {
    "cross_attn.q_linear": "cross.f.q",
    "cross_attn.kv_linear": "cross.f.kv",
    "cross_attn.proj": "cross.f.proj",
    "mlp.fc1": "mlp.f.fc1",
    "mlp.fc2": "mlp.f.fc2",
}


def stdit3(config: ModelConfig) -> tuple[Rule, ...]:
    """The key map of Open-Sora 1.2 (STDiT3), upstream -> ours. Reads config's depth, dim, in_channels and patch."""
    return (
        *_patch(config),
        *(rule for old, new in STEM.items() for rule in _linear(old, new)),
        Rename("y_embedder.y_embedding", "null_caption"),
        Rename("rope.freqs", "rope_freqs"),
        Rename("final_layer.scale_shift_table", "final.table"),
        *(rule for pair in range(config.depth) for rule in _pair(pair)),
    )


def _patch(config: ModelConfig) -> tuple[Rule, ...]:
    """Upstream convolves with kernel = stride = patch, which is a linear layer over a patch in (C, T, H, W) order."""
    conv = (config.dim, config.in_channels, *config.patch)
    linear = (config.dim, prod(conv[1:]))
    return (
        Reshape("x_embedder.proj.weight", "patch.weight", conv, linear),
        Rename("x_embedder.proj.bias", "patch.bias"),
    )


def _pair(pair: int) -> tuple[Rule, ...]:
    """Upstream keeps spatial and temporal blocks in two lists and runs them by turns; we keep the order they run in."""
    return (
        *_block(f"spatial_blocks.{pair}", f"blocks.{2 * pair}", "spatial"),
        *_block(f"temporal_blocks.{pair}", f"blocks.{2 * pair + 1}", "temporal"),
    )


def _block(old: str, new: str, part: str) -> tuple[Rule, ...]:
    linears = {"attn.qkv": f"{part}.f.qkv", "attn.proj": f"{part}.f.proj", **BLOCK}
    return (
        # rows: shift, scale, gate of the self-attention, then of the MLP
        Split(f"{old}.scale_shift_table", (f"{new}.{part}.table", f"{new}.mlp.table")),
        Rename(f"{old}.attn.q_norm.weight", f"{new}.{part}.f.q_norm"),
        Rename(f"{old}.attn.k_norm.weight", f"{new}.{part}.f.k_norm"),
        *(rule for a, b in linears.items() for rule in _linear(f"{old}.{a}", f"{new}.{b}")),
    )


def _linear(old: str, new: str) -> tuple[Rule, ...]:
    return tuple(Rename(f"{old}.{kind}", f"{new}.{kind}") for kind in ("weight", "bias"))
