"""The key map of the video autoencoder against the names and shapes of the published file, and real weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from families import GOLDENS
from minidit.opensora_vae import OPENSORA_VAE_12, OpenSoraVAE
from minidit.weights.rules import KeyMapError, apply, invert
from minidit.weights.vae import has_old_attention, opensora_vae
from test_opensora_vae import TINY

MANIFEST = Path(__file__).parents[1] / "manifests" / "opensora_v12_vae.json"
OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def published():
    """Names and shapes of the published file, as tensors without data."""
    tensors = json.loads(MANIFEST.read_text())["tensors"]
    return {name: torch.empty(shape, device="meta") for name, (shape, _) in tensors.items()}


def respelled(tensors):
    """With the attention's names as diffusers had them before 0.20."""
    for new, old in OLD.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    return tensors


def sizes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("spelled", [dict, respelled])
def test_the_map_covers_the_published_file_name_for_name_and_back(spelled):
    theirs = spelled(published())
    rules = opensora_vae(OPENSORA_VAE_12, old_attention=has_old_attention(theirs))
    assert len(theirs) == 517 and sum(tensor.numel() for tensor in theirs.values()) == 393_341_015
    ours = apply(rules, theirs)
    assert sizes(invert(rules, ours)) == sizes(theirs)
    with torch.device("meta"):
        state = OpenSoraVAE(OPENSORA_VAE_12).state_dict()
    assert sizes(ours) == sizes(state)


def test_the_old_names_of_attention_are_told_from_the_new_ones():
    theirs, old = published(), respelled(published())
    assert len(theirs.keys() - old.keys()) == 16
    assert not has_old_attention(theirs) and has_old_attention(old)
    with pytest.raises(KeyMapError, match="missing: 'spatial_vae.module.encoder.mid_block.attentions.0.to_q.weight'"):
        apply(opensora_vae(OPENSORA_VAE_12), old)


@pytest.mark.parametrize("spelled", [dict, respelled])
def test_real_weights_come_back_bit_for_bit(spelled):
    golden = load_file(GOLDENS / "opensora_vae12_a.safetensors")
    theirs = spelled({name[2:]: tensor for name, tensor in golden.items() if name.startswith("w/")})
    rules = opensora_vae(TINY, old_attention=has_old_attention(theirs))
    back = invert(rules, apply(rules, theirs))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
