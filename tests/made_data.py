"""Shards made for a test: clips whose every frame can be told from the others, and small pictures."""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from PIL import Image

GREY_STEP = 10  # frame t of a made clip is grey of this times t


def encode_clip(frames: int = 24, fps: int = 24, width: int = 32, height: int = 32, key_frame_every: int = 8) -> bytes:
    """An mp4 whose frame t is a plane of grey GREY_STEP · t."""
    greys = [min(255, GREY_STEP * t) for t in range(frames)]
    return encode_frames([np.full((height, width, 3), grey, np.uint8) for grey in greys], fps, key_frame_every)


def encode_frames(pictures: Sequence[np.ndarray], fps: int = 24, key_frame_every: int = 8) -> bytes:
    """(H, W, 3) uint8 pictures → an mp4."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"g": str(key_frame_every), "crf": "10"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv444p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def encode_image(picture: np.ndarray, form: str = "png", **options) -> bytes:
    """(H, W, 3 or 4) uint8 → a file of that form."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format=form, **options)
    return file.getvalue()


PICTURE = encode_image(np.zeros((16, 16, 3), np.uint8))


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A tar of the files KEY.SUFFIX, from key → suffix → bytes."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def clip() -> bytes:
    """24 frames at 24 fps of 32² pixels."""
    return encode_clip()


@pytest.fixture
def shard_of(tmp_path: Path, clip: bytes) -> Callable[..., Path]:
    """shard_of("a.tar", 3) writes clips a0, a1, a2, captioned so; extra samples may be given by key."""

    def write(name: str, count: int, **extra: dict[str, bytes]) -> Path:
        stem = name.removesuffix(".tar")
        samples = {f"{stem}{i}": {"mp4": clip, "txt": f"{stem}{i}".encode()} for i in range(count)}
        return write_shard(tmp_path / name, samples | extra)

    return write


@pytest.fixture
def pictures_of(tmp_path: Path) -> Callable[..., Path]:
    """pictures_of("a.tar", 3) writes black pictures a0, a1, a2, captioned so; extra samples may be given by key."""

    def write(name: str, count: int, **extra: dict[str, bytes]) -> Path:
        stem = name.removesuffix(".tar")
        samples = {f"{stem}{i}": {"png": PICTURE, "txt": f"{stem}{i}".encode()} for i in range(count)}
        return write_shard(tmp_path / name, samples | extra)

    return write


@pytest.fixture
def bucket() -> Iterator[Callable[[Path], str]]:
    """bucket(shard) puts a file into an object store and gives its URL; the store is empty after the test."""
    store = fsspec.filesystem("memory")

    def put(path: Path) -> str:
        store.pipe_file(f"/bucket/{path.name}", path.read_bytes())
        return f"memory://bucket/{path.name}"

    yield put
    store.store.clear()
