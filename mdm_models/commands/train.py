"""`mdm train RECIPE`, and what a recipe does when it is run as a file: a preset, and options in place of its values."""

import dataclasses
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Literal

import tyro

from mdm_models.commands import line
from mdm_models.commands.line import DONE, exit_code, like
from mdm_models.config import UNetConfig
from mdm_models.data.config import DataConfig
from mdm_models.errors import COME_AGAIN
from mdm_models.training.config import TrainConfig, changed
from mdm_models.training.settings import check_paths

RECIPES = "mdm_models.recipes"  # found by its name: recipes stand above the commands, which know none of them

Preset = Callable[[tuple[str, ...], str], TrainConfig]
"""preset(shards, run directory) → settings, which may follow from the shards if these are not tyro.MISSING, as they are
for the help text; its docstring is its line there"""


@dataclass(frozen=True)
class _Data(DataConfig):
    shards: Annotated[tuple[str, ...], tyro.conf.arg(name="data")]


@dataclass(frozen=True)
class _Options(TrainConfig):
    data: _Data


def main(arguments: list[str] | None = None) -> int:
    """`mdm train`; → exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    return exit_code("mdm train", lambda: _train(name, rest))


def run_recipe(
    presets: Mapping[str, Preset],
    description: str | None,
    arguments: list[str] | None = None,
    architectures: Mapping[str, UNetConfig] | None = None,
) -> int:
    """Run a recipe; → exit code. The first preset is the default. architectures: those of its models, by name, that are
    not among `list_models()`; a file of recipes/ calls them ARCHITECTURES, as it calls its presets PRESETS."""
    program, arguments = os.path.basename(sys.argv[0]), sys.argv[1:] if arguments is None else arguments
    return exit_code(program, lambda: _run(program, presets, description, arguments, architectures or {}))


def parse(
    program: str, presets: Mapping[str, Preset], description: str | None, arguments: list[str]
) -> tuple[TrainConfig, bool]:
    """Read the settings of the preset that the command line names with the fields that it replaces, and whether it asks
    for --dry-run. Raises ValueError in one line for a wrong command line."""
    names = list(presets)
    first = dataclasses.make_dataclass(
        "First",
        [
            ("preset", Literal[tuple(names)], names[0]),
            ("dry_run", tyro.conf.FlagCreatePairsOff[bool], False),
            ("data", tuple[str, ...], ()),
        ],
    )
    chosen, rest = line.parse(program, None, first, arguments, add_help=False, return_unknown_args=True)
    preset = presets[chosen.preset](chosen.data or tyro.MISSING, tyro.MISSING)
    choices = "\n".join(f"  --preset {name:8} {preset.__doc__}" for name, preset in presets.items())
    dry_run = "  --dry-run         print the settings, the model's size, its memory and its schedule, and do nothing"
    options = line.parse(
        program,
        f"{description}\n{choices}\n{dry_run}\n\nDefaults below are those of --preset {chosen.preset}.",
        _Options,
        rest,
        config=(tyro.conf.OmitArgPrefixes,),
        default=dataclasses.replace(like(_Options, preset), data=like(_Data, preset.data)),
    )
    return dataclasses.replace(like(TrainConfig, options), data=like(DataConfig, options.data)), chosen.dry_run


def _run(
    program: str,
    presets: Mapping[str, Preset],
    description: str | None,
    arguments: list[str],
    architectures: Mapping[str, UNetConfig],
) -> int:
    """→ exit code."""
    config, dry_run = parse(program, presets, description, arguments)
    architecture = architectures.get(config.model.model)
    check_paths(config)
    if dry_run:
        from mdm_models.training.dry_run.estimate import describe

        print(describe(config, int(os.environ.get("WORLD_SIZE", "1")), architecture))
        return DONE
    from mdm_models.data.prepare.captioned_folder import shards_for
    from mdm_models.training.checkpoint.checkpoints import is_finished
    from mdm_models.training.trainer import train

    data = config.data
    shards, images = (shards_for(names, data.size, data.cache) for names in (data.shards, data.images))
    run = train(changed(config, shards=shards, images=images), architecture)
    return DONE if is_finished(run, config.optimizer.steps) else COME_AGAIN


def _train(name: str, arguments: list[str]) -> int:
    """Run the recipe of that name; → exit code. Raises ValueError if there is none."""
    known = _recipes()
    if name not in known:
        raise ValueError(f"no recipe is named {name!r}; known are {', '.join(known)}")
    recipe = known[name]
    architectures = getattr(recipe, "ARCHITECTURES", {})
    return _run(f"mdm train {name}", recipe.PRESETS, recipe.__doc__, arguments, architectures)


def _recipes() -> dict[str, ModuleType]:
    """The files of recipes/ that have presets, by name."""
    names = [module.name for module in pkgutil.iter_modules(importlib.import_module(RECIPES).__path__)]
    modules = {name: importlib.import_module(f"{RECIPES}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "PRESETS")}


def _help() -> str:
    """What `mdm train --help` shows."""
    lines = [f"  mdm train {name:14}{(module.__doc__ or name).splitlines()[0]}" for name, module in _recipes().items()]
    more = "`mdm train RECIPE --help` tells its presets and options; `torchrun recipes/RECIPE.py` runs the same."
    usage = "usage: mdm train RECIPE [--preset PRESET] --data SHARDS --out DIR [OPTIONS]"
    return "\n".join([usage, "", *lines, "", more])
