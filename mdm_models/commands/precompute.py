"""Encode the captions of WebDataset shards once, so that training need not run the text encoder.

    mdm precompute DATA/*.tar --encoder flan-t5-xl --out FEATURES --device cuda --dtype bf16

writes FEATURES/SHARD.safetensors for every shard, and the features of the empty prompt; `mdm_models.text` reads them
back with `PrecomputedText`. The same command again goes on where it was stopped: shards that are done are left alone.
Several processes can share a data set by taking different shards.
"""

import argparse
import hashlib
import itertools
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from mdm_models.data.cache import ShardCache
from mdm_models.data.config import DataConfig
from mdm_models.data.locations import expand
from mdm_models.data.media import BadSample
from mdm_models.data.reader import CAPTION_SUFFIXES, caption_of
from mdm_models.data.shard_index import Shard
from mdm_models.data.shards import open_shard
from mdm_models.errors import DataError
from mdm_models.text import FrozenTextEncoder, load_text_encoder
from mdm_models.text.interface import EncoderIdentity
from mdm_models.text.precomputed import UNCONDITIONAL, FeatureFile, file_of, write_features

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def precompute(shards: list[str], encoder: FrozenTextEncoder, out: Path, batch_size: int) -> None:
    """Write the features of every shard's captions into the folder `out`, which is made if need be.

    A sample without a usable caption is named and left out. The features of one shard are held in memory, twice while
    they are written: 4 · width bytes a token. Raises DataError for a shard that cannot be used, ValueError if `out`
    holds features of another encoder or if features are not finite.
    """
    sources: dict[str, str | None] = {UNCONDITIONAL: None}  # file of features → shard
    for path in shards:
        if sources.setdefault(file_of(path), path) != path:
            other = sources[file_of(path)] or "the empty prompt"
            raise DataError(f"the features of {path} and of {other} would have the same name; rename the shard")
    out.mkdir(parents=True, exist_ok=True)
    identity = encoder.identity
    done = 0
    for number, (name, path) in enumerate(sources.items()):
        captions = _captions(path) if path else {"": ""}
        digest = _digest(captions)
        if _is_done(out / name, identity, digest):
            done += path is not None
            continue
        title = f"{Path(path).name} ({number}/{len(shards)})" if path else "empty prompt"
        write_features(out / name, _encoded(captions, encoder, batch_size, title), identity, digest)
    if done:
        tqdm.write(f"{done} of {len(shards)} shards were done before")


def _is_done(target: Path, identity: EncoderIdentity, captions: str) -> bool:
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
    if file.identity != identity:
        raise ValueError(f"{target} has features of {file.identity}, not of {identity}; choose another --out")
    if file.captions != captions:
        tqdm.write(f"{target} is of other captions and is written again")
    return file.captions == captions


def _digest(captions: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(captions, sort_keys=True).encode()).hexdigest()


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
        for key, members in itertools.groupby(_members(tar, end), lambda member: base_plus_ext(member.name)[0]):
            files = {base_plus_ext(member.name)[1].lower(): member for member in members}
            yield key, {s: tar.extractfile(files[s]).read() for s in CAPTION_SUFFIXES if s in files}


def _members(tar: tarfile.TarFile, end: int) -> Iterator[tarfile.TarInfo]:
    """The files of samples before byte `end`, beyond which the tar may be broken off."""
    while tar.offset < end and (member := tar.next()):
        if member.isreg() and base_plus_ext(member.name)[0] is not None:
            yield member


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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("mdm precompute", description=__doc__, formatter_class=form)
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, folders of them, or patterns")
    parser.add_argument("--encoder", required=True, metavar="DIR", help="directory or hub id of the text encoder")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the features")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="captions at once (default: 64)")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="longest caption (default: 128)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the encoder's weights (default: fp32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch-size {options.batch_size}: must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        shards = expand(options.shards)
        dtype = DTYPES[options.dtype]
        encoder = load_text_encoder(options.encoder, max_tokens=options.max_tokens, dtype=dtype, device=options.device)
        if not isinstance(encoder, FrozenTextEncoder):
            raise ValueError(f"{options.encoder} is no network; --encoder takes a directory of T5, CLIP or another one")
        precompute(shards, encoder, options.out, options.batch_size)
    except (DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
