"""Training that replays CUDA graphs: the same as without them."""

from pathlib import Path

import pytest
import torch

from mdm_kernels import use_backend
from mdm_models.errors import TrainingError
from mdm_models.processes import Processes
from mdm_models.training.config import changed
from mdm_models.training.denoiser import open_encoder
from mdm_models.training.graphs import uses_graphs
from mdm_models.training.learner import Learner
from tests.training.models import IMAGE_MODEL, NESTED_MODEL, clips, settings

GPU = torch.device("cuda")
FOUR_SAMPLES = {"frames": 1, "batch_size": 4, "level_shares": (0.5, 1.0)}


def config(out: Path, **values):
    return changed(settings(out / "none.tar", out), **FOUR_SAMPLES | values)


@pytest.fixture
def as_in_training():
    """Data begin on the CPU, and kernels run."""
    with torch.device("cpu"), use_backend("auto"):
        yield


def test_a_processor_has_no_graphs(tmp_path):
    told = config(tmp_path, cuda_graphs=True)
    assert not uses_graphs(told, Processes(0, 1, torch.device("cpu")))
    assert uses_graphs(told, Processes(0, 1, GPU))
    assert not uses_graphs(config(tmp_path), Processes(0, 1, GPU))


@pytest.mark.parametrize(
    ("world_size", "values"), [(2, {}), (1, {"micro_batch": 2}), (1, {"checkpoint_activations": True})]
)
def test_what_graphs_cannot_do_is_refused(tmp_path, world_size, values):
    with pytest.raises(TrainingError, match="leave out --cuda-graphs or these"):
        uses_graphs(config(tmp_path, cuda_graphs=True, **values), Processes(0, world_size, GPU))


@pytest.mark.gpu
@pytest.mark.usefixtures("as_in_training")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_steps_learn_the_same_with_graphs_and_without(tmp_path, precision):
    """Every step has another noise, other times and other captions; at the third, rounding has not yet led apart."""
    learned = []
    for cuda_graphs in (False, True):
        told = config(tmp_path, cuda_graphs=cuda_graphs, precision=precision, warmup=0, lr=1e-3)
        learner = Learner(told, NESTED_MODEL, open_encoder(told.model, 0, GPU), Processes(0, 1, GPU))
        steps = []
        for caption in ("a cat", "a red apple", "a cat that eats"):
            batch = clips(4, frames=1)
            batch.captions[:] = [caption, "", "a dog", caption]
            steps.append(learner.learn([batch]))
        learned.append(steps)
        assert learner.has_graphs == cuda_graphs
    tolerance = 1e-4 if precision == "float32" else 3e-2
    for plain, graphed in zip(*learned, strict=True):
        assert graphed.loss == pytest.approx(plain.loss, rel=tolerance)
        assert graphed.grad_norm == pytest.approx(plain.grad_norm, rel=tolerance)
        assert graphed.level_losses == pytest.approx(plain.level_losses, rel=tolerance)


@pytest.mark.gpu
@pytest.mark.usefixtures("as_in_training")
def test_the_averaged_model_draws_while_graphs_are_held(tmp_path):
    told = config(tmp_path, cuda_graphs=True, level_shares=())
    learner = Learner(told, IMAGE_MODEL, open_encoder(told.model, 0, GPU), Processes(0, 1, GPU))
    learner.learn([clips(4, frames=1)])
    with learner.as_pipeline() as pipeline:
        picture = pipeline("a cat", num_inference_steps=2, seed=0, output_type="pt", progress=False)
    assert picture.shape == (1, 3, 16, 16)
    assert picture.isfinite().all()
