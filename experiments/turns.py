"""Workloads in processes of their own that take turns, so that what is compared meets the same machine.

A worker's process calls `serve`; whoever measures calls `in_turns`.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple, TypeVar

TURNS = 6
"""Of each workload."""
SECONDS = 2.0
"""Of a turn before it is counted, and then again; at least one call each."""


class Workload(NamedTuple):
    """What a worker repeats."""

    call: Callable[[Any], Any]
    """From what it carries on to the next."""
    carry: Any
    tokens: int
    """A call."""
    compile_s: float | None = None
    flops: float | None = None
    """A call's, in matrix products, to compare with the limit."""


def serve(workload: Workload) -> None:
    """Answers requests on the standard input: "turn" with the tokens a second of one, "end" with all figures.

    A turn's first SECONDS are not counted: on a virtual machine the first call after another process has worked may be slower, the
    more so the more memory it touches, and training without pause never meets that. The figure `first_call` is its speed over that
    of the turn.
    """
    carry = workload.carry

    def calls() -> list[float]:
        nonlocal carry
        times: list[float] = []
        while sum(times) < SECONDS:
            start = time.perf_counter()
            carry = workload.call(carry)
            times.append(time.perf_counter() - start)
        return times

    def answer(x: Any) -> None:
        print(json.dumps(x), flush=True)

    carry = workload.call(carry)
    speeds: list[float] = []
    first_calls: list[float] = []
    for request in sys.stdin:
        if request == "end\n":
            break
        if request == "turn\n":
            first, usual = calls()[0], statistics.median(calls())
            speeds.append(workload.tokens / usual)
            first_calls.append(usual / first)
        answer(speeds[-1] if speeds else None)
    else:  # Whoever asked has gone.
        return
    figures = {
        "tokens_per_second": statistics.median(speeds),
        "first_call": statistics.median(first_calls),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if workload.compile_s is not None and workload.flops is not None:
        from rwkv_jax import devices

        flops_per_second = figures["tokens_per_second"] * workload.flops / workload.tokens
        figures |= {
            "compile_s": workload.compile_s,
            "share_of_gemm": flops_per_second / devices.measure_gemm("float32"),
        }
    answer(figures)


class Program(NamedTuple):
    """What starts a worker's process."""

    name: str
    """In error messages."""
    command: list[str]
    environment: dict[str, str]


class Measured(NamedTuple):
    """What a workload did."""

    speeds: list[float]
    """Tokens a second in each of its turns, the median of its calls."""
    figures: dict[str, float]

    def over(self, other: "Measured") -> float:
        """Returns its speed over another's that took turns with it."""
        return statistics.median(a / b for a, b in zip(self.speeds, other.speeds, strict=True))


Key = TypeVar("Key", bound=Hashable)


def in_turns(programs: Mapping[Key, Program]) -> dict[Key, Measured]:
    """Starts workers one after the other, then lets them take turns, and ends them.

    Raises:
        RuntimeError: A worker's process has ended.
    """
    speeds: dict[Key, list[float]] = {key: [] for key in programs}
    with ExitStack() as ended:
        workers: dict[Key, Worker] = {}
        for key, program in programs.items():
            workers[key] = worker = Worker(program)
            ended.callback(worker.close)
            worker.ask("start")
        for turn in range(TURNS):
            for key in [*workers][:: -1 if turn % 2 else 1]:  # None is always the one after another.
                speeds[key].append(workers[key].ask("turn"))
        return {key: Measured(speeds[key], worker.ask("end")) for key, worker in workers.items()}


class Worker:
    """A process that serves a workload: once it has answered, that is compiled and has been called."""

    def __init__(self, program: Program):
        self.name = program.name
        self.process = subprocess.Popen(
            program.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=program.environment
        )

    def ask(self, request: str) -> Any:
        """Returns the answer to a request.

        Raises:
            RuntimeError: The process has ended.
        """
        with suppress(BrokenPipeError):  # It has ended, and then has no answer.
            print(request, file=self.process.stdin, flush=True)
        assert self.process.stdout is not None
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        raise RuntimeError(f"the process of {self.name} ended with exit code {self.process.wait()}; see above")

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.communicate()  # Waits, and closes what leads to it.
