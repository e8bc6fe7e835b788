"""A list of captioned URLs → shards of images or clips.

  mdm prepare captions cc12m.tsv --out CC12M --size 512
  mdm prepare captions results_10M_train.csv --out WEBVID --size 256 --seconds 20

INDEX is CC12M's or CC3M's .tsv, WebVid's .csv, or any .tsv, .csv or .parquet file with columns for URLs and captions.
It is read as a stream; row R becomes the sample R.jpg (or .png, .webp, .mp4, …), R.txt, R.json, so that a sample has
the same key in every run. What cannot be downloaded or decoded is skipped and counted by reason.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from mdm_models.data.media import BadSample
from mdm_models.data.prepare.clips import checked_clip, clip_suffix
from mdm_models.data.prepare.fetch import Downloader
from mdm_models.data.prepare.folder import Files, ShardFolder
from mdm_models.data.prepare.images import checked_image
from mdm_models.data.prepare.url_list import UrlList

USER_AGENT = "Mozilla/5.0 (compatible; mdm-prepare; dataset download)"
CaptionedUrl = tuple[str, str]  # URL, caption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("index", metavar="INDEX", type=Path, help="a .tsv, .csv (also .gz) or .parquet file")
    add("--out", metavar="DIR", type=Path, required=True, help="folder for the shards")
    add("--size", type=int, metavar="PIXELS", help="shrink what is larger to this shorter side (default: keep it)")
    add("--seconds", type=float, metavar="S", help="cut longer clips (default: keep them whole)")
    add("--rows-per-shard", type=int, default=1000, metavar="N", help="of the index (default: %(default)s)")
    add("--url-column", metavar="NAME", help="default: url, contentUrl, image_url or video_url, whichever is there")
    add("--caption-column", metavar="NAME", help="default: caption, text or name, whichever is there")
    add("--threads", type=int, default=64, metavar="N", help="downloads at a time (default: %(default)s)")
    add("--per-host", type=int, default=8, metavar="N", help="of them from one host (default: %(default)s)")
    add("--timeout", type=float, default=60, metavar="S", help="longest download in seconds (default: %(default)s)")
    add("--max-mb", type=float, default=50, metavar="MB", help="largest download (default: %(default)s)")
    add("--retries", type=int, default=2, metavar="N", help="attempts after one that failed (default: %(default)s)")
    add("--user-agent", default=USER_AGENT, metavar="TEXT", help="what servers are told (default: %(default)s)")


def prepare(options: argparse.Namespace) -> list[ShardFolder]:
    """Raises ValueError or OSError in one line."""
    url_list = UrlList(options.index, options.url_column, options.caption_column)
    settings = {
        "index": f"{options.index.name} {url_list.fingerprint()}",
        "columns": [options.url_column, options.caption_column],
        "size": options.size,
        "seconds": options.seconds,
        "rows-per-shard": options.rows_per_shard,
    }
    folder = ShardFolder(options.out, settings)
    downloader = Downloader(
        per_host=options.per_host,
        timeout=options.timeout,
        largest=int(options.max_mb * 1e6),
        retries=options.retries,
        user_agent=options.user_agent,
    )

    def make(row: CaptionedUrl) -> Files:
        return sample_of(row, downloader, options.size, options.seconds)

    with contextlib.closing(downloader):
        folder.write(
            numbered(url_list), make,
            per_shard=options.rows_per_shard, workers=options.threads, total=url_list.estimated_rows(), unit="rows",
        )  # fmt: skip
    return [folder]


def numbered(url_list: UrlList) -> Iterator[tuple[str, CaptionedUrl]]:
    """The key of each row: its number."""
    return ((f"{number:09d}", row) for number, row in enumerate(url_list))


def sample_of(row: CaptionedUrl, downloader: Downloader, size: int | None, seconds: float | None) -> Files:
    """The files of one sample. Raises BadSample."""
    url, caption = row
    if not caption.strip():
        raise BadSample("caption empty", url)
    data = downloader.fetch(url)
    facts: dict[str, object] = {"url": url, "caption": caption}
    if clip_suffix(data):
        media = checked_clip(data, size, seconds)
        facts |= {"frames": media.frames, "fps": media.fps}
    else:
        media = checked_image(data, size)
    facts |= {"width": media.width, "height": media.height}
    return {media.suffix: media.data, "txt": caption.encode(), "json": json.dumps(facts, ensure_ascii=False).encode()}
