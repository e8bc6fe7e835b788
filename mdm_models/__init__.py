"""Matryoshka Diffusion models: nested UNets for images and video, on the fused ops of `mdm_kernels`."""

import mdm_models.threads  # noqa: F401, before anything imports torch

# isort: split
from mdm_kernels import __version__
from mdm_models.config import UNetConfig
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.pretrained import from_pretrained
from mdm_models.unet import NestedUNet, UNet, build_model
from mdm_models.zoo import create_model, list_models, model_config

__all__ = [
    "NestedUNet",
    "Pipeline",
    "PipelineConfig",
    "UNet",
    "UNetConfig",
    "__version__",
    "build_model",
    "create_model",
    "from_pretrained",
    "list_models",
    "model_config",
]
