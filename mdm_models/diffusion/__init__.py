"""The diffusion process: noise schedules, the multi-resolution objective, the samplers."""

from mdm_models.diffusion.guidance import guide
from mdm_models.diffusion.noise import seeded_generators
from mdm_models.diffusion.objective import MatryoshkaDiffusion
from mdm_models.diffusion.samplers import SAMPLERS, sample
from mdm_models.diffusion.schedule import alpha_bar_table
from mdm_models.diffusion.times import continuous_times, discrete_times, logit_normal_times, time_grid

__all__ = [
    "SAMPLERS",
    "MatryoshkaDiffusion",
    "alpha_bar_table",
    "continuous_times",
    "discrete_times",
    "guide",
    "logit_normal_times",
    "sample",
    "seeded_generators",
    "time_grid",
]
