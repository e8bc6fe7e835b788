"""How well a model of recipes/emoji.py draws what it never saw: pairs of a name and a style that were held out.

    python recipes/emoji_report.py runs/emoji-64 --data EMOJI --out runs/emoji-64

writes evaluation.json and two uncurated grids, held_out.webp and trained.webp: pairs of a real picture, left, and a
sample for its caption, right. nearest_is_right is the share of held-out captions whose sample has, among the real
held-out pictures, its own as the nearest (features of EfficientNet-lite0 at 64²), right_of_5 among the nearest five;
reference_… are the same of a real picture of the same name in another style, and frechet_… the distance of these
samples from these pictures, which shrinks as they grow in number.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdm_models.commands.line import exit_code, parse
from mdm_models.data.config import DataConfig
from mdm_models.data.media import decode_image
from mdm_models.data.shards import ShardedSamples, open_shards
from mdm_models.data.stream import split
from mdm_models.errors import DataError
from mdm_models.evaluation.comparison import Comparison
from mdm_models.evaluation.extractors import EFFICIENTNET_LITE0, load_extractor
from mdm_models.evaluation.retrieval import share_right
from mdm_models.pipeline import Pipeline
from mdm_models.recipes.emoji_samples import Options as Sampled
from mdm_models.recipes.emoji_samples import drawn, open_model, save_pairs, save_results

SIZE = 64  # of all pictures that are compared, in pixels
STYLES = 4  # in which a name must be drawn to be asked for: what is judged is the drawing, not a word nobody knows


@dataclass(frozen=True)
class Options(Sampled):
    held_out: tuple[str, ...] = ()
    """shards that it was not trained on; default: the share of --data that training held out"""
    captions: int = 100
    """held-out ones that are asked for"""


@dataclass(frozen=True)
class Drawing:
    """A drawing as a shard has it. encoded: the bytes of its picture."""

    name: str
    style: str
    caption: str
    encoded: bytes

    @property
    def pixels(self) -> Tensor:
        """The picture, (3, SIZE, SIZE) uint8, on white."""
        return decode_image(self.encoded, SIZE)[:, 0]


@dataclass(frozen=True)
class Chosen:
    """Held-out drawings to ask for, one of another style for each, and as many drawings that were trained on."""

    held_out: list[Drawing]
    others: list[Drawing]
    trained: list[Drawing]


def report(options: Options) -> None:
    """Draw pictures for captions, save them beside real ones, and judge those that were held out. Raises TrainingError,
    OSError or ValueError in one line."""
    pipeline = open_model(options)
    chosen = choose(*drawings(options), options)
    real = stacked(chosen.held_out)
    sampled = drawn_for(chosen.held_out, pipeline, options)
    results = {
        **shares(sampled, real, ""),
        **shares(stacked(chosen.others), real, "reference_"),
        **distance(sampled, real, pipeline.device),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    count = options.grid
    save_pairs(options.out / "held_out.webp", real[:count], sampled[:count])
    trained = chosen.trained[:count]
    save_pairs(options.out / "trained.webp", stacked(trained), drawn_for(trained, pipeline, options))
    save_results(options, results)


def drawings(options: Options) -> tuple[list[Drawing], list[Drawing]]:
    """Read the drawings that were trained on, and those held out. Raises DataError for other samples."""
    samples = ShardedSamples(open_shards(DataConfig(options.data, workers=0)))
    training, held_out = split(samples, options.holdout)
    trained, unseen = (_read(samples, indices) for indices in (training, held_out))
    if options.held_out:
        others = ShardedSamples(open_shards(DataConfig(options.held_out, workers=0)))
        unseen = _read(others, range(len(others)))
    return trained, unseen


def _read(samples: ShardedSamples, indices: Iterable[int]) -> list[Drawing]:
    found = []
    for index in indices:
        sample = samples[int(index)]
        try:
            facts = json.loads(sample["json"])
            found.append(Drawing(facts["name"], facts["style"], sample["txt"].decode(), sample["webp"]))
        except (KeyError, ValueError) as error:
            raise DataError(f"sample {sample['__key__']} is not one of `mdm prepare emoji`: {error!r}") from None
    return found


def choose(trained: list[Drawing], held_out: list[Drawing], options: Options) -> Chosen:
    """Choose at random what to ask for. Raises ValueError if no held-out name is drawn in STYLES styles."""
    rng = np.random.default_rng(options.seed)
    by_name: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in (*trained, *held_out):
        by_name[drawing.name].append(drawing)
    known = [drawing for drawing in held_out if len(by_name[drawing.name]) >= STYLES]
    if not known:
        raise ValueError(f"none of {len(held_out)} held-out drawings has a name that {STYLES} styles draw")
    asked = [known[i] for i in rng.permutation(len(known))[: options.captions]]
    others = []
    for drawing in asked:
        elsewhere = [other for other in by_name[drawing.name] if other.style != drawing.style]
        others.append(elsewhere[rng.integers(len(elsewhere))])
    return Chosen(asked, others, [trained[i] for i in rng.permutation(len(trained))[: options.captions]])


def shares(queries: Tensor, gallery: Tensor, prefix: str) -> dict[str, float]:
    """Give the shares of pictures (N, 3, SIZE, SIZE) uint8 to which the gallery's of the same number is nearest, or one
    of the 5 nearest."""
    extractor = load_extractor(EFFICIENTNET_LITE0, SIZE)
    asked, among = (extractor(pictures) for pictures in (queries, gallery))
    right = torch.arange(len(queries))
    return {
        f"{prefix}nearest_is_right": share_right(asked, among, right),
        f"{prefix}right_of_5": share_right(asked, among, right, among=5),
    }


def distance(sampled: Tensor, real: Tensor, device: torch.device) -> dict[str, float]:
    """Measure the Fréchet distance of pictures (N, 3, SIZE, SIZE) uint8 from as many others, with the name of its
    features."""
    comparison = Comparison.of(EFFICIENTNET_LITE0, "", SIZE, 1, device)
    comparison.add(real.to(device), sampled.to(device), [""] * len(real))
    return comparison.results()


def drawn_for(wanted: list[Drawing], pipeline: Pipeline, options: Options) -> Tensor:
    """Draw a sample for each drawing's caption, (N, 3, SIZE, SIZE) uint8 on the CPU."""
    sampled = drawn(pipeline, [each.caption for each in wanted], options)
    if sampled.shape[-1] == SIZE:
        return sampled
    resized = F.interpolate(sampled.float(), (SIZE, SIZE), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).byte()


def stacked(wanted: list[Drawing]) -> Tensor:
    """Give the pictures of drawings, (N, 3, SIZE, SIZE) uint8."""
    return torch.stack([each.pixels for each in wanted])


def main(arguments: list[str] | None = None) -> int:
    program, arguments = "emoji_report.py", sys.argv[1:] if arguments is None else arguments
    return exit_code(program, lambda: report(parse(program, __doc__, Options, arguments)))


if __name__ == "__main__":
    sys.exit(main())
