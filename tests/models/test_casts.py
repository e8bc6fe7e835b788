"""A model, a pipeline or a diffusion process that is cast to half precision keeps its constants as they were."""

import io

import pytest
import torch

from mdm_models import create_model
from mdm_models.diffusion import MatryoshkaDiffusion
from mdm_models.layers import SinusoidalEmbedding, TextConditioning, sinusoid
from mdm_models.pipeline import Pipeline, PipelineConfig
from mdm_models.text import TransformerTextEncoder

HALVES = [torch.bfloat16, torch.float16]
LATE = torch.tensor([999.0, 500.0, 1.0])
CASTS = {
    "to": lambda module, dtype: module.to(dtype),
    "by name": lambda module, dtype: module.bfloat16() if dtype == torch.bfloat16 else module.half(),
    "there and back": lambda module, dtype: module.to(dtype).float().to(dtype),
    "assigned buffers": lambda module, dtype: assigned(module, dtype),
    "saved and loaded": lambda module, dtype: reloaded(module.to(dtype)),
}


def assigned(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.to(dtype)
    return module


def reloaded(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def exact_sinusoid(value: torch.Tensor, width: int) -> torch.Tensor:
    frequencies = 10000 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = value.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_cast_model_embeds_late_times_as_an_uncast_one(cast, dtype):
    embedding = SinusoidalEmbedding(256)
    first_seen = []
    embedding = cast(embedding, dtype)
    embedding.fc1.register_forward_pre_hook(lambda _, inputs: first_seen.append(inputs[0]))
    with torch.no_grad():
        embedding(LATE)
    error = (first_seen[0].double() - exact_sinusoid(LATE, 64)).abs().max()
    assert error < torch.finfo(dtype).eps  # of the rounded sinusoid, not of its argument


def test_the_sinusoid_is_the_one_of_the_definition():
    torch.testing.assert_close(sinusoid(LATE, 64).double(), exact_sinusoid(LATE, 64), rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_cast_diffusion_process_adds_the_same_noise(dtype):
    exact, cast = (MatryoshkaDiffusion((4, 1), 1) for _ in range(2))
    cast.to(dtype)
    times = torch.arange(1001)
    for level in (0, 1):
        assert torch.equal(cast.alpha_bar(times, level), exact.alpha_bar(times, level))
        assert cast.alpha_bar(500, level) == exact.alpha_bar(500, level)
    assert cast.device.type == "cpu"
    assert cast.to("meta").device.type == "meta"


@pytest.mark.parametrize("dtype", HALVES)
def test_a_pipeline_cast_after_loading_is_the_one_loaded_in_that_dtype(dtype, tmp_path):
    torch.manual_seed(0)
    model = create_model("mdm_t2i_tiny_64")
    with torch.no_grad():
        for parameter in model.parameters():  # those that start at zero too
            parameter.normal_(std=0.05)
    whole = Pipeline(model, TransformerTextEncoder(64, layers=1), PipelineConfig(size=64))
    whole.save_pretrained(tmp_path)
    how = {"num_inference_steps": 2, "seed": 1, "output_type": "pt", "progress": False, "micro": {"scale": 61}}
    expected = Pipeline.from_pretrained(tmp_path, dtype=dtype)("a red apple", **how)
    actual = Pipeline.from_pretrained(tmp_path).to(dtype=dtype)("a red apple", **how)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_times_and_conditions_that_half_precision_rounded_are_refused(dtype):
    model = create_model("mdm_t2i_tiny")
    inputs = {"x": [torch.zeros(1, 3, 32, 32)], "context": torch.zeros(1, 3, 64)}
    time = torch.tensor([999])
    with pytest.raises(TypeError, match=r"time is torch\.\w*float16, which rounds it; it must be float32, float64 or"):
        model(time=time.to(dtype), **inputs)
    with pytest.raises(TypeError, match=r"micro\['scale'\] is torch\.\w*float16, which rounds it"):
        model(time=time, micro={"scale": torch.tensor([31]).to(dtype)}, **inputs)
    with pytest.raises(TypeError, match=r"t is torch\.\w*float16, which rounds times"):
        MatryoshkaDiffusion((1,)).alpha_bar(time.to(dtype), 0)


def test_long_prompts_pool_to_their_mean_in_bfloat16():
    text = TextConditioning(8, 0, 0, masked=True, embed_dim=8).bfloat16()
    torch.nn.init.eye_(text.pool.weight)
    _, _, pooled = text(torch.ones(1, 384, 8, dtype=torch.bfloat16), torch.arange(384)[None] < 257)
    assert torch.equal(pooled, torch.ones(1, 8, dtype=torch.bfloat16))  # 257 is 256 in bfloat16


def test_a_level_that_is_divided_by_its_deviation_has_a_deviation_of_one_in_bfloat16():
    model = create_model("mdm_t2i_tiny_64", normalize_input=True).bfloat16()
    seen = []
    model.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double().std()))
    x = [torch.randn(1, 3, 64, 64) * 1.003, torch.randn(1, 3, 32, 32)]
    with torch.no_grad():
        model(x, torch.tensor([3]), torch.zeros(1, 3, 64))
    assert abs(seen[0] - 1) < 1e-3  # 1.003 is 1 in bfloat16
