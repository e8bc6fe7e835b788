"""Which shapes are measured: those of the models on a GPU, small ones elsewhere."""

from benchmarks.case import Case, Place
from benchmarks.cases import (
    by_tma,
    diffusers_resnet,
    flash_attention,
    group_norm,
    group_norm_in_one_pass,
    sampler_step,
    self_cross_attention,
    temporal_attention,
)
from benchmarks.multires_cases import Levels, multires_loss, multires_noise
from mdm_kernels.tune import IMAGES

GROUP_NORMS = IMAGES  # by channels and size, the batch that a training step has on one GPU; sampling doubles one of 1
SAMPLING_BATCH = 2


def gpu_cases(place: Place) -> list[Case]:
    """Every op at every shape of the models, at the batches of training and of sampling."""
    training = list(GROUP_NORMS.items())
    sampling = [(shape, SAMPLING_BATCH) for shape in GROUP_NORMS]
    return [
        *(group_norm(place, batch, *shape) for shape, batch in sampling + training),
        *(group_norm(place, batch, *shape, film=True) for shape, batch in training),
        *(group_norm(place, batch, *shape, skip=shape[0]) for shape, batch in training),
        *(self_cross_attention(place, batch, 1024, 128, 64) for batch in (SAMPLING_BATCH, 16, 64)),
        *(self_cross_attention(place, batch, 256, 128, 96) for batch in (SAMPLING_BATCH, 16, 64)),
        *(flash_attention(place, batch, 1024, 64) for batch in (SAMPLING_BATCH, 16, 64)),
        *(flash_attention(place, batch, 256, 96) for batch in (SAMPLING_BATCH, 16, 64)),
        *(temporal_attention(place, batch, 16, 32) for batch in (SAMPLING_BATCH, 16)),
        *_multires(Levels(place, 64, 256, [(1, 1), (1, 4)])),
        *_multires(Levels(place, 8, 1024, [(1, 1), (1, 4), (1, 16)])),
        *_multires(Levels(place, 8, 256, [(1, 1), (1, 4), (16, 4)], frames=16)),
        *(sampler_step(place, batch, size) for batch, size in ((1, 1024), (16, 256))),
        *(diffusers_resnet(place, batch, 256, 64) for batch in (SAMPLING_BATCH, 16)),
    ]


def quick_gpu_cases(place: Place) -> list[Case]:
    """One shape an op, and GroupNorm at each of its sizes: a first look."""
    return [
        *(group_norm(place, batch, *shape) for shape, batch in GROUP_NORMS.items()),
        group_norm(place, 64, 256, 64, film=True),
        group_norm(place, 64, 512, 32, skip=512),
        self_cross_attention(place, 16, 1024, 128, 64),
        self_cross_attention(place, 16, 256, 128, 96),
        flash_attention(place, 16, 1024, 64),
        flash_attention(place, 16, 256, 96),
        temporal_attention(place, 4, 16, 32),
        *_multires(Levels(place, 16, 256, [(1, 1), (1, 4)])),
        sampler_step(place, 16, 256),
    ]


def experimental_cases(place: Place) -> list[Case]:
    """What is off until a GPU has shown it right and faster, beside what it would replace."""
    return [
        *(
            group_norm_in_one_pass(place, GROUP_NORMS[shape], *shape)
            for shape in ((64, 256), (128, 128), (32, 512), (32, 1024))
        ),
        group_norm_in_one_pass(place, 16, 256, 128, skip=128),
        *(by_tma(self_cross_attention(place, 16, *sizes)) for sizes in ((1024, 128, 64), (256, 128, 96))),
        *(by_tma(flash_attention(place, 16, *sizes)) for sizes in ((1024, 64), (256, 96))),
    ]


def small_cases(place: Place) -> list[Case]:
    """Every op at a shape that a processor does in milliseconds."""
    return [
        group_norm(place, 1, 64, 32),
        group_norm(place, 1, 64, 32, film=True),
        group_norm(place, 1, 64, 32, skip=64),
        self_cross_attention(place, 1, 256, 32, 64),
        flash_attention(place, 1, 256, 64),
        temporal_attention(place, 1, 16, 8),
        *_multires(Levels(place, 2, 64, [(1, 1), (1, 4)])),
        *_multires(Levels(place, 2, 32, [(1, 1), (1, 4), (8, 4)], frames=8)),
        sampler_step(place, 2, 64),
        diffusers_resnet(place, 1, 32, 16),
    ]


def _multires(levels: Levels) -> list[Case]:
    return [multires_noise(levels), multires_loss(levels)]
