"""Every op is made of the same parts, and each part holds what its name says."""

import ast
from pathlib import Path

import pytest

import mdm_kernels

PACKAGE = Path(mdm_kernels.__file__).parent
OPS = ("attention", "group_norm", "multires", "temporal")
KERNEL_FILES = sorted(path for op in OPS for path in (PACKAGE / op).glob("*kernels.py"))
each_kernel_file = pytest.mark.parametrize(
    "path", KERNEL_FILES, ids=[str(path.relative_to(PACKAGE)) for path in KERNEL_FILES]
)


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


def imported(path: Path) -> set[str]:
    """What a file of an op imports, at its top or in a function, as the last part of a module's name and the names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {(node.module or "").split(".")[-1], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_the_same_parts(op):
    files = {path.name for path in (PACKAGE / op).glob("*.py")}
    assert {"__init__.py", "reference.py", "checks.py", "launch.py", "kernels.py", "op.py"} <= files
    assert all(name.endswith("_kernels.py") for name in files - {
        "__init__.py", "reference.py", "cpu.py", "checks.py", "launch.py", "kernels.py", "op.py"
    })  # fmt: skip


@each_kernel_file
def test_a_kernel_file_holds_kernels_only(path):
    assert functions(path)
    for function in functions(path):
        assert any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list), function.name


@each_kernel_file
def test_a_kernel_takes_no_argument_that_it_does_not_use(path):
    for function in functions(path):
        arguments = {argument.arg for argument in function.args.args}
        used = {node.id for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
        assert arguments <= used, f"{function.name} does not use {arguments - used}"


@pytest.mark.parametrize("op", OPS)
def test_parts_import_only_what_stands_below_them(op):
    folder = PACKAGE / op
    assert not {"op", "launch", "kernels"} & imported(folder / "reference.py")
    assert not {"op", "launch", "kernels", "triton"} & imported(folder / "checks.py")
    assert "op" not in imported(folder / "launch.py")
    assert "kernels" not in imported(folder / "op.py")


def test_only_launches_and_kernels_know_triton():
    for path in PACKAGE.rglob("*.py"):
        if "triton" in imported(path):
            assert path.parent.name == "aot" or path.name.endswith("kernels.py") or path.name in ("op.py", "tune.py"), (
                path
            )


def test_the_namespace_of_the_ops_is_written_once():
    """Elsewhere it is `library.NAMESPACE`, so that a package of another name can have ops of its own."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        code = {ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
        assert not any(name.startswith("torch.ops.mdm_kernels") for name in code), path
        assert path.name == "library.py" or '"mdm_kernels::' not in text, path
