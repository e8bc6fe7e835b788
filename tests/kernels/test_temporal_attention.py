"""temporal_attention: Triton against float64, its meaning, and what it refuses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdm_kernels import temporal_attention, use_backend
from mdm_kernels.temporal.reference import rotate
from tests.kernels.attention_accuracy import assert_as_exact


def make_qkv(clips=2, frames=16, positions=5, heads=2, width=32, dtype=torch.float32):
    """(B·T, L, 3C)."""
    return torch.randn(clips * frames, positions, 3 * heads * width).to(dtype)


def make_angles(frames=16, width=32):
    """Radians, many turns."""
    return 10 * torch.randn(frames, width // 2)


def test_attends_over_the_frames_at_each_position():
    qkv = make_qkv(dtype=torch.float64)
    q, k, v = qkv.reshape(2, 16, 5, 3, 2, 32).permute(3, 0, 2, 4, 1, 5)  # each (B, L, H, T, D)
    expected = (q @ k.mT / 32**0.5).softmax(-1) @ v
    actual = temporal_attention(qkv, num_heads=2, frames=16)
    torch.testing.assert_close(actual, expected.permute(0, 3, 1, 2, 4).reshape(32, 5, 64))


def test_rotation_turns_neighbouring_channels():
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    angles = torch.randn(4, 4, dtype=torch.float64)
    pairs = torch.view_as_complex(x.unflatten(2, (4, 2)))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)
    torch.testing.assert_close(rotate(x, angles), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rotary_attention_depends_on_the_distance_of_frames_alone(backend):
    qkv, angles = make_qkv(), torch.arange(16)[:, None] * torch.linspace(0.1, 1.0, 16)
    with use_backend(backend):
        expected = temporal_attention(qkv, num_heads=2, frames=16, rotary=angles)
        shifted = temporal_attention(qkv, num_heads=2, frames=16, rotary=angles + 1.3 * torch.linspace(0.1, 1.0, 16))
        plain = temporal_attention(qkv, num_heads=2, frames=16)
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [16, 32, 64, 96])
@pytest.mark.parametrize("rotary", [False, True])
def test_matches_float64(width, dtype, rotary):
    angles = make_angles(width=width) if rotary else None
    assert_as_exact(temporal_attention, make_qkv(width=width, dtype=dtype), num_heads=2, frames=16, rotary=angles)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    clips=st.integers(1, 2), frames=st.integers(1, 64), positions=st.integers(1, 9), half=st.integers(1, 64),
    rotary=st.booleans(),
)  # fmt: skip
def test_any_size_matches_float64(clips, frames, positions, half, rotary):
    qkv = make_qkv(clips, frames, positions, heads=1, width=2 * half)
    angles = make_angles(frames, 2 * half) if rotary else None
    assert_as_exact(temporal_attention, qkv, num_heads=1, frames=frames, rotary=angles)


def test_odd_head_widths_match_float64():
    assert_as_exact(temporal_attention, make_qkv(width=21), num_heads=2, frames=16)


def test_more_frames_than_a_tile_holds_match_float64():
    assert_as_exact(temporal_attention, make_qkv(clips=1, frames=65, positions=2), num_heads=2, frames=65)


def test_large_logits_match_float64():
    assert_as_exact(temporal_attention, make_qkv() * 4 + 5, num_heads=2, frames=16)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_huge_logits_do_not_overflow(backend):
    with use_backend(backend):
        out = temporal_attention(make_qkv(dtype=torch.float16) * 200, num_heads=2, frames=16)
    assert out.isfinite().all()


STRIDED = {
    "L fastest": lambda x: x.mT.contiguous().mT,
    "every other channel": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "every other position": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one position for all": lambda x: x[:, :1].expand(-1, 5, -1),
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("rotary", [False, True])
def test_any_strides_match_float64(layout, rotary):
    angles = make_angles() if rotary else None
    assert_as_exact(temporal_attention, STRIDED[layout](make_qkv()), num_heads=2, frames=16, rotary=angles)


def test_the_output_keeps_the_memory_order():
    qkv = make_qkv()
    with use_backend("triton"):
        assert temporal_attention(qkv, num_heads=2, frames=16).is_contiguous()
        assert temporal_attention(qkv.mT.contiguous().mT, num_heads=2, frames=16).mT.is_contiguous()


def test_a_gradient_in_another_memory_order_matches_a_contiguous_one():
    qkv, grad = make_qkv().requires_grad_(), torch.randn(32, 5, 64)
    with use_backend("triton"):
        out = temporal_attention(qkv, num_heads=2, frames=16)
        (expected,) = torch.autograd.grad(out, qkv, grad, retain_graph=True)
        (actual,) = torch.autograd.grad(out, qkv, grad.mT.contiguous().mT)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_no_gradient_reaches_the_angles():
    qkv, angles = make_qkv().requires_grad_(), make_angles().requires_grad_()
    temporal_attention(qkv, num_heads=2, frames=16, rotary=angles).sum().backward()
    assert qkv.grad is not None
    assert angles.grad is None


@pytest.mark.parametrize(("clips", "positions"), [(0, 5), (2, 0)])
def test_empty_inputs_match_float64(clips, positions):
    assert_as_exact(temporal_attention, make_qkv(clips=clips, positions=positions), num_heads=2, frames=16)


def test_bf16_reference_matches_float64():
    qkv, angles = make_qkv(dtype=torch.bfloat16), make_angles()
    exact = temporal_attention(qkv.double(), num_heads=2, frames=16, rotary=angles)
    actual = temporal_attention(qkv, num_heads=2, frames=16, rotary=angles)
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_casts_the_input(backend):
    qkv = make_qkv()
    with use_backend(backend):
        with torch.autocast(torch.get_default_device().type, dtype=torch.float16):
            out = temporal_attention(qkv, num_heads=2, frames=16)
        torch.testing.assert_close(out, temporal_attention(qkv.half(), num_heads=2, frames=16), rtol=0, atol=0)


@pytest.mark.parametrize("rotary", [False, True])
def test_the_library_ops_are_well_behaved(rotary):
    qkv = make_qkv(frames=4)
    cos, sin = (make_angles(4).cos(), make_angles(4).sin()) if rotary else (None, None)
    ops = torch.ops.mdm_kernels
    torch.library.opcheck(ops.temporal_attention_forward, (qkv.clone().requires_grad_(), cos, sin, 2, 4))
    grad = torch.randn(8, 5, 64)
    torch.library.opcheck(ops.temporal_attention_backward, (grad, qkv, cos, sin, 2, 4))


def test_a_second_derivative_is_an_error():
    qkv = make_qkv(frames=4).requires_grad_()
    with use_backend("triton"):
        out = temporal_attention(qkv, num_heads=2, frames=4)
        (dqkv,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        dqkv.sum().backward()


def changed(**changes):
    return {"qkv": make_qkv(frames=4), "num_heads": 2, "frames": 4, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (changed(qkv=torch.randn(8, 192)), ValueError, r"qkv has shape \(8, 192\).*\(batch, tokens, channels\)"),
        (changed(num_heads=5), ValueError, "multiple of 3 · num_heads, with num_heads = 5"),
        (changed(frames=3), ValueError, r"qkv has shape \(8, 5, 192\).*multiple of frames, with frames = 3"),
        (changed(frames=0), ValueError, "with frames = 0"),
        (changed(qkv=make_qkv(frames=4).int()), TypeError, "qkv has dtype torch.int32"),
        (changed(rotary=make_angles(8)), ValueError, r"rotary has shape \(8, 16\).*\(4, 16\)"),
        (changed(rotary=make_angles(4).int()), TypeError, "rotary has dtype torch.int32.*radians"),
        (changed(rotary=make_angles(4).to("meta")), ValueError, "rotary is on meta"),
        (changed(qkv=make_qkv(frames=4, width=21), rotary=make_angles(4, 20)), ValueError, "pairs.*heads 21 wide"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        temporal_attention(**arguments)
