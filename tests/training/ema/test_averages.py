import contextlib

import pytest
import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mdm_models.training.config import OptimizerConfig
from mdm_models.training.ema.averages import EMA, PowerEMA, make_averages
from mdm_models.training.ema.power_functions import exponent


@pytest.fixture
def model() -> nn.Linear:
    return nn.Linear(3, 2)


@pytest.fixture
def sharded(tmp_path):
    """Two layers under fully_shard, in a group of one process; one forward pass has left the outer one gathered."""
    init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    fully_shard(layers[0])
    fully_shard(layers)
    layers(torch.zeros(1, 4))
    yield layers
    destroy_process_group()


def train(model: nn.Module, averages, steps: int) -> None:
    for _ in range(steps):
        with torch.no_grad():
            for parameter in averages.parameters.values():
                parameter.normal_()
        averages.update()


def test_the_average_follows_the_recurrence(model):
    ema = EMA(model, decay=0.7)
    expected = model.weight.detach().clone()
    for n in range(1, 60):
        train(model, ema, 1)
        decay = min(0.7, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.averages["weight"], expected)


def test_a_power_average_weighs_each_update_by_its_share_of_the_power_function(model):
    model.double()
    averages = PowerEMA(model, [0.1, 0.2])
    seen = []
    for _ in range(50):
        train(model, averages, 1)
        seen.append(model.weight.detach().clone())
    for std, by_name in averages.by_std.items():
        edges = (torch.arange(51, dtype=torch.float64) / 50) ** (exponent(std) + 1)
        expected = torch.einsum("t,tij->ij", edges.diff(), torch.stack(seen))
        torch.testing.assert_close(by_name["weight"], expected)


def test_the_settings_choose_the_kind_of_average(model):
    constant = make_averages(model, OptimizerConfig(ema_decay=0.9))
    assert isinstance(constant, EMA)
    assert constant.decay == 0.9
    power = make_averages(model, OptimizerConfig(ema_stds=(0.1, 0.05)))
    assert isinstance(power, PowerEMA)
    train(model, power, 5)
    assert power.averages is power.by_std[0.1]


def test_sampling_sees_the_averages_and_training_its_weights(model):
    ema = EMA(model, decay=0.5)
    before, average = model.weight.detach().clone(), ema.averages["weight"].fill_(7.0).clone()
    place = model.weight.data_ptr()
    with ema.swapped_in():
        assert torch.equal(model.weight, average)
        assert model.weight.data_ptr() == place
    assert torch.equal(model.weight, before)
    assert torch.equal(ema.averages["weight"], average)


def test_the_weights_come_back_when_sampling_fails(model):
    ema, before = EMA(model), model.weight.detach().clone()
    ema.averages["weight"].fill_(7.0)
    with contextlib.suppress(RuntimeError), ema.swapped_in():
        model(torch.zeros(1, 4))  # of the wrong width
    assert torch.equal(model.weight, before)


def test_a_sharded_model_computes_with_its_averages_and_then_with_its_weights(sharded):
    averages = EMA(sharded, decay=0.5)
    x = torch.randn(1, 4)
    plain = sharded(x).detach()
    for average in averages.averages.values():
        assert isinstance(average, DTensor)
        average.to_local().zero_()
    with averages.swapped_in(), torch.no_grad():
        assert not sharded(x).any()
    assert torch.equal(sharded(x), plain)


def test_the_averages_of_a_sharded_model_move(sharded):
    averages = PowerEMA(sharded, [0.1])
    with torch.no_grad():
        for parameter in averages.parameters.values():
            parameter.to_local().fill_(3.0)
    averages.update()
    assert all((average.full_tensor() == 3).all() for average in averages.averages.values())


@pytest.mark.parametrize("config", [OptimizerConfig(ema_decay=0.99), OptimizerConfig(ema_stds=(0.05, 0.1))])
def test_loaded_averages_go_on_as_the_saved_ones(model, config):
    first = make_averages(model, config)
    train(model, first, 3)
    second = make_averages(model, config)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    train(model, first, 1)
    second.update()
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_state_holds_every_width_by_name_and_the_count(model):
    averages = PowerEMA(model, [0.05, 0.1])
    train(model, averages, 2)
    state = averages.state_dict()
    assert sorted(state) == ["bias", "std 0.1.bias", "std 0.1.weight", "updates", "weight"]
    assert torch.equal(state["updates"], torch.tensor(2))


def test_averages_of_another_model_are_refused(model):
    with pytest.raises(ValueError, match="bias"):
        EMA(model).load_state_dict({"weight": model.weight, "updates": torch.tensor(1)})
    with pytest.raises(ValueError, match=r"weight has shape \(5, 3\)"):
        EMA(model).load_state_dict(EMA(nn.Linear(3, 5)).state_dict() | {"bias": torch.zeros(2)})


def test_averages_of_another_width_are_refused(model):
    with pytest.raises(ValueError, match=r"std 0\.2"):
        PowerEMA(model, [0.05, 0.1]).load_state_dict(PowerEMA(model, [0.05, 0.2]).state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(model, decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(model, decay)


@pytest.mark.parametrize(("stds", "word"), [([0.3], "0.3"), ([], "one width or more"), ([0.1, 0.1], "once")])
def test_widths_that_no_average_has_are_refused(model, stds, word):
    with pytest.raises(ValueError, match=word):
        PowerEMA(model, stds)
