"""The parameter names of Open-Sora-Plan's causal VAE, and ours.

Source: PKU-YuanGroup/Open-Sora-Plan v1.1.0 (2a8b2328)
opensora/models/ae/videobase/causal_vae/modeling_causalvae.py CausalVAEModel. Its causal convolutions are modules around
one, called conv; its convolutions of images are ours of single frames, with one more dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from minidit.plan_vae import CausalVAEConfig
from minidit.weights.rules import Drop, Fuse, Rename, Reshape, Rule, Shape, linears

# a module's upstream name -> ours, with a weight and a bias each
OUTER = {
    "encoder.norm_out": "encoder.norm",
    "encoder.conv_out.conv": "encoder.last",
    "quant_conv.conv": "encoder.moments",
    "post_quant_conv.conv": "decoder.latents",
    "decoder.conv_in.conv": "decoder.first",
    "decoder.norm_out": "decoder.norm",
    "decoder.conv_out.conv": "decoder.last",
}
ATTENTION = {"norm": "norm", "proj_out.conv": "proj"}
LOSS = "what the VAE was trained with, LPIPS and a discriminator: no part of it"


def causal_vae(config: CausalVAEConfig) -> tuple[Rule, ...]:
    """The key map of CausalVAEModel, upstream -> ours. A file that was trained on has more in it, see `loss`."""
    return (
        *_conv("encoder.conv_in", "encoder.first", (config.widths[0], 3, 3, 3) if config.flat else None),
        *linears(OUTER),
        *(rule for n in range(len(config.widths)) for rule in (*_down(config, n), *_up(config, n))),
        *_middle("encoder"),
        *_middle("decoder"),
    )


def loss(names: Iterable[str]) -> tuple[Rule, ...]:
    """Rules for those of the names that begin with "loss.", as upstream's init_from_ckpt drops them."""
    return tuple(Drop(name, LOSS) for name in names if name.startswith("loss."))


def _down(config: CausalVAEConfig, n: int) -> Iterator[Rule]:
    old, new, width = f"encoder.down.{n}.", f"encoder.levels.{n}.", config.widths[n]
    for i in range(config.depth):
        dim = width if i else config.widths[max(n - 1, 0)]
        yield from _block(f"{old}block.{i}.", f"{new}blocks.{i}.", dim, width, flat=n < config.flat)
    if n < len(config.widths) - 1:
        # with flat levels every level, also one that is not flat, halves the size of images
        image = (width, width, 3, 3) if config.flat else None
        yield from _conv(f"{old}downsample.conv", f"{new}space.conv", image)
    if n in config.halve and config.mixed:
        yield Rename(f"{old}time_downsample.mix_factor", f"{new}time.mixed.mix")
        yield from linears({"time_downsample.conv": "time.mixed.conv"}, old, new)


def _up(config: CausalVAEConfig, n: int) -> Iterator[Rule]:
    """Upstream counts the decoder's levels from the video on; we keep the order they run in."""
    widths = config.widths[::-1]
    old, new = f"decoder.up.{len(widths) - 1 - n}.", f"decoder.levels.{n}."
    for i in range(config.depth + 1):
        dim = widths[n] if i else widths[max(n - 1, 0)]
        yield from _block(f"{old}block.{i}.", f"{new}blocks.{i}.", dim, widths[n])
    if n < len(widths) - 1:
        yield from _conv(f"{old}upsample.conv", f"{new}space.conv")
    if n in config.double and config.mixed:
        yield Rename(f"{old}time_upsample.mix_factor", f"{new}time.mixed.mix")
        yield from _conv(f"{old}time_upsample.conv", f"{new}time.mixed.conv")


def _middle(part: str) -> Iterator[Rule]:
    old, new = f"{part}.mid.", f"{part}.middle."
    yield from _block(f"{old}block_1.", f"{new}0.")
    yield from linears(ATTENTION, f"{old}attn_1.", f"{new}1.")
    for kind in ("weight", "bias"):
        yield Fuse(tuple(f"{old}attn_1.{letter}.conv.{kind}" for letter in "qkv"), f"{new}1.qkv.{kind}")
    yield from _block(f"{old}block_2.", f"{new}2.")


def _block(old: str, new: str, dim: int = 0, out: int = 0, flat: bool = False) -> Iterator[Rule]:
    """A residual block. dim, out: its channels, where they differ or it is flat."""
    yield from linears({"norm1": "norm1", "norm2": "norm2"}, old, new)
    yield from _conv(f"{old}conv1", f"{new}conv1", (out, dim, 3, 3) if flat else None)
    yield from _conv(f"{old}conv2", f"{new}conv2", (out, out, 3, 3) if flat else None)
    if dim != out:
        yield from _conv(f"{old}nin_shortcut", f"{new}skip", (out, dim, 1, 1) if flat else None)


def _conv(old: str, new: str, image: Shape | None = None) -> tuple[Rule, ...]:
    """A convolution. image: upstream's shape of the weight if it is one of images, None: it is a causal one."""
    if image is None:
        return linears({f"{old}.conv": new})
    frame = (*image[:2], 1, *image[2:])
    return Reshape(f"{old}.weight", f"{new}.weight", image, frame), Rename(f"{old}.bias", f"{new}.bias")
