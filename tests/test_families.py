"""Every published architecture computes what its authors' code computes, from their own weights."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save_file

from families import FAMILIES, error, prepared, stage
from minidit import checkpoint
from minidit.sampling import guide
from minidit.weights.convert import prepare

CASES = [(family, case) for family in FAMILIES for case in family.cases]


@cache
def model_of(family):
    """The original's weights in a file, converted to a folder, and loaded."""
    with TemporaryDirectory() as folder:
        file, out = Path(folder) / "model.safetensors", Path(folder) / "converted"
        save_file(family.upstream(), file)
        prepare(str(file), str(out), model=family.preset, config=family.config).run()
        return checkpoint.load(out)


def given_to(family, case):
    own = family.tensors()
    return {name.split("/")[2]: tensor for name, tensor in own.items() if name.startswith(f"case{case}/in/")}


@pytest.mark.parametrize(("family", "case"), CASES, ids=[f"{family} {case}" for family, case in CASES])
def test_the_output_is_that_of_the_original(family, case):
    said, given, theirs = family.cases[case], given_to(family, case), family.tensors()[f"case{case}/out/out"]
    model = model_of(family)
    if said.get("enable_temporal_attentions") is False:
        model = model.spatial()
    guided = said.get("mode") == "cfg"
    if guided:
        given["x"] = given["x"][:1].repeat(2, 1, 1, 1, 1)  # the original halves the batch and doubles it again
    x, t, cond = prepared(model, given)
    mask = given["x_mask"].bool() if "x_mask" in given else None
    out = model(x, t, cond, frame_mask=mask)
    if guided:
        noise = guide(*out.chunk(2), said["cfg_scale"], 4)[:, :4]
        out = torch.cat((noise.repeat(2, 1, 1, 1, 1), out[:, 4:]), 1)
    if model.config.modulation == "block":
        out = out.transpose(1, 2)
    assert error(out, theirs) < 2e-5


def test_no_class_is_the_label_after_the_last():
    family = next(family for family in FAMILIES if family.preset == "latte-ucf101")
    (guided,) = (case for case, said in family.cases.items() if said["mode"] == "cfg")
    label, none = given_to(family, guided)["y"]
    assert model_of(family).null(label[None]).tolist() == [none] == [family.config.classes]


STAGES = {  # golden -> the original's module: ours
    "stdit2_a": {
        "t_embedder": "timestep",
        "ar_embedder": "condition.ratio",
        "fl_embedder": "condition.frames",
        "fps_embedder": "condition.fps",
        "t_block": "modulation",
        "t_block_temp": "temporal_modulation",
        "x_embedder": "patch",
        "block_0.cross_attn_out": "blocks.0.cross.f",
        "block_0.attn_out": "blocks.0.spatial.f",
        "block_0": "blocks.0.mlp",
        "block_1": "blocks.1.mlp",
        "final_layer": "final",
    },
    "stdit1_a": {
        "t_block": "modulation",
        "x_embedder": "patch",
        "block_0": "blocks.0.mlp",
        "block_1": "blocks.1.mlp",
        "final_layer": "final",
    },
    "latte_a": {
        "t_embedder": "timestep",
        "x_embedder": "patch",
        "block_0": "blocks.0.mlp",
        "block_2": "blocks.2.mlp",
        "final_layer": "final",
    },
    "latte_t2v_a": {
        "adaln_single": "modulation",
        "caption_projection": "caption",
        "transformer_block_0": "blocks.0.mlp",
    },
}


@pytest.mark.parametrize("golden", STAGES)
def test_every_stage_on_the_way_is_that_of_the_original(golden):
    family = next(family for family in FAMILIES if family.golden == golden)
    model, stages, hooks = model_of(family), {}, []
    for theirs, ours in STAGES[golden].items():

        def hook(module, args, out, name=theirs):
            stages[name] = stage(out)

        hooks.append(model.get_submodule(ours).register_forward_hook(hook))
    try:
        x, t, cond = prepared(model, given_to(family, 0))
        model(x, t, cond)
    finally:
        for hook in hooks:
            hook.remove()
    mids = {name.split("/")[2]: out for name, out in family.tensors().items() if name.startswith("case0/mid/")}
    if golden in ("latte_a", "latte_t2v_a"):
        stages["x_embedder"] = stages.get("x_embedder", x)  # the original of T2V adds positions in the same module
    errors = {name: error(out.reshape(mids[name].shape), mids[name]) for name, out in stages.items() if name in mids}
    assert len(errors) >= len(STAGES[golden]) and max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_without_its_temporal_blocks_a_model_shares_the_weights_of_the_others(family):
    model = model_of(family)
    if all("temporal" in block for block in family.config.blocks):
        with pytest.raises(ValueError, match="this model has temporal attention in every block"):
            model.spatial()
        return
    images = model.spatial()
    assert not images.training and not any(parameter.requires_grad for parameter in images.parameters())
    assert {site.part for site in images.sites} == {site.part for site in model.sites} - {"temporal"}
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert all(tensor.data_ptr() in theirs for tensor in images.state_dict().values())
