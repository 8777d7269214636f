"""Open-Sora's parameter names, and ours.

Sources: hpcaitech/Open-Sora, opensora/models/stdit: tag v1.0.0 (c861b988) stdit.py STDiT, tag v1.1.0 (d599fd75)
stdit2.py STDiT2, tag v1.2.0 (17cce908) stdit3.py STDiT3. All maps read config's depth, dim, in_channels and patch.
"""

from collections.abc import Callable, Iterator

from minidit.config import ModelConfig
from minidit.weights.rules import Drop, Rename, Rule, Split, linears, patch

# a linear layer's upstream name -> ours
STEM = {
    "t_embedder.mlp.0": "timestep.fc1",
    "t_embedder.mlp.2": "timestep.fc2",
    "t_block.1": "modulation",
    "y_embedder.y_proj.fc1": "caption.fc1",
    "y_embedder.y_proj.fc2": "caption.fc2",
    "final_layer.linear": "final.linear",
}
FPS = {"fps_embedder.mlp.0": "condition.fps.fc1", "fps_embedder.mlp.2": "condition.fps.fc2"}
SIZE = {
    **FPS,
    "csize_embedder.mlp.0": "condition.side.fc1",
    "csize_embedder.mlp.2": "condition.side.fc2",
    "ar_embedder.mlp.0": "condition.ratio.fc1",
    "ar_embedder.mlp.2": "condition.ratio.fc2",
    "fl_embedder.mlp.0": "condition.frames.fc1",
    "fl_embedder.mlp.2": "condition.frames.fc2",
    "t_block_temp.1": "temporal_modulation",
}
CROSS = {
    "cross_attn.q_linear": "cross.f.q",
    "cross_attn.kv_linear": "cross.f.kv",
    "cross_attn.proj": "cross.f.proj",
}
MLP = {"mlp.fc1": "mlp.f.fc1", "mlp.fc2": "mlp.f.fc2"}
REBUILT = "positions of one size of video: they are computed for the size that is asked for, as upstream does"


def stdit(config: ModelConfig) -> tuple[Rule, ...]:
    """The key map of Open-Sora 1.0, upstream -> ours."""
    tables = (Drop("pos_embed", REBUILT), Drop("pos_embed_temporal", REBUILT))
    return *_stem(config, STEM), *tables, *_each(config, _stdit_block)


def stdit2(config: ModelConfig) -> tuple[Rule, ...]:
    """The key map of Open-Sora 1.1, upstream -> ours."""
    return *_stem(config, STEM | SIZE), Rename("rope.freqs", "rope_freqs"), *_each(config, _stdit2_block)


def stdit3(config: ModelConfig) -> tuple[Rule, ...]:
    """The key map of Open-Sora 1.2, upstream -> ours."""
    return *_stem(config, STEM | FPS), Rename("rope.freqs", "rope_freqs"), *_each(config, _stdit3_blocks)


def _stem(config: ModelConfig, names: dict[str, str]) -> tuple[Rule, ...]:
    return (
        *patch(config.dim, config.in_channels, config.patch, "x_embedder.proj"),
        *linears(names),
        Rename("y_embedder.y_embedding", "null_caption"),
        Rename("final_layer.scale_shift_table", "final.table"),
    )


def _each(config: ModelConfig, block: Callable[[int], Iterator[Rule]]) -> Iterator[Rule]:
    return (rule for n in range(config.depth) for rule in block(n))


def _stdit_block(n: int) -> Iterator[Rule]:
    """Both attentions, cross-attention and MLP in one block; the temporal attention has no table of its own."""
    name = f"blocks.{n}."
    yield _tables(name, name, "spatial")
    yield from linears({**_attention("attn", "spatial"), **_attention("attn_temp", "temporal")}, name, name)
    yield from linears({**CROSS, **MLP}, name, name)


def _stdit2_block(n: int) -> Iterator[Rule]:
    name = f"blocks.{n}."
    yield from _stdit_block(n)
    yield Rename(f"{name}scale_shift_table_temporal", f"{name}temporal.table")
    yield from _norms(f"{name}attn", f"{name}spatial")
    yield from _norms(f"{name}attn_temp", f"{name}temporal")


def _stdit3_blocks(n: int) -> Iterator[Rule]:
    """Upstream keeps spatial and temporal blocks in two lists and runs them by turns; we keep the order they run in."""
    for i, part in enumerate(("spatial", "temporal")):
        old, new = f"{part}_blocks.{n}.", f"blocks.{2 * n + i}."
        yield _tables(old, new, part)
        yield from _norms(f"{old}attn", f"{new}{part}")
        yield from linears({**_attention("attn", part), **CROSS, **MLP}, old, new)


def _tables(old: str, new: str, part: str) -> Rule:
    """Rows: shift, scale, gate of the self-attention, then of the MLP."""
    return Split(f"{old}scale_shift_table", (f"{new}{part}.table", f"{new}mlp.table"))


def _attention(name: str, part: str) -> dict[str, str]:
    return {f"{name}.qkv": f"{part}.f.qkv", f"{name}.proj": f"{part}.f.proj"}


def _norms(old: str, new: str) -> Iterator[Rule]:
    return (Rename(f"{old}.{kind}_norm.weight", f"{new}.f.{kind}_norm") for kind in "qk")
