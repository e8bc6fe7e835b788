"""What is known of a compiled kernel without compiling it: whether an earlier report's figures are still its figures.

A row of a report carries a key: a digest of all that decides what compiling gives, and of the row's own figures. A
kernel with another source, launch, target or compiler has another key; so has a row that was edited by hand. Only rows
whose key is right are taken for known.
"""

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import triton

from . import machine_code
from .compiler import CompilingDriver, Launch, warm_up
from .report import Result, read_json


def with_key(result: Result, launch: Launch) -> Result:
    """Give the result of compiling a launch its key; none if it is an error."""
    return result if result.error else dataclasses.replace(result, key=_key(result, launch))


def known_results(report: Path, jobs: list[tuple[Launch, str]]) -> dict[int, Result]:
    """Give, by the number of the job, the results that a report written by `--json` has for (launch, target) jobs; none
    if another Triton wrote it."""
    triton_version, results = read_json(report)
    if triton_version != triton.__version__:
        return {}
    rows = {(row.shape_class, row.kernel, row.variant, row.target): row for row in results if row.key}
    known = {}
    for number, (launch, target) in enumerate(jobs):
        row = rows.get((launch.shape_class, launch.name, launch.variant, target))
        if row and row.key == _key(row, launch):
            known[number] = row
    return known


def _key(result: Result, launch: Launch) -> str:
    if not (decisive := _decisive(launch, result.target)):
        return ""
    return _digest(decisive, repr(dataclasses.replace(result, key="")))[:16]


def _decisive(launch: Launch, target: str) -> str:
    """A digest of all that decides what a kernel is compiled to and how that is measured; empty where Triton cannot
    say, and its compiler will tell why."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend

    specializations = []

    def note(*, fn, compile, **_) -> bool:
        specialization = json.loads(compile["specialization_data"])
        del specialization["options"]["extern_libs"]  # where on this machine there is what belongs to Triton
        specializations.append((fn.jit_function.cache_key, specialization))
        return True  # compile nothing

    knobs: Any = triton.knobs.runtime  # pyright: ignore[reportAttributeAccessIssue]: a module that Triton hands out lazily
    before, knobs.jit_cache_hook = knobs.jit_cache_hook, note
    try:
        warm_up(launch, target)
    except Exception:  # whatever is thrown here is thrown again, and reported, when the kernel is compiled
        return ""
    finally:
        knobs.jit_cache_hook = before
    assembler = make_backend(CompilingDriver(target).get_current_target()).hash()
    compiler = (triton.__version__, assembler, get_cache_invalidating_env_vars())
    return _digest(repr(specializations), repr(compiler), inspect.getsource(machine_code))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
