"""What `sample` computes once a run, against a loop that computes it at every step: the same bits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mdm_models import UNetConfig, build_model
from mdm_models.diffusion import SAMPLERS, MatryoshkaDiffusion, noise, sample, seeded_generators
from mdm_models.diffusion.schedule import NoiseSchedule
from mdm_models.diffusion.solvers import Process
from mdm_models.diffusion.times import quadratic_times, time_grid
from mdm_models.unet import UNet

INNER = UNetConfig(
    channels=(32,), blocks=(1,), attention=(1,), num_heads=2, mid_blocks=True, embed_dim=32,
    micro=(("scale", 8.0),), context_dim=16, context_layers=1,
)  # fmt: skip
NESTED = UNetConfig(channels=(32, 32), blocks=(1, 1), embed_dim=32, inner=INNER)
SHAPES = [(2, 3, 8, 8), (2, 3, 4, 4)]
STEPS = 4
INTERVALS = [(0.0, float("inf")), (200.0, 600.0), (5000.0, 6000.0)]


@pytest.fixture(scope="module")
def model() -> UNet:
    torch.manual_seed(0)
    model = build_model(NESTED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def condition() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    context, negative = torch.randn(2, 2, 5, 16, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return {
        "context": context, "context_mask": mask, "negative_context": negative, "negative_context_mask": mask.flip(0),
    }  # fmt: skip


@torch.no_grad()
def plain_loop(
    model: Callable, diffusion: MatryoshkaDiffusion, condition: dict[str, Tensor], *, sampler: str, eta: float,
    threshold: str, scale: float, interval: tuple[float, float], seed: int,
) -> list[Tensor]:  # fmt: skip
    """Every noise level, every feature of the text and every draw when it is needed."""
    context, mask, negative, negative_mask = condition.values()
    generators = seeded_generators(seed, range(2))

    def guided(x: list[Tensor], t: float) -> list[Tensor]:
        time = torch.full((2,), t - 1, dtype=torch.int64 if isinstance(t, int) else torch.float32)
        if not interval[0] <= t <= interval[1]:
            return model(x, time, context, mask)
        both = torch.cat([negative, context]), torch.cat([negative_mask, mask])
        predictions = model([torch.cat([y, y]) for y in x], torch.cat([time, time]), *both)
        return [torch.lerp(*prediction.chunk(2), scale) for prediction in predictions]

    def draw() -> list[Tensor]:
        return [torch.stack([torch.randn(shape[1:], generator=one) for one in generators]) for shape in SHAPES]

    def denoise(x: list[Tensor], t: float) -> list[Tensor]:
        return diffusion.denoised(x, guided(x, t), diffusion.schedule.noise_levels(t), threshold)

    times = time_grid(1000, STEPS) if sampler in ("ddim", "ddpm") else quadratic_times(1000, STEPS)
    process, options = Process(diffusion.schedule.noise_levels, denoise, draw), {"eta": eta} if eta else {}
    *_, (_, _, x) = SAMPLERS[sampler](process, draw(), times, **options)
    return [level.clamp(-1, 1) for level in x]


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("threshold", ["clip", "dynamic", "dynamic_if", "none"])
@pytest.mark.parametrize(("sampler", "eta"), [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.7)])
def test_pictures_are_those_of_the_plain_loop(model, condition, sampler, eta, threshold, interval):
    diffusion = MatryoshkaDiffusion(NESTED.noise_scales(8, 0))
    expected = plain_loop(
        model, diffusion, condition,
        sampler=sampler, eta=eta, threshold=threshold, scale=3.0, interval=interval, seed=7,
    )  # fmt: skip
    actual = sample(
        model, diffusion, SHAPES, **condition,
        sampler=sampler, eta=eta, threshold=threshold, guidance_scale=3.0, guidance_interval=interval,
        num_inference_steps=STEPS, seed=7, return_levels=True,
    )  # fmt: skip
    assert all(map(torch.equal, actual, expected))


class Counted:
    """A model that counts its calls."""

    def __init__(self, model: UNet):
        self.model = model
        self.prepared, self.steps = [], 0

    def prepare(self, context, *rest):
        self.prepared.append(len(context))
        return self.model.prepare(context, *rest)

    def __call__(self, *inputs):
        self.steps += 1
        return self.model(*inputs)


@pytest.mark.parametrize(("interval", "prepared"), [*zip(INTERVALS, ([4], [2, 4], [2]), strict=True)])
def test_a_condition_is_prepared_once_and_only_where_it_is_needed(model, condition, interval, prepared):
    counted = Counted(model)
    options = {"guidance_scale": 3.0, "guidance_interval": interval, "num_inference_steps": STEPS}
    sample(counted, MatryoshkaDiffusion(NESTED.noise_scales(8, 0)), SHAPES, **condition, **options)
    assert sorted(counted.prepared) == prepared
    assert counted.steps == STEPS


def test_the_table_of_noise_levels_holds_what_each_lookup_gives():
    schedule = NoiseSchedule("deepfloyd", 1000, (4, 1), 1)
    times = [*range(1001), *quadratic_times(1000, 300)]
    table = schedule.tabulated(times)
    for t in times:
        for tabulated, alone in zip(table[t], schedule.noise_levels(t), strict=True):
            for name in ("half_logsnr", "alpha", "sigma"):
                assert torch.equal(getattr(tabulated, name), getattr(alone, name))


def test_noise_is_looked_up_once_a_run(model, condition, monkeypatch):
    diffusion = MatryoshkaDiffusion(NESTED.noise_scales(8, 0))
    monkeypatch.setattr(diffusion.schedule, "noise_levels", None)
    sample(model, diffusion, SHAPES, **condition, sampler="heun", num_inference_steps=STEPS)


@pytest.mark.parametrize(("sampler", "eta"), [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.7)])
def test_noise_drawn_ahead_is_the_noise_drawn_when_needed(model, condition, sampler, eta, monkeypatch):
    """Also the generator is left where it would be: nothing is drawn that no step takes."""
    pictures, states = [], []
    for ahead in (False, True):
        monkeypatch.setattr(noise, "_drawn_elsewhere", lambda *where, ahead=ahead: ahead)
        generator = torch.Generator().manual_seed(3)
        pictures.append(
            sample(
                model, MatryoshkaDiffusion(NESTED.noise_scales(8, 0)), SHAPES, **condition,
                sampler=sampler, eta=eta, num_inference_steps=STEPS, generator=generator,
            )
        )  # fmt: skip
        states.append(generator.get_state())
    assert torch.equal(*pictures)
    assert torch.equal(*states)


def test_noise_for_a_gpu_is_drawn_while_the_caller_works():
    generator, device = torch.Generator().manual_seed(0), torch.device("meta")
    with noise.noise_for([(2, 3)], generator, device, 2) as draw:
        (x,) = draw()
        assert x.device == device
    drawn = torch.Generator().manual_seed(0)
    torch.randn(2, 2, 3, generator=drawn)
    assert torch.equal(generator.get_state(), drawn.get_state())  # the second draw, which nobody asked for
