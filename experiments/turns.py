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
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

TURNS = 8
"""Of each workload."""
SECONDS = 2.0
"""Of a turn that are counted, and at least one call."""


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

    A turn's first call is not counted: on virtual machines, memory that lay idle while others worked may be slow to touch again, by
    a tenth of a call, which training without pause never meets.
    """

    def answer(x: Any) -> None:
        print(json.dumps(x), flush=True)

    carry, speeds = workload.call(workload.carry), []
    for request in sys.stdin:
        if request == "end\n":
            break
        if request == "turn\n":
            carry, times = workload.call(carry), []
            while sum(times) < SECONDS:
                start = time.perf_counter()
                carry = workload.call(carry)
                times.append(time.perf_counter() - start)
            speeds.append(workload.tokens / statistics.median(times))
        answer(speeds[-1] if speeds else None)
    else:  # Whoever asked has gone.
        return
    figures = {
        "tokens_per_second": statistics.median(speeds), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    }  # fmt: skip
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
    workers: dict[Key, Worker] = {}
    speeds: dict[Key, list[float]] = {key: [] for key in programs}
    try:
        for key, program in programs.items():
            workers[key] = Worker(program)
        for turn in range(TURNS):
            for key in [*workers][:: -1 if turn % 2 else 1]:  # None is always the one after another.
                speeds[key].append(workers[key].ask("turn"))
        return {key: Measured(speeds[key], worker.end()) for key, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()


class Worker:
    """A process that serves a workload, which it has compiled and called once."""

    def __init__(self, program: Program):
        self.name = program.name
        self.process = subprocess.Popen(
            program.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=program.environment
        )
        self.ask("start")

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

    def end(self) -> dict[str, float]:
        """Ends the process and returns its figures."""
        figures = self.ask("end")
        self.process.wait()
        return figures
