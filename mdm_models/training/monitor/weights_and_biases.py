"""Curves on Weights & Biases, which is imported only where a run asks for it."""

import dataclasses
import secrets
from pathlib import Path

from mdm_models.errors import TrainingError
from mdm_models.training.config import TrainConfig

ID_FILE = "wandb-id"


class WeightsAndBiases:
    """One run there for one run directory, however often it is resumed: RUN/wandb-id keeps the id.

    Every number is sent with its step as a number of its own, "step", which is the axis of all curves: a run that goes
    on from an earlier step than it had logged may then log those steps again.
    Raises TrainingError if the package is not installed or the run cannot be opened.
    """

    def __init__(self, config: TrainConfig):
        try:
            import wandb  # pyright: ignore[reportMissingImports]: who logs there has it
        except ImportError:
            raise TrainingError("wandb: the package is not installed: pip install wandb, or omit --wandb") from None
        path = Path(config.out) / ID_FILE
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n")
        try:
            self._run = wandb.init(
                project=config.output.wandb,
                id=path.read_text().strip(),
                resume="allow",
                name=Path(config.out).name,
                dir=config.out,
                config=dataclasses.asdict(config),
                allow_val_change=True,  # a resumed run may have more steps than it was begun with
            )
        except wandb.errors.Error as error:
            raise TrainingError(f"wandb: {' '.join(str(error).split())}") from None
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, curves: dict[str, float]) -> None:
        """Send the numbers measured at `step`, by the names of their curves."""
        self._run.log({"step": step, **curves})

    def close(self) -> None:
        self._run.finish()
