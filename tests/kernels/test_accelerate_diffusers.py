"""accelerate on diffusers' UNets with random weights: same results, same training step, same state dict, undo."""

import copy
import pickle

import pytest
import torch

import mdm_kernels as mk
from tests.kernels.accelerated import assert_same, output_and_gradients, parts, with_random_norms

pytest.importorskip("diffusers")
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

CHANNELS = {"block_out_channels": (8, 16), "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 8}
UNCONDITIONAL = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}
CONDITIONAL = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
FILM = {"resnet_time_scale_shift": "scale_shift"}


def unet_2d(**config):
    return with_random_norms(UNet2DModel(**CHANNELS | UNCONDITIONAL | config))


def unet_2d_condition(**config):
    return with_random_norms(UNet2DConditionModel(**CHANNELS | CONDITIONAL | config))


def older_attention():
    unet = unet_2d_condition()
    unet.set_attn_processor(AttnProcessor())
    return unet


UNETS = {
    "UNet2DModel": unet_2d,
    "UNet2DModel with FiLM": lambda: unet_2d(**FILM),
    "UNet2DModel that resamples in its residual blocks": lambda: unet_2d(
        downsample_type="resnet", upsample_type="resnet", dropout=0.3, **FILM
    ),
    "UNet2DConditionModel": unet_2d_condition,
    "UNet2DConditionModel with FiLM": lambda: unet_2d_condition(
        resnet_skip_time_act=True, resnet_out_scale_factor=1.4, dropout=0.3, **FILM
    ),
    "UNet2DConditionModel with AttnProcessor": older_attention,
    "UNet2DConditionModel without SiLU": lambda: unet_2d_condition(act_fn="gelu"),
}


def arguments(unet):
    """Positional arguments of a call, and named ones: a batch of two, with a text mask where there is text."""
    x = torch.randn(2, unet.config.in_channels, 8, 8)
    time = torch.tensor([3, 700])
    if isinstance(unet, UNet2DModel):
        return (x, time), {}
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return (x, time, torch.randn(2, 5, 12)), {"encoder_attention_mask": mask.bool()}


def weights_after_a_step(unet, inputs, masks):
    """Results of a call with their gradients, and the weights after one optimizer step."""
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    results = output_and_gradients(unet, *inputs, **masks)
    optimizer.step()
    return results, {name: weight.detach().clone() for name, weight in unet.named_parameters()}


@pytest.mark.parametrize("make_unet", UNETS.values(), ids=UNETS.keys())
def test_a_training_step_stays_the_same(make_unet):
    unet = make_unet().train()
    accelerated = copy.deepcopy(unet)
    inputs, masks = arguments(unet)
    assert mk.accelerate(accelerated).swapped
    results, weights = weights_after_a_step(accelerated, inputs, masks)
    expected_results, expected_weights = weights_after_a_step(unet, inputs, masks)
    assert_same(results, expected_results)
    assert_same(weights, expected_weights)


def test_results_stay_the_same_with_the_kernels():
    unet = unet_2d_condition(**FILM)
    inputs, masks = arguments(unet)
    before = output_and_gradients(unet, *inputs, **masks)
    mk.accelerate(unet)
    with mk.use_backend("triton"):
        assert_same(output_and_gradients(unet, *inputs, **masks), before)


def test_bfloat16_errs_no_more_than_before():
    exact = unet_2d(**FILM)
    unet = copy.deepcopy(exact).bfloat16()
    (x, time), _ = arguments(unet)
    truth = exact(x, time).sample
    before = (unet(x.bfloat16(), time).sample - truth).abs().max()
    mk.accelerate(unet)
    assert (unet(x.bfloat16(), time).sample - truth).abs().max() <= 2 * before


def test_autocast_errs_no_more_than_before():
    unet = unet_2d_condition(**FILM)
    inputs, masks = arguments(unet)
    truth = unet(*inputs, **masks).sample

    def error():
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return (unet(*inputs, **masks).sample - truth).abs().max()

    before = error()
    mk.accelerate(unet)
    assert error() <= 2 * before


def test_results_stay_the_same_with_gradient_checkpoints_and_channels_last():
    unet = unet_2d_condition(**FILM).train().to(memory_format=torch.channels_last)
    inputs, masks = arguments(unet)
    before = output_and_gradients(unet, *inputs, **masks)
    mk.accelerate(unet)
    unet.enable_gradient_checkpointing()
    assert_same(output_and_gradients(unet, *inputs, **masks), before)


def test_torch_compile_without_graph_breaks():
    one_resolution = {"block_out_channels": (8,), "attention_head_dim": 2} | {
        f"{way}_block_types": (f"CrossAttn{way.title()}Block2D",) for way in ("down", "up")
    }
    unet = unet_2d_condition(**one_resolution, **FILM).eval()
    inputs, masks = arguments(unet)
    before = unet(*inputs, **masks).sample
    mk.accelerate(unet)
    torch.compiler.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    assert_same({"output": compiled(*inputs, **masks).sample}, {"output": before})


def test_the_report_counts_every_part():
    report = mk.accelerate(unet_2d(**FILM))
    # residual blocks: one in each of two down stages, two in each of two up stages, two in the middle, whose attention
    # has no norm of its own
    assert parts(report.swapped) == {
        "GroupNorm + SiLU": 8 + 1,  # and the output's
        "GroupNorm + FiLM + SiLU": 8,
        "GroupNorm": 3,
        "Attention": 4,
    }
    assert report.left == []
    report = mk.accelerate(unet_2d_condition())
    # four transformers, each with self- and cross-attention
    assert parts(report.swapped) == {"GroupNorm + SiLU": 17, "GroupNorm": 4, "Attention": 8}


def test_what_is_left_is_reported_with_the_reason():
    unet = unet_2d_condition(act_fn="mish")
    first, *_ = unet.attn_processors
    unet.set_attn_processor(dict.fromkeys(unet.attn_processors, AttnProcessor()) | {first: SlicedAttnProcessor(1)})
    report = mk.accelerate(unet)
    assert parts(report.left) == {"ResnetBlock2D": 8, "Attention": 1}
    assert parts(report.swapped) == {"GroupNorm": 21, "Attention": 7}
    table = str(report)
    assert "its activation is Mish, not SiLU" in table
    assert "its processor is SlicedAttnProcessor" in table


def give_a_forward(unet):
    unet.forward = lambda x: unet.conv_norm_out(x)


def share_the_norm(unet):
    unet.mid_block.norm = unet.conv_norm_out


@pytest.mark.parametrize("change", [give_a_forward, share_the_norm])
def test_an_output_norm_that_others_may_call_gets_no_silu(change):
    unet = unet_2d()
    change(unet)
    x = torch.randn(1, 8, 4, 4)
    before = unet.conv_norm_out(x)
    mk.accelerate(unet)
    torch.testing.assert_close(unet.conv_norm_out(x), before)


def test_the_state_dict_stays_the_same_and_loads_both_ways():
    unet = unet_2d_condition()
    state = unet.state_dict(keep_vars=True)
    mk.accelerate(unet)
    after = unet.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is state[name] for name in state)
    plain, accelerated = unet_2d_condition(), unet_2d_condition()
    mk.accelerate(accelerated)
    plain.load_state_dict(after)
    accelerated.load_state_dict(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), accelerated.parameters(), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_accelerated_too(copied):
    unet = unet_2d(**FILM)
    inputs, masks = arguments(unet)
    mk.accelerate(unet)
    again = copied(unet)
    second = mk.accelerate(again)
    assert second.swapped == second.left == []
    assert_same(output_and_gradients(again, *inputs), output_and_gradients(unet, *inputs, **masks))


def test_processors_can_be_set_to_the_default_on_an_accelerated_unet():
    """diffusers looks their classes up in a list of its own."""
    unet = unet_2d_condition()
    inputs, masks = arguments(unet)
    before = unet(*inputs, **masks).sample
    mk.accelerate(unet)
    unet.set_default_attn_processor()
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor}
    assert_same({"output": unet(*inputs, **masks).sample}, {"output": before})


def test_an_image_prompt_adapter_loads_into_an_accelerated_unet():
    """diffusers makes new processors of self-attention from the classes of those that it finds."""
    adapter = {"image_proj": {}, "ip_adapter": {}}
    plain = unet_2d_condition()
    for i, name in enumerate(name for name in plain.attn_processors if name.endswith("attn2.processor")):
        width = plain.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("k", "v"):
            adapter["ip_adapter"][f"{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(width, 12)
    adapter["image_proj"] = {
        "proj.weight": torch.randn(4 * 12, 6), "proj.bias": torch.randn(48),
        "norm.weight": torch.ones(12), "norm.bias": torch.zeros(12),
    }  # fmt: skip
    inputs, masks = arguments(plain)
    image = {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 6)]}}
    accelerated = copy.deepcopy(plain)
    mk.accelerate(accelerated)
    outputs = []
    for unet in (plain, accelerated):
        unet._load_ip_adapter_weights([copy.deepcopy(adapter)])
        outputs.append({"output": unet(*inputs, **masks, **image).sample})
    assert_same(*outputs)


def test_undo_restores_modules_processors_and_bits():
    unet = unet_2d_condition(**FILM)
    inputs, masks = arguments(unet)
    before = unet(*inputs, **masks).sample
    modules, processors = [(m, type(m)) for m in unet.modules()], unet.attn_processors
    mk.accelerate(unet).undo()
    assert [(m, type(m)) for m in unet.modules()] == modules
    assert unet.attn_processors == processors
    assert torch.equal(unet(*inputs, **masks).sample, before)
