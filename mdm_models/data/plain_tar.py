"""The files in a few bytes of a tar, in a fifth of the time that tarfile takes to read their headers."""

import re
import tarfile

BLOCK = tarfile.BLOCKSIZE
TIMES = re.compile(rb"(\d+ (mtime|atime|ctime)=[\d.]+\n)+")  # what webdataset's TarWriter puts before each file


def plain_files(data: bytes) -> list[tuple[str, bytes]] | None:
    """List names and contents of the files in a tar, if all members are regular files that are whole and whose headers
    say all there is to say but fractions of seconds, as in nearly every shard; None for any other bytes, which tarfile
    is to judge."""
    files, place, owed = [], 0, False
    while place < len(data) or owed:
        header = data[place : place + BLOCK]
        if len(header) < BLOCK:
            return None
        try:
            size, checksum = _number(header[124:136]), _number(header[148:156])
        except ValueError:  # of 8 GB and more, or damaged
            return None
        start = place + BLOCK
        if checksum != sum(header[:148]) + sum(header[156:]) + 8 * ord(" ") or size < 0 or start + size > len(data):
            return None
        content = data[start : start + size]
        owed = header[156:157] == tarfile.XHDTYPE and not owed and TIMES.fullmatch(content) is not None
        if not owed:
            name, folder = _text(header[:100]), _text(header[345:500])
            if header[156:157] not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not name or name.endswith("/"):
                return None
            files.append((f"{folder}/{name}" if folder else name, content))
        place = start + -(-size // BLOCK) * BLOCK
    return files


def _number(field: bytes) -> int:
    """Octal, up to a zero byte. Raises ValueError."""
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(tarfile.ENCODING, "surrogateescape")
