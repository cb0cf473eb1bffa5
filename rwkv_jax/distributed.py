"""Several processes: how they find each other, that they run the same thing, and which part of a batch each of them reads."""

import hashlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from . import sharding

T = TypeVar("T")


def start(config: sharding.MeshConfig) -> None:
    """Joins this process to the others of its run, as the config or the launcher (`coordinator = "auto"`) says.

    Raises:
        ConnectionError: The coordinator does not answer within mesh.timeout seconds.
        ValueError: No launcher that JAX knows has started this process.
    """
    if config.coordinator is None:
        return
    if config.coordinator == "auto":
        where, arguments = "the launcher's coordinator", {}
    else:
        where = f"mesh.coordinator={config.coordinator}"
        if config.process_id:
            _wait_for(config.coordinator, config.timeout)
        arguments = {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
        }
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=config.timeout, heartbeat_timeout_seconds=config.timeout
        )
    except ValueError as error:
        raise ValueError(
            f"{where}: JAX finds no Slurm, Open MPI, Kubernetes or TPU pod around this process ({error}); give "
            "mesh.coordinator=HOST:PORT, mesh.num_processes and mesh.process_id"
        ) from error
    except RuntimeError as error:
        raise ConnectionError(
            f"{where}: not all {config.num_processes or ''} processes came within mesh.timeout={config.timeout} s "
            f"({str(error).partition(chr(10))[0]})"
        ) from error


def is_main() -> bool:
    """Returns whether this is the process that prints and writes: process 0."""
    return jax.process_index() == 0


def main_first(function: Callable[[], T]) -> T:
    """Returns function(), called by process 0 before the others, which then find what it has written."""
    if is_main():
        result = function()
        _barrier("main is done")
        return result
    _barrier("main is done")
    return function()


def check_same(what: Mapping[str, Any]) -> None:
    """Raises ValueError unless all processes have the same values, plain ones by name; those that differ are listed."""
    if jax.process_count() == 1:
        return
    own = {name: json.dumps(value, sort_keys=True, default=str) for name, value in what.items()}
    digests = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.int32) for text in own.values()])
    every = multihost_utils.process_allgather(digests)
    wrong = [
        f"{name}: here (process {jax.process_index()}) {text[:200]}"
        for i, (name, text) in enumerate(own.items())
        if (every[:, i] != every[0, i]).any()
    ]
    if wrong:
        raise ValueError("the processes of this run differ; start all with the same:\n  " + "\n  ".join(wrong))


def source_digest() -> str:
    """Returns a digest of this package's own source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process; all must call this at the same step."""
    return bool(np.asarray(multihost_utils.process_allgather(np.asarray(flag))).any())


def rows_here(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns which rows of a batch the devices of this process need, ascending."""
    where = NamedSharding(mesh, sharding.spec("batch")).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in where.values() if index is not None]))


def place(batch: T, mesh: Mesh, rows: np.ndarray, batch_size: int) -> T:
    """Returns arrays of this process's `rows` of a batch as arrays on the mesh: all rows, each on the devices that run it."""
    if mesh.size == 1:
        return batch

    def one(x: np.ndarray) -> jax.Array:
        def part(index):
            return x[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        where = NamedSharding(mesh, sharding.spec("batch", *[None] * (x.ndim - 1)))
        return jax.make_array_from_callback((batch_size, *x.shape[1:]), where, part)

    return jax.tree.map(one, batch)


def leave_after(error: BaseException) -> None:
    """Ends this process at once after an error of a run of several: what the others wait for will not come, and they must not hang."""
    traceback.print_exception(error)
    print(f"process {jax.process_index()} of {jax.process_count()} stops: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _wait_for(coordinator: str, seconds: int) -> None:
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConnectionError(
                    f"mesh.coordinator={coordinator} cannot be reached in mesh.timeout={seconds} s ({error}); is process 0 "
                    "started, and its port open from here?"
                ) from error
            time.sleep(0.5)
