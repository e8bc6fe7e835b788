"""diffusers' residual block and attention on the fused ops. Imports diffusers: only for models that come from it.

Both are subclasses that add nothing to their base but a forward, so that an instance can change between the two.
Written for diffusers 0.42.
"""

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from ..attention import scaled_dot_product_attention
from .fused import norm_silu, runs_as_one


class FusedResnetBlock2D(ResnetBlock2D):
    """ResnetBlock2D with GroupNorm, the time embedding's scale and shift where it has them, and SiLU as one op."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        """input_tensor (N, C, H, W), temb (N, D) or None → (N, C_out, H', W'); other arguments are the base's."""
        fused = all(runs_as_one(norm, self.nonlinearity) for norm in (self.norm1, self.norm2))
        embedded = (temb is None) == (self.time_emb_proj is None)
        modulated = self.time_embedding_norm == "scale_shift"
        if args or kwargs or not fused or not embedded or (modulated and temb is None):
            given: Any = temb  # None is allowed, which diffusers' annotation leaves out
            return super().forward(input_tensor, given, *args, **kwargs)

        x, h = self._resampled(input_tensor, norm_silu(self.norm1, input_tensor))
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))  # (N, C_out or 2·C_out)
        if temb is not None and modulated:
            scale, shift = temb.chunk(2, dim=1)
            h = norm_silu(self.norm2, h, scale, shift)
        else:
            h = norm_silu(self.norm2, h if temb is None else h + temb[:, :, None, None])
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)  # as the base: a stride that DDP expects
        return (x + h) / self.output_scale_factor

    def _resampled(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the block and its normalised input, both at the resolution of the block's output."""
        if self.upsample is not None:
            return self.upsample(x), self.upsample(h)
        if self.downsample is not None:
            return self.downsample(x), self.downsample(h)
        return x, h


class FlashAttention(Attention):
    """Attention whose standard processors' work is done by `scaled_dot_product_attention` of this library: the fused
    kernel without a mask, and torch's function with one, as diffusers' masks are added to the logits.

    The processor stays diffusers' own: what makes a processor from another's class, or asks for its class, as
    `load_ip_adapter` and `set_default_attn_processor` do, finds one that it knows. Any other processor that is set
    later does its own work.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs,
    ) -> Tensor:
        """hidden_states (B, L, C) or (B, C, H, W) → the same shape; encoder_hidden_states (B, S, C_text) are the keys
        if given; attention_mask (B or B·heads, 1 or L, S) is added to the logits; temb goes to a spatial norm."""
        if not is_standard(self) or cross_attention_kwargs.keys() - {"temb"}:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
        residual = hidden_states
        if self.spatial_norm is not None:
            hidden_states = self.spatial_norm(hidden_states, cross_attention_kwargs.get("temb"))
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        keys_from = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, keys, _ = keys_from.shape
        if attention_mask is not None:
            attention_mask = self.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.unflatten(0, (batch, self.heads))  # (B, heads, 1 or L, S)

        if self.group_norm is not None:
            hidden_states = self.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            keys_from = hidden_states
        elif self.norm_cross:
            keys_from = self.norm_encoder_hidden_states(encoder_hidden_states)

        to_k: Any = self.to_k  # as to_v and to_out, None in joint attention alone
        to_v: Any = self.to_v
        projections = self.to_q(hidden_states), to_k(keys_from), to_v(keys_from)
        query, key, value = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in projections)
        query = query if self.norm_q is None else self.norm_q(query)
        key = key if self.norm_k is None else self.norm_k(key)
        scale = self.scale if type(self.processor) is AttnProcessor else None  # None: 1/√(head width)
        h = scaled_dot_product_attention(query, key, value, attention_mask, scale=scale)
        h = h.transpose(1, 2).flatten(2).to(query.dtype)

        to_out: Any = self.to_out
        project, dropout = to_out
        h = dropout(project(h))
        if image_shape is not None:
            h = h.transpose(1, 2).reshape(image_shape)
        if self.residual_connection:
            h = h + residual
        return h / self.rescale_output_factor


def is_standard(attention: Attention) -> bool:
    """Whether `FlashAttention` computes what the processor of `attention` does; AttnProcessor leaves out the norms of
    queries and keys."""
    kind = type(attention.processor)
    return kind is AttnProcessor2_0 or (kind is AttnProcessor and attention.norm_q is None)
