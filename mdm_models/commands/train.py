"""The command line that all recipes share: a preset, and options that replace its values."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping

import tyro

from mdm_models.errors import TrainingError, warn_in_one_line
from mdm_models.training.config import TrainConfig

Preset = Callable[[tuple[str, ...], str], TrainConfig]
"""preset(shards, run directory) → settings; its docstring is its line in the help text"""


def main(presets: Mapping[str, Preset], description: str, arguments: list[str] | None = None) -> int:
    """Run a recipe; → exit code. The first preset is the default; TrainingError becomes one line and code 2."""
    config, dry_run = parse(presets, description, sys.argv[1:] if arguments is None else arguments)
    warn_in_one_line()
    try:
        if dry_run:
            from mdm_models.training.dry_run.estimate import describe

            print(describe(config, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
        else:
            from mdm_models.training.trainer import train

            train(config)
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(presets: Mapping[str, Preset], description: str, arguments: list[str]) -> tuple[TrainConfig, bool]:
    """The settings of the preset that the command line names with the fields that it replaces, and whether it asks for
    --dry-run."""
    names = list(presets)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=names, default=names[0])
    first.add_argument("--dry-run", action="store_true")
    chosen, rest = first.parse_known_args(arguments)
    choices = "\n".join(f"  --preset {name:8} {preset.__doc__}" for name, preset in presets.items())
    dry_run = "  --dry-run         print the settings, the model's size, its memory and its schedule, and do nothing"
    return (
        tyro.cli(
            tyro.conf.OmitArgPrefixes[TrainConfig],
            args=rest,
            default=presets[chosen.preset](tyro.MISSING, tyro.MISSING),
            description=f"{description}\n{choices}\n{dry_run}\n\nDefaults below are those of --preset {chosen.preset}.",
        ),
        chosen.dry_run,
    )
