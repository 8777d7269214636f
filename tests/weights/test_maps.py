"""Every key map against the names and shapes of the published files, and against real weights."""

import json
from pathlib import Path

import pytest
import torch

from families import FAMILIES
from minidit.model import DiT
from minidit.presets import PRESETS
from minidit.weights.families import PUBLISHED
from minidit.weights.rules import DROPPED, apply, invert

MANIFESTS = Path(__file__).parents[1] / "manifests"
FILES = {  # manifest -> the presets of its shape, and its elements
    "opensora_v12_stdit3_xl2": (["opensora-1.2"], 1_208_872_772),
    "opensora_v11_stdit2_xl2": (["opensora-1.1"], 768_271_300),
    "opensora_v10_stdit_xl2_16x512x512": (["opensora-1.0-16x512x512", "opensora-1.0-16x256x256"], 761_310_368),
    "latte_xl2_class_conditional": (["latte-ucf101"], 674_112_416),
    "latte_xl2_unconditional": (["latte"], 673_994_912),
    "latte_t2v_original": (["latte-t2v"], 1_057_738_400),
    "latte_t2v_diffusers": (["latte-t2v"], 1_057_246_880),
    "opensoraplan_v100_latte_t2v_17x256x256": (
        [name for name in PRESETS if name.startswith("opensora-plan-1.0")],
        1_057_738_400,
    ),
    "opensoraplan_v110_latte_t2v_221x512x512": (
        [name for name in PRESETS if name.startswith("opensora-plan-1.1")],
        1_057_738_400,
    ),
}
PAIRS = [(manifest, preset) for manifest, (presets, _) in FILES.items() for preset in presets]


def upstream(manifest):
    """Names and shapes of a published checkpoint, as tensors without data."""
    tensors = json.loads((MANIFESTS / f"{manifest}.json").read_text())["tensors"]
    return {name: torch.empty(shape, device="meta") for name, (shape, _) in tensors.items()}


def sizes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_every_preset_has_a_key_map_and_a_published_file():
    assert PUBLISHED.keys() == PRESETS.keys() == {preset for _, preset in PAIRS}


@pytest.mark.parametrize(("manifest", "preset"), PAIRS)
def test_a_map_covers_its_published_checkpoint_name_for_name_and_back(manifest, preset):
    theirs, rules = upstream(manifest), PUBLISHED[preset].rules(PRESETS[preset])
    assert sum(tensor.numel() for tensor in theirs.values()) == FILES[manifest][1]
    ours = apply(rules, theirs)
    assert sizes(invert(rules, ours)) == sizes(theirs)
    with torch.device("meta"):
        state = DiT(PRESETS[preset]).state_dict()
    assert {name: size for name, size in sizes(ours).items() if not name.startswith(DROPPED)} == sizes(state)


@pytest.mark.parametrize(
    ("manifest", "dropped"),
    [
        ("opensora_v10_stdit_xl2_16x512x512", {"pos_embed": (1, 1024, 1152), "pos_embed_temporal": (1, 16, 1152)}),
        ("latte_t2v_original", {"caption_projection.y_embedding": (120, 4096)}),
        ("latte_t2v_diffusers", {}),
        ("opensora_v12_stdit3_xl2", {}),
        ("latte_xl2_class_conditional", {}),
    ],
)
def test_nothing_is_dropped_but_what_no_forward_reads(manifest, dropped):
    preset = FILES[manifest][0][0]
    ours = apply(PUBLISHED[preset].rules(PRESETS[preset]), upstream(manifest))
    aside = {name.removeprefix(DROPPED): size for name, size in sizes(ours).items() if name.startswith(DROPPED)}
    assert aside == dropped


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_real_weights_come_back_bit_for_bit(family):
    rules, theirs = PUBLISHED[family.preset].rules(family.config), family.upstream()
    back = invert(rules, apply(rules, theirs))
    assert sizes(back) == sizes(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(back[name].view(torch.int32), tensor.view(torch.int32)), name
