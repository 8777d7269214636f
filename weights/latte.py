"""The parameter names of Latte and of what grew out of it, and ours.

Sources: Vchitect/Latte (b27c24a) models/latte.py Latte, models/latte_t2v.py LatteT2V; diffusers 0.30.3
models/transformers/latte_transformer_3d.py LatteTransformer3DModel; PKU-YuanGroup/Open-Sora-Plan v1.0.0 (a7375034)
and v1.1.0 (2a8b2328) opensora/models/diffusion/latte/modeling_latte.py LatteT2V. The last three have the names of
LatteT2V. All maps read config's depth, dim, in_channels, patch and, of Latte, positions and classes.
"""

from collections.abc import Iterator

from minidit.config import ModelConfig
from minidit.weights.rules import Drop, Fuse, Rename, Reshape, Rule, Split, linears, patch

# a linear layer's upstream name -> ours
LATTE = {
    "t_embedder.mlp.0": "timestep.fc1",
    "t_embedder.mlp.2": "timestep.fc2",
    "final_layer.adaLN_modulation.1": "final.modulation",
    "final_layer.linear": "final.linear",
}
T2V = {
    "adaln_single.emb.timestep_embedder.linear_1": "timestep.fc1",
    "adaln_single.emb.timestep_embedder.linear_2": "timestep.fc2",
    "adaln_single.linear": "modulation",
    "caption_projection.linear_1": "caption.fc1",
    "caption_projection.linear_2": "caption.fc2",
    "proj_out": "final.linear",
}
UNUSED = "a buffer of diffusers up to 0.24 that no forward reads; the null caption is an empty prompt"


def latte(config: ModelConfig) -> tuple[Rule, ...]:
    """The key map of Latte, class-conditional or not, upstream -> ours."""
    places, frames, dim = config.positions.base or 0, config.positions.frames or 0, config.dim
    labels = [Rename("y_embedder.embedding_table.weight", "condition.label.weight")] if config.classes else []
    return (
        *patch(dim, config.in_channels, config.patch[1:], "x_embedder.proj"),
        Reshape("pos_embed", "places", (1, places, dim), (places, dim)),
        Reshape("temp_embed", "frames", (1, frames, dim), (frames, dim)),
        *linears(LATTE),
        *labels,
        *(rule for n in range(2 * config.depth) for rule in _latte_block(n)),
    )


def _latte_block(n: int) -> Iterator[Rule]:
    name, part = f"blocks.{n}.", "temporal" if n % 2 else "spatial"
    names = {"attn.qkv": f"{part}.f.qkv", "attn.proj": f"{part}.f.proj", "mlp.fc1": "mlp.f.fc1", "mlp.fc2": "mlp.f.fc2"}
    yield from linears(names, name, name)
    for kind in ("weight", "bias"):
        # rows: shift, scale, gate of the attention, then of the MLP
        new = (f"{name}{part}.linear.{kind}", f"{name}mlp.linear.{kind}")
        yield Split(f"{name}adaLN_modulation.1.{kind}", new)


def latte_t2v(config: ModelConfig) -> tuple[Rule, ...]:
    """The key map of LatteT2V, upstream -> ours: Latte's, its diffusers form's, and Open-Sora-Plan's."""
    return (
        *patch(config.dim, config.in_channels, config.patch[1:], "pos_embed.proj"),
        *linears(T2V),
        Drop("caption_projection.y_embedding", UNUSED),
        Rename("scale_shift_table", "final.table"),
        *(rule for n in range(config.depth) for rule in _t2v_blocks(n)),
    )


def _t2v_blocks(n: int) -> Iterator[Rule]:
    """Upstream keeps spatial and temporal blocks in two lists and runs them by turns; we keep the order they run in."""
    for i, (part, prefix) in enumerate((("spatial", ""), ("temporal", "temporal_"))):
        old, new = f"{prefix}transformer_blocks.{n}.", f"blocks.{2 * n + i}."
        yield Split(f"{old}scale_shift_table", (f"{new}{part}.table", f"{new}mlp.table"))
        yield from _fused(f"{old}attn1.", "qkv", f"{new}{part}.f.qkv")
        yield from linears({"attn1.to_out.0": f"{part}.f.proj"}, old, new)
        yield from linears({"ff.net.0.proj": "mlp.f.fc1", "ff.net.2": "mlp.f.fc2"}, old, new)
        if part == "spatial":
            yield from linears({"attn2.to_q": "cross.f.q", "attn2.to_out.0": "cross.f.proj"}, old, new)
            yield from _fused(f"{old}attn2.", "kv", f"{new}cross.f.kv")


def _fused(old: str, letters: str, new: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield Fuse(tuple(f"{old}to_{letter}.{kind}" for letter in letters), f"{new}.{kind}")
