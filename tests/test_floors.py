"""The floors of DESIGN.md: imports go downwards, never in a circle, and no floor needs what only a higher one uses."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (  # from the ground up: each may import what stands in its own line and in those before it
    "mdm_kernels",
    "errors memory plain_text processes config private_torch threads",
    "diffusion layers inputs storage unet shipped",
    "zoo pretrained mp4 pictures text",
    "official diffusers_port engine pipeline",
    "data",
    "evaluation",
    "training",
    "web commands",
    "recipes",
    "convert precompute cli mdm_models",
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units.split()}

LIBRARIES = {  # that a floor imports when it is imported, beside the standard library and those of the floors below
    "mdm_kernels": "torch triton",
    "errors": "numpy safetensors einops PIL tqdm",  # what every model needs
    "data": "av webdataset fsspec filelock braceexpand urllib3 pyarrow emoji",
    "evaluation": "torchmetrics torchvision open_clip",
    "training": "tensorboard",
    "web": "gradio",
    "commands": "tyro",
}


def modules() -> dict[str, Path]:
    files = [file for package in ("mdm_kernels", "mdm_models") for file in (ROOT / package).rglob("*.py")]
    files += (ROOT / "mdm_models" / "recipes").glob("*.py")  # a link, which rglob does not follow
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()
TOP = "mdm_models"  # its __init__ has what users import, and stands above all that it imports


def imports(name: str, at_once: bool = False) -> Iterator[str]:
    """What a module imports: modules of these packages, and other packages.

    at_once: only what is imported along with it, not what a function of it imports when it is called.
    """
    for node in _statements(ast.parse(MODULES[name].read_text()), at_once):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                is_package = MODULES[name].stem == "__init__"
                parts = name.split(".")[: len(name.split(".")) - node.level + is_package]
                source = ".".join([*parts, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in MODULES else source


def _statements(node: ast.AST, at_once: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if at_once and (is_typing or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        yield child
        yield from _statements(child, at_once)


def library(found: str) -> str:
    """torchvision.ops → torchvision; torch.utils.tensorboard is tensorboard's, without which it cannot be imported."""
    return "tensorboard" if found.startswith("torch.utils.tensorboard") else found.split(".")[0]


def unit(module: str) -> str:
    """mdm_models.data.prepare.clips → data: what stands on a floor."""
    return "mdm_kernels" if module.startswith("mdm_kernels") else module.split(".")[1] if "." in module else TOP


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def between(names: dict[str, str]) -> dict[str, set[str]]:
    """The imports between the groups of modules that `names` gives to each of them."""
    graph: dict[str, set[str]] = {group: set() for group in names.values()}
    for module, group in names.items():
        graph[group] |= {names[found] for found in imports(module) if names.get(found, group) != group}
    return graph


def test_every_file_stands_on_a_floor():
    assert {unit(module) for module in MODULES} == FLOOR.keys()


def test_no_import_goes_upwards():
    upwards = [
        f"{module} imports {found}"
        for module in MODULES
        for found in imports(module)
        if found in MODULES and FLOOR[unit(found)] > FLOOR[unit(module)]
    ]
    assert not upwards


def test_no_packages_import_each_other():
    assert circle(between({module: unit(module) for module in MODULES})) is None


@pytest.mark.parametrize("package", ["mdm_kernels", "mdm_models.training", "mdm_models.data"])
def test_no_packages_inside_a_package_import_each_other(package):
    depth = package.count(".") + 1
    inside = {m: m.split(".")[depth] for m in MODULES if m.startswith(package + ".") and m.count(".") > depth}
    assert circle(between(inside)) is None


def test_no_files_import_each_other():
    assert circle(between({module: module for module in MODULES})) is None


def test_data_knows_no_model_loss_or_command_line():
    """It gives uint8 clips and captions to whoever asks; that a text encoder reads names or classes it may know."""
    known = {unit(found) for module in MODULES if unit(module) == "data" for found in imports(module)}
    models = {"unet", "layers", "inputs", "zoo", "pretrained", "official", "pipeline", "engine", "diffusion"}
    assert not known & (models | {"evaluation", "training", "commands"})


def test_no_floor_needs_a_library_of_a_higher_one():
    allowed, strays = set(sys.stdlib_module_names) | {"mdm_kernels", "mdm_models"}, []
    for floor in FLOORS:
        for name in floor.split():
            allowed |= set(LIBRARIES.get(name, "").split())
        strays += [
            f"{module} imports {found}"
            for module in MODULES
            if unit(module) in floor.split()
            for found in imports(module, at_once=True)
            if library(found) not in allowed
            and not module.split(".")[-1].startswith(library(found))  # an adapter, named after what it adapts
        ]
    assert not strays


def test_models_are_made_and_sampled_with_the_libraries_of_their_floor_alone():
    blocked = [name for floor in ("data", "evaluation", "training", "commands") for name in LIBRARIES[floor].split()]
    program = f"""
import sys
for name in {[*blocked, "transformers", "huggingface_hub", "gradio", "diffusers", "wandb"]}:
    sys.modules[name] = None  # importing it fails
import mdm_models
from mdm_models.text import ClassLabels
model = mdm_models.create_model("mdm_t2i_tiny", context_dim=2)
config = mdm_models.PipelineConfig(size=32)
pipeline = mdm_models.Pipeline(model, ClassLabels(["a cat", "a dog"]), config)
print(pipeline("a cat", num_inference_steps=1, seed=0)[0].size)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "(32, 32)"
