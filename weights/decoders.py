"""The published decoders' folders, as they were downloaded, and our decoders.

A folder is recognised by the class that its config.json names, or else by its tensors. config.json has the shape of
diffusers' autoencoders and of Open-Sora-Plan's; that of Open-Sora 1.2's is written in its code alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidit import tensors
from minidit.decoders import Causal, Decoder, Frames, OpenSora, TemporalDecoder
from minidit.opensora_vae import OPENSORA_VAE_12, OpenSoraVAE, VAEConfig
from minidit.plan_vae import CausalVAE, CausalVAEConfig
from minidit.tensors import INDEX, SAFE
from minidit.weights.plan_vae import causal_vae, loss
from minidit.weights.rules import DROPPED, Rule, apply
from minidit.weights.source import fetch, on_hub
from minidit.weights.vae import OLD_ATTENTION, has_old_attention, opensora_vae

Shape = VAEConfig | CausalVAEConfig
Named = Mapping[str, Tensor]
CONFIG = "config.json"
STEMS = ("diffusion_pytorch_model", "model")
FILES = (*(stem + ending for stem in STEMS for ending in (SAFE, INDEX)), "checkpoint.ckpt")


@dataclass(frozen=True)
class Kind:
    users: str
    sign: str  # how a name begins that tensors of this kind alone have


KINDS = {
    "VideoAutoencoderPipeline": Kind("Open-Sora 1.2", "temporal_vae."),
    "AutoencoderKLTemporalDecoder": Kind("Latte T2V", "decoder.time_conv_out."),
    "CausalVAEModel": Kind("Open-Sora-Plan 1.0 and 1.1", "post_quant_conv.conv."),
    "AutoencoderKL": Kind("Open-Sora 1.0 and 1.1, Latte", "post_quant_conv.weight"),
}
# of CausalVAEModel, all that `causal_config` has a meaning for
MODULES = {
    *("", "Conv2d", "CausalConv3d", "ResnetBlock2D", "ResnetBlock3D", "AttnBlock3D", "AttnBlock3DFix"),
    *("Downsample", "SpatialDownsample2x", "SpatialUpsample2x"),
    *("TimeDownsample2x", "TimeDownsampleRes2x", "TimeUpsample2x", "TimeUpsampleRes2x"),
}


def load_decoder(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    shape: Shape | None = None,
) -> Decoder:
    """The decoder of a published folder, in eval mode. dtype None: float32 on a CPU, else bfloat16.

    folder: here, or org/name or org/name/folder on the hub, of which what is needed is fetched if it is not there yet.
    shape: of an Open-Sora 1.2 or Open-Sora-Plan VAE that is not as published. Raises OSError, ValueError or
    ImportError, saying what is missing or does not fit.
    """
    source, folder, device = str(folder), _here(str(folder)), torch.device(device)
    try:
        path, config = _weights(folder), _config(folder / CONFIG)
    except (OSError, ValueError) as error:
        if Path(source) == folder:
            raise
        raise ValueError(f"{source} on the hub: {error}; a folder in it is named as org/name/FOLDER") from error
    stored = tensors.read(path, device=device)
    kind = _kind(folder, config, stored.meta)
    with torch.device("meta"):
        decoder, rename = _built(kind, folder / CONFIG, config, shape, tuple(stored.meta))
    try:
        wrong = tensors.told(tensors.misfits(decoder.vae.state_dict(), rename(stored.meta)))
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise ValueError(f"{path} does not fit the {kind} of {CONFIG}, tensors are wrong: {wrong}")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    buffers = {name for name, _ in decoder.vae.named_buffers()}  # they keep their dtype
    state = {
        name: tensor.to(device) if name in buffers else tensors.cast(name, tensor.to(device), dtype)
        for name, tensor in rename(stored.tensors).items()
    }
    decoder.vae.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(False)


def _here(source: str) -> Path:
    """The folder, or that of the hub's cache with a decoder's config and weights, of which pickled ones come last."""
    if Path(source).is_dir():
        return Path(source)
    if not (name := on_hub(source)):
        expected = f"one with {CONFIG} and {FILES[0]}, or org/name or org/name/folder on the hub"
        raise FileNotFoundError(f"{source} is no folder: give {expected}")
    at = f"{name.inside.strip('/')}/" if name.inside else ""
    parts = [f"{stem}-*{SAFE}" for stem in STEMS]
    for wanted in ((CONFIG, *FILES[:-1], *parts), FILES[-1:]):
        folder = fetch(source, name.repository, [at + file for file in wanted]) / at
        if any((folder / file).is_file() for file in FILES):
            break
    return folder


def _weights(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist")
    there = [folder / name for name in FILES if (folder / name).is_file()]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if not there and pickled:
        raise ValueError(f"{folder}: {pickled[0]} may hold code and is not read: get {FILES[0]} from the same place")
    if not there:
        raise FileNotFoundError(f"{folder} holds no weights of a decoder: expected one of {', '.join(FILES)}")
    return there[0]


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: it is published beside the weights")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def _kind(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> str:
    said = config.get("_class_name") or next(iter(config.get("architectures") or []), config.get("model_type"))
    known = ", ".join(f"{name} ({kind.users})" for name, kind in KINDS.items())
    if said is not None and said not in KINDS:
        raise ValueError(f"{folder / CONFIG} is of a {said}, known are {known}")
    signs = [name for name, kind in KINDS.items() if any(tensor.startswith(kind.sign) for tensor in names)]
    if said is None and len(signs) != 1:
        raise ValueError(f"{folder / CONFIG} names no class, and the tensors are of none that is known: {known}")
    if signs and said not in (None, *signs):
        raise ValueError(f"{folder / CONFIG} is of a {said}, but the tensors are of a {signs[0]}: get both anew")
    return said or signs[0]


def _built(
    kind: str, path: Path, config: dict[str, Any], shape: Shape | None, names: tuple[str, ...]
) -> tuple[Decoder, Callable[[Named], Named]]:
    """A decoder without weights, and what gives its names to published tensors of these names."""
    old = has_old_attention(names)
    match kind, shape:
        case "VideoAutoencoderPipeline", VAEConfig() | None:
            opensora = OpenSoraVAE(shape or OPENSORA_VAE_12)
            return OpenSora(opensora), partial(apply, opensora_vae(opensora.config, old_attention=old))
        case "CausalVAEModel", CausalVAEConfig() | None:
            causal = CausalVAE(shape or causal_config(path, config))
            return Causal(causal), partial(_kept, (*causal_vae(causal.config), *loss(names)))
        case "AutoencoderKL" | "AutoencoderKLTemporalDecoder", None:
            vae = getattr(_diffusers(), kind).from_config(config)
            return (Frames if kind == "AutoencoderKL" else TemporalDecoder)(vae), _since_020 if old else dict
    raise ValueError(f"{path}: a {kind} has no {type(shape).__name__}: leave the shape out, or give one of its own")


def _kept(rules: tuple[Rule, ...], stored: Named) -> Named:
    return {name: tensor for name, tensor in apply(rules, stored).items() if not name.startswith(DROPPED)}


def _since_020(stored: Named) -> Named:
    """With the names that an attention's layers have since diffusers 0.20, which renames old ones when loading, too."""
    renamed = {}
    for name, tensor in stored.items():
        *module, layer, kind = name.split(".")
        renamed[".".join((*module, OLD_ATTENTION.get(layer, layer), kind))] = tensor
    return renamed


def _diffusers() -> Any:
    try:
        return import_module("diffusers")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        message = "this decoder needs the package diffusers, of minidit's extra 'hub'"
        raise ModuleNotFoundError(message, name="diffusers") from error


def causal_config(path: Path, config: Mapping[str, Any]) -> CausalVAEConfig:
    """The shape in a CausalVAEModel's config.json. Raises ValueError for one that Open-Sora-Plan 1.0 and 1.1 lack."""
    try:
        layers = [value for name, value in config.items() if name.startswith(("encoder_", "decoder_"))]
        used = {name for names in layers for name in ([names] if isinstance(names, str) else names)}
        if unknown := ", ".join(sorted(used - MODULES)):
            raise ValueError(f"{path}: not a VAE of Open-Sora-Plan 1.0 or 1.1, which have no {unknown}")
        halves, doubles = config["encoder_temporal_downsample"], config["decoder_temporal_upsample"][::-1]
        return CausalVAEConfig(
            widths=tuple(config["hidden_size"] * multiplier for multiplier in config["hidden_size_mult"]),
            depth=config["num_res_blocks"],
            groups=32,
            latent=config["z_channels"],
            flat=config["encoder_resnet_blocks"].count("ResnetBlock2D"),
            halve=tuple(level for level, name in enumerate(halves) if name),
            double=tuple(level for level, name in enumerate(doubles) if name),
            mixed="TimeDownsampleRes2x" in halves,
            attended="frame" if config["encoder_attention"] == "AttnBlock3DFix" else "scrambled",
        )
    except (KeyError, TypeError) as error:
        problem = f"{path}: not all of a CausalVAEModel's config, {error!r}"
        raise ValueError(f"{problem}: give the shape, such as minidit.plan_vae.PLAN_1_0") from error
