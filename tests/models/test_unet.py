import copy
import json

import pytest
import torch

from mdm_models import UNet, UNetConfig, create_model
from mdm_models.layers import AttentionBlock, TextConditioning
from tests.models.golden import MODELS, GoldenModel, relative_error


@pytest.mark.parametrize("name", MODELS)
def test_model_agrees_with_the_official_outputs(name):
    golden = GoldenModel(name)
    model = golden.model()
    with torch.no_grad():
        outputs = model(golden.x, **golden.inputs)
    assert sum(p.numel() for p in model.parameters()) == golden.parameters
    for ours, official in zip(outputs, golden.y, strict=True):
        assert relative_error(ours, official) <= 1e-5


def randomised(model):
    """Weights all drawn at random, so that no zero-initialised branch hides a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05 if parameter.dim() > 1 else 0.5)
    return model.eval()


def tiny_inputs(batch: int = 2, frames: int = 8, size: int = 16):
    x = [torch.randn(batch, 3, frames, size, size), torch.randn(batch, 3, 1, size, size)]
    context = torch.randn(batch, 5, 64)
    return {"x": x, "time": torch.tensor([3, 700][:batch]), "context": context}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return randomised(create_model("mdm_t2v_tiny"))


def test_a_fresh_model_predicts_zero_at_every_level():
    outputs = create_model("mdm_t2v_tiny")(**tiny_inputs())
    assert all((output == 0).all() for output in outputs)


def test_samples_of_a_batch_do_not_touch_each_other(tiny):
    inputs = tiny_inputs()
    with torch.no_grad():
        both = tiny(**inputs)
        alone = tiny([x[:1] for x in inputs["x"]], inputs["time"][:1], inputs["context"][:1])
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a[:1], b, rtol=1e-4, atol=1e-5)


def test_mixed_batch_gives_the_missing_outer_rows_no_features(tiny):
    inputs = tiny_inputs()
    mixed = {**inputs, "x": [inputs["x"][0][:1], inputs["x"][1]]}
    with torch.no_grad():
        full = tiny(**inputs)
        outer, inner = tiny(**mixed)
        torch.testing.assert_close(outer, full[0][:1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inner[:1], full[1][:1], rtol=1e-4, atol=1e-5)
        features_off = tiny.inner.denoise(  # the second row sees the inner UNet alone, fed with zeros
            [inputs["x"][1]], torch.zeros(2, 32, 16, 16), inputs["time"], tiny.prepare(inputs["context"])
        )[0][0]
    torch.testing.assert_close(inner[1:], features_off[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_condition_prepared_once_gives_the_same_bits(tiny, dtype):
    model, inputs = copy.deepcopy(tiny).to(dtype), tiny_inputs()
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    condition = inputs.pop("context"), mask, {"scale": torch.tensor([16.0, 16.0])}
    mixed = {**inputs, "x": [inputs["x"][0][:1], inputs["x"][1]]}
    with torch.no_grad():
        prepared = model.prepare(*condition)
        for given in (inputs, mixed):
            expected = model(**given, context=condition[0], context_mask=mask, micro=condition[2])
            assert all(map(torch.equal, model(**given, context=prepared), expected))


def test_a_prepared_condition_leaves_no_layer_that_reads_the_text_again(tiny, monkeypatch):
    inputs = tiny_inputs()
    with torch.no_grad():
        prepared = tiny.prepare(inputs.pop("context"))
        for module in tiny.modules():
            if isinstance(module, AttentionBlock | TextConditioning):
                monkeypatch.setattr(getattr(module, "context_kv", module), "forward", None)
        tiny(**inputs, context=prepared)


def test_a_model_without_conditions_is_prepared_for_any_batch():
    model = UNet(UNetConfig(channels=(32,), blocks=(1,), embed_dim=32))
    x = [torch.randn(3, 3, 8, 8)]
    assert model(x, torch.tensor([1, 2, 3]), model.prepare(None))[0].shape == x[0].shape


def test_masked_tokens_change_nothing(tiny):
    inputs = tiny_inputs()
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    other = {**inputs, "context": inputs["context"] + 100 * ~mask[..., None]}
    with torch.no_grad():
        for a, b in zip(tiny(**inputs, context_mask=mask), tiny(**other, context_mask=mask), strict=True):
            torch.testing.assert_close(a, b)


def test_micro_condition_defaults_and_scale_clamp(tiny):
    inputs = tiny_inputs()
    with torch.no_grad():
        default = tiny(**inputs)[0]
        larger = tiny(**inputs, micro={"scale": torch.tensor([99.0, 1000.0])})[0]
        smaller = tiny(**inputs, micro={"scale": torch.tensor([16.0, 16.0])})[0]
    torch.testing.assert_close(default, larger)
    assert (default - smaller).abs().max() > 1e-3


def test_every_parameter_gets_a_gradient(tiny):
    outputs = tiny(**tiny_inputs())
    sum(output.square().mean() for output in outputs).backward()
    missing = [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.any()]
    tiny.zero_grad()
    assert missing == []


def test_every_feature_map_stays_in_channels_last_memory(tiny):
    strays = []

    def check(name):
        def hook(module, inputs, output):
            if output.shape[1] > 1 and not output.is_contiguous(memory_format=torch.channels_last):
                strays.append(name)

        return hook

    hooks = [
        module.register_forward_hook(check(name))
        for name, module in tiny.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm)
    ]
    with torch.no_grad():
        tiny(**tiny_inputs())
    for hook in hooks:
        hook.remove()
    assert strays == []


def test_bfloat16_stays_near_float32(tiny):
    inputs = tiny_inputs()
    with torch.no_grad():
        expected = tiny(**inputs)
        halved = randomised(create_model("mdm_t2v_tiny"))
        halved.load_state_dict(tiny.state_dict())
        actual = halved.bfloat16()(**inputs)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert relative_error(a.float(), b) < 0.05  # some 40 layers, each rounding to 8 bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [torch.zeros(2, 3, 8, 16, 16)]}, "x has 1 tensors; this model takes 2"),
        ({"x": [torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 1, 16, 16)]}, r"x\[0\].*must be \(B, C, T, H, W\)"),
        ({"x": [torch.zeros(2, 4, 8, 16, 16), torch.zeros(2, 3, 1, 16, 16)]}, r"x\[0\].*takes 3 channels"),
        ({"x": [torch.zeros(2, 3, 6, 16, 16), torch.zeros(2, 3, 1, 16, 16)]}, r"x\[0\].*multiple of 8"),
        ({"x": [torch.zeros(2, 3, 8, 16, 16), torch.zeros(2, 3, 1, 8, 16)]}, r"x\[1\].*must be \(1, 16, 16\)"),
        ({"x": [torch.zeros(2, 3, 8, 16, 16), torch.zeros(1, 3, 1, 16, 16)]}, r"x\[0\] has 2 rows, more than the 1"),
        ({"x": [torch.zeros(0, 3, 8, 16, 16), torch.zeros(2, 3, 1, 16, 16)]}, r"x\[0\].*needs a row"),
        ({"time": torch.zeros(3)}, r"time has shape \(3,\)"),
        ({"context": None}, "context is missing"),
        ({"context": torch.zeros(2, 5, 63)}, r"context has shape \(2, 5, 63\)"),
        ({"context_mask": torch.ones(2, 4)}, r"context_mask has shape \(2, 4\)"),
        ({"micro": {"watermark": torch.zeros(2)}}, "micro has 'watermark'"),
        ({"micro": {"scale": torch.zeros(3)}}, r"micro\['scale'\] has shape \(3,\)"),
    ],
)
def test_an_input_that_does_not_fit_is_named(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{**tiny_inputs(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 16, 16)}, "x is Tensor; it must be a list of tensors"),
        ({"x": [torch.zeros(2, 3, 8, 16, 16).numpy(), torch.zeros(2, 3, 1, 16, 16)]}, r"x\[0\] is ndarray"),
        ({"time": 500}, "time is int; it must be a tensor"),
        ({"context": [[0.0]]}, "context is list; it must be a tensor"),
        ({"context_mask": [True]}, "context_mask is list; it must be a tensor"),
        ({"micro": 3}, "micro is int; it must be a dict of tensors, by name"),
        ({"micro": {"scale": 3}}, r"micro\['scale'\] is int; it must be a tensor"),
    ],
)
def test_an_input_of_another_type_is_named(tiny, change, message):
    with pytest.raises(TypeError, match=message):
        tiny(**{**tiny_inputs(), **change})


def test_a_condition_prepared_for_another_batch_is_named(tiny):
    with torch.no_grad(), pytest.raises(ValueError, match="context was prepared for 1 samples; x has 2"):
        tiny(**{**tiny_inputs(), "context": tiny.prepare(torch.zeros(1, 5, 64))})
    with pytest.raises(ValueError, match=r"context has shape \(2, 5, 63\)"):
        tiny.prepare(torch.zeros(2, 5, 63))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": (1, 1)}, "one entry a resolution"),
        ({"kind": "volume"}, "kind 'volume'"),
        ({"channels": (33,)}, "multiples of norm_groups"),
        ({"kind": "time"}, "innermost UNet sees one frame"),
        ({"attention": (1, 1)}, "attention"),
        ({"temporal_attention": (1,)}, "needs kind 'time'"),
        ({"attention": (1,), "num_heads": 5}, "32 of a resolution with attention must be a multiple of num_heads 5"),
        ({"mid_blocks": True, "num_heads": 5}, "must be a multiple of num_heads 5"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"context_layers": -1}, "context_layers -1 must not be negative"),
    ],
)
def test_a_config_that_cannot_be_built_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{"channels": (32,), "blocks": (1,), **fields})


def test_temporal_heads_that_do_not_divide_the_width_are_named():
    config = {**create_model("mdm_t2v_tiny").config.to_dict(), "temporal_head_dim": 24}
    with pytest.raises(ValueError, match="must be a multiple of temporal_head_dim 24"):
        UNetConfig.from_dict(config)


def test_text_attention_in_a_video_level_is_refused():
    config = {**create_model("mdm_t2v_tiny").config.to_dict(), "attention": (0, 0, 0, 1)}
    with pytest.raises(ValueError, match="attention to text needs kind 'image'"):
        UNetConfig.from_dict(config)


def test_config_survives_json():
    config = create_model("mdm_t2v_tiny").config
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
