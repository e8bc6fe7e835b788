"""mdm_kernels as a kernel repository of Hugging Face's `kernels`: built by one command, loaded by theirs."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mdm_kernels as mk
from mdm_kernels import layers

REPOSITORY = Path(__file__).parents[2]
BUILD = REPOSITORY / "hub/build.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "mdm-kernels"
    subprocess.run([sys.executable, str(BUILD), str(out)], check=True)
    return out


@pytest.fixture(scope="module")
def loaded(built):
    return pytest.importorskip("kernels").get_local_kernel(built, backend="cpu")


def test_the_build_has_every_backend_of_its_description(built):
    rust = pytest.importorskip("kernels._rust")
    backends = {str(backend).lower() for backend in rust.Build.open(built).general.backends}
    assert {path.name for path in (built / "build").iterdir()} == {f"torch-{backend}" for backend in backends}
    assert (built / "torch-ext/mdm_kernels/__init__.py").exists()


def test_a_loaded_build_stands_beside_the_installed_package(loaded):
    """Its ops have a name of their own, and none of its modules is one of the installed package's."""
    assert loaded is not mk
    assert loaded.library.NAMESPACE.startswith("mdm_kernels_1_cpu_")
    modules = [value for value in vars(loaded).values() if inspect.ismodule(value)]
    assert not any(module.__name__.startswith("mdm_kernels.") for module in modules)


def test_a_loaded_build_computes_the_same(loaded):
    x, weight, bias = torch.randn(2, 8, 4, 4), torch.randn(8), torch.randn(8)
    with mk.use_backend("triton"), loaded.use_backend("triton"):
        assert torch.equal(loaded.group_norm_silu(x, 4, weight, bias), mk.group_norm_silu(x, 4, weight, bias))


def test_nothing_is_built_over_what_is_there(built):
    process = subprocess.run([sys.executable, str(BUILD), str(built)], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr == f"{built} exists; give a folder that does not\n"


@pytest.mark.parametrize("layer", [layers.GroupNorm, layers.GroupNormSiLU])
def test_a_layer_is_a_forward_and_says_what_it_can(layer):
    members = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert members == {"has_backward", "can_torch_compile"}
    assert layer.forward is not nn.Module.forward


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        (layers.GroupNorm, nn.GroupNorm(2, 8)),
        (layers.GroupNormSiLU, mk.GroupNormSiLU(2, 8)),
        (layers.GroupNormSiLU, mk.GroupNormSiLU(2, 8, activation=None)),
    ],
)
def test_a_layer_computes_what_the_module_does_that_it_serves(layer, module):
    nn.init.normal_(module.weight)
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(layer.forward(module, x), module(x))
