"""Noising an image at several resolutions at once, and the loss of a network that predicts them all."""

from mdm_kernels.multires.loss import multires_loss
from mdm_kernels.multires.noise import multires_noise

__all__ = ["multires_loss", "multires_noise"]
