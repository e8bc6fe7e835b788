"""A network's forward and backward pass as CUDA graphs: launched as a whole, not kernel by kernel from Python."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mdm_models.errors import TrainingError
from mdm_models.processes import Processes
from mdm_models.training.config import TrainConfig, chunks_of


def uses_graphs(config: TrainConfig, processes: Processes) -> bool:
    """Whether the passes are to be captured. Raises TrainingError where the settings ask for it and forbid it.

    A replay overwrites the gradients of the one before, so that none may be added to them.
    """
    if not config.system.cuda_graphs or processes.device.type != "cuda":
        return False
    _, rounds = chunks_of(config.optimizer, processes.world_size)
    if processes.world_size > 1 or rounds > 1 or config.system.checkpoint_activations:
        raise TrainingError(
            f"cuda_graphs: {processes.world_size} processes, {rounds} parts of a batch one after another, "
            f"checkpoint_activations {config.system.checkpoint_activations}; graphs need one process, the whole batch "
            "at once and kept activations: leave out --cuda-graphs or these"
        )
    return True


def captured(model: nn.Module, x: Sequence[Tensor], time: Tensor, captions: tuple[Tensor, ...]) -> nn.Module:
    """Give the model itself, whose calls in training mode from now on replay a call on inputs like these: x of each
    level (B, C, [T,] H, W), fewer rows at higher ones, time (B,), captions as `CaptionReader.read` gives them. Inputs
    of other shapes cannot be replayed; in evaluation mode the model runs as before.

    To be called, as the result is, under the autocast of the training, without its cache: a weight cast in one pass
    must not serve the next. Raises RuntimeError for a network that waits for the device inside a pass.
    """
    places = [level.clone() for level in x], time.clone(), tuple(part.clone() for part in captions)
    nested = cast(Any, places)  # which torch's types do not know
    return cast(nn.Module, torch.cuda.make_graphed_callables(model, nested))
