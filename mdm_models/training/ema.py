"""An exponential moving average of a model's parameters."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class EMA:
    """Averages of the parameters of `model`: average ← decay · average + (1 − decay) · parameter at every `update`.

    In the first updates the decay is (1 + n) / (10 + n) where that is smaller, so that the average forgets the
    initialisation in a run of any length. The averages keep the parameters' dtype and device.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must lie in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.parameters = dict(model.named_parameters())
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the model computes with the averages; the memory changes hands, nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.averages[name] = self.averages[name], parameter.data

    def load(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """Continue from saved averages. Raises ValueError if they are not of this model's parameters."""
        if differing := sorted(averages.keys() ^ self.averages.keys()):
            raise ValueError(f"averages must have this model's parameters; {', '.join(differing[:3])} differ")
        with torch.no_grad():
            for name, average in self.averages.items():
                average.copy_(averages[name])
        self.updates = updates
