"""Encode the captions of WebDataset shards once, so that training need not run the text encoder.

    mdm precompute DATA/*.tar --text-encoder flan-t5-xl --out FEATURES --dtype bf16

writes FEATURES/SHARD.safetensors for every shard, and the features of the empty prompt; `mdm_models.text` reads them
back with `PrecomputedText`. The same command again goes on where it was stopped: shards that are done are left alone.
Several processes can share a data set by taking different shards.
"""

import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional, arg

from mdm_models.commands.line import DTYPES, Dtype, command, device_of
from mdm_models.data.cache import ShardCache
from mdm_models.data.config import DataConfig, check_above_0
from mdm_models.data.layout import CAPTION_SUFFIXES, content, in_roles, split_name
from mdm_models.data.locations import expand
from mdm_models.data.media import BadSample
from mdm_models.data.reader import caption_of
from mdm_models.data.shard_index import Shard
from mdm_models.data.shards import open_shard
from mdm_models.errors import DataError
from mdm_models.text import FrozenTextEncoder, load_text_encoder
from mdm_models.text.interface import EncoderIdentity
from mdm_models.text.precomputed import UNCONDITIONAL, FeatureFile, digest_of, file_of, write_features


def precompute(shards: list[str], encoder: FrozenTextEncoder, out: Path, batch_size: int) -> None:
    """Write the features of every shard's captions into the folder `out`, which is made if need be.

    A sample without a usable caption is named and left out. The features of one shard are held in memory, twice while
    they are written: 4 · width bytes a token. Raises DataError for a shard that cannot be used and for shards without
    any caption, ValueError if `out` holds features of another encoder or if features are not finite.
    """
    sources: dict[str, str | None] = {UNCONDITIONAL: None}  # file of features → shard
    for path in shards:
        if sources.setdefault(file_of(path), path) != path:
            other = sources[file_of(path)] or "the empty prompt"
            raise DataError(f"the features of {path} and of {other} would have the same name; rename the shard")
    out.mkdir(parents=True, exist_ok=True)
    identity = encoder.identity
    done = found = 0
    for number, (name, path) in enumerate(sources.items()):
        captions = _captions(path) if path else {"": ""}
        found += len(captions) if path else 0
        if _is_done(out / name, identity, captions):
            done += path is not None
            continue
        title = f"{Path(path).name} ({number}/{len(shards)})" if path else "empty prompt"
        write_features(out / name, _encoded(captions, encoder, batch_size, title), identity, captions)
    if done:
        tqdm.write(f"{done} of {len(shards)} shards were done before")
    if not found:
        raise DataError(f"data: none of the {len(shards)} shards has a caption, {shards[0]} the first of them")


def _is_done(target: Path, identity: EncoderIdentity, captions: dict[str, str]) -> bool:
    """Whether the features are there, whole, and of these captions. Raises ValueError if they are of another encoder.

    Files are renamed into place when they are whole and on disk, so the features themselves are not read again.
    """
    if not target.exists():
        return False
    try:
        file = FeatureFile(target)
    except ValueError:
        tqdm.write(f"{target} is damaged and is written again")
        return False
    if not file.identity.fits(identity):
        raise ValueError(f"{target} has features of {file.identity}, not of {identity}; choose another --out")
    is_of_these = file.captions == digest_of(captions)
    if not is_of_these:
        tqdm.write(f"{target} is of other captions and is written again")
    return is_of_these


def _captions(path: str) -> dict[str, str]:
    """Key → caption of every sample that has one. Raises DataError."""
    shard = open_shard(path, ShardCache.of(DataConfig.cache, DataConfig.cache_gb))
    if not shard.reached:
        raise DataError(f"data: shard {path} {shard.damage}")
    if shard.damage:
        tqdm.write(f"shard {path} {shard.damage}; the {len(shard)} samples before are used")
    captions: dict[str, str] = {}
    for key, files in _samples(shard):
        if key in captions:
            raise DataError(f"shard {path} has two samples of the key {key}; their features could not be told apart")
        try:
            captions[key] = caption_of(files)
        except BadSample as bad:
            tqdm.write(f"skipped {key} in {path}: {bad.reason}" + (f" ({bad.detail})" if bad.detail else ""))
    return captions


def _samples(shard: Shard) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and text files (suffix → bytes) of every sample that is whole; images and clips are not read."""
    end = int(shard.bounds[-1])  # beyond it the tar may be broken off
    with shard.open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for key, members in itertools.groupby(_members(tar, end), lambda member: member[0]):
            files = in_roles({suffix: member for _, suffix, member in members})
            yield key, {s: content(tar, files[s]) for s in CAPTION_SUFFIXES if s in files}


def _members(tar: tarfile.TarFile, end: int) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, suffix and file of samples before byte `end`, beyond which the tar may be broken off."""
    while tar.offset < end and (member := tar.next()):
        if member.isreg() and (named := split_name(member.name)):
            yield *named, member


def _encoded(captions: dict[str, str], encoder: FrozenTextEncoder, batch_size: int, title: str) -> dict[str, Tensor]:
    """Key → features (tokens, width) bfloat16. Captions of like length share a batch, so that little is padding."""
    keys = sorted(captions, key=lambda key: len(captions[key]), reverse=True)  # the largest batch first: fail early
    features: dict[str, Tensor] = {}
    with tqdm(total=len(keys), desc=title, unit=" captions", dynamic_ncols=True) as bar:
        for start in range(0, len(keys), batch_size):
            batch = keys[start : start + batch_size]
            rows, mask = encoder([captions[key] for key in batch])
            if not rows.isfinite().all():
                raise ValueError(f"{encoder.name} gives features that are not finite in {rows.dtype}; try --dtype bf16")
            rows, lengths = rows.bfloat16().cpu(), mask.sum(dim=1).tolist()
            features |= {key: row[:n].clone() for key, row, n in zip(batch, rows, lengths, strict=True)}
            bar.update(len(batch))
    return features


@dataclass(frozen=True)
class Options:
    shards: Annotated[Positional[tuple[str, ...]], arg(metavar="SHARDS")]
    """tar files, folders of them, or patterns"""
    text_encoder: Annotated[str, arg(aliases=["--encoder"])]
    """directory or hub id of the text encoder"""
    out: Path
    """folder for the features"""
    batch_size: int = 64
    """captions at once"""
    max_tokens: int = 128
    """longest caption, in tokens"""
    dtype: Dtype = "float32"
    """of the encoder's weights"""
    device: str = "auto"
    """auto: a GPU if there is one"""

    def __post_init__(self):
        check_above_0(self, "batch_size", "max_tokens")


def run(options: Options) -> None:
    """Load the text encoder and precompute with it. Raises DataError, ValueError or OSError in one line."""
    shards = expand(options.shards)  # before the encoder, which takes longer to load
    encoder = load_text_encoder(
        options.text_encoder,
        max_tokens=options.max_tokens,
        dtype=DTYPES[options.dtype],
        device=device_of(options.device),
    )
    if not isinstance(encoder, FrozenTextEncoder):
        raise ValueError(
            f"{options.text_encoder} is no network; --text-encoder takes a directory of T5, CLIP or another one"
        )
    precompute(shards, encoder, options.out, options.batch_size)


main = command("precompute", __doc__, Options, run)
