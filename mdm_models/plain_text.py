"""Text that other programs wrote: with a byte order mark, with half a character, under names that are no UTF-8."""

import codecs
from pathlib import Path

MARK = "\ufeff"


def encoding_of(beginning: bytes) -> str:
    """Tell the encoding of text that begins so: that of its byte order mark, as Excel and Windows write it, or
    UTF-8."""
    return "utf-16" if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decoded(data: bytes) -> str:
    """Give the text of a file, without its byte order mark. Raises UnicodeDecodeError."""
    return data.decode(encoding_of(data))


def decoded_table(data: bytes) -> str:
    """Give the text of a file, without its byte order mark; what is not UTF-8 is as Excel writes it in the West. Raises
    UnicodeDecodeError."""
    try:
        return decoded(data)
    except UnicodeDecodeError:
        return data.decode("cp1252")


def read_lines(path: Path) -> list[str]:
    """Give the lines of a text file. Raises OSError or UnicodeDecodeError."""
    return decoded(path.read_bytes()).splitlines()


def stripped(text: str) -> str:
    """Strip a text of white space and byte order marks around it, and put a space for a zero byte, of which a disk that
    lost its power leaves many, and U+FFFD for half a character (a lone surrogate, of an escape in JSON that was cut),
    which no tokenizer or file takes."""
    text = text.replace("\0", " ").strip().strip(MARK).strip()
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def legible(name: str) -> str:
    """Give the name of a file as text: one whose bytes are not UTF-8 is taken to be Latin-1."""
    raw = name.encode("utf-8", "surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
