"""scripts/posterior.py: the best prediction is the best, where it is known."""

import pytest
import torch

import posterior
import shapes
import train
from minidit.model import DiT


@pytest.fixture(scope="module")
def known():
    return posterior.sample(posterior.scenes(40, "known"))


def noised(data, t):
    return (1 - t) * data + t * torch.randn(data.shape, generator=torch.Generator().manual_seed(1))


def test_scenes_are_those_that_the_caption_may_mean(known):
    assert known.videos.shape == (40, 3, shapes.FRAMES, shapes.SIZE, shapes.SIZE)
    assert shapes.parse(posterior.CAPTION) == (posterior.TRIPLE,)
    assert len({video.sum().item() for video in known.videos}) == 40
    assert posterior.scenes(40, "known") != posterior.scenes(40, "data")


def test_of_nothing_but_noise_the_best_is_the_mean_of_all(known):
    mean, sharing = posterior.best(noised(known.videos[:2], 1 - 1e-6), 1 - 1e-6, known)
    torch.testing.assert_close(mean, known.videos.mean(0).expand(2, -1, -1, -1, -1), rtol=0, atol=1e-2)
    assert sharing == pytest.approx(40, abs=0.1)


def test_of_little_noise_the_best_is_the_scene_itself(known):
    found, sharing = posterior.best(noised(known.videos[3:5], 0.5), 0.5, known)
    torch.testing.assert_close(found, known.videos[3:5])
    assert sharing == pytest.approx(1)


def test_no_other_weights_have_a_smaller_error_on_average(known):
    """For data that are each of the known alike: neither a colder nor a hotter posterior, nor the mean, is better."""
    t, data = 0.98, known.videos

    def error(seen):
        return (posterior.best(noised(data, t), seen, known)[0] - data).square().mean().item()

    assert error(t) < min(error(0.95), error(0.995), (data.mean(0) - data).square().mean().item())


def test_what_there_is_more_of_weighs_more(known):
    data, logs = known.videos, torch.zeros(40)
    logs[7] = 50.0
    mean, sharing = posterior.best(noised(data[:1], 1 - 1e-6), 1 - 1e-6, posterior.Sample(data, logs))
    torch.testing.assert_close(mean, data[7:8])
    assert sharing == pytest.approx(1)


def test_near_scenes_are_near_may_be_and_weigh_what_there_is_room_for():
    (true,) = posterior.scenes(1, "true")
    videos, logs = posterior.near(true, 0.5, 6, "near")
    far = (videos - shapes.render([true])).square().mean((1, 2, 3, 4))
    others = posterior.drawn(posterior.scenes(6, "others"))
    assert (far > 0).all() and far.max() < (others - shapes.render([true])).square().mean((1, 2, 3, 4)).min()
    # a room of one pixel, or less at the edge of what may be, of some 12 to 20 across and 46 down
    assert (logs < -3).all() and logs.isfinite().all()
    everywhere = posterior.near(true, 1e3, 6, "near")
    torch.testing.assert_close(everywhere.log_weights, torch.zeros(6))  # the whole room: as likely as another


def test_a_model_is_measured_beside_it(known, capsys):
    torch.manual_seed(0)
    model = DiT(train.TINY).eval().requires_grad_(False)
    far, close = posterior.measure(model, known, posterior.scenes(2, "data"), [(0.99, None), (0.9, 2.5)], 20)
    assert 0 < close.best < far.best < far.model and close.best < close.model
    assert 1 <= far.sharing <= 40 and 1 <= close.sharing <= 20
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("0.990   all     ") and second.startswith("0.900   2.5     ")
