from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minidit.presets import OPENSORA_12
from minidit.weights.opensora import stdit3
from minidit.weights.rules import apply

CONFIG = replace(OPENSORA_12, depth=2, dim=72, heads=4)


@pytest.fixture(scope="module")
def golden():
    """The weights of the tiny STDiT3 of the goldens; stored as float16 but used as float32."""
    tensors = load_file(Path(__file__).parents[1] / "goldens/stdit3_a.safetensors")
    return {name[2:]: tensor.float() for name, tensor in tensors.items() if name.startswith("w/")}


def test_a_block_is_found_where_the_forward_runs_it(golden):
    ours = apply(stdit3(CONFIG), golden)
    table = golden["temporal_blocks.1.scale_shift_table"]
    assert torch.equal(ours["blocks.3.temporal.table"], table[:3])
    assert torch.equal(ours["blocks.3.mlp.table"], table[3:])
    assert torch.equal(ours["blocks.2.spatial.f.qkv.weight"], golden["spatial_blocks.1.attn.qkv.weight"])


def test_the_patch_as_a_linear_layer_is_the_convolution(golden):
    ours = apply(stdit3(CONFIG), golden)
    patch = torch.randn(1, 4, 1, 2, 2)
    conv = torch.nn.functional.conv3d(patch, golden["x_embedder.proj.weight"], golden["x_embedder.proj.bias"])
    linear = torch.nn.functional.linear(patch.reshape(1, -1), ours["patch.weight"], ours["patch.bias"])
    torch.testing.assert_close(linear, conv.reshape(1, -1))
