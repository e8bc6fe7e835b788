"""multires_noise and multires_loss: Triton against the reference in float64, the reference against the equations."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mdm_kernels import backend
from mdm_kernels.multires import multires_loss, multires_noise, reference

SPACES = ("v", "eps", "x0")
SPACE_PAIRS = list(itertools.product(SPACES, SPACES))
FORMATS = (torch.contiguous_format, torch.channels_last)


def randn(*shape: int, **options) -> Tensor:
    return torch.randn(shape, **options)


def make_batch(shape=(3, 3, 16, 24), strides=(1, 4), dtype=torch.float32, memory_format=torch.contiguous_format):
    """Images, ᾱ, strides, noise and predictions; ᾱ keeps clear of 0 and 1, where changes of space diverge."""
    images = randn(*shape).to(dtype).contiguous(memory_format=memory_format)
    alpha_bars = torch.rand(len(strides), shape[0]) * 0.9 + 0.05
    pairs = [stride if isinstance(stride, tuple) else (1, stride) for stride in strides]
    noise = [torch.randn_like(reference.level_image(images, pair)).to(dtype) for pair in pairs]
    preds = [torch.randn_like(eps).requires_grad_() for eps in noise]
    return images, alpha_bars, list(strides), noise, preds


def doubled(value):
    """The same in float64, as new leaves."""
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    return [doubled(item) for item in value] if isinstance(value, list) and isinstance(value[0], Tensor) else value


def loss_and_gradients(preds, *arguments, **options) -> list[Tensor]:
    """The loss, then the gradients of the predictions under a different weight for each sample."""
    loss = multires_loss(preds, *arguments, **options)
    upstream = torch.linspace(0.5, 2.0, len(loss), dtype=loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss @ upstream, preds)]


def assert_as_exact(compute, *arguments, **options) -> None:
    """Triton's error against float64 is at most twice plain PyTorch's in the same dtype, and four units of the dtype:
    pooling, the target, the difference, its square and the mean each round once, and plain PyTorch may be lucky."""
    with backend.use_backend("triton"):
        actual = compute(*arguments, **options)
    plain = compute(*arguments, **options)
    exact = compute(*map(doubled, arguments), **options)
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert (a.shape, a.dtype) == (p.shape, p.dtype), f"result {i}"
        if e.numel():
            tolerance = 2 * (p - e).abs().max() + 4 * torch.finfo(a.dtype).eps * e.abs().max()
            torch.testing.assert_close(a.double(), e, rtol=0, atol=tolerance.item(), msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("rows", [None, [1, 3]])
def test_the_terms_of_the_levels_are_what_the_loss_adds_up(rows):
    *arguments, preds = make_batch()
    preds = [pred[: rows[i] if rows else None].detach().requires_grad_() for i, pred in enumerate(preds)]
    options = {"weights": [2.0, 0.5], "rows": rows}

    def terms_and_gradients(preds, *arguments):
        terms = multires_loss(preds, *arguments, per_level=True, **options)
        upstream = torch.linspace(0.5, 2.0, terms.numel(), dtype=terms.dtype).view_as(terms)
        return [terms.detach(), *torch.autograd.grad((terms * upstream).sum(), preds)]

    assert_as_exact(terms_and_gradients, preds, *arguments)
    for name in ("torch", "triton"):
        with backend.use_backend(name):
            terms = multires_loss(preds, *arguments, per_level=True, **options)
            torch.testing.assert_close(terms.sum(0), multires_loss(preds, *arguments, **options))
        assert terms.shape == (2, 3)
        assert (terms == 0).sum() == (0 if rows is None else 2)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seeded", [False, True])
def test_noise_matches_float64(dtype, memory_format, seeded):
    images, alpha_bars, strides, noise, _ = make_batch(dtype=dtype, memory_format=memory_format)
    source = {"seed": 2**61 + 12345} if seeded else {"noise": noise}
    assert_as_exact(multires_noise, images, alpha_bars, strides, **source)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seeded", [False, True])
def test_loss_and_its_gradients_match_float64(dtype, memory_format, seeded):
    images, alpha_bars, strides, noise, preds = make_batch(dtype=dtype, memory_format=memory_format)
    source = {"seed": 7} if seeded else {"noise": noise}
    assert_as_exact(loss_and_gradients, preds, images, alpha_bars, strides, weights=[2.0, 0.5], **source)


@pytest.mark.parametrize(("prediction", "loss_target"), SPACE_PAIRS)
def test_every_prediction_and_loss_space_matches_float64(prediction, loss_target):
    images, alpha_bars, strides, noise, preds = make_batch((2, 3, 8, 8))
    spaces = {"prediction": prediction, "loss_target": loss_target}
    assert_as_exact(loss_and_gradients, preds, images, alpha_bars, strides, noise, **spaces)


@pytest.mark.parametrize(("prediction", "loss_target"), SPACE_PAIRS)
def test_loss_is_the_squared_error_after_converting_the_prediction_at_fixed_x_t(prediction, loss_target):
    images, alpha_bars, _, noise, preds = map(doubled, make_batch((2, 3, 8, 8), strides=(1,)))
    a, s = (coefficient.view(2, 1, 1, 1).sqrt() for coefficient in (alpha_bars[0], 1 - alpha_bars[0]))
    x_t, pred = a * images + s * noise[0], preds[0].detach()
    x0 = {"v": a * x_t - s * pred, "eps": (x_t - s * pred) / a, "x0": pred}[prediction]
    eps = (x_t - a * x0) / s
    converted = {"v": a * eps - s * x0, "eps": eps, "x0": x0}[loss_target]
    target = {"v": a * noise[0] - s * images, "eps": noise[0], "x0": images}[loss_target]
    loss = multires_loss(preds, images, alpha_bars, [1], noise, prediction=prediction, loss_target=loss_target)
    torch.testing.assert_close(loss.detach(), (converted - target).square().mean((1, 2, 3)))


@st.composite
def image_batches(draw):
    """Shapes that fill no tile, levels that divide one another and levels that do not, images and clips."""
    strides = draw(st.sampled_from([[1], [4], [1, 2], [1, 3], [2, 3], [1, 2, 8], [4, 1], [1, 1], [1, 32]]))
    unit = math.lcm(*strides)
    height, width = (unit * draw(st.integers(1, max(1, 40 // unit))) for _ in range(2))
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    time = draw(st.sampled_from([None, 1, 2, 4]))
    if time is None:
        return (batch, channels, height, width), strides
    return (batch, channels, 2 * time, height, width), [(time if i else 1, s) for i, s in enumerate(strides)]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(image_batches(), st.booleans(), st.booleans())
def test_any_shape_matches_float64(batch, last, seeded):
    shape, strides = batch
    channels_last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    memory_format = channels_last if last else torch.contiguous_format
    images, alpha_bars, strides, noise, preds = make_batch(shape, tuple(strides), memory_format=memory_format)
    source = {"seed": 3} if seeded else {"noise": noise}
    assert_as_exact(multires_noise, images, alpha_bars, strides, **source)
    assert_as_exact(loss_and_gradients, preds, images, alpha_bars, strides, **source)


@pytest.mark.parametrize("rows", [[2, 3, 5], [0, 5, 1], [5, 0, 2]])
def test_mixed_batches_match_float64(rows):
    images, alpha_bars, strides, noise, preds = make_batch((5, 3, 16, 16), (1, 2, 8))
    preds = [pred.detach()[:count].requires_grad_() for pred, count in zip(preds, rows, strict=True)]
    assert_as_exact(loss_and_gradients, preds, images, alpha_bars, strides, noise, rows=rows)


def test_predictions_and_images_may_differ_in_dtype_and_memory_format():
    images, alpha_bars, strides, _, preds = make_batch()
    preds = [pred.detach().half().contiguous(memory_format=torch.channels_last).requires_grad_() for pred in preds]
    assert_as_exact(loss_and_gradients, preds, images, alpha_bars, strides, seed=1)


@pytest.mark.parametrize(("channels", "width"), [(3, 132), (3, 4), (3, 22), (4, 24)])
def test_channels_last_predictions_match_float64_in_whole_pixels_and_one_by_one(channels, width):
    images, alpha_bars, strides, noise, preds = make_batch((2, channels, 6, width), (1, 2))
    preds = [pred.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for pred in preds]
    assert_as_exact(loss_and_gradients, preds, images, alpha_bars, strides, noise)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("pred_format", FORMATS)
def test_x_t_keeps_the_images_memory_format_and_gradients_the_predictions(image_format, pred_format):
    images, alpha_bars, strides, noise, preds = make_batch(memory_format=image_format)
    preds = [pred.detach().contiguous(memory_format=pred_format).requires_grad_() for pred in preds]
    with backend.use_backend("triton"):
        x_t = multires_noise(images, alpha_bars, strides, noise)
        _, *gradients = loss_and_gradients(preds, images, alpha_bars, strides, noise)
    assert all(x.is_contiguous(memory_format=image_format) for x in x_t)
    assert all(gradient.is_contiguous(memory_format=pred_format) for gradient in gradients)


def test_strided_views_match_float64():
    images, alpha_bars, strides, noise, preds = make_batch((2, 3, 32, 16))
    images, alpha_bars = images[:, :, ::2].flip(-1).transpose(-1, -2), alpha_bars.T.contiguous().T
    noise, preds = ([t.detach()[:, :, ::2].transpose(-1, -2) for t in tensors] for tensors in (noise, preds))
    with backend.use_backend("triton"):
        x_t = multires_noise(images, alpha_bars, strides, noise)
        loss = multires_loss(preds, images, alpha_bars, strides, noise)
    exact = [doubled(value) for value in (images, alpha_bars, strides, noise, preds)]
    for actual, expected in zip(x_t, multires_noise(*exact[:4]), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.double(), multires_loss(exact[4], *exact[:4]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_an_empty_batch_gives_empty_results(name):
    images, alpha_bars, strides, _, preds = make_batch((0, 3, 8, 8))
    with backend.use_backend(name):
        x_t = multires_noise(images, alpha_bars, strides, seed=0)
        loss = multires_loss(preds, images, alpha_bars, strides, seed=0)
        loss.sum().backward()
    assert [tuple(x.shape) for x in x_t] == [(0, 3, 8, 8), (0, 3, 2, 2)]
    assert loss.shape == (0,)
    assert preds[0].grad.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("shape", [(2, 0, 8, 8), (2, 3, 0, 8), (2, 0, 2, 8, 8), (2, 3, 0, 8, 8), (2, 3, 2, 8, 0)])
def test_images_without_pixels_have_no_loss(name, shape):
    images, alpha_bars, strides, _, preds = make_batch(shape)
    with backend.use_backend(name):
        x_t = multires_noise(images, alpha_bars, strides, seed=0)
        loss = multires_loss(preds, images, alpha_bars, strides, seed=0)
        loss.sum().backward()
    assert [x.shape for x in x_t] == [pred.shape for pred in preds]
    assert torch.equal(loss, torch.zeros(2))
    assert all(pred.grad.shape == pred.shape for pred in preds)


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("prediction", SPACES)
def test_loss_stays_finite_without_signal_and_without_noise(name, prediction):
    images, _, strides, noise, preds = make_batch((2, 3, 8, 8))
    with backend.use_backend(name):
        for loss_target in SPACES:
            loss, *gradients = loss_and_gradients(
                preds, images, torch.tensor([[0.0, 1.0]] * 2), strides, noise,
                prediction=prediction, loss_target=loss_target,
            )  # fmt: skip
            assert all(result.isfinite().all() for result in (loss, *gradients))


def test_float16_gradients_survive_a_large_image_under_a_loss_scale():
    """A mean over 2¹⁶ elements is below float16's normal range until the loss scale, which comes last, lifts it."""
    images, alpha_bars, strides, noise, preds = make_batch((1, 1, 256, 256), (1,), torch.float16)
    with backend.use_backend("triton"):
        loss = multires_loss(preds, images, alpha_bars, strides, noise)
        (actual,) = torch.autograd.grad(loss, preds, torch.full((1,), 2.0**14))
    exact_preds = doubled(preds)
    loss = multires_loss(exact_preds, *map(doubled, (images, alpha_bars, strides, noise)))
    (exact,) = torch.autograd.grad(loss, exact_preds, torch.full((1,), 2.0**14, dtype=torch.float64))
    torch.testing.assert_close(actual.double(), exact, rtol=2e-3, atol=2e-3 * exact.abs().max().item())


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_loss_sees_the_noise_that_its_seed_put_into_x_t(name):
    """Predicting that very noise costs nothing."""
    images, alpha_bars, strides, _, _ = make_batch()
    noise = reference.seeded_noise(images, [(1, 1), (1, 4)], 9)
    with backend.use_backend(name):
        loss = multires_loss(noise, images, alpha_bars, strides, seed=9, prediction="eps")
    assert loss.max() < 1e-10


# PyTorch's machinery


def test_no_gradient_is_made_where_none_is_wanted():
    images, alpha_bars, strides, noise, preds = make_batch()
    with backend.use_backend("triton"):
        with torch.no_grad():
            assert not multires_loss(preds, images, alpha_bars, strides, noise).requires_grad
        detached = [pred.detach() for pred in preds]
        assert not multires_loss(detached, images, alpha_bars, strides, noise).requires_grad


def test_results_are_the_same_every_time():
    images, alpha_bars, strides, _, preds = make_batch()
    with backend.use_backend("triton"):
        first, second = (loss_and_gradients(preds, images, alpha_bars, strides, seed=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_leaves_dtypes_and_results_alone():
    images, alpha_bars, strides, _, preds = make_batch((2, 3, 8, 8))
    for name in ("triton", "torch"):
        with backend.use_backend(name):
            expected = loss_and_gradients(preds, images, alpha_bars, strides, seed=4)
            with torch.autocast(torch.get_default_device().type, torch.bfloat16):
                actual = loss_and_gradients(preds, images, alpha_bars, strides, seed=4)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), name


def test_second_derivatives_are_refused():
    images, alpha_bars, strides, noise, preds = make_batch((1, 1, 4, 4))
    with backend.use_backend("triton"):
        loss = multires_loss(preds, images, alpha_bars, strides, noise)
        gradient, _ = torch.autograd.grad(loss.square().sum(), preds, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        gradient.sum().backward()


def test_second_derivatives_are_refused_where_the_upstream_gradient_is_a_constant():
    images, alpha_bars, strides, noise, preds = make_batch((1, 1, 4, 4))
    with backend.use_backend("triton"):
        loss = multires_loss(preds, images, alpha_bars, strides, noise)
        gradient, _ = torch.autograd.grad(loss.sum(), preds, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_loss_is_float32_whatever_the_default_dtype(name):
    images, alpha_bars, strides, noise, preds = make_batch((1, 1, 4, 4))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with backend.use_backend(name):
            assert multires_loss(preds, images, alpha_bars, strides, noise).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("seeded", [False, True])
def test_ops_are_registered_correctly(seeded):
    images, alpha_bars, _, noise, preds = make_batch((2, 3, 8, 8))
    noise, seed = ([], 3) if seeded else (noise, None)
    residuals, levels = [pred.detach() for pred in preds], ([1, 1], [1, 4])
    spaces = ("v", "eps", [1.0, 1.0])
    ops = torch.ops.mdm_kernels
    arguments = (images, alpha_bars, *levels, noise, seed, None)
    torch.library.opcheck(ops.multires_noise, arguments)
    torch.library.opcheck(ops.multires_loss_forward, (preds, *arguments, *spaces, True))
    torch.library.opcheck(ops.multires_loss_forward, (preds, *arguments, *spaces, True, True))
    torch.library.opcheck(ops.multires_loss_backward, (residuals, torch.rand(2), alpha_bars, *spaces))
    torch.library.opcheck(ops.multires_loss_backward, (residuals, torch.rand(2, 2), alpha_bars, *spaces))


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_compiles_in_one_graph_and_not_anew_for_every_seed(name):
    def noise_and_loss(images, alpha_bars, preds, seed):
        x_t = multires_noise(images, alpha_bars, [1, 4], seed=seed)
        return x_t[1], multires_loss(preds, images, alpha_bars, [1, 4], seed=seed)

    images, alpha_bars, _, _, preds = make_batch((2, 3, 8, 8))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(noise_and_loss, fullgraph=True, backend=counter)
    with backend.use_backend(name):
        for seed in (5, 6, 7, 2**50):
            x_t, loss = compiled(images, alpha_bars, preds, seed)
            gradients = torch.autograd.grad(loss.sum(), preds)
            expected_x_t, expected = noise_and_loss(images, alpha_bars, preds, seed)
            expected_gradients = torch.autograd.grad(expected.sum(), preds)
            for a, b in zip((x_t, loss, *gradients), (expected_x_t, expected, *expected_gradients), strict=True):
                torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # once for the first seed, once for any seed


# What is refused


def test_bad_arguments_are_named():
    images, alpha_bars, strides, noise, preds = make_batch((2, 3, 8, 8))
    clip = randn(2, 3, 4, 8, 8)
    cases = [
        (ValueError, "images has shape", lambda: multires_noise(images[0], alpha_bars, strides, noise)),
        (TypeError, "images is", lambda: multires_noise(images.int(), alpha_bars, strides, noise)),
        (ValueError, "strides is empty", lambda: multires_noise(images, alpha_bars, [], noise)),
        (ValueError, "strides has", lambda: multires_noise(images, alpha_bars, [1, 0], noise)),
        (ValueError, "without frames", lambda: multires_noise(images, alpha_bars, [1, (2, 4)], noise)),
        (ValueError, "must divide", lambda: multires_noise(images, alpha_bars, [1, 3], seed=0)),
        (ValueError, "must divide", lambda: multires_noise(clip, alpha_bars, [1, (3, 1)], seed=0)),
        (ValueError, "alpha_bars has shape", lambda: multires_noise(images, alpha_bars[:1], strides, noise)),
        (TypeError, "alpha_bars is", lambda: multires_noise(images, alpha_bars.half(), strides, noise)),
        (ValueError, "alpha_bars is on", lambda: multires_noise(images, alpha_bars.to("meta"), strides, noise)),
        (ValueError, "either noise or seed", lambda: multires_noise(images, alpha_bars, strides)),
        (ValueError, "either noise or seed", lambda: multires_noise(images, alpha_bars, strides, noise, seed=1)),
        (ValueError, "seed is -1", lambda: multires_noise(images, alpha_bars, strides, seed=-1)),
        (ValueError, "seed is", lambda: multires_noise(images, alpha_bars, strides, seed=2**63)),
        (TypeError, "seed is float", lambda: multires_noise(images, alpha_bars, strides, seed=1.0)),
        (ValueError, "noise has 1", lambda: multires_noise(images, alpha_bars, strides, noise[:1])),
        (ValueError, r"noise\[1\] has shape", lambda: multires_noise(images, alpha_bars, strides, noise[:1] * 2)),
        (ValueError, "preds has 1", lambda: multires_loss(preds[:1], images, alpha_bars, strides, noise)),
        (ValueError, r"preds\[0\] has shape", lambda: multires_loss(preds[::-1], images, alpha_bars, strides, noise)),
        (ValueError, "rows is", lambda: multires_loss(preds, images, alpha_bars, strides, noise, rows=[2, 3])),
        (ValueError, r"preds\[0\]", lambda: multires_loss(preds, images, alpha_bars, strides, noise, rows=[1, 2])),
        (ValueError, "weights has", lambda: multires_loss(preds, images, alpha_bars, strides, noise, weights=[1])),
        (ValueError, "prediction is", lambda: multires_loss(preds, images, alpha_bars, strides, noise, prediction="x")),
        (ValueError, "loss_target", lambda: multires_loss(preds, images, alpha_bars, strides, noise, loss_target="x")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("name", ["images", "alpha_bars", "noise"])
def test_gradients_of_anything_but_predictions_are_refused(name):
    images, alpha_bars, strides, noise, preds = make_batch((2, 3, 8, 8))
    {"images": images, "alpha_bars": alpha_bars, "noise": noise[1]}[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        multires_loss(preds, images, alpha_bars, strides, noise)
