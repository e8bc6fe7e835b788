import contextlib
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mdm_kernels.group_norm import cpu
from mdm_models.config import UNetConfig
from mdm_models.training.config import ModelConfig
from mdm_models.training.denoiser import CaptionedDenoiser, open_encoder
from mdm_models.training.dry_run.footprint import activation_bytes, level_flops
from mdm_models.unet import build_model
from mdm_models.zoo import model_config
from tests.training.models import IMAGE_MODEL, NESTED_MODEL

TRAINED = ModelConfig("small", text_width=32, text_layers=1, text_tokens=8)
FROZEN = ModelConfig("small", text_encoder="features", text_tokens=8)


def shapes_of(architecture: UNetConfig, size: int = 16) -> tuple[tuple[int, ...], ...]:
    return tuple(architecture.sample_shapes(size))


def test_the_operations_of_the_published_model_are_those_of_the_official_code():
    architecture = model_config("mdm_t2i_256")
    config = ModelConfig("mdm_t2i_256", text_encoder="t5", text_tokens=32)
    outer, inner = level_flops(architecture, config, shapes_of(architecture, 256))
    assert inner / 2e9 == pytest.approx(182, abs=1)  # multiplications with additions, in 10⁹
    assert (outer + inner) / 2e9 == pytest.approx(294, abs=1)


def test_a_layer_of_a_trained_text_encoder_is_counted_with_the_innermost_level():
    def innermost(layers: int) -> int:
        config = ModelConfig("small", text_width=32, text_layers=layers, text_tokens=8)
        return level_flops(IMAGE_MODEL, config, shapes_of(IMAGE_MODEL))[0]

    width, tokens = 32, 8
    layer = 2 * (12 * width**2 * tokens + 2 * tokens**2 * width)
    assert innermost(3) - innermost(2) == layer


class Kept:
    """What autograd holds in place of a tensor that it keeps, as long as it does."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def kept_by(model: torch.nn.Module, inputs: tuple, autocast: bool) -> int:
    """Bytes that autograd keeps of a real forward pass, when it is over."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = weakref.WeakSet()

    def note(tensor):
        found.add(kept := Kept(tensor))
        return kept

    with saved_tensors_hooks(note, lambda kept: kept.tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predictions = model(*inputs)
    memory = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in found}
    assert predictions  # which hold all that is kept
    return sum(size for address, size in memory.items() if address not in weights)


def real_and_told(rows: tuple[int, ...], autocast: bool) -> tuple[int, int]:
    model = CaptionedDenoiser(build_model(NESTED_MODEL), open_encoder(TRAINED, seed=0, device=torch.device("cpu")))
    x = [torch.randn(count, *shape) for count, shape in zip(rows, shapes_of(NESTED_MODEL), strict=True)]
    inputs = (x, torch.zeros(3), (torch.zeros(3, 8, dtype=torch.int64),))
    told = activation_bytes(NESTED_MODEL, TRAINED, shapes_of(NESTED_MODEL), rows, "cpu", autocast, recompute=False)
    return kept_by(model, inputs, autocast), told.kept


def test_activations_are_what_plain_pytorch_really_keeps(monkeypatch):
    monkeypatch.setattr(cpu, "pays", lambda *tensors: False)
    real, told = real_and_told((1, 3), autocast=False)
    assert told == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_cpu_keeps_is_told_up_to_twice_too_high(autocast):
    real, told = real_and_told((3, 3), autocast)
    assert real < told < 2 * real


def kept(device: str = "cpu", rows: int = 4, **how) -> int:
    settings = {"autocast": False, "recompute": False} | how
    return activation_bytes(IMAGE_MODEL, FROZEN, shapes_of(IMAGE_MODEL), [rows], device, **settings).kept


def test_the_kernels_of_a_gpu_keep_less_than_plain_pytorch():
    assert kept("cuda") < 0.8 * kept("cpu")


def test_bfloat16_halves_the_activations_of_a_gpu():
    per_sample = [kept("cuda", 32, autocast=on) - kept("cuda", 16, autocast=on) for on in (False, True)]
    assert per_sample[1] == pytest.approx(per_sample[0] / 2, rel=0.1)


def test_recomputation_keeps_the_blocks_inputs_and_the_insides_of_one():
    assert kept(recompute=True) < 0.5 * kept()


def test_autocast_is_as_it_was_afterwards():
    with contextlib.suppress(ValueError):
        activation_bytes(IMAGE_MODEL, FROZEN, ((3, 15, 15),), [1], "cpu", autocast=True, recompute=False)
    kept("cuda", autocast=True)
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cuda")
