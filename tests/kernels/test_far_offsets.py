"""Offsets of 2³¹ elements and more without a GPU, where one in 32 bits would wrap: in memory that a system hands out
where it is touched. Where a tensor is dense and so has that many elements, only the ends of a launch run.
"""

import math
import mmap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from mdm_kernels import backend, plans
from mdm_kernels.attention import launch as attention
from mdm_kernels.group_norm import launch as group_norm
from mdm_kernels.multires import launch as multires
from mdm_kernels.temporal import launch as temporal

UNRESERVED = 0x4000  # Linux's MAP_NORESERVE, of which Python 3.11 does not know the name
FAR = 2**30 + 64  # twice this wraps to below 0, four times to another element
Tensors = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def interpreted(request, watched_addresses):
    if request.config.getoption("device") != "cpu":
        pytest.skip("test_beyond_int32.py asks a GPU")


def zeros(*shape: int, dtype=torch.float32) -> Tensor:
    """Zeros that take memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | UNRESERVED
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def spread(x: Tensor, axis: int) -> Tensor:
    """x's values, FAR elements apart along one axis."""
    moved = x.movedim(axis, 0)
    memory = zeros((len(moved) - 1) * FAR + moved[0].numel(), dtype=x.dtype)
    return memory.as_strided(moved.shape, (FAR, *moved[0].contiguous().stride())).movedim(0, axis).copy_(x)


def halves(**shapes: tuple[int, ...]) -> Tensors:
    return {name: torch.randn(shape, dtype=torch.float16) for name, shape in shapes.items()}


def flash(batch=1, heads=1, queries=3, keys=5, width=16, masked=False) -> tuple[Callable, Tensors]:
    q, k = (batch, heads, queries, width), (batch, heads, keys, width)

    def run(q, k, v, grad, out, lse, dq, dk, dv, mask=None) -> None:
        attention.flash_forward(q, k, v, mask, out, lse, 0.25)
        attention.flash_backward(grad, q, k, v, mask, out, lse, 0.25, dq, dk, dv)

    tensors = halves(q=q, k=k, v=k, grad=q, out=q, dq=q, dk=k, dv=k) | {"lse": torch.zeros(batch, heads, queries)}
    return run, tensors | ({"mask": torch.rand(batch, keys) > 0.5} if masked else {})


def self_cross(batch=1, tokens=3, keys=5, heads=1, width=16, masked=False) -> tuple[Callable, Tensors]:
    C = heads * width
    own, context, out = (batch, tokens, 3 * C), (batch, keys, 2 * C), (batch, tokens, C)

    def run(qkv, context, grad, out, lse, dqkv, dcontext, mask=None) -> None:
        attention.self_cross_forward(qkv, context, mask, out, lse, heads)
        attention.self_cross_backward(grad, qkv, context, mask, out, lse, heads, dqkv, dcontext)

    tensors = halves(qkv=own, context=context, grad=out, out=out, dqkv=own, dcontext=context)
    tensors["lse"] = torch.zeros(2, batch, heads, tokens)
    return run, tensors | ({"mask": torch.rand(batch, keys) > 0.5} if masked else {})


def over_time(clips=1, positions=1, heads=1, width=16) -> tuple[Callable, Tensors]:
    frames, C = 2, heads * width
    rows = clips * frames, positions

    def run(qkv, grad, out, dqkv) -> None:
        temporal.forward(qkv, None, None, out, heads, frames)
        temporal.backward(grad, qkv, None, None, dqkv, heads, frames)

    return run, halves(qkv=(*rows, 3 * C), grad=(*rows, C), out=(*rows, C), dqkv=(*rows, 3 * C))


def end_of(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The last elements, so many along each axis."""
    return x[tuple(slice(-size, None) for size in sizes[: x.dim()])]


def normalise(x, dy, y, dx, mean, rstd, scale, dscale, dshift, dweight=None, dbias=None) -> None:
    """group_norm, both ways."""
    groups, parameters = mean.shape[1], (None, None, scale, None)
    group_norm.forward(x, None, y, mean, rstd, groups, *parameters, 1e-5, True)
    gradients = dweight, dbias, dscale, dshift
    group_norm.backward(dy, x, None, dx, None, mean, rstd, groups, *parameters, *gradients, True)


def normalised(rows: int, channels: int, positions: int, channels_last=False, affine=True) -> Tensors:
    """Its tensors, of one group, with values at the end of x, dy and scale."""
    tensors: Tensors = {name: torch.zeros(rows, channels, positions, 1).half() for name in ("x", "dy", "y", "dx")}
    if channels_last:
        tensors = {name: x.contiguous(memory_format=torch.channels_last) for name, x in tensors.items()}
    tensors |= {name: torch.zeros(rows, 1) for name in ("mean", "rstd")}
    tensors |= {name: torch.zeros(rows, channels) for name in ("scale", "dscale", "dshift")}
    tensors |= {name: torch.zeros(channels) for name in ("dweight", "dbias") if affine}
    for name in ("x", "dy", "scale"):
        end_of(tensors[name], (1, 1, 8)).normal_()
    return tensors


SPREAD = {
    "flash, samples": (0, "", lambda: flash(batch=3)),
    "flash, heads": (1, "", lambda: flash(heads=3)),
    "flash, tokens": (2, "", lambda: flash(queries=67, keys=67)),
    "flash, channels": (3, "", lambda: flash(width=20)),
    "flash, samples of the mask": (0, "mask", lambda: flash(batch=3, masked=True)),
    "flash, keys of the mask": (1, "mask", lambda: flash(keys=67, masked=True)),
    "self_cross, samples": (0, "", lambda: self_cross(batch=3)),
    "self_cross, tokens": (1, "", lambda: self_cross(tokens=67, keys=67)),
    "self_cross, channels": (2, "", lambda: self_cross(heads=3)),
    "self_cross, samples of the mask": (0, "mask", lambda: self_cross(batch=3, masked=True)),
    "self_cross, keys of the mask": (1, "mask", lambda: self_cross(keys=67, masked=True)),
    "temporal, frames": (0, "", lambda: over_time(clips=2)),
    "temporal, positions": (1, "", lambda: over_time(positions=17)),
    "temporal, channels": (2, "", lambda: over_time(heads=3)),
    "group_norm, rows of scale": (0, "scale", lambda: (normalise, normalised(3, 2, 8))),
}
"""The axis; along it one tensor is spread, or all are but the log-sum-exps, which are dense; what runs with which."""


@pytest.mark.parametrize("case", SPREAD)
def test_elements_may_lie_further_apart_than_32_bits_say(case):
    axis, name, make = SPREAD[case]
    run, near = make()
    names = {name} if name else near.keys() - {"lse"}
    apart = {name: spread(x, axis) if name in names else x.clone() for name, x in near.items()}
    run(**near)
    run(**apart)
    for name, x in near.items():
        assert torch.equal(apart[name], x), name


@pytest.fixture
def launch_ends(monkeypatch):
    """From its call on, a launch's first program and last three alone run, on scratch memory of zeros: as if the
    others, given zeros, had made zeros of them."""
    builder, launch = interpreter.interpreter_builder, backend.launch

    def ends(kernel, grid, **arguments) -> None:
        count = math.prod(grid)
        chosen = sorted({0, *range(max(count - 3, 0), count)})
        with pytest.MonkeyPatch.context() as patch:
            set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
            patch.setattr(builder, "set_grid_dim", lambda *_: set_dim(count, 1, 1))
            patch.setattr(builder, "set_grid_idx", lambda number, *_: set_idx(chosen[number], 0, 0))
            launch(kernel, (len(chosen),), **arguments)

    def begin() -> None:
        monkeypatch.setattr(backend, "launch", ends)
        monkeypatch.setattr(plans, "scratch", lambda *shape, like, **_: zeros(*shape))

    return begin


@pytest.fixture
def assert_ends_like(launch_ends):
    """Runs tensors by themselves; then as the end of larger ones, where the last row's last elements must be the same,
    up to a few roundings to float16."""

    def check(run: Callable, near: Tensors, shapes: dict[str, tuple[int, ...]], *results: str) -> None:
        far = {}
        for name, x in near.items():
            shape = shapes[name]
            far[name] = zeros(*shape, dtype=x.dtype)
            if x.dim() == 4 and not x.is_contiguous():
                far[name] = far[name].view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
            end_of(far[name], x.shape)[x != 0] = x[x != 0]
        run(**near)
        launch_ends()
        run(**far)
        for name in results:
            expected, actual = (end_of(x[name], (1, 1, 8, 8)) for x in (near, far))
            assert expected.any(), name
            torch.testing.assert_close(actual, expected, rtol=0, atol=4e-3 * expected.abs().max().item(), msg=name)

    return check


def more_samples(tensors: Tensors, samples: int) -> dict[str, tuple[int, ...]]:
    return {name: (samples, *x.shape[1:]) for name, x in tensors.items()}


@pytest.mark.parametrize("make", [flash, self_cross])
def test_attention_may_have_2_to_the_31_log_sum_exps(make, assert_ends_like):
    run, near = make(**{"queries" if make is flash else "tokens": 128})
    shapes = more_samples(near, samples := 2**24 + 1)
    shapes["lse"] = (*near["lse"].shape[:-3], samples, 1, 128)
    assert_ends_like(run, near, shapes, *(name for name in near if name.startswith(("out", "d"))))


@pytest.fixture
def by_tiles(monkeypatch):
    monkeypatch.setattr(group_norm, "WHOLE_GROUP_BYTES", 0)


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize(
    ("near", "far"),
    [
        ({"rows": 1, "channels": 64, "positions": 1, "affine": False}, (2**25 + 1, 64, 1, 1)),
        ({"rows": 130, "channels": 2, "positions": 1}, (130, 2**24, 1, 2**23)),
        ({"rows": 1, "channels": 2, "positions": 2**12 + 8}, (1, 2**19, 2**12 + 8, 2**18)),
        ({"rows": 1, "channels": 2, "positions": 2**12 + 8, "channels_last": True}, (1, 2**19, 2**12 + 8, 2**18)),
    ],
    ids=["rows", "channels", "positions", "positions, channels_last"],
)
def test_group_norm_of_2_to_the_31_elements(near, far, assert_ends_like):
    near = normalised(**near)
    rows, channels, positions, groups = far
    images, statistics = (rows, channels, positions, 1), (rows, groups)
    shapes = {name: images if x.dim() == 4 else (rows, channels)[2 - x.dim() :] for name, x in near.items()}
    shapes |= {"mean": statistics, "rstd": statistics}
    results = {name for name in near if name.startswith(("y", "mean", "rstd", "dx", "ds", "dw", "db"))}
    assert_ends_like(normalise, near, shapes, *results)


def noise_and_loss(images, noise, pred, x_t, residual, gradient, alpha_bar, upstream) -> None:
    strides, spaces, alpha_bars = [(1, 1)], {"PREDICTION": "v", "LOSS_TARGET": "eps"}, alpha_bar[None]
    multires.noise(images, alpha_bars, strides, [noise], None, None, [x_t])
    multires.loss_forward(
        [pred], images, alpha_bars, strides, [noise], None, None, spaces, [1.0], [residual], per_level=False
    )
    multires.loss_backward([residual], upstream, alpha_bars, spaces, [1.0], [gradient])


@pytest.mark.parametrize("channels_last", [False, True])
def test_noise_and_loss_of_2_to_the_31_elements(channels_last, assert_ends_like):
    last = torch.channels_last if channels_last else torch.contiguous_format
    names = "images", "noise", "pred", "x_t", "residual", "gradient"
    near: Tensors = {name: torch.randn(1, 3, 16, 16).half().contiguous(memory_format=last) for name in names}
    near |= {"alpha_bar": torch.rand(1), "upstream": torch.rand(1)}
    shapes = more_samples(near, 2**31 // (3 * 16 * 16) + 2)
    assert_ends_like(noise_and_loss, near, shapes, "x_t", "residual", "gradient")


def test_the_gradient_of_a_clip_of_just_below_2_to_the_31_elements(assert_ends_like):
    def run(residual, gradient) -> None:
        spaces, ones = {"PREDICTION": "v", "LOSS_TARGET": "v"}, torch.ones(1, 1)
        weight = float(residual.numel())  # of which each element has its share
        multires.loss_backward([residual], ones[0], ones, spaces, [weight], [gradient])

    near = halves(residual=(1, 8), gradient=(1, 8))
    assert_ends_like(run, near, dict.fromkeys(near, (1, 2**31 - 8)), "gradient")
