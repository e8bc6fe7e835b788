"""The diffusion process: noise schedules, the multi-resolution objective, the samplers."""

from mdm_models.diffusion.objective import MatryoshkaDiffusion
from mdm_models.diffusion.samplers import guide, sample, time_grid
from mdm_models.diffusion.schedule import alpha_bar_table

__all__ = ["MatryoshkaDiffusion", "alpha_bar_table", "guide", "sample", "time_grid"]
