"""The ahead-of-time compiler. It runs in processes of its own: interpreter and compiler do not share one."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton.language as tl

import mdm_kernels
from mdm_kernels.aot import __main__ as command
from mdm_kernels.aot.compiler import Launch, record
from mdm_kernels.aot.report import read_json
from mdm_kernels.aot.shape_classes import SHAPE_CLASSES, meta
from tests.kernels.compiling import compiling_python

PACKAGE = Path(mdm_kernels.__file__).parent


@pytest.fixture(scope="module")
def compiling(tmp_path_factory):
    with compiling_python(tmp_path_factory.mktemp("compiling")) as run:
        yield run


def launched_kernels() -> set[str]:
    """Names of the kernels that the package's launching functions speak of: `kernels.name`, `some_kernels.name`."""
    return {
        node.attr
        for path in PACKAGE.glob("*/launch.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id.endswith("kernels")
    }


def test_every_kernel_that_is_launched_has_a_shape_class():
    assert launched_kernels() == {launch.name for launch in record(SHAPE_CLASSES)}


def test_every_op_has_a_bfloat16_and_a_float32_case():
    for op in ("group_norm", "multires", "self_cross", "flash", "temporal"):
        launches = record({name: call for name, call in SHAPE_CLASSES.items() if name.startswith(op)})
        dtypes = {next(iter(launch.arguments.values())).dtype for launch in launches}
        assert {torch.bfloat16, torch.float32} <= dtypes, op


class Kernel:
    do_not_specialize = ("seed",)

    @staticmethod
    def fn(x_ptr, size, seed, BLOCK: tl.constexpr):
        pass


def launches_of(*launches: dict) -> list[Launch]:
    def call():
        for arguments in launches:
            mdm_kernels.backend.launch(Kernel, (1,), **arguments)

    return record({"class": call})


@pytest.mark.parametrize("pair", [(32, 48), (3, 5), (None, None), (0.5, 2.5)])
def test_one_specialization_is_compiled_once(pair):
    assert len(launches_of(*({"x_ptr": meta(8), "size": value} for value in pair))) == 1


@pytest.mark.parametrize("pair", [(32, 33), (1, 3), (3, 2**40), (None, 3), (3, 3.5)])
def test_specializations_are_told_apart(pair):
    assert len(launches_of(*({"x_ptr": meta(8), "size": value} for value in pair))) == 2


def test_constants_are_compiled_anew_for_each_value_and_unspecialized_numbers_for_none():
    assert len(launches_of(*({"x_ptr": meta(8), "BLOCK": value} for value in (32, 48)))) == 2
    assert len(launches_of(*({"x_ptr": meta(8), "seed": value} for value in (1, 3, 16)))) == 1


def test_dtypes_are_told_apart():
    assert len(launches_of({"x_ptr": meta(8)}, {"x_ptr": meta(8, dtype=torch.float16)})) == 2


def test_a_kernel_compiles_for_nvidia_and_amd(tmp_path):
    report, page = tmp_path / "report.json", tmp_path / "report.md"
    command = [sys.executable, "-m", "mdm_kernels.aot", "--json", report, "--markdown", page]
    command += ["--targets", "sm_80,gfx942", "--filter", "group_norm 768×16²"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(command, env=environment, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    _, rows = read_json(report)
    assert {(row.kernel, row.target) for row in rows} == {
        (kernel, target)
        for kernel in ("held_group_forward", "held_group_backward", "affine_gradients")
        for target in ("sm_80", "gfx942")
    }
    assert all(row.registers > 0 and row.spills == row.stack == 0 and row.loads > 0 for row in rows)
    assert all(row.wide_loads > 0 for row in rows if row.kernel == "held_group_forward")
    assert all(f"| {row.kernel} |" in page.read_text() for row in rows)
    assert process.stdout.count("\n") == len(rows) + 1


FAULTY = """
import sys
import torch, triton, triton.language as tl
from mdm_kernels import backend
from mdm_kernels.aot import __main__ as aot
from mdm_kernels.aot.shape_classes import meta

@triton.jit
def spilling(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + i[:, None] * BLOCK + i[None, :])
    tl.store(x_ptr + i[:, None] * BLOCK + i[None, :], tile / tl.sum(tl.sum(tile, 0), 0))

@triton.jit
def ill_typed(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + unknown_name)

def call():
    backend.launch(spilling, (1,), x_ptr=meta(1, dtype=torch.float32), BLOCK=256, num_warps=4)
    backend.launch(ill_typed, (1,), x_ptr=meta(1, dtype=torch.float32))

aot.SHAPE_CLASSES.clear()
aot.SHAPE_CLASSES["faulty"] = call
sys.exit(aot.main(["--targets", "sm_80", "--check"]))
"""


def test_a_spill_and_an_error_are_named_in_one_line_each(compiling):
    process = compiling(FAULTY)
    assert process.returncode == 1
    spill, error = process.stderr.splitlines()[-2:]
    assert spill.startswith("spilling (faulty) on sm_80: spills ")
    assert error.startswith("ill_typed (faulty) on sm_80: ")
    assert "unknown_name" in error
    assert not process.stdout


ROUGH = """
import sys
import torch, triton, triton.language as tl
from mdm_kernels import backend
from mdm_kernels.aot import __main__ as aot
from mdm_kernels.aot.shape_classes import meta

@triton.jit
def product(x_ptr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(at)
    tl.store(at, tl.dot(x, x, input_precision=PRECISION))

def call():
    for precision in ("ieee", "tf32"):
        backend.launch(product, (1,), x_ptr=meta(1, dtype=torch.float32), BLOCK=32, PRECISION=precision)

aot.SHAPE_CLASSES.clear()
aot.SHAPE_CLASSES["rough"] = call
report = sys.argv[1]
aot.main(["--targets", "sm_80,sm_90", "--json", report])
print("again", file=sys.stderr)
sys.exit(aot.main(["--targets", "sm_80,sm_90", "--check", "--known", report]))
"""


def test_a_float32_product_that_became_tf32_is_a_fault_when_it_is_compiled_and_when_it_is_known(compiling, tmp_path):
    process = compiling(ROUGH, str(tmp_path / "report.json"))
    assert process.returncode == 1
    compiled, known = process.stderr.split("again\n")
    assert known.startswith("4 of 4 kernels are known from ")
    for said in (compiled, known):
        faults = [line for line in said.splitlines() if "tf32" in line]
        assert [line.split(":")[0] for line in faults] == ["product #2 (rough) on sm_80", "product #2 (rough) on sm_90"]


SCALING = """
import triton
import triton.language as tl

@triton.jit
def scaled(x):
    return 2 * x

@triton.jit
def scale(x_ptr):
    tl.store(x_ptr, scaled(tl.load(x_ptr)))
"""

CHANGING = """
import contextlib, importlib, io, json, sys, warnings
from pathlib import Path
import torch, triton
sys.path.insert(0, str(Path(sys.argv[1]).parent))
import scaling
from mdm_kernels import backend
from mdm_kernels.aot import __main__ as aot
from mdm_kernels.aot.shape_classes import meta

source, report = Path(scaling.__file__), Path(sys.argv[1])
original, launch = source.read_text(), {"num_warps": 4}

def call():
    backend.launch(scaling.scale, (1,), x_ptr=meta(1, dtype=torch.float32), **launch)

aot.SHAPE_CLASSES.clear()
aot.SHAPE_CLASSES["scaling"] = call

def aot_with(*options):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = aot.main(["--targets", "sm_80,gfx942", *options])
    return status, said.getvalue().splitlines()

def check(change):
    importlib.reload(scaling)
    status, said = aot_with("--check", "--known", str(report))
    known = said[0].split(" kernels")[0] if "known" in said[0] else "0 of 2"
    print(f"{change}: {known} known, exit {status}", *[line for line in said if " on " in line], sep="; ")

aot_with("--json", str(report))
written = report.read_text()
check("nothing")
for change, old, new in (
    ("comment elsewhere", "import triton\\n", "import triton  # it\\n"),
    ("kernel", "tl.load(x_ptr)", "tl.load(x_ptr) + 1"),
    ("what it calls", "2 * x", "3 * x"),
    ("fault", "2 * x", "2 * unknown_name"),
):
    source.write_text(original.replace(old, new))
    check(change)
source.write_text(original)
launch["num_warps"] = 8
check("launch")
launch["num_warps"] = 4
rows = json.loads(written)
rows["kernels"][0]["registers"] += 1
report.write_text(json.dumps(rows))
check("figure")
report.write_text(written.replace(triton.__version__, "3.0.0"))
check("Triton")
aot_with("--json", str(report), "--known", str(report))
print("written anew:", report.read_text() == written)
"""


def test_only_kernels_that_are_as_the_report_says_are_known(compiling, tmp_path):
    (tmp_path / "scaling.py").write_text(SCALING)
    process = compiling(CHANGING, str(tmp_path / "report.json"))
    assert process.returncode == 0, process.stderr
    *lines, written = process.stdout.splitlines()
    known = {change: rest for change, _, rest in (line.partition(": ") for line in lines)}
    fault = known.pop("fault")
    assert known == {
        "nothing": "2 of 2 known, exit 0",
        "comment elsewhere": "2 of 2 known, exit 0",
        "kernel": "0 of 2 known, exit 0",
        "what it calls": "0 of 2 known, exit 0",
        "launch": "0 of 2 known, exit 0",
        "figure": "1 of 2 known, exit 0",
        "Triton": "0 of 2 known, exit 0",
    }
    assert fault.startswith("0 of 2 known, exit 1; scale (scaling) on sm_80: ")
    assert written == "written anew: True"


SUMMING = """
import torch, triton, triton.language as tl
from triton.runtime import driver
from mdm_kernels.aot.compiler import CompilingDriver
from mdm_kernels.aot.shape_classes import meta
from mdm_kernels.attention.kernels import multiply_add

@triton.jit
def sum_of_products(x_ptr, out_ptr, N):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    out = tl.zeros([32, 32], tl.float32)
    for start in range(0, N, 1024):
        x = tl.load(x_ptr + start + at)
        out = multiply_add(out, x, x)
    tl.store(out_ptr + at, out)

for target in ("sm_80", "sm_90", "gfx942"):
    driver.set_active(CompilingDriver(target))
    for dtype in (torch.float32, torch.bfloat16):
        x, out = meta(1, dtype=dtype), meta(1, dtype=torch.float32)
        compiled = sum_of_products.warmup(grid=(1,), x_ptr=x, out_ptr=out, N=4096)
        print(target, dtype, compiled.asm["ttgir"].count("arith.addf"))
"""


def test_float32_products_are_summed_apart_from_what_they_are_added_to(compiling):
    process = compiling(SUMMING)
    assert process.returncode == 0, process.stderr
    additions = {"torch.float32": 1, "torch.bfloat16": 0}
    targets = ("sm_80", "sm_90", "gfx942")
    assert process.stdout.splitlines() == [
        f"{target} {dtype} {n}" for target in targets for dtype, n in additions.items()
    ]


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main([]) == 2
    assert capsys.readouterr().err == "TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--targets=sm_70", "unknown targets: sm_70; known: sm_80, sm_89, sm_90, sm_100, sm_120, gfx942"),
        ("--filter=nothing", "no shape class contains 'nothing'"),
        ("--check --json=report.json", "--check counts no instructions"),
        ("--known=nowhere.json", "--known: there is no nowhere.json"),
    ],
)
def test_a_bad_option_is_named(option, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(option.split())
    assert message in capsys.readouterr().err
