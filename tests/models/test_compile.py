"""Whole models under torch.compile on a CPU, by Inductor: at batch 1, where its loops are split in other ways."""

import re

import pytest
import torch

from mdm_models import UNetConfig, build_model, create_model, list_models
from tests.models.golden import relative_error

SMALL = UNetConfig(
    channels=(16, 32), blocks=(1, 1), attention=(0, 1), num_heads=2, embed_dim=16, norm_groups=4, context_dim=16,
    masked_context=True,
)  # fmt: skip


def assert_compiled_computes_the_same(model, size: int) -> None:
    torch.compiler.reset()
    with torch.no_grad():
        for parameter in model.parameters():  # of their layer's size, those that start at zero too
            parameter.uniform_(-1, 1).mul_(parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5)
        x = [torch.randn(1, *shape) for shape in model.config.sample_shapes(size)]
        context = torch.randn(1, 5, model.config.innermost.context_dim)
        inputs = x, torch.tensor([500]), model.prepare(context)
        for compiled, eager in zip(torch.compile(model, fullgraph=True)(*inputs), model(*inputs), strict=True):
            assert relative_error(compiled, eager) < 1e-4


def test_a_small_compiled_model_computes_what_it_computes_eagerly():
    """Norms, skips and attention of every model; the named ones take minutes."""
    assert_compiled_computes_the_same(build_model(SMALL).eval(), 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_a_compiled_model_computes_what_it_computes_eagerly(name):
    size = int(re.findall(r"\d+", name)[-1]) if re.search(r"_\d+$", name) else 32
    assert_compiled_computes_the_same(create_model(name).eval(), size)
