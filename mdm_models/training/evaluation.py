"""Evaluation while training: the averaged model on the samples that are held out."""

import warnings

import numpy as np

from mdm_models.data.held_out import HeldOut
from mdm_models.data.reader import SampleReader
from mdm_models.errors import TrainingError
from mdm_models.evaluation.comparison import Comparison
from mdm_models.evaluation.measure import Sampling, measure
from mdm_models.processes import Processes
from mdm_models.training.config import TrainConfig, chunks_of
from mdm_models.training.learner import Learner


class Evaluation:
    """Measures a learner again and again on the same samples, from the same noise; real images are read into the
    Fréchet distance once."""

    def __init__(self, held_out: HeldOut, comparison: Comparison, workers: int):
        self.held_out = held_out
        self.comparison = comparison
        self.workers = workers

    @classmethod
    def of(
        cls, config: TrainConfig, reader: SampleReader, validation: np.ndarray, processes: Processes
    ) -> "Evaluation | None":
        """Make the evaluation that the settings ask for; None if they ask for none, or, with a warning, if there is
        nothing to evaluate on.

        validation: numbers of the samples that are held out. Raises TrainingError for a network that cannot be loaded.
        """
        wanted = config.evaluation
        if not wanted.evaluate_every:
            return None
        if not len(validation):
            if processes.is_main:
                share = f"holdout is {config.data.holdout} of {len(reader.samples)}"
                warnings.warn(f"there is no evaluation: no sample is held out of training ({share})", stacklevel=2)
            return None
        size, frames = config.data.size, config.data.frames
        try:
            comparison = Comparison.of(wanted.feature_extractor, wanted.clip_model, size, frames, processes.device)
        except ValueError as error:
            raise TrainingError(str(error)) from None
        chunk_size, _ = chunks_of(config.optimizer, processes.world_size)
        held_out = HeldOut(reader, validation, wanted.evaluate_samples, chunk_size, processes, keep=True)
        return cls(held_out, comparison, config.data.workers)

    def measure(self, learner: Learner) -> dict[str, float]:
        """Measure numbers by name, equal on all processes, every one of which must call this. Raises DataError, on all
        of them, if too few samples can be used or if one cannot read its share."""
        output = learner.config.output
        sampling = Sampling(learner.config.system.seed, output.sample_steps, output.sampler)
        with learner.as_pipeline() as pipeline:
            return measure(pipeline, self.held_out, self.comparison, learner.processes, self.workers, sampling)
