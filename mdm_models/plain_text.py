"""Text that other programs wrote: with a byte order mark, with half a character, under names that are no UTF-8."""

import codecs
import io
import re
from pathlib import Path

MARK = "\ufeff"
EXCEL = "excel"
"""a way to treat what is not UTF-8, for `bytes.decode`: as Excel writes it in the West"""


def encoding_of(beginning: bytes) -> str:
    """Tell the encoding of text that begins with these four bytes: that of its byte order mark, as Excel and Windows
    write it, or UTF-8."""
    if beginning.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decoded(data: bytes) -> str:
    """Give the text of a file, without its byte order mark. Raises UnicodeDecodeError."""
    return data.decode(encoding_of(data))


def _as_excel(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


codecs.register_error(EXCEL, _as_excel)


def read_lines(path: Path) -> list[str]:
    """Give the lines of a text file but for blank ones at its end; form feeds and U+2028 stand within lines, as for all
    who count them but str.splitlines. Raises OSError or UnicodeDecodeError."""
    lines = [line.removesuffix("\n") for line in io.StringIO(decoded(path.read_bytes()), newline=None)]
    while lines and not stripped(lines[-1]):
        lines.pop()
    return lines


def stripped(text: str) -> str:
    """Strip a text of white space and byte order marks around it, and put a space for a zero byte, of which a disk that
    lost its power leaves many, and U+FFFD for half a character (a lone surrogate, of an escape in JSON that was cut),
    which no tokenizer or file takes."""
    text = text.replace("\0", " ").strip().strip(MARK).strip()
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def legible(name: str) -> str:
    """Give the name of a file as a line of text: one whose bytes are not UTF-8 is taken to be Latin-1."""
    raw = re.sub(rb"[\r\n]+", b" ", name.encode("utf-8", "surrogateescape"))
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
