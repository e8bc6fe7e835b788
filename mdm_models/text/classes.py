"""Class labels as text: what a class-conditional model takes in place of a caption."""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from mdm_models.plain_text import stripped
from mdm_models.text.interface import check_prompts


class ClassLabels:
    """Turns a prompt that names a class into that class's one-hot vector as one token: features (B, 1, classes)
    float32, mask all True.

    classes: how many there are (1000 for ImageNet, the width of mdm_c2i_256), or their names in order. A prompt is a
    class's number ("207") or, where there are names, a name; of folders that are called 1, 10 and 2, say, "1" is the
    second, as in the KEY.cls that data have. "" is no class, the vector of zeros: what then remains of the token is the
    bias of the model's projection, which learns to stand for it.
    """

    max_tokens = 1

    def __init__(
        self,
        classes: int | Sequence[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        names = [] if isinstance(classes, int) else [stripped(name) for name in classes]
        self.width = classes if isinstance(classes, int) else len(names)
        if self.width < 1:
            raise ValueError(f"classes is {classes!r}; there must be at least one")
        if "" in names:
            raise ValueError(f"class {names.index('')} of {self.width} has no name")
        self.numbers = {name.lower(): number for number, name in reversed(list(enumerate(names)))}  # the first counts
        self.dtype = dtype
        self.device = device

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Give the features (B, 1, classes) and mask (B, 1) of B prompts. Raises ValueError for one that names no
        class."""
        check_prompts(prompts)
        features = torch.zeros(len(prompts), 1, self.width, dtype=self.dtype)
        for row, prompt in enumerate(prompts):
            if prompt:
                features[row, 0, self.number(prompt)] = 1
        mask = torch.ones(len(prompts), 1, dtype=torch.bool)
        return features.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)

    def check_prompt(self, prompt: str) -> None:
        """Raises ValueError for a prompt that names no class."""
        if prompt:
            self.number(prompt)

    def number(self, prompt: str) -> int:
        """Give the number of the class that a prompt names. Raises ValueError if it names none."""
        name = prompt.strip().lower()
        if name.isdecimal() and int(name) < self.width:
            return int(name)
        if name in self.numbers:
            return self.numbers[name]
        near = difflib.get_close_matches(name, self.numbers, n=1)
        named = f"a number from 0 to {self.width - 1}" + " or by its name" * bool(self.numbers)
        hint = f"did you mean {near[0]!r}?" if near else f"a class is named by {named}"
        raise ValueError(f"no class {prompt!r}; {hint}")
