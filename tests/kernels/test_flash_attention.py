"""flash_attention and scaled_dot_product_attention: Triton against float64, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mdm_kernels import flash_attention, scaled_dot_product_attention, use_backend
from mdm_kernels.attention import launch, op
from tests.kernels import calls
from tests.kernels.accuracy import root_mean_square
from tests.kernels.attention_accuracy import assert_as_exact, uncancelled


def make_qkv(batch=2, heads=2, queries=33, keys=77, width=64, dtype=torch.float32):
    """q, k, v as projections give them: (B, H, L, D) views of (B, L, H, D)."""
    return [torch.randn(batch, n, heads, width).to(dtype).transpose(1, 2) for n in (queries, keys, keys)]


def make_mask(batch=2, keys=77):
    """About half of the keys, the first one always."""
    mask = torch.rand(batch, keys) > 0.5
    mask[:, :1] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [16, 64, 80, 96])
def test_matches_float64(width, dtype):
    assert_as_exact(flash_attention, *make_qkv(width=width, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masked_keys_match_float64(dtype):
    assert_as_exact(flash_attention, *make_qkv(dtype=dtype), key_mask=make_mask())


@pytest.mark.parametrize("masked", [slice(0, 70), slice(5, 77)], ids=["first", "last"])
def test_a_block_of_masked_keys_leaves_the_others_exact(masked):
    mask = torch.ones(2, 77, dtype=torch.bool)
    mask[0, masked] = False
    assert_as_exact(flash_attention, *make_qkv(), key_mask=mask)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    queries=st.integers(1, 70), keys=st.integers(1, 70), width=st.integers(1, 128), masked=st.booleans(),
    scale=st.sampled_from([None, 0.05, 0.25]),
)  # fmt: skip
@example(queries=64, keys=1, width=101, masked=False, scale=None)
def test_any_size_matches_float64(queries, keys, width, masked, scale):
    qkv = make_qkv(batch=1, heads=1, queries=queries, keys=keys, width=width)
    mask = make_mask(1, keys) if masked else None
    assert_as_exact(flash_attention, *qkv, key_mask=mask, scale=scale)


def test_what_is_left_of_sums_that_cancel_is_their_rounding_and_no_more():
    """Of one key dq and dk are 0: a δ that errs by a thousandth is thirty times what is allowed."""
    torch.manual_seed(0)
    q, k, v = (x.double() for x in make_qkv(batch=1, heads=1, queries=64, keys=1, width=101))
    grad = torch.randn_like(q)
    dq, dk = uncancelled(grad, q, k, v, None, None)
    delta = (grad * v).sum(-1, keepdim=True)
    float32 = (grad.float() * v.float()).sum(-1, keepdim=True)  # the same sum, rounded
    scale = 101**-0.5
    assert (scale * (float32 - delta) * k).abs().max() < dq.max()
    assert (scale * 1e-3 * delta * k).abs().max() > 30 * 4 * dq.max()
    assert (scale * (1e-3 * delta).mT @ q).abs().max() > 30 * 4 * dk.max()


def test_lengths_that_fill_every_block_match_float64():
    assert_as_exact(flash_attention, *make_qkv(batch=1, heads=1, queries=128, keys=128, dtype=torch.float16))


@pytest.mark.parametrize(("queries", "keys", "long_sums"), [(2048, 32, (2, 3)), (32, 2048, (0, 1))], ids=str)
def test_long_float32_sums_err_at_most_twice_as_much_as_pytorch(queries, keys, long_sums):
    """dk and dv sum over the queries, the output and dq over the keys. One after another would err three times as
    much."""
    call = calls.flash(queries=queries, keys=keys, masked=False)
    exact, plain, actual = call.to(torch.float64).run("torch"), call.run("torch"), call.run("triton")
    for i in long_sums:
        ours, theirs = (root_mean_square(results[i] - exact[i]) for results in (actual, plain))
        assert ours <= 2 * theirs, f"result {i}: {ours:.2e}, PyTorch's {theirs:.2e}"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_with_no_key_gives_zero_and_passes_no_gradient(backend):
    qkv = [x.requires_grad_() for x in make_qkv()]
    mask = make_mask()
    mask[1] = False
    with use_backend(backend):
        out = flash_attention(*qkv, key_mask=mask)
        grads = torch.autograd.grad(out.sum(), qkv)
    for x in (out, *grads):
        assert (x[1] == 0).all()
        assert x[0].isfinite().all()


def test_a_row_with_no_key_leaves_the_others_exact():
    mask = make_mask()
    mask[1] = False
    assert_as_exact(flash_attention, *make_qkv(), key_mask=mask)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_huge_logits_do_not_overflow(backend):
    q, k, v = make_qkv(dtype=torch.float16)
    with use_backend(backend):
        out = flash_attention(q * 100, k * 100, v)
    best = (q.double() @ k.double().mT).argmax(-1)  # logits thousands apart: the largest takes all
    expected = v.gather(2, best[..., None].expand(*best.shape, 64))
    close = torch.isclose(out, expected, atol=1e-2)
    assert out.isfinite().all()
    assert close.float().mean() > 0.97  # near-ties share


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # in the padding of tiles, which is dropped
def test_large_logits_of_either_sign_match_float64():
    q, k, v = make_qkv()
    assert_as_exact(flash_attention, q * 4 + 5, k * 4 - 5, v)


STRIDED = {
    "contiguous": lambda x: x.contiguous(),
    "L fastest": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every other channel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "one row for all heads": lambda x: x[:, :1].expand(-1, 2, -1, -1),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_any_strides_match_float64(layout):
    assert_as_exact(flash_attention, *map(STRIDED[layout], make_qkv()), key_mask=make_mask(keys=154)[:, ::2])


def test_the_output_keeps_the_memory_order_of_q():
    q, k, v = make_qkv()
    with use_backend("triton"):
        assert flash_attention(q, k, v).transpose(1, 2).is_contiguous()
        assert flash_attention(q.contiguous(), k, v).is_contiguous()


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_empty_inputs_give_zeros(batch, queries, keys, backend):
    qkv = [x.requires_grad_() for x in make_qkv(batch=batch, queries=queries, keys=keys)]
    with use_backend(backend):
        out = flash_attention(*qkv)
        grads = torch.autograd.grad(out.sum(), qkv)
    for x, like in zip((out, *grads), (qkv[0], *qkv), strict=True):
        assert x.shape == like.shape
        assert (x == 0).all()


def test_bf16_reference_matches_float64():
    qkv = make_qkv(dtype=torch.bfloat16)
    exact = flash_attention(*(x.double() for x in qkv), key_mask=(mask := make_mask()))
    actual = flash_attention(*qkv, key_mask=mask)
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2 * torch.finfo(torch.bfloat16).eps)


def test_autocast_casts_the_inputs():
    qkv = make_qkv()
    with torch.autocast(torch.get_default_device().type, dtype=torch.float16), use_backend("triton"):
        out = flash_attention(*qkv)
    with use_backend("triton"):
        torch.testing.assert_close(out, flash_attention(*(x.half() for x in qkv)), rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_the_library_ops_are_well_behaved(masked):
    q, k, v = make_qkv(queries=5, keys=7, width=16)
    mask = make_mask(keys=7) if masked else None
    ops = torch.ops.mdm_kernels
    out, lse = ops.flash_attention_forward(q, k, v, mask, 0.25)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.flash_attention_forward, (*leaves, mask, 0.25))
    torch.library.opcheck(ops.flash_attention_backward, (out, q, k, v, mask, out, lse, 0.25))


def test_a_second_derivative_is_an_error():
    q, k, v = (x.requires_grad_() for x in make_qkv(queries=3, keys=3, width=16))
    with use_backend("triton"):
        (dq,) = torch.autograd.grad(flash_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        dq.sum().backward()


def changed(**changes):
    q, k, v = make_qkv(queries=5, keys=7, width=16)
    return {"q": q, "k": k, "v": v, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (changed(q=torch.randn(2, 5, 16)), ValueError, r"q has shape \(2, 5, 16\).*\(batch, heads, tokens, head width"),
        (changed(k=torch.randn(2, 3, 7, 16)), ValueError, r"k has shape \(2, 3, 7, 16\).*\(2, 2, 7, 16\)"),
        (changed(v=torch.randn(2, 2, 8, 16)), ValueError, r"v has shape \(2, 2, 8, 16\).*\(2, 2, 7, 16\)"),
        (changed(k=torch.randn(2, 2, 7, 16).half()), TypeError, "k has dtype torch.float16.*q's, torch.float32"),
        (changed(**{name: torch.ones(2, 2, 5, 16).int() for name in "qkv"}), TypeError, "q has dtype torch.int32"),
        (changed(**{n: torch.ones(2, 2, 5, 0) for n in "qkv"}), ValueError, "heads 0 wide"),
        (changed(v=torch.randn(2, 2, 7, 16, device="meta")), ValueError, "v is on meta"),
        (changed(key_mask=torch.ones(2, 5, dtype=torch.bool)), ValueError, r"key_mask has shape \(2, 5\).*\(2, 7\)"),
        (changed(key_mask=torch.ones(2, 7)), TypeError, "key_mask has dtype torch.float32.*torch.bool"),
        (changed(scale=0.0), ValueError, r"scale is 0\.0; it must be positive"),
        (changed(scale=float("inf")), ValueError, "scale is inf; it must be positive and finite"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        flash_attention(**arguments)


def test_float64_on_triton_is_an_error():
    with use_backend("triton"), pytest.raises(TypeError, match=r"q has dtype torch.float64; it must be float16"):
        flash_attention(*make_qkv(dtype=torch.float64))


@given(st.integers(1, 128))
def test_a_split_head_is_never_wider_than_the_padded_one(width):
    first, second = launch.split_width(width)
    assert width <= first + second <= max(16, 2 ** (width - 1).bit_length())
    assert all(part == 0 or (part >= 16 and part & (part - 1) == 0) for part in (first, second))


def test_heads_of_96_take_96_channels():
    assert launch.split_width(96) == (64, 32)


@pytest.fixture
def flash_calls(monkeypatch):
    """The keyword arguments of every call of flash_attention that scaled_dot_product_attention makes."""
    calls = []

    def recorded(*args, **options):
        calls.append(options)
        return flash_attention(*args, **options)

    monkeypatch.setattr(op, "flash_attention", recorded)
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.2},
        {"attn_mask": make_mask()[:, None, None, :]},
        {"attn_mask": make_mask(batch=1)[:, None, None, :]},
    ],
    ids=["plain", "scale", "key mask", "one key mask for all"],
)
def test_sdpa_runs_flash_attention_where_it_computes_the_same(options, flash_calls):
    qkv = make_qkv()
    with use_backend("triton"):
        actual = scaled_dot_product_attention(*qkv, **options)
    assert len(flash_calls) == 1
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(*qkv, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("qkv", "options"),
    [
        (make_qkv(keys=33), {"is_causal": True}),
        (make_qkv(), {"attn_mask": torch.rand(33, 77) > 0.5}),
        (make_qkv(), {"attn_mask": torch.randn(2, 1, 1, 77)}),
        (make_qkv(), {"scale": -0.5}),
        (make_qkv(width=160), {}),
        (make_qkv(dtype=torch.float64), {}),
        ([x[0] for x in make_qkv()], {}),
        ([*make_qkv()[:2], torch.randn(2, 2, 77, 32)], {}),
        ([torch.randn(2, h, 9, 16) for h in (4, 2, 2)], {"enable_gqa": True}),
    ],
    ids=["causal", "mask per query", "bias", "negative scale", "wide", "float64", "no batch", "value width", "gqa"],
)
def test_sdpa_leaves_to_torch_what_the_kernel_has_not(qkv, options, flash_calls):
    with use_backend("triton"):
        actual = scaled_dot_product_attention(*qkv, **options)
    assert not flash_calls
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(*qkv, **options), rtol=0, atol=0)


def test_sdpa_leaves_dropout_to_torch(flash_calls, monkeypatch):
    """Not by what comes out: on CUDA a fused kernel may answer NaN where everything is dropped."""
    given = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **options: given.append(args) or "torch's")
    with use_backend("triton"):
        assert scaled_dot_product_attention(*make_qkv(), dropout_p=0.5) == "torch's"
    assert not flash_calls
    assert given[0][4] == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_short_half_precision_attention_on_a_cpu_is_that_of_float32_rounded(dtype, autocast):
    with torch.device("cpu"):
        halves = [tensor.detach().requires_grad_() for tensor in make_qkv(dtype=dtype)]
        mask = make_mask()
    floats = [tensor.detach().float().requires_grad_() for tensor in halves]
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = flash_attention(*halves, key_mask=mask)
    exact = F.scaled_dot_product_attention(*floats, attn_mask=mask[:, None, None])
    dy = torch.randn_like(out)
    assert torch.equal(out, exact.to(dtype))
    for ours, truth in zip(
        torch.autograd.grad(out, halves, dy), torch.autograd.grad(exact, floats, dy.float()), strict=True
    ):
        assert torch.equal(ours, truth.to(dtype))
