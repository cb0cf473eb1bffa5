"""What a run leaves for people: metrics.jsonl, TensorBoard events, loss.png and a record of the environment."""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
ENVIRONMENT = "environment.json"


class RunLog:
    """Appends rows of numbers to files and TensorBoard, each step once even if the run was killed and resumed."""

    def __init__(self, folder: Path, step: int):
        """Opens the log of a run that goes on after `step`; rows of later steps, from before a kill, are dropped."""
        for name in (METRICS, VALIDATION):
            _keep_until(folder / name, step)
        self._files = {name: (folder / name).open("a") for name in (METRICS, VALIDATION)}
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, name: str, row: Mapping[str, float | int]) -> None:
        """Appends a row, which has a "step", to the file `name`; it is with the operating system on return."""
        self._files[name].write(json.dumps(dict(row)) + "\n")
        self._files[name].flush()
        group = Path(name).stem
        for key, value in row.items():
            if key != "step":
                self._events.add_scalar(f"{group}/{key}", value, int(row["step"]))

    def close(self) -> None:
        """Flushes and closes all files."""
        for file in self._files.values():
            file.close()
        self._events.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a .jsonl file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise ValueError(f"{path}: a line is damaged ({error}); remove it") from None


def _keep_until(path: Path, step: int) -> None:
    rows = [row for row in read_rows(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)


def environment() -> dict[str, str]:
    """Returns what decides whether a resumed run repeats bit for bit: versions, cores and devices."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "optax", "grain")}
    return {
        "python": platform.python_version(),
        **packages,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "processor": platform.machine(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def record_environment(folder: Path) -> list[str]:
    """Writes the environment beside a run, or, when the run has one, returns a line for each difference from it."""
    path, now = folder / ENVIRONMENT, environment()
    try:
        before = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # A kill may have cut it short.
        path.write_text(json.dumps(now, indent=2) + "\n")
        return []
    return [f"{key}: {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]


def plot_losses(folder: Path) -> Path:
    """Draws bits per byte against steps, for training (smoothed) and held-out text, into loss.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, validation = read_rows(folder / METRICS), read_rows(folder / VALIDATION)
    if not rows:
        raise ValueError(f"{folder / METRICS}: no steps to draw")
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, values = [row["step"] for row in rows], [row["bits_per_byte"] for row in rows]
    axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(values, max(1, len(values) // 100)), color="tab:blue", label="training, smoothed")
    if validation:
        axes.plot(
            [row["step"] for row in validation], [row["validation_bits_per_byte"] for row in validation],
            color="tab:orange", marker="o", markersize=4, label="held out",
        )  # fmt: skip
    settled = sorted(values)[: max(1, math.ceil(0.98 * len(values)))]
    axes.set_ylim(0.9 * min(values), 1.05 * max(settled))
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png")
    return folder / "loss.png"


def _smooth(values: list[float], window: int) -> list[float]:
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means
