"""Chooses among the backends of an op, and says why."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Backend(NamedTuple):
    """One way to run an op.

    `why_not(platform)` returns why it cannot run on "cpu", "gpu", "tpu", ..., or None where it can.
    """

    run: Callable[..., Any]
    why_not: Callable[[str], str | None]


def anywhere(platform: str) -> None:
    """The `why_not` of a backend that runs on every platform."""
    del platform


def choose(op: str, backends: Mapping[str, Backend], requested: str | None, platform: str) -> Backend:
    """Returns the requested backend, or, for None, the first one in order that runs on `platform`.

    Raises:
        ValueError: The requested backend does not exist or cannot run here, or none can; the message lists every backend
            with its reason.
    """
    if requested is not None and requested in backends and not backends[requested].why_not(platform):
        return backends[requested]
    if requested is None:
        for backend in backends.values():
            if not backend.why_not(platform):
                return backend
    problem = "no backend runs here" if requested is None else f"backend={requested!r} cannot be used"
    raise ValueError(f"{op}: {problem}; choose one of these, or None for the best:\n{explain(op, backends, platform)}")


def explain(op: str, backends: Mapping[str, Backend], platform: str) -> str:
    """Returns one line a backend, in order of preference: whether it runs on `platform`, or why it does not."""
    lines = [f"{op} on {platform}, in order of preference:"]
    for name, backend in backends.items():
        lines.append(f"  {name}: {backend.why_not(platform) or 'runs here'}")
    return "\n".join(lines)
