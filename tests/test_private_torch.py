"""A canary for each name of PyTorch's own that mdm_models uses: when one fails, its message says what for."""

import dataclasses
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata

import mdm_models
from mdm_models import private_torch
from mdm_models.training.checkpoint.files import _MetadataUnpickler
from tests.kernels.test_private_torch import private_names

PACKAGE = Path(mdm_models.__file__).parent


def test_private_names_of_torch_stand_in_one_file():
    names = {path: private_names(path) - {"torch.__version__"} for path in PACKAGE.rglob("*.py")}
    found = [str(path.relative_to(PACKAGE)) for path in names if any("(" not in name for name in names[path])]
    assert found == ["private_torch.py"]


def test_fake_tensors_have_shapes_and_no_memory():
    """If this fails, `--dry-run` cannot count what a step holds: look for what torch.compile traces with now."""
    with private_torch.fake_tensors():
        x = torch.empty(1 << 20, 1 << 20)
        assert (x @ x).shape == x.shape


def test_lists_of_tensors_are_moved_towards_others():
    """If this fails, the averages of the weights do not move: lerp_ each of them in turn."""
    averages = [torch.zeros(2), torch.zeros(3)]
    private_torch.foreach_lerp_(averages, [torch.ones(2), torch.ones(3)], 0.25)
    assert [average.tolist() for average in averages] == [[0.25] * 2, [0.25] * 3]


def test_the_limit_of_recompilations_is_torch_compiles():
    """If this fails, --compile gives up on blocks that run at many widths: look for dynamo's limit of that purpose."""
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        private_torch.allow_recompilations(256)
        assert torch._dynamo.config.recompile_limit == 256


@pytest.mark.parametrize("unit", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_a_cpu_with_either_unit_multiplies_in_bfloat16(monkeypatch, unit):
    """If this fails, `--precision auto` no longer finds them: see how torch tells what a CPU can do."""
    assert isinstance(private_torch.cpu_multiplies_bf16(), bool)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda found=name == unit: found)
    assert private_torch.cpu_multiplies_bf16()


def read(value: object) -> object:
    return _MetadataUnpickler(io.BytesIO(pickle.dumps(value))).load()


def test_checkpoints_describe_tensors_by_the_names_that_are_allowed():
    """If this fails, no checkpoint can be read: see which name its message gives, and whether it is harmless."""
    described = metadata.TensorProperties(torch.float32, torch.strided, True, torch.channels_last, False)
    assert read(described) == described


@dataclasses.dataclass
class Added:
    size: int


def test_a_class_that_torch_adds_to_describe_tensors_is_read(monkeypatch):
    monkeypatch.setattr(Added, "__module__", metadata.__name__)
    monkeypatch.setattr(metadata, "Added", Added, raising=False)
    assert read(Added(3)) == Added(3)


@pytest.mark.parametrize("stray", [io.open, dataclasses.replace, torch.load, torch.nn.Linear])
def test_whatever_else_a_checkpoint_calls_for_is_refused(stray):
    with pytest.raises(pickle.UnpicklingError, match="describes no tensor"):
        read(stray)


def test_an_import_of_the_modules_that_describe_tensors_is_refused(monkeypatch):
    """They import `os` and the like, which are no descriptions though they stand beside them."""
    monkeypatch.setattr(metadata, "system", io.open, raising=False)
    with pytest.raises(pickle.UnpicklingError, match="describes no tensor"):
        _MetadataUnpickler(io.BytesIO(b"ctorch.distributed.checkpoint.metadata\nsystem\n.")).load()
