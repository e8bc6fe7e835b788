"""Reading a tar's headers in few lines, against tarfile."""

import io
import tarfile

import pytest
import webdataset

from mdm_models.data.plain_tar import plain_files

FILES = {"a/b.jpg": b"", "a/b.txt": b"x" * 512, "a/b.json": "größe".encode() * 200, "ä.cls": b"1"}


def tar_of(files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT, **told) -> bytes:
    """The members alone, without the zeros at the end."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=form) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in told.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))
        end = tar.offset
    return written.getvalue()[:end]


def read_by_tarfile(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_plain_members_are_those_that_tarfile_finds(form):
    data = tar_of(FILES, form)
    assert plain_files(data) == read_by_tarfile(data) == list(FILES.items())


def test_members_of_webdatasets_writer_are_plain_ones():
    plain = {name: content for name, content in FILES.items() if name.isascii()}
    data = tar_of(plain, tarfile.PAX_FORMAT, mtime=1700000000.25)
    assert data[156:157] == tarfile.XHDTYPE
    assert plain_files(data) == read_by_tarfile(data) == list(plain.items())
    assert plain_files(data[:1024]) is None  # what belongs to a file that is not there
    assert plain_files(tar_of(FILES, tarfile.PAX_FORMAT)) is None  # of a name that is not ASCII
    written = io.BytesIO()
    with webdataset.TarWriter(written, encoder=False) as tar:
        tar.write({"__key__": "a", "jpg": b"1", "txt": b"2"})
    assert plain_files(written.getvalue()[: 8 * 512]) == [("a.jpg", b"1"), ("a.txt", b"2")]


def test_a_long_name_in_two_parts_is_put_together():
    data = tar_of({f"{'folder/' * 15}{'n' * 90}.jpg": b"1"})
    assert plain_files(data) == read_by_tarfile(data)


def test_a_folder_in_the_manner_of_old_tars_is_left_to_tarfile():
    assert plain_files(tar_of({"folder/": b""}, type=tarfile.AREGTYPE)) is None


@pytest.mark.parametrize(
    "told",
    [{"pax_headers": {"path": "c.jpg"}}, {"type": tarfile.SYMTYPE, "linkname": "b"}, {"type": tarfile.DIRTYPE}],
)
def test_what_is_more_than_a_plain_file_is_left_to_tarfile(told):
    assert plain_files(tar_of({"a.jpg": b"", "b.jpg": b""}, tarfile.PAX_FORMAT, **told)) is None


@pytest.mark.parametrize("place", [0, 124, 150, 156])
def test_a_header_that_is_spoilt_is_left_to_tarfile(place):
    data = bytearray(tar_of(FILES))
    data[place] ^= 1
    assert plain_files(bytes(data)) is None


@pytest.mark.parametrize("length", [511, 1023, 1500, 1536 + 512 + 100])
def test_bytes_that_end_within_a_member_are_left_to_tarfile(length):
    assert plain_files(tar_of(FILES)[:length]) is None
