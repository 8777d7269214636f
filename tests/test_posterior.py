"""scripts/posterior.py: the best prediction is the best, where it is known."""

import pytest
import torch

import posterior
import shapes
import train
from minidit.model import DiT


@pytest.fixture(scope="module")
def known():
    return posterior.scenes(40, "known")


def noised(data, t):
    return (1 - t) * data + t * torch.randn(data.shape, generator=torch.Generator().manual_seed(1))


def test_scenes_are_those_that_the_caption_may_mean(known):
    assert known.shape == (40, 3, shapes.FRAMES, shapes.SIZE, shapes.SIZE)
    assert shapes.parse(posterior.CAPTION) == (posterior.TRIPLE,)
    assert len({video.sum().item() for video in known}) == 40
    assert not torch.equal(known, posterior.scenes(40, "data"))


def test_of_nothing_but_noise_the_best_is_the_mean_of_all(known):
    mean, sharing = posterior.best(noised(known[:2], 1 - 1e-6), 1 - 1e-6, known)
    torch.testing.assert_close(mean, known.mean(0).expand(2, -1, -1, -1, -1), rtol=0, atol=1e-2)
    assert sharing == pytest.approx(40, abs=0.1)


def test_of_little_noise_the_best_is_the_scene_itself(known):
    found, sharing = posterior.best(noised(known[3:5], 0.5), 0.5, known)
    torch.testing.assert_close(found, known[3:5])
    assert sharing == pytest.approx(1)


def test_no_other_weights_have_a_smaller_error_on_average(known):
    """For data that are each of the known alike: neither a colder nor a hotter posterior, nor the mean, is better."""
    t = 0.98

    def error(seen):
        return (posterior.best(noised(known, t), seen, known)[0] - known).square().mean().item()

    assert error(t) < min(error(0.95), error(0.995), (known.mean(0) - known).square().mean().item())


def test_a_model_is_measured_beside_it(known, capsys):
    torch.manual_seed(0)
    model = DiT(train.TINY).eval().requires_grad_(False)
    (row,) = posterior.measure(model, known, posterior.scenes(2, "data"), [0.99])
    assert 0 < row.best < row.model and 1 <= row.sharing <= 40
    assert capsys.readouterr().out.startswith("0.990   ")
