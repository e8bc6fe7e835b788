"""Data sets of Hugging Face's `datasets` on disk: .parquet files as the Hub has them, .arrow files of save_to_disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm_models.data.prepare.captioned_files import Captioned
from mdm_models.data.prepare.url_list import CAPTION_COLUMNS

ROWS_AT_ONCE = 64  # of pictures in memory


class HuggingFaceRows:
    """The rows of the files, in their order, each with its key: pictures or clips as bytes in the first column that has
    such, captions in one called caption, text or name, or classes in one of `ClassLabel`.

    classes: names of the classes in the order of their numbers, if there are any. Raises ValueError if there are no
    such columns, the files are damaged, or pyarrow is not installed.
    """

    def __init__(self, files: list[Path]):
        self.files = [_Table(path) for path in files]
        schema = self.files[0].schema
        self._media = next((field.name for field in schema if _has_bytes(field.type)), None)
        if self._media is None:
            raise ValueError(f"{files[0]} has no column of pictures among {', '.join(schema.names)}")
        named = {name.strip().lower(): name for name in reversed(schema.names)}
        self._caption = next((named[name] for name in CAPTION_COLUMNS if name in named), None)
        self._label, self.classes = _classes(schema)
        if self._caption is None and self._label is None:
            known = ", ".join(CAPTION_COLUMNS)
            raise ValueError(f"{files[0]} has no column {known}, and none of classes, among {', '.join(schema.names)}")

    def __len__(self) -> int:
        return sum(table.rows for table in self.files)

    def __iter__(self) -> Iterator[tuple[str, Captioned]]:
        columns = [name for name in (self._media, self._caption, self._label) if name]
        for number, table in enumerate(self.files):
            for row, fields in enumerate(table.read(columns)):
                yield f"{number:05d}_{row:07d}", self._item(f"row {row} of {table.path}", fields)

    def _item(self, name: str, fields: dict[str, Any]) -> Captioned:
        media = (fields[self._media] if self._media else None) or b""
        if isinstance(media, dict):  # {"bytes": …, "path": the name that it had}
            media = media.get("bytes") or b""
        label = fields[self._label] if self._label else None
        if label is not None and not 0 <= label < len(self.classes):  # −1 is none
            label = None
        caption = (fields[self._caption] if self._caption else "") or ("" if label is None else self.classes[label])
        return Captioned(name, media, str(caption), label)


class _Table:
    """A .parquet or .arrow file. Raises ValueError."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            import pyarrow.ipc
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: reading it needs the package pyarrow: pip install pyarrow") from None
        self.path = path
        try:
            if path.suffix.lower() == ".parquet":
                file = pyarrow.parquet.ParquetFile(path)
                self.schema, self.rows = file.schema_arrow, file.metadata.num_rows
                self._batches = lambda columns: file.iter_batches(ROWS_AT_ONCE, columns=columns)
            else:
                table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()  # mapped, not in memory
                self.schema, self.rows = table.schema, table.num_rows
                self._batches = lambda columns: table.select(columns).to_batches(ROWS_AT_ONCE)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a whole {path.suffix} file: {error}") from None

    def read(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        for batch in self._batches(columns):
            yield from batch.to_pylist()


def _has_bytes(kind) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind)


def _classes(schema) -> tuple[str | None, list[str]]:
    """The column of classes and their names, by what `datasets` wrote into the file."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    for name, feature in written.get("info", {}).get("features", {}).items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and name in schema.names:
            return name, feature["names"]
    return None, []
