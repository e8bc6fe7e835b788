"""What a run was told, kept in its directory as RUN/config.json."""

import dataclasses
import json
import typing
from pathlib import Path

from mdm_models.errors import TrainingError, one_line
from mdm_models.storage import write_whole
from mdm_models.training.config import TrainConfig

FILE = "config.json"


def write_settings(run: Path, config: TrainConfig) -> None:
    text = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    write_whole(run / FILE, lambda path: path.write_text(text))


def read_settings(run: Path) -> TrainConfig | None:
    """What the run was told; None if the directory holds none, or those of a model. A setting that another version of
    this package knew is left out, one that it did not know has its default.

    Raises TrainingError for a damaged file.
    """
    try:
        told = json.loads((run / FILE).read_text())
        if not isinstance(told, dict) or "optimizer" not in told:
            return None
        return _read(TrainConfig, told)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{run / FILE} is damaged: {one_line(error)}") from None


def _read(kind: type, values: dict):
    hints = typing.get_type_hints(kind)
    known = {name: values[name] for name in hints if name in values}
    return kind(**{name: _value(hints[name], value) for name, value in known.items()})


def _value(hint, value):
    if dataclasses.is_dataclass(hint):
        return _read(hint, value)
    return tuple(value) if isinstance(value, list) else value
