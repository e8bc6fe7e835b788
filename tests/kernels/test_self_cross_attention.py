"""self_cross_attention: Triton against float64, its meaning, and what it refuses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdm_kernels import self_cross_attention, use_backend
from mdm_kernels.attention import launch
from tests.kernels.attention_accuracy import assert_as_exact


def make_inputs(batch=2, heads=2, tokens=18, context=40, width=64, dtype=torch.float32):
    """qkv (B, L, 3C) and context_kv (B, S, 2C)."""
    channels = heads * width
    return [torch.randn(batch, n, parts * channels).to(dtype) for n, parts in ((tokens, 3), (context, 2))]


def make_mask(batch=2, keys=40):
    """About half of the keys, the first one always."""
    mask = torch.rand(batch, keys) > 0.5
    mask[:, :1] = True
    return mask


def test_is_the_sum_of_two_softmaxes_over_the_same_queries():
    qkv, context_kv = make_inputs(dtype=torch.float64)
    q, k, v = (x.reshape(2, 18, 2, 64).transpose(1, 2) for x in qkv.split(128, dim=2))
    context_k, context_v = (x.reshape(2, 40, 2, 64).transpose(1, 2) for x in context_kv.split(128, dim=2))
    expected = ((q @ k.mT) / 8).softmax(-1) @ v + ((q @ context_k.mT) / 8).softmax(-1) @ context_v
    actual = self_cross_attention(qkv, context_kv, num_heads=2)
    torch.testing.assert_close(actual, expected.transpose(1, 2).reshape(2, 18, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [16, 64, 96])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_float64(width, dtype, masked):
    inputs = make_inputs(tokens=33, context=77, width=width, dtype=dtype)
    mask = make_mask(keys=77) if masked else None
    assert_as_exact(self_cross_attention, *inputs, num_heads=2, key_mask=mask)


@pytest.mark.parametrize("masked", [slice(0, 35), slice(5, 40)], ids=["first", "last"])
def test_a_block_of_masked_keys_leaves_the_others_exact(masked):
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, masked] = False
    assert_as_exact(self_cross_attention, *make_inputs(), num_heads=2, key_mask=mask)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 40), context=st.integers(1, 40), width=st.integers(1, 128), heads=st.integers(1, 2),
    masked=st.booleans(),
)  # fmt: skip
def test_any_size_matches_float64(tokens, context, width, heads, masked):
    inputs = make_inputs(batch=1, heads=heads, tokens=tokens, context=context, width=width)
    mask = make_mask(1, context) if masked else None
    assert_as_exact(self_cross_attention, *inputs, num_heads=heads, key_mask=mask)


@pytest.mark.parametrize("seed", range(20))
def test_one_key_of_the_context_matches_float64(seed):
    torch.manual_seed(seed)
    assert_as_exact(self_cross_attention, *make_inputs(batch=1, heads=1, tokens=10, context=1, width=1), num_heads=1)


def test_lengths_that_fill_every_block_match_float64():
    inputs = make_inputs(batch=1, heads=1, tokens=128, context=128, dtype=torch.float16)
    assert_as_exact(self_cross_attention, *inputs, num_heads=1)


@pytest.mark.parametrize(("context", "masked"), [(64, False), (45, True)])
def test_the_tiles_of_many_queries_match_float64(monkeypatch, context, masked):
    """128 queries, 64 of the image's keys and 32 of the context's."""
    monkeypatch.setattr(launch, "FEW_QUERIES", 0)
    inputs = make_inputs(batch=1, heads=1, tokens=130, context=context, dtype=torch.float16)
    assert_as_exact(self_cross_attention, *inputs, num_heads=1, key_mask=make_mask(1, context) if masked else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_self_attention_alone_matches_float64(dtype):
    assert_as_exact(self_cross_attention, make_inputs(dtype=dtype)[0], num_heads=2)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_context_without_any_key_adds_nothing(backend):
    qkv, context_kv = (x.requires_grad_() for x in make_inputs())
    mask = make_mask()
    mask[1] = False
    with use_backend(backend):
        out = self_cross_attention(qkv, context_kv, num_heads=2, key_mask=mask)
        alone = self_cross_attention(qkv, num_heads=2)
        (dqkv,) = torch.autograd.grad(alone[1].sum(), qkv)
        gradients = torch.autograd.grad(out[1].sum(), (qkv, context_kv))
    torch.testing.assert_close(out[1], alone[1])
    torch.testing.assert_close(gradients[0], dqkv)
    assert (gradients[1] == 0).all()
    assert not torch.allclose(out[0], alone[0], atol=0.01)


def test_a_context_without_any_key_leaves_the_others_exact():
    mask = make_mask()
    mask[1] = False
    assert_as_exact(self_cross_attention, *make_inputs(), num_heads=2, key_mask=mask)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # in the padding of tiles, which is dropped
@pytest.mark.parametrize("seed", range(4))
def test_large_logits_match_float64(seed):
    """The keys' mean is far from 0, where the gradients of a query's logits have to add up to 0 for it not to show."""
    torch.manual_seed(seed)
    qkv, context_kv = make_inputs()
    assert_as_exact(self_cross_attention, qkv * 4 + 5, context_kv * 4 - 5, num_heads=2)


def tokens_of_map(x, memory_format):
    """The same values as the tokens of an image that a 1×1 convolution wrote in `memory_format`."""
    image = x.mT.unflatten(2, (-1, 3)).contiguous(memory_format=memory_format)
    return image.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_output_of_a_convolution_matches_float64_and_keeps_its_memory_order(memory_format):
    qkv, context_kv = make_inputs()
    qkv = tokens_of_map(qkv, memory_format)
    out, dqkv, _ = assert_as_exact(self_cross_attention, qkv, context_kv, num_heads=2)
    assert (out.stride(2) == 1) == (dqkv.stride(2) == 1) == (memory_format == torch.channels_last)
    assert (out.stride(1) == 1) == (dqkv.stride(1) == 1) == (memory_format == torch.contiguous_format)


def test_strided_context_and_mask_match_float64():
    qkv, context_kv = make_inputs(batch=2, context=14)
    context_kv = context_kv.mT.contiguous().mT[:1, ::2].expand(2, -1, -1)
    assert_as_exact(self_cross_attention, qkv, context_kv, num_heads=2, key_mask=make_mask(2, 14)[:, ::2])


def test_a_gradient_in_another_memory_order_matches_float64():
    """Its bits are not a contiguous one's: a GPU's code depends on the strides, and with it the order of the sums over
    the channels."""
    strides = set()

    def attention(*inputs):
        out = self_cross_attention(*inputs, num_heads=2)
        out.register_hook(lambda grad: strides.add(grad.stride()[1:]))
        return out.mT.contiguous().mT

    assert_as_exact(attention, *make_inputs())
    assert strides == {(1, 18)}


@pytest.mark.parametrize(("batch", "tokens", "context"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0)])
def test_empty_inputs_match_float64(batch, tokens, context):
    assert_as_exact(self_cross_attention, *make_inputs(batch=batch, tokens=tokens, context=context), num_heads=2)


def test_bf16_reference_matches_float64():
    inputs = make_inputs(dtype=torch.bfloat16)
    exact = self_cross_attention(*(x.double() for x in inputs), num_heads=2)
    actual = self_cross_attention(*inputs, num_heads=2)
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_casts_the_inputs(backend):
    inputs = make_inputs()
    with use_backend(backend):
        with torch.autocast(torch.get_default_device().type, dtype=torch.float16):
            out = self_cross_attention(*inputs, num_heads=2)
        expected = self_cross_attention(*(x.half() for x in inputs), num_heads=2)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels_fastest", [False, True])
def test_the_library_ops_are_well_behaved(masked, channels_fastest):
    qkv, context_kv = make_inputs(tokens=5, context=7, width=16)
    qkv = qkv if channels_fastest else qkv.mT.contiguous().mT
    mask = make_mask(keys=7) if masked else None
    ops = torch.ops.mdm_kernels
    out, lse = ops.self_cross_attention_forward(qkv, context_kv, mask, 2)
    leaves = [x.clone().requires_grad_() for x in (qkv, context_kv)]
    torch.library.opcheck(ops.self_cross_attention_forward, (*leaves, mask, 2))
    torch.library.opcheck(ops.self_cross_attention_backward, (out, qkv, context_kv, mask, out, lse, 2))


def test_a_second_derivative_is_an_error():
    qkv = make_inputs(tokens=3, width=16)[0].requires_grad_()
    with use_backend("triton"):
        out = self_cross_attention(qkv, num_heads=2)
        (dqkv,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        dqkv.sum().backward()


def changed(**changes):
    qkv, context_kv = make_inputs(tokens=5, context=7, width=16)
    return {"qkv": qkv, "context_kv": context_kv, "num_heads": 2, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (changed(qkv=torch.randn(2, 96, 5, 5)), ValueError, r"qkv has shape \(2, 96, 5, 5\).*\(batch, tokens"),
        (changed(qkv=torch.randn(2, 5, 100)), ValueError, r"qkv has shape \(2, 5, 100\).*3 · num_heads.*num_heads = 2"),
        (changed(num_heads=0), ValueError, "num_heads = 0"),
        (changed(qkv=torch.randn(2, 5, 800)), ValueError, r"qkv has shape \(2, 5, 800\)"),
        (changed(context_kv=torch.randn(2, 7, 96)), ValueError, r"context_kv has shape \(2, 7, 96\).*\(2, any, 64\)"),
        (changed(context_kv=torch.randn(3, 7, 64)), ValueError, r"context_kv has shape \(3, 7, 64\).*\(2, any, 64\)"),
        (changed(context_kv=torch.randn(2, 7, 64).half()), TypeError, "context_kv has dtype torch.float16.*qkv's"),
        (changed(context_kv=torch.randn(2, 7, 64, device="meta")), ValueError, "context_kv is on meta"),
        (changed(key_mask=torch.ones(2, 5).bool()), ValueError, r"key_mask has shape \(2, 5\).*\(2, 7\)"),
        (changed(key_mask=torch.ones(2, 7).int()), TypeError, "key_mask has dtype torch.int32.*torch.bool"),
        (changed(context_kv=None, key_mask=torch.ones(2, 7).bool()), ValueError, "without context_kv it must be None"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        self_cross_attention(**arguments)
