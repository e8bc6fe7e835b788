"""Tables in plain text as spreadsheets save them: fields with commas, semicolons or tabs between them."""

import csv
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

DELIMITERS = (",", ";", "\t")

csv.field_size_limit(sys.maxsize)  # captions of alt text may be long


def rows_of(file: TextIO, usual: str, columns: Sequence[str]) -> Iterator[list[str]]:
    """The rows of a table but for empty ones, that of its column names first if it has one. Raises csv.Error, also for
    a quote that is never closed, and would make one field of all that follows.

    usual: what stands between fields, unless Excel's line `sep=;` says otherwise, or another delimiter is the one by
    which the first line has one of these columns (lower case).
    """
    first = file.readline()
    said = re.match("sep=(.)", first)
    if said:
        delimiter, first = said[1], file.readline()
    else:
        delimiter = next((one for one in (usual, *DELIMITERS) if _names(first, one) & {*columns}), usual)
    is_plain = usual == delimiter == "\t"  # in a TSV quotes are the caption's
    quoting = csv.QUOTE_NONE if is_plain else csv.QUOTE_MINIMAL
    lines: list[str] = []  # of the row at hand

    def noted() -> Iterator[str]:
        for line in itertools.chain([first], file):
            lines.append(line)
            yield line

    reader = csv.reader(noted(), delimiter=delimiter, quoting=quoting)
    for row in reader:
        if len(lines) > 1 and "".join(lines).count('"') % 2:
            raise csv.Error(f"the quote that opens in row {reader.line_num - len(lines) + 1} is never closed")
        lines.clear()
        if row:
            yield row


def _names(line: str, delimiter: str) -> set[str]:
    return {name.strip().strip('"').lower() for name in line.split(delimiter)}
