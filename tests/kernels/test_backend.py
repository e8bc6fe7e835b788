"""Which implementation runs, and what a launch does."""

import contextlib
import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mdm_kernels import backend, flash_attention, group_norm_silu, self_cross_attention, temporal_attention
from mdm_kernels.backend import launch, recording, runs_triton, set_backend, shapes_only, use_backend, what_ran


class Kernel:
    """Stands in for a Triton kernel: notes how it is launched."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((grid, arguments))


@pytest.fixture
def restored_default():
    yield
    set_backend("auto")


def test_auto_runs_the_reference_on_cpu():
    with use_backend("auto"):
        assert not runs_triton(torch.ones(1, device="cpu"))


def test_use_backend_ends_with_its_block():
    with use_backend("triton"):
        assert runs_triton(torch.ones(1))
        with use_backend("torch"):
            assert not runs_triton(torch.ones(1))
        assert runs_triton(torch.ones(1))
    assert not runs_triton(torch.ones(1))


@pytest.mark.usefixtures("restored_default")
def test_use_backend_overrides_set_backend():
    set_backend("triton")
    assert runs_triton(torch.ones(1))
    with use_backend("torch"):
        assert not runs_triton(torch.ones(1))


@pytest.mark.parametrize(
    ("chosen", "dtype", "references"),
    [
        *(("auto", torch.float32, 2), ("auto", torch.bfloat16, 0)),
        *(("triton", torch.float32, 0), ("torch", torch.float32, 2)),
    ],
)
def test_auto_leaves_attention_in_float32_on_nvidia_to_torch(chosen, dtype, references):
    with FakeTensorMode(), use_backend(chosen), what_ran() as ran:
        q, qkv = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((1, 2, 8, 16), (1, 8, 96)))
        assert flash_attention(q, q, q).device.type == self_cross_attention(qkv, num_heads=2).device.type == "cuda"
    assert ran.references.total() == references


def test_every_reference_that_runs_is_counted_once():
    wide, exact = torch.zeros(1, 1, 4, 160), torch.zeros(1, 4, 2, 2, dtype=torch.float64)
    for call, how in (
        (lambda: flash_attention(wide[..., :16], wide[..., :16], wide[..., :16]), "torch"),
        (lambda: flash_attention(wide, wide, wide), "triton"),
        (lambda: group_norm_silu(exact, 2), "triton"),
        (lambda: temporal_attention(torch.zeros(4, 3, 48), num_heads=1, frames=2), "torch"),
        (lambda: temporal_attention(torch.zeros(128, 1, 384), num_heads=1, frames=64), "triton"),
    ):
        with use_backend(how), what_ran() as ran:
            call()
        assert ran.references.total() == 1
        assert not ran.kernels


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend is 'cuda'; it must be one of auto, triton, torch"):
        set_backend("cuda")


def test_an_unknown_backend_in_the_environment_is_named(monkeypatch):
    monkeypatch.setattr(backend, "_backend", "auto")  # which is so again after the test
    monkeypatch.setenv("MDM_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="MDM_KERNELS_BACKEND is 'fast'"):
        importlib.reload(backend)


def test_the_environment_chooses_the_backend():
    code = "import torch; from mdm_kernels.backend import runs_triton; print(runs_triton(torch.ones(1)))"
    environment = os.environ | {"MDM_KERNELS_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.stdout.strip() == "True", process.stderr


def test_triton_on_cpu_needs_the_interpreter_or_a_stand_in_for_the_gpu(monkeypatch):
    monkeypatch.setattr(backend, "_launches_on_cpu", False)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="needs TRITON_INTERPRET=1"):
            runs_triton(torch.ones(1, device="cpu"))
        with backend.launching_on_cpu():
            assert runs_triton(torch.ones(1, device="cpu"))


def test_launch_passes_arguments_and_constants():
    kernel, x = Kernel(), torch.ones(3)
    launch(kernel, (4, 2), x_ptr=x, size=7, BLOCK=16)
    assert kernel.launches == [((4, 2), {"x_ptr": x, "size": 7, "BLOCK": 16, "enable_fp_fusion": True})]


def test_arguments_have_names():
    with pytest.raises(TypeError, match="positional"):
        launch(Kernel(), (1,), torch.ones(3))


def test_launch_keeps_fused_multiply_adds():
    kernel = Kernel()
    launch(kernel, (1,), x_ptr=torch.ones(3))
    assert kernel.launches[0][1]["enable_fp_fusion"] is True


def test_nothing_runs_on_an_empty_grid():
    kernel = Kernel()
    launch(kernel, (4, 0), x_ptr=torch.ones(3))
    assert kernel.launches == []


def test_recording_replaces_launches():
    kernel, recorded = Kernel(), []
    with recording(lambda *launched: recorded.append(launched)):
        launch(kernel, (0,), size=1, BLOCK=2)
    launch(kernel, (1,), x_ptr=torch.ones(1))
    assert recorded == [(kernel, {"size": 1, "BLOCK": 2, "enable_fp_fusion": True})]
    assert len(kernel.launches) == 1


def test_meta_tensors_want_shapes_except_while_recording():
    x = torch.empty(1, device="meta")
    assert shapes_only(x)
    with recording(lambda *_: None):
        assert not shapes_only(x)
    assert not shapes_only(torch.ones(1))


def test_fake_tensors_want_shapes():
    with FakeTensorMode():
        assert shapes_only(torch.ones(1))


def test_a_launch_enters_the_device_of_its_tensors_unless_it_is_there(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # else each fake tensor looks for its GPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    with FakeTensorMode():
        for index in (0, 1):
            launch(Kernel(), (1,), skip_ptr=None, size=3, x_ptr=torch.ones(1, device=f"cuda:{index}"))
    assert entered == [torch.device("cuda:1")]


def test_amd_gets_half_the_warps_and_two_stages():
    options = backend.wavefront_options({"num_warps": 8, "num_stages": 4, "BLOCK": 16})
    assert options == {"num_warps": 4, "num_stages": 2, "BLOCK": 16}


def test_what_ran_counts_kernels_and_references_by_device():
    x = torch.ones(2, 4, 3, 3)
    with what_ran() as ran:
        group_norm_silu(x, 2)
        with use_backend("triton"):
            group_norm_silu(x, 2)
            group_norm_silu(x, 2)
    group_norm_silu(x, 2)
    device = str(x.device)
    assert ran.kernels == {("held_group_forward", device): 2}
    assert ran.references == {device: 1}
    lines = [f"     2  held_group_forward on {device}", f"     1  PyTorch references on {device}"]
    assert str(ran).splitlines() == lines


def test_what_ran_of_nothing_says_so():
    with what_ran() as ran:
        pass
    assert str(ran) == "nothing of mdm_kernels ran"
