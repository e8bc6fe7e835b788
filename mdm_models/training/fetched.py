"""A model that lies in an object store, copied to this machine before it is used: `mdm sample s3://bucket/run`."""

import json
import re
from pathlib import Path

from mdm_models.errors import CheckpointError
from mdm_models.storage import url_of, write_whole

MODEL = re.compile(r"(model/)?(config\.json|pipeline\.json|model\.safetensors|text_encoder/[^/]+)")  # of a run as well
AVERAGES = re.compile(r"averages/step-\d{8,}\.safetensors")
VERSIONS = ".versions.json"  # name → what the store said of the file that was copied


def fetched(init_from: str) -> str:
    """Give what a run begins from, on this machine: of a URL, the copy of the model that is there. Raises
    TrainingError."""
    if not url_of(init_from):
        return init_from
    try:
        folder = on_this_machine(Path(init_from))
    except FileNotFoundError as error:
        raise CheckpointError(f"init_from {error}") from None
    return str(folder / "model" if (folder / "model").is_dir() else folder)


def on_this_machine(model: Path, averages: bool = False) -> Path:
    """Give a model's path on this machine: the same; of a URL, the copy of the model there, or of that which a run
    there has left, in the folder `models` of the user's cache directory. What has not changed since is not copied
    again. averages: with the run's snapshots.

    Raises FileNotFoundError if no model is there, TrainingError for a store that cannot be read.
    """
    if not (url := url_of(model)):
        return model
    from filelock import FileLock  # nothing of this is needed to sample a model that is here

    from mdm_models.data.cache import cache_name, user_cache
    from mdm_models.data.locations import look_up
    from mdm_models.training.checkpoint.store import Store

    store = Store(url)
    store.check()
    names = [name for name in store.names() if MODEL.fullmatch(name) or (averages and AVERAGES.fullmatch(name))]
    if not any(name.endswith("model.safetensors") for name in names):
        raise FileNotFoundError(f"{store.url}: there is no model, nor a run that has left one")
    folder = user_cache() / "models" / cache_name(store.url)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # several processes may want it at once: one copies, the others wait
        noted = folder / VERSIONS
        here = json.loads(noted.read_text()) if noted.exists() else {}
        for name in names:
            version = str(look_up(f"{store.url}/{name}"))
            if here.get(name) != version:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(folder / name, lambda partial, name=name: store.get(name, partial))
                here[name] = version
        write_whole(noted, lambda partial: partial.write_text(json.dumps(here)))
    return folder
