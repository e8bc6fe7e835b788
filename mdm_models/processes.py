"""One process or many: plain `python`, or `torchrun` with gloo on CPUs and nccl on GPUs."""

import contextlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mdm_models.errors import TrainingError

PATIENCE = timedelta(minutes=30)  # how long a process waits for the others, one of which may copy shards or write files
RESTARTS = (
    "torchrun --max-restarts: a restarted run would meet the addresses of the one before and fail, unless torchrun is "
    "started with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment (pytorch issue 135712)"
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among the others. All of them must call what makes them agree, in the same order."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # None: torch's default

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the terminal."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Give the mean of `values` over the processes, the same on all of them."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any of the processes."""
        if self.world_size == 1:
            return flag  # a GPU need not be waited for
        return self.mean(torch.tensor(float(flag), device=self.device)).item() > 0

    def agree(self, work: Callable[[], Result]) -> list[Result]:
        """Give what `work` returns on each process, by rank; raises on all what it raises on one, so that none waits
        for one that has given up."""
        try:
            outcome = work(), None
        except Exception as error:
            if self.world_size == 1:
                raise
            outcome = None, error
        outcomes = [outcome] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(outcomes, outcome, group=self.group)
        for _, error in outcomes:
            if error is not None:
                raise error
        return [cast(Result, result) for result, _ in outcomes]

    def gather(self, items: list) -> list:
        """Give the items of all processes, in the order of their ranks."""
        return [item for each in self.agree(lambda: items) for item in each]

    def apart(self) -> "Processes":
        """Give the same processes, whose talk is not mixed up with this one's: for another thread, on CPUs."""
        return replace(self, group=dist.new_group(backend="gloo")) if self.world_size > 1 else self


ALONE = Processes(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Sharing:
    """This process among those that see the same run directory: all of `world_size`, unless each machine has one of its
    own. index: its place among the `count` of them."""

    index: int
    count: int
    world_size: int

    @classmethod
    def of_all(cls, processes: Processes) -> "Sharing":
        """Make the sharing of one run directory that all processes see."""
        return cls(processes.rank, processes.world_size, processes.world_size)

    @property
    def keeps(self) -> bool:
        """Whether this process makes and deletes what is in the directory; the leading one does in its own."""
        return self.index == 0

    @property
    def is_of_all(self) -> bool:
        """Whether all processes see the same run directory."""
        return self.count == self.world_size

    def share(self, names: list[str]) -> list[str]:
        """Choose those of the files in the directory that this process takes care of."""
        return names[self.index :: self.count]


@contextlib.contextmanager
def init_process_group(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did. device: "auto", "cpu" or "cuda".

    Raises TrainingError if there is no GPU where one is asked for, or fewer than processes on this machine.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise TrainingError(f"device is {device!r}; it must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device is cuda, but there is no GPU here that torch can use")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cpu")
    if on_gpu:
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if where.index >= torch.cuda.device_count():
            processes = os.environ.get("LOCAL_WORLD_SIZE", where.index + 1)
            raise TrainingError(
                f"there are {processes} processes on this machine and {torch.cuda.device_count()} GPUs that torch can "
                "use; each process needs one: start fewer by --nproc-per-node"
            )
        torch.cuda.set_device(where)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes(0, 1, where)
        return
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get("RANK") == "0":
        warnings.warn(RESTARTS, stacklevel=2)
    backend, bound = ("nccl", where) if on_gpu else ("gloo", None)
    dist.init_process_group(backend, timeout=PATIENCE, device_id=bound)
    yield Processes(dist.get_rank(), world_size, where)
    dist.destroy_process_group()  # not after an error: it would wait for the others, whom torchrun is about to end


class StopRequest:
    """Inside the `with` block SIGUSR1, SIGXCPU and the first SIGINT or SIGTERM only set `asked`; a second one of those
    two acts as usual.

    Schedulers send SIGUSR1 some time before they end a job, to each of its processes and perhaps twice; the system
    sends SIGXCPU each second after a limit of CPU time (`ulimit -St`) has passed, behind the block to no effect.
    """

    def __enter__(self) -> "StopRequest":
        self.asked = False
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def _ask(self, number: int, frame) -> None:
        self.asked = True
        asked = signal.Signals(number)
        if asked == signal.SIGXCPU:
            self._before[asked] = signal.SIG_IGN
        if asked in (signal.SIGINT, signal.SIGTERM):
            signal.signal(asked, self._before[asked])

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
