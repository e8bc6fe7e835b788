"""What a run was told: kept in its directory as RUN/config.json, and, as far as it decides what is learned, with each
checkpoint, so that a run that goes on with other data or settings says so."""

import dataclasses
import hashlib
import json
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from mdm_models.data.fingerprint import ShardRecord, changes
from mdm_models.errors import CheckpointError, TrainingError, one_line
from mdm_models.storage import check_local, url_of, write_whole
from mdm_models.text import ClassLabels, TextEncoder
from mdm_models.training.checkpoint.store import Store
from mdm_models.training.config import TrainConfig

FILE = "config.json"
SHOWN = 5  # changes that are named

# Settings that decide what is learned, by their parts; of a run that goes on they are not to change unawares. The model
# and the shards are compared by what they are, whatever they are called.
DECIDING = {
    "data": ("image_share", "size", "frames", "frame_rate", "clip_start", "crop", "flip", "holdout"),
    "model": ("caption_dropout",),
    "objective": None,  # all of them
    "optimizer": (
        *("batch_size", "lr", "warmup", "beta1", "beta2", "eps", "clip"),
        *("ema_decay", "ema_stds"),
    ),
    "system": ("seed",),
}
# Those that change it a little, or are meant to change with the length of the run.
TOLD = {"data": ("split_shards",), "optimizer": ("cooldown",)}


def check_paths(config: TrainConfig) -> None:
    """Check the paths in the settings. Raises TrainingError for a URL where a path on a local disk is meant, and for
    one that cannot be opened."""
    named = {
        "cache": config.data.cache,
        "prometheus": config.output.prometheus,
    }
    try:
        for name, path in named.items():
            check_local(path, f"--{name}")
    except ValueError as error:
        raise TrainingError(str(error)) from None
    for path in (config.out, config.model.init_from):
        if url := url_of(path):
            Store(url).check()


def write_settings(run: Path, config: TrainConfig) -> None:
    """Write what the run is told to RUN/config.json, whole."""
    text = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    write_whole(run / FILE, lambda path: path.write_text(text))


def read_settings(run: Path) -> TrainConfig | None:
    """Read what the run was told; None if the directory holds none, or those of a model. A setting that another version
    of this package knew is left out, one that it did not know has its default.

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
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _read(hint, value)
    return tuple(value) if isinstance(value, list) else value


def record_of_run(
    config: TrainConfig, encoder: TextEncoder, shards: Sequence[ShardRecord], computed: Mapping[str, object]
) -> dict:
    """What a checkpoint keeps of the data and settings that led to it, as JSON values. computed: what is to be told of
    how it was computed."""
    return {
        "deciding": _chosen(config, DECIDING) | {"text_encoder": _identity(encoder), "tokenizer": _tokenizer(encoder)},
        "told": {**_chosen(config, TOLD), **computed},
        "shards": [dataclasses.astuple(shard) for shard in shards],
    }


def differences(before: dict, now: dict) -> tuple[list[str], list[str]]:
    """What differs between two records of a run, each a line: what cannot be meant, and what is merely to be told."""
    was, here = ([ShardRecord(*shard) for shard in record["shards"]] for record in (before, now))
    lost, new = changes(was, here)
    return [*_changed(before["deciding"], now["deciding"]), *lost], [*_changed(before["told"], now["told"]), *new]


def compare_records(path: Path, before: dict | None, now: dict, accept: bool) -> None:
    """Warn of what has changed since a checkpoint. Raises CheckpointError for what cannot be meant, unless told to
    accept it."""
    if before is None:
        warnings.warn(
            f"checkpoint {path} has no record of its data and settings, which an earlier version did not keep: "
            "whether they are the same is not known",
            stacklevel=2,
        )
        return
    wrong, new = differences(before, now)
    if wrong and not accept:
        raise CheckpointError(
            f"checkpoint {path} was made with other data or settings: {_listed(wrong)}; give them as they were, go on "
            "with --accept-changes, or choose another output directory"
        )
    if wrong or new:
        warnings.warn(f"since checkpoint {path}: {_listed([*wrong, *new])}", stacklevel=2)


def _listed(lines: list[str]) -> str:
    rest = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + rest


def _changed(before: dict, now: dict) -> list[str]:
    """A setting that one of the two does not know is left out."""
    both = [name for name in before if name in now and None not in (before[name], now[name])]
    return [f"{name} was {before[name]}, is {now[name]}" for name in both if before[name] != now[name]]


def _chosen(config: TrainConfig, parts: dict) -> dict:
    chosen = {}
    for part, names in parts.items():
        values = dataclasses.asdict(getattr(config, part))
        chosen |= {name: values[name] for name in names or values}
    return chosen


def _identity(encoder: TextEncoder) -> str:
    """Tells a frozen text encoder from another, wherever it lies; "" for one that is trained along."""
    if isinstance(encoder, ClassLabels):
        digest = hashlib.blake2b(json.dumps(encoder.numbers).encode(), digest_size=8).hexdigest()
        return f"{encoder.width} classes {digest}"
    found = getattr(encoder, "identity", None)
    return f"{found.weights}, {found.max_tokens} tokens" if found else ""


def _tokenizer(encoder: TextEncoder) -> str | None:
    """Tells how a frozen text encoder reads; None if that is not known, or follows from what it is."""
    return getattr(getattr(encoder, "identity", None), "tokenizer", None) or None
