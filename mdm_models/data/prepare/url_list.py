"""Lists of captioned URLs, read as a stream: CC12M's and CC3M's TSV, WebVid's CSV, and Parquet."""

import csv
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mdm_models.data.prepare.tables import rows_of
from mdm_models.plain_text import EXCEL, encoding_of, stripped

URL_COLUMNS = ("url", "contenturl", "image_url", "video_url")  # lower case
CAPTION_COLUMNS = ("caption", "text", "name")
FINGERPRINT_BYTES = 1 << 20


class UrlList:
    """The rows (URL, caption) of a file, in its order.

    .parquet: columns by name. .csv, .tsv (also .gz): a first line that names the columns or, as in CC12M and CC3M,
    none: the two fields of a line are then told apart by the URL's "http". Raises ValueError if there are no such
    columns.
    """

    def __init__(self, path: Path, url_column: str | None = None, caption_column: str | None = None):
        self.path = path
        self.wanted = (url_column, caption_column)
        self._is_parquet = path.suffix.lower() == ".parquet"
        names = path.name.lower().removesuffix(".gz")
        if not self._is_parquet and not names.endswith((".tsv", ".csv", ".txt")):
            raise ValueError(f"{path}: a list of URLs is a .tsv, .csv or .parquet file")
        if path.exists() and not path.is_file():  # it is read more than once
            raise ValueError(f"{path} is no file but a folder, a pipe or a device; copy the list to a file")
        self._delimiter = "," if names.endswith(".csv") else "\t"
        if self._is_parquet:
            self._columns = self._named(_parquet(path).schema_arrow.names)
        else:
            self._places, self._has_header = self._of_first_line()

    def estimated_rows(self) -> int:
        """The number of rows; of text, that of its lines: sooner found, and more if captions have line breaks."""
        if self._is_parquet:
            return _parquet(self.path).metadata.num_rows
        with self._opened() as file:
            return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b"")) - self._has_header

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """"" stands for a field that is missing."""
        if self._is_parquet:
            for batch in _parquet(self.path).iter_batches(batch_size=4096, columns=list(self._columns)):
                url, caption = (batch.column(name).to_pylist() for name in self._columns)
                yield from ((stripped(str(u or "")), stripped(str(c or ""))) for u, c in zip(url, caption, strict=True))
            return
        for fields in self._lines():
            url, caption = (stripped(fields[i]) if i < len(fields) else "" for i in self._places)
            yield url, caption

    def fingerprint(self) -> str:
        """Tells another list from this one: its size and a hash of its beginning."""
        with self.path.open("rb") as file:
            start = hashlib.sha256(file.read(FINGERPRINT_BYTES)).hexdigest()
        return f"{self.path.stat().st_size}-{start[:16]}"

    def _lines(self) -> Iterator[list[str]]:
        with self._text() as file:
            lines = self._reader(file)
            if self._has_header:
                next(lines)
            yield from lines

    @contextmanager
    def _opened(self) -> Iterator[gzip.GzipFile | io.BufferedReader]:
        try:
            with gzip.open(self.path) if self.path.suffix.lower() == ".gz" else self.path.open("rb") as file:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from None

    @contextmanager
    def _text(self) -> Iterator[io.TextIOWrapper]:
        with self._opened() as file:
            encoding = encoding_of(file.read(4))
            file.seek(0)
            yield io.TextIOWrapper(file, encoding=encoding, errors=EXCEL, newline="")

    def _reader(self, file: io.TextIOWrapper) -> Iterator[list[str]]:
        named = [name.strip().lower() for name in self.wanted if name]
        try:
            yield from rows_of(file, self._delimiter, [*named, *URL_COLUMNS])
        except csv.Error as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _of_first_line(self) -> tuple[tuple[int, int], bool]:
        """Numbers of the URL's and the caption's columns, and whether the first line names them."""
        with self._text() as file:
            first = next(self._reader(file), [])
        urls = [i for i, field in enumerate(first) if field.strip().lower().startswith(("http://", "https://"))]
        if not urls:
            url, caption = self._named(first)
            return (first.index(url), first.index(caption)), True
        if len(first) != 2:
            raise ValueError(f"{self.path}: without a line of column names it must have a URL and a caption a line")
        return (urls[0], 1 - urls[0]), False

    def _named(self, columns: list[str]) -> tuple[str, str]:
        """The names of the URL's and the caption's columns."""
        found = []
        for what, wanted, usual in zip(("url", "caption"), self.wanted, (URL_COLUMNS, CAPTION_COLUMNS), strict=True):
            known = (name for usual_name in usual for name in columns if name.strip().lower() == usual_name)
            name = wanted or next(known, None)
            if name not in columns:
                missing = f"no column {name}" if name else f"no column for the {what}"
                raise ValueError(
                    f"{self.path}: {missing} among {', '.join(columns) or 'none'}; name it by --{what}-column"
                )
            found.append(name)
        return tuple(found)


def _parquet(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
