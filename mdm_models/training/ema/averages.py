"""Averages of a model's weights over training: what is sampled, evaluated and kept in the end.

Parameters may be spread over processes (DTensors of FSDP2): an average is spread as its parameter is, and each process
works on its own part.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mdm_models.private_torch import foreach_lerp_
from mdm_models.training.config import OptimizerConfig
from mdm_models.training.ema.power_functions import exponent

UPDATES = "updates"  # the name of the count in a state dict


class Averages(ABC):
    """One or several averages of every parameter of `model`, each begun as the parameter is now.

    averages: the average by the parameter's name that `swapped_in` puts in the model's place. others: further ones
    by a prefix of their names. updates: how often the averages have moved. They keep the parameters' dtype and device.
    """

    def __init__(self, model: nn.Module, prefixes: Sequence[str] = ()):
        self.updates = 0
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._release_gathered()
        self.parameters = dict(model.named_parameters())
        self.averages = self._copies()
        self.others = {prefix: self._copies() for prefix in prefixes}

    @abstractmethod
    def update(self) -> None:
        """Move the averages towards the parameters; to be called after each step of the optimizer."""

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the model computes with `averages`, and these hold its own weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Tensor]:
        """Give the averages themselves, not copies, and the count of updates (int64)."""
        state = dict(self.averages)
        for prefix, averages in self.others.items():
            state |= {prefix + name: average for name, average in averages.items()}
        return state | {UPDATES: torch.tensor(self.updates)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned. Raises ValueError if it is not of this model and these averages."""
        own = self.state_dict()
        if differing := sorted(state.keys() ^ own.keys()):
            raise ValueError(f"the saved averages are of another model or width: {', '.join(differing[:3])} differ")
        for name, average in own.items():
            if state[name].shape != average.shape:
                shapes = f"{tuple(state[name].shape)} there, {tuple(average.shape)} here"
                raise ValueError(f"the saved averages are of another model: {name} has shape {shapes}")
        for name, average in own.items():
            average.copy_(state[name])
        self.updates = int(state[UPDATES])

    def _copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap the values of parameters and averages, in place: FSDP and the optimizer know the parameters' memory."""
        for name, parameter in self.parameters.items():
            mine, average = local(parameter), local(self.averages[name])
            before = mine.clone()
            mine.copy_(average)
            average.copy_(before)
        self._release_gathered()

    def _release_gathered(self) -> None:
        """Have FSDP drop whole parameters that it still holds after a forward pass: copies, with the values of then."""
        for module in self._sharded:
            module.reshard()

    @torch.no_grad()
    def _move(self, averages: Mapping[str, Tensor], share: float) -> None:
        """average ← average + share · (parameter − average)."""
        parts = [local(average) for average in averages.values()]
        foreach_lerp_(parts, [local(self.parameters[name]) for name in averages], share)


class EMA(Averages):
    """The exponential moving average of every parameter: average ← decay · average + (1 − decay) · parameter.

    In the first updates the decay is (1 + n) / (10 + n) where that is smaller, so that the average forgets the
    initialisation in a run of any length.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must lie in [0, 1)")
        super().__init__(model)
        self.decay = decay

    def update(self) -> None:
        self.updates += 1
        self._move(self.averages, 1 - min(self.decay, (1 + self.updates) / (10 + self.updates)))


class PowerEMA(Averages):
    """Averages of the widths `stds`, as shares of the run so far: update t has the decay (1 − 1/t)^(γ + 1), with γ the
    exponent of the width (Karras et al., arXiv 2312.02696, section 3.1). The first one's are `averages`.

    After T updates the weights of update t have the share (t^(γ+1) − (t−1)^(γ+1)) / T^(γ+1), the first values none.
    Raises ValueError for a width out of range or given twice.
    """

    def __init__(self, model: nn.Module, stds: Sequence[float]):
        if len(set(stds)) != len(stds) or not stds:
            raise ValueError(f"stds is {tuple(stds)}; it must hold one width or more, each once")
        self.exponents = [exponent(std) for std in stds]
        self.stds = tuple(stds)
        super().__init__(model, [f"std {std:g}." for std in stds[1:]])

    @property
    def by_std(self) -> dict[float, dict[str, Tensor]]:
        """The averages of each width."""
        return dict(zip(self.stds, [self.averages, *self.others.values()], strict=True))

    def update(self) -> None:
        self.updates += 1
        for gamma, averages in zip(self.exponents, self.by_std.values(), strict=True):
            self._move(averages, 1 - (1 - 1 / self.updates) ** (gamma + 1))


def make_averages(model: nn.Module, config: OptimizerConfig) -> Averages:
    """The averages that the settings ask for, begun as the parameters are now."""
    return PowerEMA(model, config.ema_stds) if config.ema_stds else EMA(model, config.ema_decay)


def local(tensor: Tensor) -> Tensor:
    """Give the part of a tensor that is in this process: a view of its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
