"""Drawings of things in eight styles → shards of captioned pictures.

  mdm prepare emoji --out EMOJI             downloads 40 MB of npm packages to EMOJI/tarballs
  mdm prepare emoji --out EMOJI *.tgz       takes these packages, downloaded before

EMOJI/NNNNN.tar are to be trained on, EMOJI/held-out/NNNNN.tar to judge by: pairs of a name and a style, a share of
those whose name is drawn in four styles or more, so that what is asked for is known and only its drawing is not. Which
pairs these are depends on nothing else. KEY.webp is 128×128 with transparency, KEY.txt a caption, "red apple, noto
style", KEY.json the name, the style and the group: face, nature, food, place, activity, object. People, flags, symbols
and clock faces are left out. EMOJI/NOTICE names whose the drawings are and under which licence.
"""

import functools
import hashlib
import io
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mdm_models.data.config import check_above_0, check_share
from mdm_models.data.media import BadSample
from mdm_models.data.prepare import fluent_emoji
from mdm_models.data.prepare.folder import Files, ShardFolder
from mdm_models.data.prepare.npm import Package, download, members, name_of
from mdm_models.storage import write_whole

ICONS = (
    Package("iconify-json", "noto", "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
    Package("iconify-json", "twemoji", "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
    Package("iconify-json", "fluent-emoji-flat", "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
    Package("iconify-json", "fluent-emoji", "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA=="),
    Package("iconify-json", "noto-v1", "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="),
    Package("iconify-json", "emojione", "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="),
    Package("iconify-json", "fxemoji", "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ=="),
)  # fmt: skip
RENDERED = fluent_emoji.PACKAGES[0]  # the 3-D art, as pictures
STYLES = {
    "@iconify-json/noto": "noto",
    "@iconify-json/twemoji": "twemoji",
    "@iconify-json/fluent-emoji-flat": "flat",
    "@iconify-json/fluent-emoji": "gradient",
    "@iconify-json/noto-v1": "blob",
    "@iconify-json/emojione": "emojione",
    "@iconify-json/fxemoji": "firefox",
    fluent_emoji.IMAGES: "3d",
}
GROUPED = tuple(STYLES)[:3]  # the packages whose groups are taken, the first one's first
GROUPS = {
    "Smileys & Emotion": "face",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "place",
    "Activities": "activity",
    "Objects": "object",
}
CLOCK_FACES = ("-oclock", "-thirty")  # how their names end
KNOWN_STYLES = 4  # in which a name must be drawn for one of its drawings to be held out
OLD_NAME = 3  # sets that must draw a thing under a name that has gone out of use, for it to be taken
SIZE = 128  # pixels
QUALITY = 86  # of the WebP files
PER_SHARD = 3000
NOTICE = """\
The drawings in this folder, by the style that their captions name:

3d, flat, gradient   Fluent Emoji, Copyright (c) Microsoft Corporation. MIT License, below.
noto, blob           Noto Emoji, Copyright Google. Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0
firefox              FxEmojis, Copyright Mozilla. Apache License 2.0
twemoji              Twemoji, Copyright Twitter, Inc. and other contributors. CC BY 4.0,
                     https://creativecommons.org/licenses/by/4.0/
emojione             EmojiOne 2, Copyright EmojiOne (JoyPixels). CC BY 4.0

They were taken from the npm packages @iconify-json/… and @lobehub/fluent-emoji-3d, drawn at 128×128 pixels and
compressed.

"""


@dataclass(frozen=True)
class Drawing:
    """One thing as one style draws it. source: an SVG document, or the bytes of a picture."""

    name: str
    style: str
    group: str
    source: str | bytes

    @property
    def key(self) -> str:
        return f"{slug(self.name)}-{self.style}"

    @property
    def place(self) -> float:
        """A number in 0…1, as good as random and always the same: where in the shards it stands, and whether it is held
        out."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8]) / 2**64


@dataclass(frozen=True)
class Options:
    tarballs: tuple[Path, ...]
    """npm tarballs to take in place of downloading them"""
    out: Path
    """folder for the shards"""
    held_out: float = 0.03
    """share of those pairs that are held out"""
    threads: int = os.cpu_count() or 1
    """how many work at a time; default: as many as processors"""

    def __post_init__(self):
        check_share(self, "held_out")
        check_above_0(self, "threads")


def prepare(options: Options) -> list[ShardFolder]:
    """Make shards of emoji and icons of many styles, and those of the held-out ones. Raises ValueError or OSError in
    one line."""
    tarballs = options.tarballs or [download(package, options.out / "tarballs") for package in (*ICONS, RENDERED)]
    by_name = {name_of(path): path for path in tarballs}
    for name, path in by_name.items():
        if name not in STYLES:
            raise ValueError(f"{path} is the package {name}; expected are {', '.join(STYLES)}")
    settings = {"packages": sorted(by_name), "held_out": options.held_out}
    every = drawings(by_name)
    folders: list[ShardFolder] = []
    for out, taken in zip((options.out, options.out / "held-out"), divided(every, options.held_out), strict=True):
        if taken:
            folders.append(folder := ShardFolder(out, settings))
            write_whole(out / "NOTICE", lambda path: path.write_text(NOTICE + fluent_emoji.LICENCE))
            items = [(drawing.key, drawing) for drawing in sorted(taken, key=lambda drawing: drawing.place)]
            how = {"per_shard": PER_SHARD, "workers": options.threads, "total": len(items), "unit": "drawings"}
            folder.write(items, sample, **how)
    return folders


def divided(every: Iterable[Drawing], held_out: float) -> tuple[list[Drawing], list[Drawing]]:
    """Divide drawings into those to train on and those to judge by: the share `held_out` of the ones of names that
    KNOWN_STYLES styles draw."""
    every = list(every)
    styles = Counter(slug(drawing.name) for drawing in every)
    parts: tuple[list[Drawing], list[Drawing]] = [], []
    for drawing in every:
        parts[styles[slug(drawing.name)] >= KNOWN_STYLES and drawing.place < held_out].append(drawing)
    return parts


def drawings(tarballs: dict[str, Path]) -> list[Drawing]:
    """What the packages, by their names, draw of the six groups. Raises ValueError if none of them tells groups."""
    icons = {name: _icons(path) for name, path in tarballs.items() if name != fluent_emoji.IMAGES}
    grouped = [icons[name] for name in GROUPED if name in icons]
    groups = _groups(grouped)
    old_names = _old_names(grouped, groups)
    groups |= old_names
    if not groups:
        raise ValueError(f"no package tells what groups things are in; give one of {', '.join(GROUPED)} too")
    found = [drawing for name, files in icons.items() for drawing in _drawn(files, STYLES[name], groups)]
    if fluent_emoji.IMAGES in tarballs:
        found += _rendered(tarballs[fluent_emoji.IMAGES], groups)
    found = list({drawing.key: drawing for drawing in reversed(found)}.values())  # of two of one name the first
    sets = Counter(slug(drawing.name) for drawing in found)
    return [drawing for drawing in found if (each := slug(drawing.name)) not in old_names or sets[each] >= OLD_NAME]


def _icons(tarball: Path) -> dict[str, dict]:
    """icons.json and metadata.json of a package of @iconify-json, by these names."""
    files = {name.removeprefix("package/"): data for name, data in members(tarball)}
    if missing := {"icons.json", "metadata.json"} - files.keys():
        raise ValueError(f"{tarball} has no package/{min(missing)}; is it a package of @iconify-json?")
    return {name: json.loads(files[name]) for name in ("icons.json", "metadata.json")}


def _groups(packages: list[dict[str, dict]]) -> dict[str, str | None]:
    """Group by slug of all things whose category is known; None: left out."""
    groups: dict[str, str | None] = {}
    for package in packages:
        for category, slugs in package["metadata.json"].get("categories", {}).items():
            for each in slugs:
                groups.setdefault(each, None if each.endswith(CLOCK_FACES) else GROUPS.get(category))
    return groups


def _old_names(packages: list[dict[str, dict]], groups: dict[str, str | None]) -> dict[str, str | None]:
    """The same for the names that have gone out of use, under which older sets may draw something else."""
    aliases = [item for package in packages for item in package["icons.json"].get("aliases", {}).items()]
    return {alias: groups.get(what["parent"]) for alias, what in aliases if alias not in groups}


def _drawn(package: dict[str, dict], style: str, groups: dict[str, str | None]) -> Iterator[Drawing]:
    """The icons of a package. Those of fxemoji have lost the hyphens of their names."""
    icons = package["icons.json"]
    full: dict[str, str] = {each.replace("-", ""): each for each in reversed(groups)} if style == "firefox" else {}
    named: dict[str, dict] = icons["icons"]
    for own, icon in named.items():
        key = full.get(own, own)
        if group := groups.get(key):
            box = [icon.get(side, icons.get(side, least)) for side, least in BOX.items()]
            yield Drawing(key.replace("-", " "), style, group, SVG.format(*box, icon["body"]))


BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # of an icon, with Iconify's defaults
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    f'width="{SIZE}" height="{SIZE}" viewBox="{{}} {{}} {{}} {{}}">{{}}</svg>'
)


def _rendered(tarball: Path, groups: dict[str, str | None]) -> Iterator[Drawing]:
    for key, data in fluent_emoji.arts([tarball]):
        try:
            name = fluent_emoji.caption_of(key)
        except BadSample:
            continue  # no emoji
        if group := groups.get(slug(name)):
            yield Drawing(name, STYLES[fluent_emoji.IMAGES], group, data)


@functools.cache
def slug(name: str) -> str:
    """Make a key of a name: "woman’s hat" → "womans-hat"."""
    ascii_only = unicodedata.normalize("NFKD", name.replace("’", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only.lower()).strip("-")


def sample(drawing: Drawing) -> Files:
    """Make the files of one drawing's sample. Raises BadSample for one that cannot be drawn."""
    file = io.BytesIO()
    _picture(drawing.source).save(file, format="WEBP", quality=QUALITY)
    facts = {"name": drawing.name, "style": drawing.style, "group": drawing.group}
    caption = f"{drawing.name}, {drawing.style} style"
    return {"webp": file.getvalue(), "txt": caption.encode(), "json": json.dumps(facts, ensure_ascii=False).encode()}


def _picture(source: str | bytes) -> Image.Image:
    """SIZE² with transparency."""
    if isinstance(source, str):
        import resvg_py

        try:
            source = resvg_py.svg_to_bytes(svg_string=source, skip_system_fonts=True)
        except ValueError as error:
            raise BadSample("undrawable", str(error)) from None
    try:
        with Image.open(io.BytesIO(source)) as picture:
            return picture.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise BadSample("undecodable", f"{type(error).__name__}: {error}") from None
