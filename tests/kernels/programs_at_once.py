"""The programs of a launch beside each other, in Triton's interpreter, which runs them one after the other by itself.

Each program is a thread; one runs at a time, and hands over wherever it comes to an atomic operation. Which goes on,
and in which order programs start, is drawn by lot. This shows what programs that talk to each other by atomics do under
any schedule and with any number of them running at once. It does not show what a GPU's caches do: here, whatever was
stored is seen by all.
"""

import functools
import inspect
import random
import threading
from collections.abc import Callable

import triton.language
from triton.runtime import interpreter

tl = triton.language  # which the interpreter looks for among the globals of what it runs
MOST_TURNS = 100_000


class Hang(AssertionError):
    pass


class Program:
    """A thread that runs `body` from one call of `hand_over` to the next, whenever `resume` is called."""

    def __init__(self, body: Callable[[], None]):
        self.done, self.failure = False, None
        self._resumed, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(body,), daemon=True)
        self._thread.start()

    def _run(self, body: Callable[[], None]) -> None:
        self._resumed.acquire()
        try:
            body()
        except BaseException as failure:
            self.failure = failure
        self.done = True
        self._paused.release()

    def resume(self) -> None:
        self._resumed.release()
        self._paused.acquire()
        if self.failure:
            raise self.failure

    def hand_over(self) -> None:
        self._paused.release()
        self._resumed.acquire()


def run_at_once(monkeypatch, kernel, at_once: int, seed: int | None) -> None:
    """From here on, launches of `kernel` have so many of their programs running at once; with the seed None, all of
    those take turns."""
    function, builder = kernel.rewrite(), interpreter.interpreter_builder
    current: list[Program] = []
    atomic = builder.create_atomic_rmw

    def handing_over(*args):
        if current:
            current[0].hand_over()
        return atomic(*args)

    @functools.wraps(function)
    def every_program(**arguments):
        if builder.grid_idx != (0, 0, 0):
            return  # the first call has run them all
        (count, _, _) = builder.grid_dim
        draw = random.Random(seed)
        waiting = draw.sample(range(count), count)
        running: list[tuple[int, Program]] = []
        for turn in range(MOST_TURNS):
            while waiting and len(running) < at_once:
                number = waiting.pop()
                running.append((number, Program(lambda: function(**arguments))))
            if not running:
                return
            place = turn % len(running) if seed is None else draw.randrange(len(running))
            number, program = running[place]
            builder.grid_idx = (number, 0, 0)
            current[:] = [program]
            program.resume()
            current.clear()
            if program.done:
                del running[place]
        raise Hang(f"{len(running)} of {count} programs still run after {MOST_TURNS} turns, {len(waiting)} wait")

    every_program.__signature__ = inspect.signature(function)
    monkeypatch.setattr(builder, "create_atomic_rmw", handing_over)
    monkeypatch.setitem(interpreter.InterpretedFunction.rewritten_fn, kernel.fn, every_program)
