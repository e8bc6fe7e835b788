"""accelerate on diffusers' residual blocks and attention, one at a time, in every configuration."""

import pytest
import torch
from torch import nn

import mdm_kernels as mk
from tests.kernels.accelerated import assert_same, output_and_gradients, parts, with_random_norms

pytest.importorskip("diffusers")
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D


def test_heads_wider_than_the_kernels_are_left():
    attention = Attention(query_dim=8, heads=1, dim_head=160)
    processor = attention.processor
    (entry,) = mk.accelerate(attention).left
    assert "160 wide" in entry.remark
    assert attention.processor is processor


class OwnBlock(ResnetBlock2D):
    def forward(self, input_tensor, temb):
        return super().forward(input_tensor, temb) + 1


def conditional_norm_block():
    return ResnetBlockCondNorm2D(in_channels=8, groups=4, temb_channels=12, time_embedding_norm="ada_group")


@pytest.mark.parametrize(
    "make_block", [lambda: OwnBlock(in_channels=8, groups=4, temb_channels=12), conditional_norm_block]
)
def test_other_residual_blocks_are_left(make_block):
    block = make_block()
    x, temb, kind = torch.randn(2, 8, 4, 4), torch.randn(2, 12), type(block)
    before = output_and_gradients(block, x, temb)
    report = mk.accelerate(block)
    assert parts(report.left) == {kind.__name__: 1}
    assert type(block) is kind
    assert_same(output_and_gradients(block, x, temb), before)


BLOCKS = {
    "no time embedding": {"temb_channels": None},
    "other width": {"out_channels": 16, "groups_out": 8, "conv_2d_out_channels": 12},
    "up": {"up": True},
    "down with FIR": {"down": True, "kernel": "fir"},
    "up by interpolation": {"up": True, "kernel": "sde_vp"},
    "FiLM": {"time_embedding_norm": "scale_shift", "skip_time_act": True, "output_scale_factor": 1.4},
}


@pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("training", [True, False])
def test_residual_blocks_of_any_configuration(config, training):
    base = {"in_channels": 8, "groups": 4, "temb_channels": 12, "dropout": 0.3}
    block = with_random_norms(ResnetBlock2D(**base | config))
    block.train(training)
    x, temb = torch.randn(2, 8, 4, 4), torch.randn(2, 12) if block.time_emb_proj is not None else None
    before = output_and_gradients(block, x, temb)
    assert mk.accelerate(block).left == []
    assert_same(output_and_gradients(block, x, temb), before)


def test_a_residual_block_with_a_hook_runs_as_before():
    block = ResnetBlock2D(in_channels=8, groups=4, temb_channels=12)
    x, temb, seen = torch.randn(2, 8, 4, 4), torch.randn(2, 12), []
    mk.accelerate(block)
    block.norm1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    block(x, temb)
    torch.testing.assert_close(seen, [nn.functional.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6)])


def test_a_residual_block_whose_forward_has_been_replaced_is_left():
    block = ResnetBlock2D(in_channels=8, groups=4, temb_channels=12)
    block.forward = lambda input_tensor, temb: input_tensor
    assert parts(mk.accelerate(block).left) == {"ResnetBlock2D": 1}


TEXT = {"cross_attention_dim": 12}
ATTENTIONS = {  # configuration, shape of the input, shape of the text, shape of the mask
    "tokens": ({}, (2, 6, 8), None, None),
    "image": ({"norm_num_groups": 4, "residual_connection": True}, (2, 8, 3, 2), None, None),
    "rescaled": ({"rescale_output_factor": 1.4, "bias": True, "out_bias": False}, (2, 6, 8), None, None),
    "text": (TEXT, (2, 6, 8), (2, 5, 12), None),
    "text mask": (TEXT, (2, 6, 8), (2, 5, 12), (2, 1, 5)),
    "mask of each query": (TEXT, (2, 6, 8), (2, 5, 12), (2, 6, 5)),
    "normalised text": (TEXT | {"cross_attention_norm": "layer_norm"}, (2, 6, 8), (2, 5, 12), None),
    "text normalised in groups": (
        TEXT | {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 3},
        (2, 6, 8),
        (2, 5, 12),
        None,
    ),
    "normalised queries and keys": ({"qk_norm": "layer_norm"}, (2, 6, 8), None, None),
    "unscaled logits": ({"scale_qk": False, "upcast_attention": True}, (2, 6, 8), None, None),
    "AttnProcessor with a mask": (TEXT | {"processor": AttnProcessor()}, (2, 6, 8), (2, 5, 12), (2, 1, 5)),
}


@pytest.mark.parametrize(("config", "shape", "text_shape", "mask_shape"), ATTENTIONS.values(), ids=ATTENTIONS.keys())
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_attention_of_any_configuration(config, shape, text_shape, mask_shape, backend):
    attention = Attention(query_dim=8, heads=2, dim_head=4, **config)
    inputs = torch.randn(shape), text_shape and torch.randn(text_shape), mask_shape and torch.randn(mask_shape)
    before = output_and_gradients(attention, *inputs)
    assert parts(mk.accelerate(attention).left) == {}
    with mk.use_backend(backend):
        assert_same(output_and_gradients(attention, *inputs), before)
