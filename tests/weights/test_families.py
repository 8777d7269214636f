import json
from pathlib import Path

import pytest
import torch

from minidit.presets import PRESETS
from minidit.weights.families import PUBLISHED, Published, recognise, upstream
from minidit.weights.rules import Drop

MANIFEST = Path(__file__).parents[1] / "manifests/opensora_v12_stdit3_xl2.json"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
TWINS = ("opensora-1.0-16x512x512", "opensora-1.0-16x256x256")  # of one shape


@pytest.fixture(scope="module")
def found():
    """Names and shapes of the published Open-Sora 1.2, as tensors without data."""
    manifest = json.loads(MANIFEST.read_text())
    return {name: torch.empty(shape, device="meta") for name, (shape, _) in manifest["tensors"].items()}


def published(name):
    return upstream(name, PRESETS[name])


def refusal(*args):
    with pytest.raises(ValueError) as error:
        recognise(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_preset_is_a_published_checkpoint():
    assert PUBLISHED.keys() == PRESETS.keys()


def test_every_place_on_the_hub_is_that_of_one_checkpoint():
    places = [place for known in PUBLISHED.values() for place in known.hub]
    assert places and len(set(places)) == len(places)
    assert all(len(place.split("/")) >= 2 and not place.endswith("/") for place in places)


def test_a_published_checkpoint_is_recognised_by_names_and_shapes(found):
    assert recognise(found) == "opensora-1.2"
    assert recognise(dict(reversed(found.items()))) == "opensora-1.2"
    assert recognise({name: tensor.to(torch.float16) for name, tensor in found.items()}) == "opensora-1.2"
    assert recognise(found, "someone/else/model.safetensors") == "opensora-1.2"
    assert recognise(found, PUBLISHED["opensora-1.1"].hub[0]) == "opensora-1.2"  # the tensors know better


def test_a_tensor_that_is_dropped_may_be_there_or_not():
    found = published("opensora-1.1")
    assert recognise(found) == "opensora-1.1"
    dropped = [rule.old for rule in PUBLISHED[TWINS[0]].rules(PRESETS[TWINS[0]]) if isinstance(rule, Drop)]
    assert dropped
    with_buffers = published(TWINS[0]) | {name: torch.empty(1, device="meta") for name in dropped}
    for found in (published(TWINS[0]), with_buffers):
        assert recognise(found, PUBLISHED[TWINS[0]].hub[0]) == TWINS[0]


def test_of_checkpoints_that_look_the_same_the_place_on_the_hub_decides():
    found = published(TWINS[0])
    for name in TWINS:
        for place in PUBLISHED[name].hub:
            assert recognise(found, place) == name and recognise(found, f"{place}/model.safetensors") == name
    for hub in (None, "someone/else/model.safetensors", PUBLISHED[TWINS[0]].hub[0] + "x"):
        assert refusal(found, hub) == f"these tensors may be those of {', '.join(TWINS)}: say which with --model NAME"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("hpcai-tech/OpenSora-STDiT-v3/model.safetensors", "opensora-1.2"),
        ("hpcai-tech/OpenSora-STDiT-v2-stage3/model.safetensors", "opensora-1.1"),
        ("hpcai-tech/Open-Sora/OpenSora-v1-HQ-16x512x512.pth", "opensora-1.0-16x512x512"),
        ("hpcai-tech/Open-Sora/OpenSora-v1-HQ-16x256x256.pth", "opensora-1.0-16x256x256"),
        ("maxin-cn/Latte/ucf101.pt", "latte-ucf101"),
        ("maxin-cn/Latte/ffs.pt", "latte"),
        ("maxin-cn/Latte/skytimelapse.pt", "latte"),
        ("maxin-cn/Latte/taichi-hd.pt", "latte"),
        ("maxin-cn/Latte/t2v_required_models/transformer/diffusion_pytorch_model.safetensors", "latte-t2v"),
        ("maxin-cn/Latte-0/transformer/diffusion_pytorch_model.safetensors", "latte-t2v"),
        ("maxin-cn/Latte-1/transformer/diffusion_pytorch_model.safetensors", "latte-t2v"),
        *(
            (f"LanguageBind/Open-Sora-Plan-v{version}.0/{size}/{SHARD}", f"opensora-plan-{version}-{size}")
            for version, size in [
                ("1.1", "65x512x512"),
                ("1.1", "221x512x512"),
                ("1.0", "65x512x512"),
                ("1.0", "65x256x256"),
                ("1.0", "17x256x256"),
            ]
        ),
    ],
)
def test_a_file_on_the_hub_is_that_of_one_model(file, name):
    assert [model for model, known in PUBLISHED.items() if known.is_at(file)] == [name]
    assert recognise(published(name), file) == name


def test_a_place_on_the_hub_is_a_repository_or_a_path_in_it():
    known = Published(PUBLISHED["opensora-1.2"].rules, ("org/name", "org/other/part"))
    assert all(known.is_at(f"org/{path}") for path in ("name/model.pt", "name", "other/part/a.pt", "other/part"))
    assert not any(known.is_at(f"org/{path}") for path in ("names/model.pt", "other/a.pt", "other/parts/a.pt", "n"))


def test_what_is_not_known_is_told_with_the_closest_and_its_first_ten_problems(found):
    some = {name: tensor for name, tensor in found.items() if not name.startswith("spatial_blocks.27.")}
    some["stray"] = torch.empty(3, device="meta")
    some["rope.freqs"] = torch.empty(8, device="meta")
    message = refusal(some)
    assert message.startswith("not the tensors of a model known here; opensora-1.2 is closest, but there are 17 miss")
    assert "; 1 unknown: 'stray' (3,); 1 misshapen: 'rope.freqs' (8,) expected (36,). For another shape of " in message
    assert message.count("'spatial_blocks.27.") == 10 and ", ...; " in message
    assert message.endswith("give --model and --config")


def test_a_small_model_is_closest_to_the_large_one_with_its_names(found):
    small = {name: torch.empty(1, device="meta") for name in found if "blocks." not in name or "_blocks.0." in name}
    assert "opensora-1.2 is closest" in refusal(small)


def test_of_shapes_of_the_same_names_the_one_with_more_in_common_is_closest():
    found = published("opensora-1.1") | {"blocks.0.mlp.fc1.bias": torch.empty(1, device="meta")}
    message = "opensora-1.1 is closest, but there are 1 misshapen: 'blocks.0.mlp.fc1.bias' (1,) expected (4608,)."
    assert message in refusal(found)
