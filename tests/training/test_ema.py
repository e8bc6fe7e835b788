import contextlib

import pytest
import torch
from torch import nn

from mdm_models.training.ema import EMA


@pytest.fixture
def model() -> nn.Linear:
    return nn.Linear(3, 2)


def test_the_average_follows_the_recurrence(model):
    ema = EMA(model, decay=0.7)
    expected = model.weight.detach().clone()
    for n in range(1, 60):
        with torch.no_grad():
            model.weight.normal_()
        ema.update()
        decay = min(0.7, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.averages["weight"], expected)


def test_sampling_sees_the_averages_and_training_its_weights(model):
    ema = EMA(model, decay=0.5)
    before, average = model.weight.detach().clone(), ema.averages["weight"].fill_(7.0).clone()
    with ema.swapped_in():
        assert torch.equal(model.weight, average)
    assert torch.equal(model.weight, before)
    assert torch.equal(ema.averages["weight"], average)


def test_a_loaded_average_goes_on_as_the_saved_one(model):
    first = EMA(model, decay=0.99)
    first.update()
    second = EMA(model, decay=0.99)
    second.load({name: average.clone() for name, average in first.averages.items()}, first.updates)
    with torch.no_grad():
        model.weight.add_(1)
    first.update()
    second.update()
    assert torch.equal(first.averages["weight"], second.averages["weight"])


def test_averages_of_another_model_are_refused(model):
    with pytest.raises(ValueError, match="bias"):
        EMA(model).load({"weight": model.weight}, 1)


def test_the_weights_come_back_when_sampling_fails(model):
    ema, before = EMA(model), model.weight.detach().clone()
    ema.averages["weight"].fill_(7.0)
    with contextlib.suppress(RuntimeError), ema.swapped_in():
        model(torch.zeros(1, 4))  # of the wrong width
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(model, decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(model, decay)
