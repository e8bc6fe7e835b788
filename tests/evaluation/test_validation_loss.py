import pytest
import torch
from torch import Tensor, nn

from mdm_models.config import UNetConfig
from mdm_models.evaluation.validation_loss import fixed_times, level_losses
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.text import ClassLabels
from tests.training.models import CLIP_MODEL, NESTED_MODEL


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 16, 16) * 2 - 1


class Shifting(nn.Module):
    """A network that makes something of what it sees, and keeps that."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.conv_in = nn.Conv2d(1, 1, 1)

    def forward(self, x: list[Tensor], time: Tensor, context: Tensor, context_mask: Tensor) -> list[Tensor]:
        self.seen = x, time
        return [0.5 * level + 0.1 * (i + 1) for i, level in enumerate(x)]


def pipeline(architecture: UNetConfig = NESTED_MODEL, **config) -> Pipeline:
    text = ClassLabels(architecture.innermost.context_dim)
    return Pipeline(Shifting(architecture), text, PipelineConfig(size=16, **config))


def test_times_are_spread_evenly_however_many_there_are():
    for count in (10, 97, 500):
        times = fixed_times(range(count), 1000).sort().values
        assert times.min() >= 0
        assert times.max() <= 999
        assert times.diff().max() < 3 * 999 / count


def test_a_samples_loss_depends_on_its_number_and_not_on_the_batch():
    shifting, pictures = pipeline(), images()
    together = level_losses(shifting, pictures, ["1"] * 4, range(4), seed=1)
    alone = level_losses(shifting, pictures[2:3], ["1"], [2], seed=1)
    torch.testing.assert_close(together[:, 2:3], alone)
    assert not torch.equal(alone, level_losses(shifting, pictures[2:3], ["1"], [3], seed=1))


@pytest.mark.parametrize("loss_target", ["eps", "v"])
def test_the_levels_losses_add_up_to_the_training_loss(loss_target):
    """Which is `MatryoshkaDiffusion.per_sample_loss` of the same noise."""
    shifting, pictures = pipeline(loss_target=loss_target), images()
    losses = level_losses(shifting, pictures, ["1"] * 4, range(4), seed=1)
    x, time = shifting.model.seen
    low = nn.functional.avg_pool2d(pictures, 2)
    noise = []
    for level, (x_t, image) in enumerate(zip(x, (pictures, low), strict=True)):
        alpha_bar = shifting.diffusion.alpha_bar(time + 1, level).view(-1, 1, 1, 1)
        noise.append((x_t - alpha_bar.sqrt() * image) / (1 - alpha_bar).sqrt())
    expected = shifting.diffusion.per_sample_loss(shifting.model(x, time, None, None), pictures, time, noise)
    torch.testing.assert_close(losses.sum(dim=0), expected, rtol=1e-3, atol=1e-4)


def test_clips_have_a_loss_at_every_level():
    losses = level_losses(pipeline(CLIP_MODEL), torch.rand(2, 3, 4, 16, 16), ["0"] * 2, [0, 1], seed=0)
    assert losses.shape == (2, 2)
    assert losses.isfinite().all()
