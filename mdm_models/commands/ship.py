"""Turn a run into a model that comes with this package: bfloat16, the text encoder's vocabulary pruned, with a card.

  mdm ship runs/emoji-64 mdm_t2i_emoji_64 --about recipes/emoji.md --machine "2 cores of an AMD EPYC" \\
      --command "torchrun --nproc-per-node=2 recipes/emoji.py --preset 64 --data EMOJI --out runs/emoji-64"

writes mdm_models/weights/NAME, or --out DIR/NAME: what `Pipeline.from_pretrained` reads, and README.md, the model card.
Of an encoder that was trained along, the embeddings of tokens that no caption of the run's data has are left out. What
`mdm evaluate RUN --json RUN/evaluation.json` or recipes/emoji_report.py measured and drew before stands in the card.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from mdm_models.commands.line import command
from mdm_models.data.config import DataConfig
from mdm_models.data.media import BadSample
from mdm_models.data.reader import caption_of
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.shipped import CARD, FOLDER
from mdm_models.storage import write_whole
from mdm_models.text import TransformerTextEncoder
from mdm_models.training.model_card import GRIDS, Told, model_card
from mdm_models.training.saved import open_pipeline


@dataclass(frozen=True)
class Options:
    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """the directory of a run: the model that it left, or its newest checkpoint's"""
    name: Annotated[Positional[str], arg(metavar="NAME")]
    """of the model from now on"""
    about: Path
    """Markdown for the card: what it draws, data and licences, limits"""
    command: str
    """that trained it, for the card"""
    machine: str
    """that it was trained on, for the card"""
    data: tuple[str, ...] = ()
    """the run's shards, if they have moved"""
    guidance_scale: float | None = None
    """unless a call says otherwise; default: that of the run's previews"""
    steps: int | None = None
    """likewise, of sampling"""
    sampler: str | None = None
    """likewise"""
    out: Path = FOLDER
    """folder for the model's folder"""


def ship(options: Options) -> None:
    """Save a run's model as one that comes with the package, with its card. Raises TrainingError, OSError, ValueError
    or TypeError in one line."""
    pipeline = open_pipeline(options.run)
    chosen = {
        "guidance_scale": options.guidance_scale,
        "num_inference_steps": options.steps,
        "sampler": options.sampler,
    }
    pipeline.config = dataclasses.replace(
        pipeline.config, **{name: value for name, value in chosen.items() if value is not None}
    )
    if isinstance(pipeline.text_encoder, TransformerTextEncoder):
        config = json.loads((options.run / "config.json").read_text())
        captions = _captions(tuple(options.data or config["data"]["shards"]))
        pipeline.text_encoder = pipeline.text_encoder.pruned(captions).to(torch.bfloat16)
    told = Told(options.about.read_text(), options.command, options.machine)
    card = model_card(options.name, options.run, pipeline, told)
    folder = options.out / options.name
    pipeline.to(dtype=torch.bfloat16).save_pretrained(folder)
    write_whole(folder / CARD, lambda path: path.write_text(card))
    for name in GRIDS:
        if (options.run / name).is_file():
            shutil.copy(options.run / name, folder / name)
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    print(f"{folder}: {megabytes:.1f} MB")


def _captions(shards: tuple[str, ...]) -> set[str]:
    samples = ShardedSamples(open_shards(DataConfig(shards)))
    found = set()
    for number in range(len(samples)):
        try:
            found.add(caption_of(samples[number]))
        except BadSample:  # which training left out as well
            continue
    return found


main = command("ship", __doc__, Options, ship)
