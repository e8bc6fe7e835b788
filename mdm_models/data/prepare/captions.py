"""A list of captioned URLs → shards of images or clips.

  mdm prepare captions cc12m.tsv --out CC12M --size 512
  mdm prepare captions results_10M_train.csv --out WEBVID --size 256 --seconds 20

LIST is CC12M's or CC3M's .tsv, WebVid's .csv, or any .tsv, .csv or .parquet file with columns for URLs and captions.
It is read as a stream; row R becomes the sample R.jpg (or .png, .webp, .mp4, …), R.txt, R.json, so that a sample has
the same key in every run. What cannot be downloaded or decoded is skipped and counted by reason.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mdm_models.data.config import check_above_0, check_not_negative
from mdm_models.data.media import BadSample
from mdm_models.data.prepare.clips import checked_clip, clip_suffix
from mdm_models.data.prepare.fetch import Downloader
from mdm_models.data.prepare.folder import Files, ShardFolder
from mdm_models.data.prepare.images import checked_image
from mdm_models.data.prepare.url_list import UrlList

USER_AGENT = "Mozilla/5.0 (compatible; mdm-prepare; dataset download)"
CaptionedUrl = tuple[str, str]  # URL, caption


@dataclass(frozen=True)
class Options:
    url_list: Path
    """a .tsv, .csv (also .gz) or .parquet file"""
    out: Path
    """folder for the shards"""
    size: int | None = None
    """shrink what is larger to this shorter side, in pixels; default: keep it"""
    seconds: float | None = None
    """cut longer clips; default: keep them whole"""
    rows_per_shard: int = 1000
    """rows of the list in a shard"""
    url_column: str | None = None
    """default: url, contentUrl, image_url or video_url, whichever is there"""
    caption_column: str | None = None
    """default: caption, text or name, whichever is there"""
    threads: int = 64
    """downloads at a time"""
    per_host: int = 8
    """of them from one host"""
    timeout: float = 60
    """longest download in seconds"""
    max_mb: float = 50
    """largest download in 10⁶ bytes"""
    retries: int = 2
    """attempts after one that failed"""
    user_agent: str = USER_AGENT
    """what servers are told"""

    def __post_init__(self):
        check_above_0(self, "size", "seconds", "rows_per_shard", "threads", "per_host", "timeout", "max_mb")
        check_not_negative(self, "retries")


def prepare(options: Options) -> list[ShardFolder]:
    """Make shards of what a list of URLs with captions names. Raises ValueError or OSError in one line."""
    url_list = UrlList(options.url_list, options.url_column, options.caption_column)
    settings = {
        "index": f"{options.url_list.name} {url_list.fingerprint()}",  # as folders that were begun before call it
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
    """Pair each row with its key, which is its number."""
    return ((f"{number:09d}", row) for number, row in enumerate(url_list))


def sample_of(row: CaptionedUrl, downloader: Downloader, size: int | None, seconds: float | None) -> Files:
    """Download one sample and make its files. Raises BadSample."""
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
