"""What diffusers' own tests ask of a model, asked of each kind of model that has parts that are swapped, when it is
accelerated. Those tests are in diffusers' repository and not in its package."""

import copy

import pytest
import torch

import mdm_kernels as mk
from tests.kernels.accelerated import assert_same, output_and_gradients, with_random_norms
from tests.kernels.test_accelerate_diffusers import CHANNELS, CONDITIONAL, unet_2d, unet_2d_condition

pytest.importorskip("diffusers")
import diffusers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    VQModel,
)
from diffusers.models.attention_processor import AttnProcessor

WIDE = {"block_out_channels": (32, 64), "layers_per_block": 1}  # where 32 groups are not to be changed
CODERS = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def blocks(kind: str) -> dict:
    """The stages of `CONDITIONAL`, for clips."""
    down, up = CONDITIONAL["down_block_types"], CONDITIONAL["up_block_types"]
    stages = {"down_block_types": down, "up_block_types": up}
    return {key: tuple(name.replace("2D", kind) for name in names) for key, names in stages.items()}


MODELS = {
    "UNet2DModel": unet_2d,
    "UNet2DConditionModel": unet_2d_condition,
    "UNet3DConditionModel": lambda: UNet3DConditionModel(**CHANNELS | CONDITIONAL | blocks("3D")),
    "UNetMotionModel": lambda: UNetMotionModel(
        **CHANNELS | blocks("Motion"), cross_attention_dim=12, num_attention_heads=2, motion_num_attention_heads=2
    ),
    "UNetSpatioTemporalConditionModel": lambda: UNetSpatioTemporalConditionModel(
        **WIDE,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=12, num_attention_heads=2, projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8, sample_size=8,
    ),
    "ControlNetModel": lambda: ControlNetModel(
        down_block_types=CONDITIONAL["down_block_types"], block_out_channels=(8, 16), norm_num_groups=2,
        layers_per_block=1, attention_head_dim=2, cross_attention_dim=12, conditioning_embedding_out_channels=(8, 8),
    ),
    "AutoencoderKL": lambda: AutoencoderKL(**CODERS),
    "AutoencoderKLTemporalDecoder": lambda: AutoencoderKLTemporalDecoder(
        **WIDE, down_block_types=("DownEncoderBlock2D",) * 2
    ),
    "VQModel": lambda: VQModel(**CODERS, num_vq_embeddings=16),
}  # fmt: skip
TEXT, TIME, IMAGE, FRAMES = (2, 5, 12), torch.tensor([3, 700]), (8, 8), 2
ARGUMENTS = {
    "UNet2DModel": lambda: ((torch.randn(2, 3, *IMAGE), TIME), {}),
    "UNet2DConditionModel": lambda: ((torch.randn(2, 4, *IMAGE), TIME, torch.randn(TEXT)), {}),
    "UNet3DConditionModel": lambda: ((torch.randn(2, 4, FRAMES, *IMAGE), TIME, torch.randn(TEXT)), {}),
    "UNetMotionModel": lambda: ((torch.randn(1, 4, FRAMES, *IMAGE), TIME[:1], torch.randn(TEXT)), {}),  # of each frame
    "UNetSpatioTemporalConditionModel": lambda: (
        (torch.randn(2, FRAMES, 8, *IMAGE), TIME, torch.randn(TEXT)), {"added_time_ids": torch.rand(2, 3)}
    ),
    "ControlNetModel": lambda: (
        (torch.randn(2, 4, *IMAGE), TIME, torch.randn(TEXT), torch.randn(2, 3, 16, 16)), {}
    ),
    "AutoencoderKL": lambda: ((torch.randn(2, 3, *IMAGE),), {}),
    "AutoencoderKLTemporalDecoder": lambda: ((torch.randn(4, 3, *IMAGE),), {"num_frames": FRAMES}),
    "VQModel": lambda: ((torch.randn(2, 3, *IMAGE),), {}),
}  # fmt: skip


def those_with(method: str) -> list[str]:
    return [name for name in MODELS if hasattr(getattr(diffusers, name), method)]


@pytest.fixture(params=MODELS)
def plain(request):
    """A model whose every weight does something: some of diffusers' begin at 0."""
    model = with_random_norms(MODELS[request.param]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def arguments(plain):
    """Positional arguments of a call, and named ones."""
    return ARGUMENTS[type(plain).__name__]()


@pytest.fixture
def accelerated(plain):
    model = copy.deepcopy(plain)
    assert mk.accelerate(model).swapped
    return model


@torch.no_grad()
def output(model, arguments, **more) -> dict[int, torch.Tensor]:
    """All tensors of the output, by number."""
    inputs, named = arguments
    found = model(*inputs, **named, **more)
    parts = found if isinstance(found, tuple) else found.to_tuple()
    flat = [tensor for part in parts for tensor in (part if isinstance(part, tuple | list) else [part])]
    return {i: tensor for i, tensor in enumerate(flat) if tensor is not None}


def test_the_output_is_the_same_as_an_object_and_as_a_tuple(plain, accelerated, arguments):
    expected = output(plain, arguments)
    assert_same(output(accelerated, arguments), expected)
    assert_same(output(accelerated, arguments, return_dict=False), expected)


def test_a_training_step_with_gradient_checkpointing_stays_the_same(plain, accelerated, arguments):
    inputs, named = arguments
    models = plain.train(), accelerated.train()
    for model in models:
        if model._supports_gradient_checkpointing:
            model.enable_gradient_checkpointing()
    expected, found = (output_and_gradients(model, *inputs, **named) for model in models)
    assert_same(found, expected)
    assert len(found) > 10  # gradients among them


def test_it_is_saved_as_the_model_that_it_was_and_loaded(plain, accelerated, arguments, tmp_path):
    accelerated.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert {type(module) for module in loaded.modules()} == {type(module) for module in plain.modules()}
    assert_same(output(loaded, arguments), output(plain, arguments))
    mk.accelerate(loaded)
    assert_same(output(loaded, arguments), output(plain, arguments))


@pytest.mark.parametrize("plain", those_with("set_attn_processor"), indirect=True)
def test_its_attention_processors_can_be_set_and_set_back(plain, accelerated, arguments):
    expected = output(plain, arguments)
    accelerated.set_attn_processor(AttnProcessor())
    assert_same(output(accelerated, arguments), expected)
    accelerated.set_default_attn_processor()
    assert accelerated.attn_processors.keys() == plain.attn_processors.keys()
    assert_same(output(accelerated, arguments), expected)


@pytest.mark.parametrize("plain", those_with("fuse_qkv_projections"), indirect=True)
def test_its_projections_can_be_fused_and_parted(plain, accelerated, arguments):
    expected, processors = output(plain, arguments), accelerated.attn_processors
    accelerated.fuse_qkv_projections()
    assert_same(output(accelerated, arguments), expected)
    accelerated.unfuse_qkv_projections()
    assert accelerated.attn_processors == processors
    assert_same(output(accelerated, arguments), expected)


def test_cast_to_bfloat16_it_errs_no_more_than_before(plain, accelerated, arguments):
    exact = output(plain, arguments)
    inputs, named = arguments
    cast = (
        [x.bfloat16() if x.is_floating_point() else x for x in inputs],
        {name: x.bfloat16() if isinstance(x, torch.Tensor) else x for name, x in named.items()},
    )
    before, after = (output(model.bfloat16(), cast) for model in (plain, accelerated))
    for name, truth in exact.items():
        assert after[name].dtype == torch.bfloat16
        assert (after[name] - truth).abs().max() <= 2 * (before[name] - truth).abs().max()


def test_weights_that_are_cast_layer_by_layer_give_the_same(plain, accelerated, arguments):
    for model in (plain, accelerated):
        model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    assert any(parameter.dtype == torch.bfloat16 for parameter in accelerated.parameters())
    assert_same(output(accelerated, arguments), output(plain, arguments))
