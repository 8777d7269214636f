import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from minidit.config import PRESETS
from minidit.model import DiT
from minidit.weights.opensora import stdit3
from minidit.weights.rules import apply, invert

TESTS = Path(__file__).parents[1]
CONFIG = PRESETS["opensora-1.2"]


@pytest.fixture(scope="module")
def upstream():
    """Names and shapes of the published checkpoint, as tensors without data."""
    manifest = json.loads((TESTS / "manifests/opensora_v12_stdit3_xl2.json").read_text())
    return {name: torch.empty(shape, device="meta") for name, (shape, _) in manifest["tensors"].items()}


@pytest.fixture(scope="module")
def golden():
    """The weights of the tiny STDiT3 of the goldens; stored as float16 but used as float32."""
    tensors = load_file(TESTS / "goldens/stdit3_a.safetensors")
    return {name[2:]: tensor.float() for name, tensor in tensors.items() if name.startswith("w/")}


def sizes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_the_map_covers_the_published_checkpoint_name_for_name(upstream):
    assert len(upstream) == 973
    ours = apply(stdit3(CONFIG), upstream)
    assert sizes(invert(stdit3(CONFIG), ours)) == sizes(upstream)
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in upstream.values()) == 1_208_872_772


def test_the_mapped_checkpoint_is_the_state_of_the_model(upstream):
    with torch.device("meta"):
        state = DiT(CONFIG).state_dict()
    assert sizes(apply(stdit3(CONFIG), upstream)) == sizes(state)


def test_real_weights_come_back_bit_for_bit(golden):
    rules = stdit3(SimpleNamespace(depth=2, dim=72, in_channels=4, patch=(1, 2, 2)))
    back = invert(rules, apply(rules, golden))
    assert sizes(back) == sizes(golden)
    for name, tensor in golden.items():
        assert torch.equal(back[name].view(torch.int32), tensor.view(torch.int32)), name


def test_a_block_is_found_where_the_forward_runs_it(golden):
    ours = apply(stdit3(SimpleNamespace(depth=2, dim=72, in_channels=4, patch=(1, 2, 2))), golden)
    table = golden["temporal_blocks.1.scale_shift_table"]
    assert torch.equal(ours["blocks.3.temporal.table"], table[:3])
    assert torch.equal(ours["blocks.3.mlp.table"], table[3:])
    assert torch.equal(ours["blocks.2.spatial.f.qkv.weight"], golden["spatial_blocks.1.attn.qkv.weight"])


def test_the_patch_as_a_linear_layer_is_the_convolution(golden):
    ours = apply(stdit3(SimpleNamespace(depth=2, dim=72, in_channels=4, patch=(1, 2, 2))), golden)
    patch = torch.randn(1, 4, 1, 2, 2)
    conv = torch.nn.functional.conv3d(patch, golden["x_embedder.proj.weight"], golden["x_embedder.proj.bias"])
    linear = torch.nn.functional.linear(patch.reshape(1, -1), ours["patch.weight"], ours["patch.bias"])
    torch.testing.assert_close(linear, conv.reshape(1, -1))
