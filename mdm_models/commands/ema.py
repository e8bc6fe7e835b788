"""Average the weights of a run that was trained with --ema-stds over another width, from the snapshots that it kept
(Karras et al., arXiv 2312.02696, section 3.2). The result is a model to sample from.

  mdm ema runs/a --std 0.08 --out models/a-0.08
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mdm_models.commands.line import command
from mdm_models.errors import TrainingError
from mdm_models.pipeline import TEXT_FOLDER, PipelineConfig
from mdm_models.pretrained import fitting_model, placed, with_weights
from mdm_models.storage import CONFIG_FILE, read_config, together
from mdm_models.text import TransformerTextEncoder
from mdm_models.training.denoiser import part_of
from mdm_models.training.ema.power_functions import Combination
from mdm_models.training.ema.snapshots import ROUNDING, list_snapshots, reconstruct


def export(run: Path, std: float, out: Path) -> Combination:
    """Write to `out` a pipeline directory like RUN/model, with the average of width `std` at the last snapshot.

    Raises TrainingError, ValueError or OSError in one line.
    """
    template = run / "model"
    if not (template / CONFIG_FILE).is_file():
        raise TrainingError(f"{template} is missing: a run writes it when it ends or is told to stop")
    config = PipelineConfig.load(template)
    architecture = read_config(template / CONFIG_FILE)
    weights, combination = reconstruct(run, std)
    unet, text = part_of(weights, "unet"), part_of(weights, "text")
    model = fitting_model(architecture, unet, run / "averages")
    own = model.state_dict()
    for name, weight in unet.items():
        unet[name] = placed(weight, own[name], None, "cpu")
    with together():
        with_weights(model, unet).save_pretrained(out)
        if config.text_encoder == TEXT_FOLDER:
            encoder = TransformerTextEncoder.load(template / TEXT_FOLDER)
            encoder.load_state_dict(text)
            encoder.save(out / TEXT_FOLDER)
        config.save(out)
    return combination


@dataclass(frozen=True)
class Options:
    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """run directory"""
    std: float
    """width of the average, as a share of the run: 0.08, say"""
    out: Path
    """directory for the model"""


def average(options: Options) -> None:
    """Export the average and say how exact it is. Raises TrainingError, ValueError or OSError in one line."""
    combination = export(options.run, options.std, options.out)
    count = len(list_snapshots(options.run))
    rounding = ROUNDING * abs(combination.weights).sum()
    print(
        f"{options.out}: the average of width {options.std:g}, from {count} snapshots; its profile is off by "
        f"{combination.relative_distance:.2%}, and rounding by up to {rounding:.2%} of a weight"
    )


main = command("ema", __doc__, Options, average)
