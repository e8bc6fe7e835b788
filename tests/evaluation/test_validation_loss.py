import pytest
import torch

from mdm_models.diffusion import MatryoshkaDiffusion
from mdm_models.evaluation.validation_loss import fixed_times, level_losses
from tests.training.models import CLIP_MODEL, NESTED_MODEL


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16) * 2 - 1


def shifted(x: list[torch.Tensor], time: torch.Tensor) -> list[torch.Tensor]:
    """A network that makes something of what it sees."""
    return [0.5 * level + 0.1 * (i + 1) for i, level in enumerate(x)]


def test_times_are_spread_evenly_however_many_there_are():
    for count in (10, 97, 500):
        times = fixed_times(range(count), 1000).sort().values
        assert times.min() >= 0
        assert times.max() <= 999
        assert times.diff().max() < 3 * 999 / count


def test_a_samples_loss_depends_on_its_number_and_not_on_the_batch():
    diffusion, pictures = MatryoshkaDiffusion(NESTED_MODEL.scales), images()
    together = level_losses(shifted, diffusion, pictures, NESTED_MODEL, range(4), seed=1)
    alone = level_losses(shifted, diffusion, pictures[2:3], NESTED_MODEL, [2], seed=1)
    torch.testing.assert_close(together[:, 2:3], alone)
    assert not torch.equal(alone, level_losses(shifted, diffusion, pictures[2:3], NESTED_MODEL, [3], seed=1))


@pytest.mark.parametrize("loss_target", ["eps", "v"])
def test_the_levels_losses_add_up_to_the_training_loss(loss_target):
    """Which is `MatryoshkaDiffusion.per_sample_loss` of the same noise."""
    seen = []

    def network(x: list[torch.Tensor], time: torch.Tensor) -> list[torch.Tensor]:
        seen.extend([x, time])
        return shifted(x, time)

    diffusion = MatryoshkaDiffusion(NESTED_MODEL.scales, loss_target=loss_target)
    pictures = images()
    losses = level_losses(network, diffusion, pictures, NESTED_MODEL, range(4), seed=1)
    x, time = seen
    low = torch.nn.functional.avg_pool2d(pictures, 2)
    noise = []
    for level, (x_t, image) in enumerate(zip(x, (pictures, low), strict=True)):
        alpha_bar = diffusion.alpha_bar(time + 1, level).view(-1, 1, 1, 1)
        noise.append((x_t - alpha_bar.sqrt() * image) / (1 - alpha_bar).sqrt())
    expected = diffusion.per_sample_loss(shifted(x, time), pictures, time, noise)
    torch.testing.assert_close(losses.sum(dim=0), expected, rtol=1e-3, atol=1e-4)


def test_clips_have_a_loss_at_every_level():
    losses = level_losses(
        shifted, MatryoshkaDiffusion(CLIP_MODEL.scales), torch.rand(2, 3, 4, 16, 16), CLIP_MODEL, [0, 1], seed=0
    )
    assert losses.shape == (2, 2)
    assert losses.isfinite().all()
