"""Fresh models: their first values, and that the same seed gives the same."""

import pytest
import torch
from torch import nn

from mdm_models import build_model, create_model, model_config
from mdm_models.layers import materialise
from mdm_models.unet import NestedUNet, empty_model


def fresh(seed: int):
    torch.manual_seed(seed)
    return create_model("mdm_t2v_tiny")


@pytest.fixture(scope="module")
def model():
    return fresh(0)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_seed_decides_the_weights(model):
    assert torch.equal(weights(fresh(0)), weights(model))
    assert not torch.equal(weights(fresh(1)), weights(model))


def test_models_made_one_after_the_other_differ(model):
    torch.manual_seed(0)
    first, second = create_model("mdm_t2v_tiny"), create_model("mdm_t2v_tiny")
    assert torch.equal(weights(first), weights(model))
    assert not torch.equal(weights(second), weights(first))


def test_every_layer_has_the_distribution_that_torch_gives_it(model):
    made_by_torch = NestedUNet(model.config).state_dict()
    for name, parameter in model.named_parameters():
        theirs = made_by_torch[name]
        assert parameter.shape == theirs.shape
        if theirs.unique().numel() == 1:  # zeros, and the ones of normalisations
            assert torch.equal(parameter, theirs)
        else:
            bound = parameter.abs().max().item()
            assert bound == pytest.approx(theirs.abs().max().item(), rel=0.3)  # of as few as 32 uniform numbers
            assert parameter.mean().abs() < 6 * bound / (3 * parameter.numel()) ** 0.5  # six standard errors


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("layer", [Scaled, lambda: nn.Embedding(4, 4), lambda: nn.MultiheadAttention(4, 1), nn.PReLU])
def test_a_layer_whose_first_values_are_not_known_is_refused(layer):
    """Rather than left with what was in memory, or with numbers that depend on which thread came first."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), layer())
    with pytest.raises(TypeError, match="are not known to `materialise`"):
        materialise(model, torch.device("cpu"))


def test_a_layer_without_parameters_needs_no_first_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.SiLU(), nn.GroupNorm(1, 2), nn.Identity())
    assert materialise(model, torch.device("cpu"))(torch.zeros(1, 2, 1, 1)).isfinite().all()


def test_layers_do_not_share_their_numbers(model):
    drawn = [layer.weight.flatten()[:16] for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    signs = {tuple((weight > 0).tolist()) for weight in drawn if weight.any()}
    assert len(signs) > 0.9 * sum(bool(weight.any()) for weight in drawn)


def test_convolutions_are_in_channels_last_memory(model):
    kernels = [layer.weight for layer in model.modules() if type(layer) is nn.Conv2d]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_an_empty_model_holds_no_memory():
    model = empty_model(model_config("mdm_t2i_1024"))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_is_made_on_the_default_device():
    with torch.device("meta"):
        assert build_model(model_config("mdm_t2i_tiny")).conv_in.weight.is_meta
    assert build_model(model_config("mdm_t2i_tiny")).conv_in.weight.device.type == "cpu"
