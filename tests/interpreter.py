"""Triton's interpreter without its repetitions, which were two thirds of the time of the tests that run kernels: before
each call of a function inside a kernel it goes through its whole language to replace what it has replaced already; with
each tensor and each sum it works out anew what follows from the types; each sum of integers it makes again in 64 bits,
for a check of overflow that it then leaves out."""

import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class Nothing:
    """What was replaced where all had been replaced before."""

    def restore(self) -> None:
        pass


def shorten() -> None:
    """Leave out of the interpreter what changes no result."""
    _patch_once()
    _remember_types()
    _shorten_arithmetic()
    options = interpreter.interpreter_builder.options
    assert not options.debug  # without which the check of overflow is not made
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _patch_once() -> None:
    """Have the interpreter replace the functions of a language module only where they are still the compiler's."""
    patch_lang = interpreter._patch_lang
    languages: dict[object, list] = {}  # by function, the names of its module that are Triton's language

    def patch_what_is_not(function):
        if function not in languages:
            languages[function] = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if all(not tl.core.is_builtin(language.load) for language in languages[function]):
            return Nothing()
        return patch_lang(function)

    interpreter._patch_lang = patch_what_is_not


def _remember_types() -> None:
    """Have what follows from the name of a type worked out once: the shape of a tensor, the checks of a block, NumPy's
    type of a Triton one. A type is known by its name, which says its elements and its shape."""
    core = tl.core
    make_block, make_tensor, numpy_type = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    is_equal, unwrap = core.dtype.__eq__, core._unwrap_if_constexpr
    blocks: dict[tuple, dict] = {}
    tensors: dict[str, dict] = {}
    numpy_types: dict[str, object] = {}

    def remembered_block(self, element_ty, shape):
        key = element_ty.name, *[getattr(size, "value", size) for size in shape]
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key], element_ty=element_ty)

    def remembered_tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = vars(self).copy()
        vars(self).update(tensors[type.name], handle=handle, type=type)

    def remembered_numpy_type(dtype):
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = numpy_type(dtype)
        return numpy_types[dtype.name]

    sequences = (list, tuple, core.tuple)

    def unwrapped(value):
        if type(value) is core.constexpr:
            return value.value
        return unwrap(value) if isinstance(value, sequences) else value

    core.block_type.__init__ = remembered_block
    core.tensor.__init__ = remembered_tensor
    interpreter._get_np_dtype = remembered_numpy_type
    core.dtype.__eq__ = lambda self, other: self is other or is_equal(self, other)
    core._unwrap_if_constexpr = unwrapped


def _shorten_arithmetic() -> None:
    """Have sums, differences and products of plain numbers left to NumPy, broadcasts included, where the long way has
    once led from operands of such types to a result, whose type is then known, and is what NumPy makes of them."""
    semantic, tensor, handle = interpreter.interpreter_semantic.__class__, tl.core.tensor, interpreter.TensorHandle
    plain = {"fp32": np.float32, "fp64": np.float64, "int32": np.int32, "int64": np.int64}

    def shortened(long_way, function):
        results = {}

        def short_way(self, x, y, sanitize_overflow):
            number = type(y)
            if not isinstance(x, tensor) or not (isinstance(y, tensor) or number is float or number is int):
                return long_way(self, x, y, sanitize_overflow)
            key = x.type.name, y.type.name if isinstance(y, tensor) else number
            known = results.get(key)
            if known is not None and (number is not int or -(2**31) <= y < 2**31):
                operand = y.handle.data if isinstance(y, tensor) else plain[known.scalar.name](y)
                return tensor(handle(function(x.handle.data, operand), known.scalar), known)
            result = long_way(self, x, y, sanitize_overflow)
            types = [plain.get(operand.dtype.name) for operand in (result, x, y) if isinstance(operand, tensor)]
            if None not in types and np.result_type(*types[1:]) == types[0]:
                results[key] = result.type
            return result

        return short_way

    for name, function in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
        setattr(semantic, name, shortened(getattr(semantic, name), function))
