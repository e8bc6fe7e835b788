"""group_norm_silu with gradients on a CPU, where torch's own group norm is slow: rows at a time, while they are in the
cache, and gradients by formula.

Channels last, torch's backward takes up to thirty times as long as its forward (torch 2.15, bfloat16, two channels a
group), and a call for each row of FiLM, which it does not know, takes longer than the arithmetic where rows are small.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..layouts import dense, is_channels_last
from ..private_torch import is_batched, is_fake, torch_func_is_active
from . import reference

CHUNK = 2**19
"""elements that are worked on at a time, of several rows where these are small: 2 MiB in float32"""

SMALL = 2**16
"""elements of a row up to which the forward pass is faster here, too"""

CENTRED = {torch.float64: 1.0, torch.float32: 1.0, torch.bfloat16: 16.0, torch.float16: 16.0}
"""|mean| in standard deviations up to which E[x²] − E[x]², computed in float32 or in x's float64, is as good as needed
for the last bit of a result in x's dtype"""


def pays(*tensors: Tensor | None) -> bool:
    """Whether x, which comes first, is normalised faster here than by the reference, for the op of these tensors.

    It is where a gradient is wanted; and it must be let look at values: not while graphs are traced, nor under
    torch.func or in forward mode, which want operations whose derivatives PyTorch knows.
    """
    x, *_ = given = [tensor for tensor in tensors if tensor is not None]
    if x.device.type != "cpu" or not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in given):
        return False
    if torch.compiler.is_compiling() or torch_func_is_active() or not x.numel():
        return False
    if any(is_fake(tensor) or forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        return False
    return is_channels_last(x) or x[0].numel() <= SMALL


def normalised(x: Tensor, num_groups: int, gain: Tensor, offset: Tensor, eps: float, activation: str | None) -> Tensor:
    """Compute what `reference.normalised` does: act(x̂·gain + offset) in x's dtype, x̂ the normalised x (N, C, *spatial);
    gain and offset (1 or N / T, C) in float32, or float64 as x."""
    return _Normalised.apply(dense(x, is_channels_last(x)), num_groups, gain, offset, eps, activation)


@dataclass(frozen=True)
class _Normal:
    """Some rows of x in the dtype of all sums, and the mean and 1 / √(variance + ε) of each channel's group, (n, C);
    positions: in which dimension of the values, (n, P, C) or (n, C, P), these are."""

    values: Tensor
    mean: Tensor
    rstd: Tensor
    positions: int

    def transformed(self, gain: Tensor, offset: Tensor) -> Tensor:
        """x̂·gain + offset."""
        slope = gain * self.rstd
        return self._affine(self.values, slope, offset - self.mean * slope)

    def gradient(self, dz: Tensor, gain: Tensor, dgain: Tensor, doffset: Tensor, num_groups: int) -> Tensor:
        """Of x, from that of x̂·gain + offset: rstd·(dx̂ − E[dx̂] − x̂·E[dx̂·x̂]) with dx̂ = dz·gain."""
        count = self.values.shape[self.positions]
        mean = _group_means(gain * doffset, num_groups) / count
        slope = -self.rstd * _group_means(gain * dgain, num_groups) / count
        dx = self._affine(self.values, slope * self.rstd, -(self.rstd * mean + slope * self.rstd * self.mean))
        return dx.addcmul_(dz, (gain * self.rstd).unsqueeze(self.positions))

    def _affine(self, values: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
        return torch.addcmul(offset.unsqueeze(self.positions), values, slope.unsqueeze(self.positions))


@dataclass(frozen=True)
class _Rows:
    """The rows of a dense tensor, (N, P, C) or (N, C, P)."""

    values: Tensor
    positions: int

    @classmethod
    def of(cls, x: Tensor, channels_last: bool) -> "_Rows":
        x = dense(x, channels_last)
        return cls(x.movedim(1, -1).flatten(1, -2), 1) if channels_last else cls(x.view(*x.shape[:2], -1), 2)

    def chunks(self) -> Iterator[slice]:
        size = max(1, CHUNK // self.values[0].numel())
        return (slice(start, start + size) for start in range(0, len(self.values), size))

    def normal(self, chunk: slice, dtype: torch.dtype, num_groups: int, eps: float) -> _Normal:
        values = self.values[chunk].to(dtype)
        mean, variance = self._moments(values, num_groups)
        if (mean.square() > CENTRED[self.values.dtype] ** 2 * variance).any():
            values = values - mean.unsqueeze(self.positions)
            mean, variance = self._moments(values, num_groups)
        return _Normal(values, mean, (variance.clamp_min(0) + eps).rsqrt(), self.positions)

    def _moments(self, values: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        mean = _group_means(values.mean(self.positions), num_groups)
        return mean, _group_means((values * values).mean(self.positions), num_groups) - mean.square()


def _group_means(channels: Tensor, num_groups: int) -> Tensor:
    """(n, C) → (n, C), each channel's entry the mean over its group."""
    groups = channels.unflatten(1, (num_groups, -1))
    return groups.mean(2, keepdim=True).expand_as(groups).flatten(1)


def _for_each_row(parameter: Tensor, count: int) -> Tensor:
    """(N / T, C) → (N, C)"""
    return parameter.repeat_interleave(count // len(parameter), 0)


def _reference_gradients(dy: Tensor, x: Tensor, num_groups: int, gain: Tensor, offset: Tensor, eps: float, activation):
    """Of x, gain and offset, by operations whose derivatives and batches PyTorch knows; None of what needs none."""
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: where gain or offset was computed from x, the way from it back to x is not this function's.
        x, gain, offset = inputs = [tensor.view_as(tensor) for tensor in (x, gain, offset)]
        known = x.contiguous() if is_batched(dy) else x  # torch 2.11 takes several dy in no other format
        y = reference.normalised(known, num_groups, gain, offset, eps, activation)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=differentiated))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


class _Normalised(torch.autograd.Function):
    """As `normalised`, of a dense x."""

    @staticmethod
    def forward(ctx, x, num_groups, gain, offset, eps, activation):
        ctx.save_for_backward(x, gain, offset)
        ctx.options = num_groups, eps, activation
        if x[0].numel() > SMALL:
            return reference.normalised(x, num_groups, gain, offset, eps, activation)
        y, last = torch.empty_like(x), is_channels_last(x)
        rows, results = _Rows.of(x, last), _Rows.of(y, last)
        gain, offset = _for_each_row(gain, len(x)), _for_each_row(offset, len(x))
        for chunk in rows.chunks():
            normal = rows.normal(chunk, gain.dtype, num_groups, eps)
            z = normal.transformed(gain[chunk], offset[chunk])
            results.values[chunk] = z if activation is None else F.silu(z, inplace=True)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gain, offset = ctx.saved_tensors
        num_groups, eps, activation = ctx.options
        if torch.is_grad_enabled() or is_batched(dy):  # its derivative is wanted too, or it is for several dy
            dx, dgain, doffset = _reference_gradients(dy, x, num_groups, gain, offset, eps, activation)
            return dx, None, dgain, doffset, None, None
        dx, last = torch.empty_like(x), is_channels_last(x)
        rows, given, results = (_Rows.of(tensor, last) for tensor in (x, dy, dx))
        gains, offsets = _for_each_row(gain, len(x)), _for_each_row(offset, len(x))
        dgain, doffset = torch.empty_like(gains), torch.empty_like(offsets)
        for chunk in rows.chunks():
            normal = rows.normal(chunk, gain.dtype, num_groups, eps)
            dz = given.values[chunk].to(gain.dtype)
            if activation is not None:
                dz = torch.ops.aten.silu_backward(dz, normal.transformed(gains[chunk], offsets[chunk]))
            doffset[chunk] = dz.sum(rows.positions)
            products = (dz * normal.values).sum(rows.positions)
            dgain[chunk] = (products - normal.mean * doffset[chunk]) * normal.rstd
            results.values[chunk] = normal.gradient(dz, gains[chunk], dgain[chunk], doffset[chunk], num_groups)
        dgain, doffset = (each.unflatten(0, (len(gain), -1)).sum(1) for each in (dgain, doffset))
        return dx, None, dgain, doffset, None, None
