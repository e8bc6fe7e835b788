"""The models whose weights come with this package: each a folder mdm_models/weights/NAME as `Pipeline.save_pretrained`
writes it, in bfloat16, and its model card, README.md."""

from pathlib import Path

from mdm_models.storage import CONFIG_FILE

FOLDER = Path(__file__).with_name("weights")
CARD = "README.md"


def shipped_names() -> list[str]:
    """Give the names of the models whose weights come with this package, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{CONFIG_FILE}"))


def shipped_or(source: str | Path) -> Path:
    """Give the folder of the model of this name that comes along; for what is a path already, or no such name, the
    path."""
    path = Path(source)
    return FOLDER / path if not path.exists() and str(source) in shipped_names() else path
