import pytest
import torch
import torch.nn.functional as F

from mdm_models.layers import Downsample, ResidualBlock, TemporalAttentionBlock, TimeConv, Upsample


@pytest.fixture
def clips():
    """Two clips of 4 frames: (2·4, 32, 8, 8), channels_last."""
    return torch.randn(8, 32, 8, 8).contiguous(memory_format=torch.channels_last)


def test_a_residual_block_of_a_skip_is_that_of_the_concatenation(clips):
    block = ResidualBlock(32 + 16, 24, embed_dim=8, norm_groups=3, dropout=0.0)
    torch.nn.init.normal_(block.conv2.weight, std=0.1)
    skip = torch.randn(8, 16, 8, 8)
    embedding = torch.randn(2, 8)
    expected = block(torch.cat([clips, skip], dim=1), embedding)
    torch.testing.assert_close(block(clips, embedding, skip), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_time_convolution_is_a_conv1d_at_every_pixel(clips, stride):
    layer = TimeConv(32, 16, 3, stride=stride, padding=1)
    pixels = clips.reshape(2, 4, 32, 64).permute(0, 3, 2, 1).reshape(2 * 64, 32, 4)
    expected = F.conv1d(pixels, layer.weight, layer.bias, stride=stride, padding=1)
    actual = layer(clips, 4)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    actual = actual.reshape(2, -1, 16, 64).permute(0, 3, 2, 1).reshape(2 * 64, 16, -1)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "down", "up"), [("time", (4, 32, 8, 8), (16, 32, 8, 8)), ("space", (8, 32, 4, 4), (8, 32, 16, 16))]
)
def test_resolution_changes_where_the_kind_says(clips, kind, down, up):
    assert Downsample(32, kind)(clips, 4).shape == down
    assert Upsample(32, kind)(clips, 4).shape == up


def test_upsampling_in_time_repeats_each_frame_before_its_convolution(clips):
    layer = Upsample(32, "time")
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[:, :, 1] = torch.eye(32)
        layer.conv.bias.zero_()
        torch.testing.assert_close(layer(clips, 4), clips.repeat_interleave(2, dim=0))


def temporal_block(rotary: bool) -> TemporalAttentionBlock:
    torch.manual_seed(1)
    block = TemporalAttentionBlock(64, head_dim=32, rotary=rotary)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
    return block


def test_temporal_attention_mixes_the_frames_of_a_clip_and_no_others():
    x = torch.randn(8, 64, 4, 4)
    changed = x.clone()
    changed[0] += 1
    with torch.no_grad():
        difference = (temporal_block(False)(x, 4) - temporal_block(False)(changed, 4)).abs().amax((1, 2, 3))
    assert (difference[:4] > 1e-4).all()
    assert (difference[4:] == 0).all()


def test_without_rotary_positions_the_order_of_frames_does_not_matter_and_with_them_it_does():
    x = torch.randn(4, 64, 4, 4)
    backwards = x.flip(0)
    with torch.no_grad():
        plain = temporal_block(False)(x, 4) - temporal_block(False)(backwards, 4).flip(0)
        rotary = temporal_block(True)(x, 4) - temporal_block(True)(backwards, 4).flip(0)
    assert plain.abs().max() < 1e-5
    assert rotary.abs().max() > 1e-3
