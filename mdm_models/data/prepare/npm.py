"""Packages of the npm registry: fetched, checked against the hash that the registry states, and read."""

import base64
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import urllib3
from tqdm import tqdm

from mdm_models.data.layout import content
from mdm_models.errors import one_line
from mdm_models.storage import write_whole

REGISTRY = "https://registry.npmjs.org"
CHUNK = 1 << 20
SILENCE = 30.0  # seconds


@dataclass(frozen=True)
class Package:
    """One version of a package."""

    scope: str
    name: str
    version: str
    sha512: str  # of its tarball, in base64

    @property
    def file(self) -> str:
        return f"{self.name}-{self.version}.tgz"


def download(package: Package, folder: Path, registry: str = REGISTRY) -> Path:
    """Fetch the package's tarball into `folder` if it is not there; → its path. Raises OSError, also if it is not what
    it was."""
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        url = f"{registry}/@{package.scope}/{package.name}/-/{package.file}"
        write_whole(path, lambda partial: _fetch(url, partial, package.sha512))
    return path


def _fetch(url: str, path: Path, sha512: str) -> None:
    digest = hashlib.sha512()
    try:
        with urllib3.PoolManager(timeout=SILENCE, retries=3) as pool, path.open("wb") as file:
            response = pool.request("GET", url, preload_content=False)
            if response.status != 200:
                raise OSError(f"{url}: HTTP {response.status}")
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, desc=url.rpartition("/")[2], unit="B", unit_scale=True, dynamic_ncols=True) as bar:
                for piece in response.stream(CHUNK):
                    digest.update(piece)
                    file.write(piece)
                    bar.update(len(piece))
    except urllib3.exceptions.HTTPError as error:
        raise OSError(f"{url}: {one_line(error)}") from None
    if base64.b64encode(digest.digest()).decode() != sha512:
        raise OSError(f"{url}: its SHA-512 is not the one that is expected; what came is not kept")


def name_of(tarball: Path) -> str:
    """The full name of the package, such as @lobehub/fluent-emoji-3d. Raises ValueError for what is no package."""
    for name, data in members(tarball):
        if name == "package/package.json":
            return json.loads(data)["name"]
    raise ValueError(f"{tarball} has no package/package.json; is it an npm tarball?")


def members(tarball: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file of a tarball, one after the other. Raises ValueError for what is no .tgz or
    breaks off."""
    try:
        with tarfile.open(tarball, "r|gz") as tar:
            for member in tar:
                if member.isreg():
                    yield member.name, content(tar, member)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{tarball} is not a whole npm tarball: {one_line(error)}") from None
