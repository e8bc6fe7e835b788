"""Noising an image at several resolutions at once, and the loss of a network that predicts them all."""

from .op import multires_loss, multires_noise

__all__ = ["multires_loss", "multires_noise"]
