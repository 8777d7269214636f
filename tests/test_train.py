import json
import random
import signal
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch

import shapes
import train
from minidit.checkpoint import load

SMALL = replace(
    train.TINY,
    depth=1,
    dim=32,
    heads=2,
    caption_dim=16,
    captions=replace(train.TINY.captions, heads=2, depth=1),
    sampling=replace(train.TINY.sampling, frames=2, height=16, width=16),
)


@pytest.fixture(autouse=True)
def a_small_model_of_small_videos(monkeypatch):
    monkeypatch.setattr(train, "TINY", SMALL)
    monkeypatch.setattr(train, "EVERY", 20)
    monkeypatch.setattr(shapes, "draw", partial(shapes.draw, frames=2, size=16))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # it would outlive the test


def command(out, steps=60, **settings):
    quiet = ["--workers", "0", "--show", "0", "--no-compile", "--device", "cpu", "--batch", "4", "--warmup", "5"]
    more = [f"--{name}={value}" for name, value in settings.items()]
    return ["--out", str(out), "--steps", str(steps), *quiet, *more]


def trained(out, **settings):
    return train.train(train.parse(command(out, **settings)), 0, 1, torch.device("cpu"))


def interrupt(monkeypatch, at):
    """Ctrl-C while step `at` is made, once."""
    advance = train.Run.advance

    def interrupted(run, *args):
        if run.step == at:
            monkeypatch.setattr(train.Run, "advance", advance)
            signal.raise_signal(signal.SIGINT)
        return advance(run, *args)

    monkeypatch.setattr(train.Run, "advance", interrupted)


def bits(run):
    """Weights, their average and the optimizers' moments, as values that compare equal bit for bit."""
    tensors = [*run.model.state_dict().values(), *run.average.state_dict().values()]
    for optimizer in (run.muon, run.adamw):
        tensors += [moment for state in optimizer.state_dict()["state"].values() for moment in state.values()]
    return [tensor.numpy().tobytes() for tensor in tensors]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """60 steps without an interruption. The fixture above is a test's own, so its patches are made here again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TINY", SMALL)
        patch.setattr(train, "EVERY", 20)
        patch.setattr(shapes, "draw", partial(shapes.draw, frames=2, size=16))
        return trained(tmp_path_factory.mktemp("straight"))


# interruptions


@pytest.mark.parametrize("at", [0, 23])
def test_an_interrupted_training_ends_with_the_same_weights_and_loss_curve(straight, tmp_path, monkeypatch, at):
    interrupt(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path)
    again = trained(tmp_path)
    assert again.step == 60 and bits(again) == bits(straight) and again.losses == straight.losses


def test_ctrl_c_leaves_a_state_that_the_same_command_resumes(straight, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Run, "show", lambda run: None)
    interrupt(monkeypatch, 50)
    assert train.main(command(tmp_path)) == 130
    assert capsys.readouterr().err == f"\ninterrupted; the state is in {tmp_path}, the same command goes on\n"
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 51  # it ends the step in hand
    assert train.main(command(tmp_path)) == 0
    model, average = load(tmp_path), deepcopy(straight.average).to(torch.bfloat16).float()
    assert model.config == SMALL and all(map(torch.equal, model.parameters(), average.parameters()))
    assert [tuple(point) for point in json.loads((tmp_path / "losses.json").read_text())] == straight.losses
    assert [step for step, _ in straight.losses] == [20, 40, 60]


def test_a_finished_training_is_not_trained_again(tmp_path, monkeypatch):
    first = trained(tmp_path, steps=3)
    interrupt(monkeypatch, 3)  # would be raised
    assert bits(trained(tmp_path, steps=3)) == bits(first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 8}, "batch 4, not 8"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"steps": 3}, "steps 2, not 3"),
        ({"lr": 0.01}, "lr 0.001, not 0.01"),
        ({"schedule": "constant"}, "schedule cosine, not constant"),
        ({"warmup": 6}, "warmup 5, not 6"),
        ({"ema": 0.9}, "ema 0.999, not 0.9"),
        ({"clip": 2.0}, "clip 1.0, not 2.0"),
    ],
)
def test_other_settings_than_the_states_are_refused_with_one_line(tmp_path, capsys, settings, message):
    trained(tmp_path, steps=2)
    before = (tmp_path / "state.pt").read_bytes()
    capsys.readouterr()
    assert train.main(command(tmp_path, **{"steps": 2, **settings})) == 2
    expected = f"train.py: {tmp_path / 'state.pt'} was trained with {message}: give the same, or another --out\n"
    assert capsys.readouterr().err == expected
    assert (tmp_path / "state.pt").read_bytes() == before


# learning


def loss(run):
    """At t = 0.5, on scenes and noise that are always the same."""
    scenes = train.Scenes(run.model, train.parse(command(".", seed=99)), slice(0, 4))
    packed, tokens = scenes[0]
    data, noise = shapes.draw(packed), torch.randn(4, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return train.Objective(run.model)(data, tokens, torch.full((4,), 0.5), noise, torch.zeros(4).bool()).item()


def test_the_loss_falls(tmp_path):
    settings = {"steps": 30, "lr": 0.003}
    new = train.Run(train.parse(command(tmp_path, **settings)), torch.device("cpu"))
    assert loss(trained(tmp_path, **settings)) < 0.5 * loss(new)


def test_every_weight_is_trained_by_one_optimizer(tmp_path):
    run = train.Run(train.parse(command(tmp_path)), torch.device("cpu"))
    muon, adamw = ({*group["params"]} for opt in (run.muon, run.adamw) for group in opt.param_groups)
    assert not muon & adamw and muon | adamw == {*run.model.parameters()}
    names = {name for name, parameter in run.model.named_parameters() if parameter in muon}
    assert len(names) == 2 * 7 * SMALL.depth  # qkv, proj; q, kv, proj; fc1, fc2
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in names)


def test_what_is_nearly_noise_counts_least_and_edges_by_their_t():
    t = torch.tensor([1.0, 0.95, 0.6, 0.3, 0.15])
    assert train.importance(t).tolist() == pytest.approx([1, 3**0.5, 17**0.5, 29**0.5, 35**0.5 / 2])


def test_two_thirds_of_the_times_are_where_places_are_decided_and_the_others_as_in_a_run():
    count = 9000
    t = train.times((torch.arange(count) + 0.5) / count)
    assert t.equal(t.sort().values) and t[0] == train.EARLIEST and 0.9999 < t[-1] < 1
    deciding = (t > 0.92) & (t < 0.98)
    assert deciding.sum() == pytest.approx(2 / 3 * count, abs=1)
    u = t / (10 - 9 * t)  # undoes the shift
    for some in (u[deciding], u[(t > 2 * train.EARLIEST) & (t <= 0.92)], u[t >= 0.98]):  # evenly, each by itself
        assert torch.allclose(some, torch.linspace(some[0], some[-1], len(some)), atol=1e-4)
    spacing = [some.diff().mean().item() for some in (u[(t > 2 * train.EARLIEST) & (t <= 0.92)], u[t >= 0.98])]
    assert spacing[0] == pytest.approx(spacing[1], rel=1e-2)


def test_seven_of_ten_scenes_have_two_actors():
    rng = random.Random(0)
    assert sum(len(train.draw(rng).actors) == 2 for _ in range(2000)) == pytest.approx(1400, abs=60)


def test_a_new_network_predicts_nothing_at_all(tmp_path):
    run = train.Run(train.parse(command(tmp_path)), torch.device("cpu"))
    z, text = torch.randn(1, 3, 2, 16, 16), torch.randn(1, 24, 16)
    cond = run.model.prepare(text, None, latent=(2, 16, 16), height=16, width=16, fps=torch.tensor([8.0]))
    assert torch.equal(run.model(z, 500.0, cond), torch.zeros_like(z))


def test_the_average_starts_as_the_weights_and_follows_them_slower_and_slower(tmp_path):
    new = train.Run(train.parse(command(tmp_path)), torch.device("cpu"))
    one, two = trained(tmp_path / "one", steps=1), trained(tmp_path / "two", steps=2)
    weights = [list(run.model.parameters()) for run in (new, one, two)]
    for average, first, then, now in zip(two.average.parameters(), *weights, strict=True):
        torch.testing.assert_close(average, first.lerp(then, 9 / 10).lerp(now, 9 / 11))


def test_a_seed_and_a_step_make_the_same_batch_on_every_rank(tmp_path):
    args = train.parse(command(tmp_path))
    run = train.Run(args, torch.device("cpu"))
    packed, tokens = train.Scenes(run.model, args, slice(0, 4))[5]
    for rank in range(2):
        share = slice(rank, 4, 2)
        own = train.Scenes(run.model, args, share)[5]
        assert torch.equal(own[0], packed[share]) and torch.equal(own[1], tokens[share])
    assert not torch.equal(train.Scenes(run.model, args, slice(0, 4))[6][0], packed)
    first, again, later = (train.random_parts(args, step, (3, 2), torch.device("cpu")) for step in (5, 5, 6))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[1], later[1])
    assert first[0].min() >= train.EARLIEST and first[0].max() <= 1


# the learning rate


def rates(tmp_path, **settings):
    args = train.parse(command(tmp_path, **{"steps": 100, "warmup": 10, "lr": 1.0, **settings}))
    return [train.learning_rate(args, step) for step in range(100)]


def test_the_learning_rate_warms_up_then_falls_to_a_hundredth(tmp_path):
    rate = rates(tmp_path)
    assert rate[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rate[10] == 1 and rate[55] == pytest.approx(0.505) and rate[99] == pytest.approx(0.01, abs=0.001)
    assert rate[10:] == sorted(rate[10:], reverse=True)


def test_a_constant_learning_rate_stays_after_the_warm_up(tmp_path):
    rate = rates(tmp_path, schedule="constant")
    assert rate[4] == 0.5 and set(rate[9:]) == {1.0}


def test_without_a_warm_up_the_learning_rate_begins_at_its_height(tmp_path):
    assert rates(tmp_path, warmup=0)[0] == 1
