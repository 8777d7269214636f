"""Offloading, with the CPU as the device too: what is lent is a copy there."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

import minidit
from families import FAMILIES
from minidit import cli, fitting
from minidit.broadcast import PAB_246
from minidit.layers import Mlp
from minidit.memory import of_model, of_text
from minidit.model import DiT
from minidit.offload import Loans, brought, layers
from minidit.pipeline import Pipeline, asked, schedule
from minidit.stages import Classes, Pixels, Prompts, Stages

CPU = torch.device("cpu")
FAMILY = next(family for family in FAMILIES if family.preset == "latte-ucf101")  # whose sublayers make their own rows
BASE = asked(replace(FAMILY.config, dim=96, heads=4), frames=5, height=48, width=48, steps=12)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DiT(BASE).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


class Latents(Pixels):
    """Shows three of the latents' channels."""

    def chunks(self, latents, frames, **options):
        return super().chunks(latents[:3], frames)


@pytest.fixture
def pipe(model):
    return Pipeline(BASE, torch.float32, Classes(BASE), lambda: model, Latents(), CPU)


@pytest.fixture
def lent(monkeypatch):
    """Bytes of layers that are on the device: after each layer is lent, what was lent, and what comes."""
    seen, lend = [], Loans.lend

    def watched(self, i, *args):
        lend(self, i, *args)
        away = [p.nbytes for home in self.homes for p, data in home if p.data_ptr() != data.data_ptr()]
        seen.append((i, sum(away) + sum(copy.nbytes for copies in self.coming.values() for copy in copies)))

    monkeypatch.setattr(Loans, "lend", watched)
    return seen


def test_the_video_is_the_same_bit_for_bit_and_two_layers_are_there_at_a_time(pipe, model, lent):
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    plain, _ = minidit.generate(pipe, "3", pyramid=PAB_246, seed=1)
    assert not lent
    video, _ = minidit.generate(replace(pipe, offload=True), "3", pyramid=PAB_246, seed=1)
    assert torch.equal(video, plain) and plain.float().std() > 1
    sizes = sorted(sum(p.nbytes for p in layer.parameters()) for layer in layers(model))
    assert sizes[-1] < max(held for _, held in lent) <= sum(sizes[-2:]) < sum(sizes) / 4
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers(model))


def test_what_is_reused_is_not_brought(pipe, model, lent):
    _, report = minidit.generate(replace(pipe, offload=True), "3", pyramid=PAB_246)
    calls = {site: 0 for site in model.sites}
    for i, _ in lent:
        for site, sublayer in zip(model.sites, model.sublayers, strict=True):
            calls[site] += layers(model)[i] in [*sublayer.f.children()][-1:] + [sublayer.f] * isinstance(
                sublayer.f, Mlp
            )
    columns = dict(zip(report.plan.sites, zip(*report.plan.acts, strict=True), strict=True))
    expected = {site: sum(act is not minidit.Act.REUSE for act in column) for site, column in columns.items()}
    assert calls == expected and min(expected.values()) < len(report.plan)


def test_an_interrupted_run_leaves_the_model_at_rest(model):
    home = [parameter.data_ptr() for parameter in model.parameters()]

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.sublayers[1].f.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), Stages(CPU, offload=True).on("model", model) as dit:
        latent = schedule(BASE, torch.float32)[1]
        cond = dit.prepare(torch.tensor([3]), None, latent=latent, height=48, width=48, fps=torch.tensor([8.0]))
        dit(torch.randn(1, 4, *latent), 500.0, cond)
    hook.remove()
    assert [parameter.data_ptr() for parameter in model.parameters()] == home
    assert not any(layer._forward_hooks for layer in layers(model))


def test_what_was_brought_comes_home_without_a_copy(model, monkeypatch):
    def places():
        return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}

    before = places()
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor.clone())  # as to another device
    with pytest.raises(KeyboardInterrupt), brought(model, CPU):
        assert not set(places().values()) & set(before.values())
        raise KeyboardInterrupt
    assert places() == before


def test_all_but_two_layers_are_predicted_to_be_away(model):
    run = {"latent": schedule(BASE, torch.float32)[1], "batch": 2, "cache_bytes": 0}
    sizes = sorted(sum(p.nbytes for p in layer.parameters()) for layer in layers(model))
    less = of_model(BASE, torch.float32, **run) - of_model(BASE, torch.float32, **run, offload=True)
    assert less == sum(sizes[:-2])


def test_a_t5_encodes_the_same_with_two_blocks_at_a_time(tmp_path, lent):
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 4, "num_heads": 2, "vocab_size": 128}
    encoder = T5EncoderModel(T5Config(**shape)).eval().requires_grad_(False)
    ids = torch.arange(12).reshape(2, 6)
    plain = encoder(input_ids=ids).last_hidden_state
    blocks = encoder.encoder.block
    with brought(encoder, CPU, blocks), torch.inference_mode():
        for _ in range(2):  # the first time, what comes next is not known yet
            assert torch.equal(encoder(input_ids=ids).last_hidden_state, plain)
    size = sum(p.nbytes for p in blocks[1].parameters())
    assert [i for i, _ in lent] == [0, 1, 2, 3] * 2 and max(held for _, held in lent) <= 2 * size + 512
    encoder.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").touch()
    with_all, some = (
        of_text(tmp_path, captions=2, length=6, dtype=torch.float32, offload=offload) for offload in (False, True)
    )
    assert with_all - some == 2 * size


@pytest.mark.gpu
def test_on_a_gpu_the_video_is_the_same_bit_for_bit_and_less_is_held():
    torch.manual_seed(0)
    model, gpu = DiT(replace(BASE, dim=384, depth=4)).eval().requires_grad_(False), torch.device("cuda")
    pipe = Pipeline(model.config, torch.float32, Classes(BASE), lambda: model, Latents(), gpu)
    plain, held = minidit.generate(pipe, "3", pyramid=PAB_246, seed=1)
    for _ in range(2):  # the second time, all that comes next is known
        video, less = minidit.generate(replace(pipe, offload=True), "3", pyramid=PAB_246, seed=1)
        assert torch.equal(video, plain) and plain.float().std() > 1
    assert all(not parameter.is_cuda for parameter in model.parameters())
    weights = sum(p.nbytes for layer in layers(model) for p in layer.parameters())
    assert less.stages["model"] < held.stages["model"] - weights / 2


def test_what_is_resident_stays_where_it_was_brought():
    layer, moved = nn.Linear(2, 2), []
    layer.to = moved.append
    with Stages(CPU).on("text", layer):
        pass
    assert not moved
    with Stages(CPU, resident=True).on("text", layer):
        assert moved == [CPU]
    assert moved == [CPU]


@pytest.mark.gpu
def test_on_a_gpu_a_resident_model_makes_the_same_video_and_is_brought_once():
    torch.manual_seed(0)
    model, gpu = DiT(BASE).eval().requires_grad_(False), torch.device("cuda")
    pipe = Pipeline(model.config, torch.float32, Classes(BASE), lambda: model, Latents(), gpu)
    plain, _ = minidit.generate(pipe, "3", pyramid=PAB_246, seed=1)
    places = []
    for _ in range(2):
        video, _ = minidit.generate(replace(pipe, resident=True), "3", pyramid=PAB_246, seed=1)
        assert torch.equal(video, plain) and plain.float().std() > 1
        places.append([parameter.data_ptr() for parameter in model.parameters() if parameter.is_cuda])
    assert places[0] == places[1] and len(places[0]) == len([*model.parameters()])


@pytest.mark.parametrize("changed", [{}, {"free": 59}, {"device": CPU}, {"offload": True}, {"text": None}])
def test_weights_stay_where_there_is_room_for_all_peaks_at_once(changed):
    peaks = {"text": 10, "model": 30, "decoder": 20}
    pipe = SimpleNamespace(text=Prompts.__new__(Prompts), device=torch.device("cuda"), offload=False)
    for name, value in changed.items():
        if name == "text":
            del peaks["text"]  # of a T5 that is on the hub
        setattr(pipe, name, pipe.text if name == "text" else value)
    assert fitting.together(pipe, peaks, changed.get("free", 60)) == (not changed)


def test_where_offload_has_no_meaning_it_is_refused(capsys):
    assert cli.main(["generate", "a red circle", "--offload", "--device", "cpu"]) == 2
    assert "--offload is for a GPU, with --device cpu all is in this computer's memory" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is small, and all on the device at once: leave offload out"):
        Pipeline.load("tiny", offload=True)
    with pytest.raises(ValueError, match="with offload no weights stay on the device: leave resident out"):
        Pipeline.load("tiny", offload=True, resident=True)
