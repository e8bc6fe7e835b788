"""Write beside each shard where its samples lie, so that training on any machine starts without reading the shard.

    mdm index "s3://bucket/cc12m/{00000..01242}.tar"

writes s3://bucket/cc12m/00000.tar.index and so on, 16 bytes a sample. A shard that is not on a local disk is copied
into the cache folder for that, once. An index is used as long as its shard has the size that it had.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

from tqdm import tqdm
from tyro.conf import Positional, arg

from mdm_models.commands.line import command
from mdm_models.data.cache import ShardCache
from mdm_models.data.config import DataConfig
from mdm_models.data.locations import expand, is_local, read_beside, write_beside
from mdm_models.data.shard_index import INDEX, Shard, scan, to_bytes
from mdm_models.data.shards import AT_ONCE, open_shard
from mdm_models.errors import DataError


def write_index(name: str, cache: ShardCache) -> Shard:
    """Write the index of one shard, unless it is there. Raises DataError."""
    shard = scan(name, may_be_empty=True) if is_local(name) else open_shard(name, cache)
    if not shard.reached:
        raise DataError(f"data: shard {name} {shard.damage}")
    index = to_bytes(shard)
    if read_beside(name, INDEX) != index:
        write_beside(name, INDEX, index)
    return shard


@dataclass(frozen=True)
class Options:
    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS")]
    """tar files, folders of them, patterns, or URLs"""
    cache: str = DataConfig.cache
    """folder for copies of shards that are not on a local disk; empty: a folder of the user's cache directory"""
    cache_gb: float = DataConfig.cache_gb
    """largest size of those copies, in 10⁹ bytes"""


def index(options: Options) -> None:
    """Write the index of each shard. Raises DataError, for shards without any sample too."""
    cache = ShardCache.of(options.cache, options.cache_gb)
    names = expand(options.shards)
    samples = 0
    with ThreadPoolExecutor(AT_ONCE) as pool, tqdm(total=len(names), unit=" shards", dynamic_ncols=True) as bar:
        for shard in pool.map(lambda name: write_index(name, cache), names):
            samples += len(shard)
            if shard.damage:
                tqdm.write(f"shard {shard.path} {shard.damage}; the {len(shard)} samples before are used")
            bar.update()
    print(f"{samples} samples in {len(names)} shards")
    if not samples:
        raise DataError(f"data: no image or clip in any of the {len(names)} shards, {names[0]} the first of them")


main = command("index", __doc__, Options, index)
