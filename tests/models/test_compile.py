"""Whole models under torch.compile on a CPU, by Inductor: at batch 1, where its loops are split in other ways."""

import re

import pytest
import torch

from mdm_models import create_model, list_models
from tests.models.golden import relative_error


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_a_compiled_model_computes_what_it_computes_eagerly(name):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # of their layer's size, those that start at zero too
            parameter.uniform_(-1, 1).mul_(parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5)
        size = int(re.findall(r"\d+", name)[-1]) if re.search(r"_\d+$", name) else 32
        x = [torch.randn(1, *shape) for shape in model.config.sample_shapes(size)]
        context = torch.randn(1, 5, model.config.innermost.context_dim)
        inputs = x, torch.tensor([500]), model.prepare(context)
        for compiled, eager in zip(torch.compile(model, fullgraph=True)(*inputs), model(*inputs), strict=True):
            assert relative_error(compiled, eager) < 1e-4
