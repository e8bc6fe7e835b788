"""Lay mdm_kernels out as a kernel repository of Hugging Face's `kernels`: python hub/build.py OUT

OUT gets build.toml, the sources in torch-ext/mdm_kernels, and a build of them for every backend in build/torch-BACKEND,
as kernel-builder makes it of Python sources: the package itself and metadata.json. The ops of a build are registered
under a name of its own, so that it stands beside an installed mdm_kernels, and beside other builds, in one process.
"""

import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "mdm_kernels"
NAMESPACE_LINE = 'NAMESPACE = "mdm_kernels"\n'


def digest(package: Path) -> str:
    """Eight digits of the sources."""
    sources = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sources.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return sources.hexdigest()[:8]


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))


def build(out: Path) -> None:
    if out.exists():
        raise SystemExit(f"{out} exists; give a folder that does not")
    shutil.copytree(REPOSITORY / "hub", out, ignore=shutil.ignore_patterns("__pycache__", "build.py"))
    copy(PACKAGE, out / "torch-ext/mdm_kernels")
    general = tomllib.loads((out / "build.toml").read_text())["general"]
    for backend in general["backends"]:
        variant = out / f"build/torch-{backend}"
        copy(PACKAGE, variant)
        name = f"mdm_kernels_{general['version']}_{backend}_{digest(PACKAGE)}"
        library = variant / "library.py"
        text = library.read_text()
        if NAMESPACE_LINE not in text:
            raise SystemExit(f"{PACKAGE}/library.py does not say {NAMESPACE_LINE.strip()}: the ops would have no name")
        library.write_text(text.replace(NAMESPACE_LINE, f'NAMESPACE = "{name}"\n'))
        metadata = {
            "id": name,
            "name": general["name"],
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python hub/build.py OUT")
    build(Path(sys.argv[1]))
