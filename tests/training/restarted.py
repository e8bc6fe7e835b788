"""What `test_faults` has torchrun start: a training run whose rank 1 is killed the first time."""

import os
import signal
import sys
from pathlib import Path

from mdm_models.training import trainer
from mdm_models.training.learner import Learner
from tests.training.fault_processes import often_saving
from tests.training.models import LEAST_MODEL


def main() -> None:
    shard, run = map(Path, sys.argv[1:])

    def learn(self: Learner, *arguments, learn=Learner.learn, **options):
        if self.step == 5 and os.environ["RANK"] == "1" and not (run / "killed").exists():
            (run / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(self, *arguments, **options)

    Learner.learn = learn
    trainer.train(often_saving(shard, run), LEAST_MODEL)


if __name__ == "__main__":
    main()
