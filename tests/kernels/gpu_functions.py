"""Float32 as a GPU computes it, in Triton's interpreter: functions with their documented errors, sums in its order.

Triton compiles exp, exp2, log2, sqrt, rsqrt and `/` of float32 to PTX's ex2.approx, lg2.approx, sqrt.approx,
rsqrt.approx and div.full, whose largest errors the PTX manual gives (sections on each instruction). The interpreter's
are NumPy's, right to half a unit, so that a bound which holds there need not hold on a GPU. Here each result is moved
by a share of that largest error, drawn from the bits of the arguments: the same arguments always give the same result.
`tl.div_rn` and `tl.sqrt_rn` stay exact, as they do on a GPU.

Products of float32 matrices are added one after another to what is there, where NumPy would sum them apart, in parts.
"""

import numpy as np
import pytest
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

EX2 = 2.0**-22  # relative; exact at 0
LG2 = 2.0**-22  # absolute in (1/2, 2), relative elsewhere
SQRT = 2.0**-23  # relative
RSQRT = 2.0**-22.9  # relative
DIV = 2.0**-22  # two units in the last place, relative
LOG2_E = np.float32(1.4426950408889634)


def share(*arguments: np.ndarray) -> np.ndarray:
    """A number in [−1, 1) for each place, from the bits of the float32 arguments there."""
    mixed = np.uint32(0)
    for argument in arguments:
        mixed = (mixed ^ argument.view(np.uint32)) * np.uint32(0x9E3779B1)
        mixed = mixed ^ (mixed >> np.uint32(15))
    return (mixed * np.uint32(0x85EBCA77)).view(np.int32) * 2.0**-31


def off(exact: np.ndarray, error: np.ndarray | float) -> np.ndarray:
    """exact + error in float32; what is zero or infinite, or NaN, stays so."""
    return np.where(np.isfinite(exact) & (exact != 0), exact + error, exact).astype(np.float32)


def exp2(x: np.ndarray) -> np.ndarray:
    exact = np.exp2(x.astype(np.float64))
    return off(exact, np.where(x == 0, 0, exact * EX2 * share(x)))


def exp(x: np.ndarray) -> np.ndarray:
    return exp2(x * LOG2_E)


def log2(x: np.ndarray) -> np.ndarray:
    exact = np.log2(x.astype(np.float64))
    return off(exact, np.where((x > 0.5) & (x < 2), 1, np.abs(exact)) * LG2 * share(x))


def sqrt(x: np.ndarray) -> np.ndarray:
    exact = np.sqrt(x.astype(np.float64))
    return off(exact, exact * SQRT * share(x))


def rsqrt(x: np.ndarray) -> np.ndarray:
    exact = 1 / np.sqrt(x.astype(np.float64))
    return off(exact, exact * RSQRT * share(x))


def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    exact = x.astype(np.float64) / y
    return off(exact, exact * DIV * share(x, y))


def multiply_add(x: np.ndarray, y: np.ndarray, out: np.ndarray) -> np.ndarray:
    """out + x y, each product fused with its addition: a sum of two float64 is rounded twice, which hardly matters."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    for k in range(x.shape[-1]):
        out = (x[..., :, k, None] * y[..., k, None, :] + out).astype(np.float32)
    return out


def approximate(patch: pytest.MonkeyPatch) -> None:
    """Have the interpreter compute float32 as a GPU does."""
    builder = type(interpreter.interpreter_builder)

    def unary(name: str, function) -> None:
        exactly = getattr(builder, name)

        def compute(self, x):
            if x.data.dtype != np.float32:
                return exactly(self, x)
            with np.errstate(all="ignore"):
                return TensorHandle(function(np.ascontiguousarray(x.data)), x.dtype.scalar)

        patch.setattr(builder, name, compute)

    exactly_divide = builder.create_fdiv

    def compute_quotient(self, x, y):
        if x.data.dtype != np.float32:
            return exactly_divide(self, x, y)
        with np.errstate(all="ignore"):
            x_data, y_data = (np.ascontiguousarray(data) for data in np.broadcast_arrays(x.data, y.data))
            return TensorHandle(divide(x_data, y_data), x.dtype.scalar)

    dot_otherwise = builder.create_dot

    def compute_product(self, x, y, out, *precision):
        if x.data.dtype != np.float32:
            return dot_otherwise(self, x, y, out, *precision)
        with np.errstate(all="ignore"):
            return TensorHandle(multiply_add(x.data, y.data, out.data), out.dtype.scalar)

    for name, function in {"exp": exp, "exp2": exp2, "log2": log2, "sqrt": sqrt, "rsqrt": rsqrt}.items():
        unary(f"create_{name}", function)
    patch.setattr(builder, "create_fdiv", compute_quotient)
    patch.setattr(builder, "create_dot", compute_product)
