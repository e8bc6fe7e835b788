"""How a model's steps run while it samples: one operation after another, as a captured CUDA graph, or compiled.

A guided step of mdm_t2i_64 is 546 operations, which a CPU takes longer to launch than a GPU to compute; a graph is
launched as one. An engine is a model as `mdm_models.diffusion.sample` calls it: prepare(context, mask, micro), then
model(x, time, prepared).
"""

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdm_kernels.backend import chooses_triton
from mdm_models.errors import one_line
from mdm_models.unet import PreparedCondition, UNet

ENGINES = ("auto", "eager", "graph", "compile")
WARM_UPS = 2  # calls before a capture: the first compiles kernels, the next runs as all that follow
GRAPHS = 8  # kept: prompts differ in length, and guidance may end halfway


def check_engine(name: str) -> None:
    """Raise ValueError unless an engine has this name."""
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}; it must be one of {', '.join(ENGINES)}")


def engine_for(model: UNet, name: str) -> Callable[..., list[Tensor]]:
    """Give what to sample with in place of `model`.

    "eager": the model itself; "graph": captured CUDA graphs of it, on a GPU; "compile": torch.compile of the whole
    model, which takes minutes and agrees up to rounding; "auto": graphs on a GPU, else the model itself.

    Raises ValueError for another name, or where the model is not on a GPU for "graph".
    """
    check_engine(name)
    device = _device_type(model)
    if name == "graph" and device != "cuda":
        raise ValueError(f"engine is 'graph', which needs a GPU; the model is on {device}: move it or take 'auto'")
    if name == "compile":
        return torch.compile(model)
    return GraphedModel(model) if name == "graph" or (name == "auto" and device == "cuda") else model


def _device_type(model: UNet) -> str:
    return model.conv_in.weight.device.type


class GraphedModel:
    """A UNet whose calls are captured once for all inputs of the same shapes and dtypes, and replayed.

    The last GRAPHS captures are kept; they share the memory that a call needs inside. Weights may change in place; if
    their memory is another one when a condition is prepared, every capture is dropped. Under autocast the model runs as
    it is, and so it does, with a warning, where it cannot be captured.
    """

    def __init__(self, model: UNet):
        self.model = model
        self._captures: OrderedDict[tuple, Callable[..., list[Tensor]]] = OrderedDict()
        self._weights: list[int] = []
        self._pool = None

    def prepare(self, *condition) -> PreparedCondition:
        """Prepare a condition as the model does, after dropping every capture if its weights have moved."""
        weights = [weight.data_ptr() for weight in self.model.parameters()]
        if weights != self._weights:
            self._captures.clear()
            self._weights, self._pool = weights, torch.cuda.graph_pool_handle()
        return self.model.prepare(*condition)

    def __call__(self, x: list[Tensor], time: Tensor, condition: PreparedCondition) -> list[Tensor]:
        if torch.is_autocast_enabled(x[0].device.type):
            return self.model(x, time, condition)
        key = _key(x, time, condition)
        if key not in self._captures:
            self._captures[key] = self._capture(x, time, condition)
            if len(self._captures) > GRAPHS:
                self._captures.popitem(last=False)
        self._captures.move_to_end(key)
        return self._captures[key](x, time, condition)

    def _capture(self, x: list[Tensor], time: Tensor, condition: PreparedCondition) -> Callable[..., list[Tensor]]:
        try:
            return Capture(self.model, x, time, condition, self._pool)
        except RuntimeError as error:  # an operation that no graph can hold, or no memory for one
            warnings.warn(f"the model runs without a CUDA graph: {one_line(error)}", stacklevel=2)
            return self.model


class Capture:
    """One captured call: inputs are copied to where it reads them, the graph is replayed, its outputs copied out."""

    def __init__(self, model: UNet, x: list[Tensor], time: Tensor, condition: PreparedCondition, pool):
        # Not in inference mode: its tensors could not be written to outside of it.
        with torch.cuda.device(time.device), torch.inference_mode(False), torch.no_grad():
            self.x, self.time, self.condition = [y.clone() for y in x], time.clone(), condition.map(torch.clone)
            self.given = weakref.ref(condition)
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    model(self.x, self.time, self.condition)
            here.wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may draw and pin the noise of the next step meanwhile
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.predictions = model(self.x, self.time, self.condition)

    def __call__(self, x: list[Tensor], time: Tensor, condition: PreparedCondition) -> list[Tensor]:
        given, read = [*x, time], [*self.x, self.time]
        if condition is not self.given():  # another prompt
            given += condition.tensors().values()
            read += self.condition.tensors().values()
            self.given = weakref.ref(condition)
        for source, target in zip(given, read, strict=True):
            target.copy_(source)
        self.graph.replay()
        return [prediction.clone() for prediction in self.predictions]  # the next replay writes over them


class RowByRow:
    """An engine that is called on one row of the batch at a time; it keeps nothing of the text between steps."""

    def __init__(self, engine: Callable[..., list[Tensor]]):
        self.engine = engine

    def __call__(
        self,
        x: list[Tensor],
        time: Tensor,
        context: Tensor | None,
        context_mask: Tensor | None,
        micro: dict[str, Tensor] | None,
    ) -> list[Tensor]:
        def row(tensor: Tensor | None, i: int) -> Tensor | None:
            return None if tensor is None else tensor[i : i + 1]

        rows = []
        for i in range(len(time)):
            own_micro = {name: row(value, i) for name, value in (micro or {}).items()}
            condition = self.engine.prepare(row(context, i), row(context_mask, i), own_micro)
            rows.append(self.engine([row(level, i) for level in x], row(time, i), condition))
        return [torch.cat(level) for level in zip(*rows, strict=True)]


class Windowed:
    """An engine for clips of more frames than the model's, which sees windows of its own length one after another.

    What several windows predict for a frame is averaged at every call, which makes one clip of them (Bar-Tal et al.,
    "MultiDiffusion", arXiv 2302.08113, eq. 5; over time: Wang et al., "Gen-L-Video", arXiv 2305.18264).
    A level of as many frames as the highest is one long clip. Of a level of fewer each window has its own, and x holds
    them one after another.
    """

    def __init__(self, engine: Callable[..., list[Tensor]], frames: Sequence[int], count: int):
        """frames: of the model's clip at each level, highest first; count: of the long clip, at least frames[0]."""
        self.engine, self.frames = engine, frames
        self.starts = window_starts(count, frames[0])
        self.counts = [count if each == frames[0] else each * len(self.starts) for each in frames]  # at each level
        if hasattr(engine, "prepare"):
            self.prepare = engine.prepare

    def __call__(self, x: list[Tensor], time: Tensor, *condition) -> list[Tensor]:
        sums = [torch.zeros_like(level, dtype=torch.promote_types(level.dtype, torch.float32)) for level in x]
        windows = [level.new_zeros(level.shape[2]) for level in sums]  # how many see each frame
        for number, start in enumerate(self.starts):
            seen = [start if each == self.frames[0] else each * number for each in self.frames]
            places = [slice(first, first + each) for first, each in zip(seen, self.frames, strict=True)]
            cut = [level[:, :, place] for level, place in zip(x, places, strict=True)]
            for i, prediction in enumerate(self.engine(cut, time, *condition)):
                sums[i][:, :, places[i]] += prediction
                windows[i][places[i]] += 1
        return [total / count.view(-1, 1, 1) for total, count in zip(sums, windows, strict=True)]


def window_starts(count: int, length: int) -> list[int]:
    """Give the first frames of windows of a length that cover `count` frames: they overlap by half, the last one
    perhaps by more."""
    return [*range(0, count - length, max(1, length // 2)), count - length]


def _key(x: list[Tensor], time: Tensor, condition: PreparedCondition) -> tuple:
    """What a capture depends on: which inputs there are, their shapes and dtypes, and whose kernels run."""
    inputs = {**dict(enumerate(x)), "time": time} | condition.tensors()
    return chooses_triton(x[0]), *((name, tuple(y.shape), y.dtype, y.device) for name, y in inputs.items())
