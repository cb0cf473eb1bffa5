"""What the studies share: settings, cells that are computed once, spread over seeds, the verdict, tables, plots and the record.

A study is a list of cells. Each is computed once, by whatever its study calls for, and kept as FOLDER/cells/NAME.json; the same
command again computes those that are missing. What the study finds goes into PREFIX.json, and its plot into PREFIX.png. Studies
that share a folder share cells.
"""

import argparse
import fcntl
import inspect
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy import stats
from tqdm import tqdm

from rwkv_jax import run_log
from rwkv_jax.command import errors_in_words
from rwkv_jax.config import ConfigError, parse_as

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class StudyConfig:
    """Where a study keeps its work, and how it judges differences."""

    folder: str = "runs/study"
    """Where finished cells are kept; started again with the same config, the study goes on from there."""
    results: str | None = None
    """Where the record goes: this with .json and .png; none: FOLDER/STUDY, such as runs/study/scaling."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of each cell that is repeated."""
    confidence: float = 0.95
    """Of intervals, and of a difference that is called one."""

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"study.seeds is {self.seeds}; it must be at least one seed, each once")
        if not 0 < self.confidence < 1:
            raise ValueError(f"study.confidence is {self.confidence}; it must be between 0 and 1")


class Cell(NamedTuple):
    """One thing to compute."""

    name: str
    """Of its file: letters, digits, dots, dashes and underscores."""
    settings: Mapping[str, Any]
    """All that its result depends on, in JSON's types."""
    cost: float = 1.0
    """In any unit that all cells of a study share, for the time left."""


class Finished(NamedTuple):
    """A cell that was computed."""

    result: Any
    """In JSON's types."""
    seconds: float
    """That it took, in the process that finished it."""
    environment: Mapping[str, str]
    """Versions and devices it was computed with."""


Advance = Callable[[float], object]
"""Takes the share of a cell that is done, 0 to 1."""


@contextmanager
def study_program(kind: type[Settings], program: str) -> Iterator[Settings]:
    """Gives the settings of this program's command line; what a user can put right ends it with a message and status 2."""
    with errors_in_words(argparse.ArgumentParser(prog=program)):
        yield parse_as(kind, sys.argv[1:], program)


def compute_cells(
    study: StudyConfig,
    cells: Sequence[Cell],
    compute: Callable[[Cell, Advance], Any],
    where: Callable[[Cell], Mapping[str, str]] = lambda cell: environment(),
) -> dict[str, Finished]:
    """Returns all cells by name, those computed that were not yet; progress and the time left are shown.

    Args:
        study: Its folder gets a file for each cell, whole or not at all.
        cells: In the order in which they are computed.
        compute: Gives a cell's result, in JSON's types, and reports how far it is.
        where: Gives the environment that a cell was just computed in.

    Raises:
        ConfigError: A finished cell has the name but not the settings; the fields that differ are listed.
        OSError: Another process computes this study.
    """
    folder = Path(study.folder, "cells")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(Path(study.folder, ".lock"), f"{study.folder}: another process computes this study; wait for it"):
        done = {cell.name: found for cell in cells if (found := _finished(folder, cell)) is not None}
        waiting = [cell for cell in cells if cell.name not in done]
        if waiting:
            tqdm.write(f"{study.folder}: {len(done)} of {len(cells)} cells are finished", file=sys.stderr)
        with tqdm(
            total=sum(cell.cost for cell in cells),
            initial=sum(cell.cost for cell in cells if cell.name in done),
            bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left",
            dynamic_ncols=True,
            disable=not waiting,
            smoothing=0,  # The time left follows from the mean speed, cells being unlike.
            mininterval=0.5 if sys.stderr.isatty() else 30,
            miniters=0,
        ) as bar:
            for cell in waiting:
                bar.set_description(f"{len(done) + 1}/{len(cells)} {cell.name}", refresh=False)

                def advance(share: float, cell: Cell = cell, start: float = bar.n) -> None:
                    bar.update(max(0.0, start + min(share, 1) * cell.cost - bar.n))

                begin = time.perf_counter()
                result = compute(cell, advance)
                advance(1)
                done[cell.name] = Finished(result, time.perf_counter() - begin, where(cell))
                row = {"name": cell.name, "settings": cell.settings, **done[cell.name]._asdict()}
                write_whole(folder / f"{cell.name}.json", json.dumps(row, indent=1, allow_nan=False) + "\n")
    return {cell.name: done[cell.name] for cell in cells}


def _finished(folder: Path, cell: Cell) -> Finished | None:
    """The cell as it is kept; None: it is not."""
    path = folder / f"{cell.name}.json"
    if not path.exists():
        return None
    row = json.loads(path.read_text())
    wanted = json.loads(json.dumps(cell.settings))
    changed = [f"{key}: {a!r} -> {b!r}" for key, a, b in _differences(row["settings"], wanted)]
    if changed:
        raise ConfigError(
            f"the finished cell {cell.name!r} has other settings; use another --study.folder, remove {path}, or undo:\n  "
            + "\n  ".join(changed)
        )
    return Finished(row["result"], row["seconds"], row["environment"])


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


@contextmanager
def locked(path: Path, busy: str | None) -> Iterator[None]:
    """Holds the lock file meanwhile; where another process has it, raises OSError with the text, or waits if that is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except BlockingIOError:
            raise OSError(busy) from None
        yield


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def environment(devices: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns versions, cores and devices, and the commit of the code (unknown: not a git checkout), marked if it was changed.

    Args:
        devices: What run_log.environment says where a cell was computed; None: this process, which takes hold of its devices.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        commit, changed = "unknown", False
    return {**(devices or run_log.environment()), "commit": commit + (" and changes" if changed else "")}


class Estimate(NamedTuple):
    """A mean over seeds and its t-interval, mean ± half_width, which is infinite for one seed."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return (
            f"{self.mean:.4f} ± {self.half_width:.4f}"
            if math.isfinite(self.half_width)
            else f"{self.mean:.4f} (one seed)"
        )


def estimate(values: Sequence[float], confidence: float) -> Estimate:
    """Returns the mean of a measurement over seeds, with Student's t-interval."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Estimate(mean, math.inf)
    return Estimate(mean, float(stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)))


def verdict(
    a: str, a_values: Sequence[float], b: str, b_values: Sequence[float], confidence: float, *,
    unit: str, lower_is_better: bool = True, paired: bool = True,
) -> str:  # fmt: skip
    """Returns in words which of two is better and by how much, or that the difference is not resolved.

    It is resolved if the t-interval of the difference of means, at the confidence given, leaves out zero. Paired: that of the
    differences seed by seed, for values in the same order of seeds that share data order. Otherwise Welch's, of two samples.
    One seed resolves nothing.

    Args:
        a: Name of the first.
        a_values: One for every seed.
        b: Name of the second.
        b_values: One for every seed.
        confidence: Of the interval, such as 0.95.
        unit: Of the values, such as "bits per byte".
        lower_is_better: Whether a smaller value is a better one.
        paired: Whether equal places have equal seeds.
    """
    unit = f" {unit}" if unit else ""
    pairs = np.subtract(a_values, b_values).tolist() if paired else []
    difference = estimate(pairs, confidence) if paired else _welch(a_values, b_values, confidence)
    shown = f"{a} - {b} = {difference.mean:+.4f}"
    if not math.isfinite(difference.half_width):
        return f"{a} and {b}: not resolved ({shown}{unit}, one seed)"
    shown = f"{shown} ± {difference.half_width:.4f}{unit}"
    if abs(difference.mean) <= difference.half_width:
        return f"{a} and {b}: not resolved ({shown})"
    better = a if (difference.mean < 0) == lower_is_better else b
    return f"{better} is better than {b if better == a else a} by {abs(difference.mean):.4f}{unit} ({shown})"


def _welch(a_values: Sequence[float], b_values: Sequence[float], confidence: float) -> Estimate:
    """The difference of the means of two samples whose variances may differ."""
    mean = float(np.mean(a_values) - np.mean(b_values))
    if min(len(a_values), len(b_values)) < 2:
        return Estimate(mean, math.inf)
    parts = [(float(np.var(values, ddof=1)) / len(values), len(values) - 1) for values in (a_values, b_values)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Estimate(mean, 0.0)
    freedom = variance**2 / sum(part**2 / own for part, own in parts)
    return Estimate(mean, float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table in Markdown, columns aligned."""
    lines = [[str(value) for value in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    shown = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])


def record(study: StudyConfig, settings: Any, cells: Mapping[str, Finished], findings: Mapping[str, Any]) -> Path:
    """Writes the study's JSON and returns the prefix of its path, which a plot shares.

    Args:
        study: Says where.
        settings: Of the whole study, a dataclass of the study's own file, whose name the record has by default.
        cells: Their results are all in the record.
        findings: What follows from them: numbers, tables and verdicts.
    """
    prefix = Path(study.results or Path(study.folder, Path(inspect.getfile(type(settings))).stem))
    environments: list[Mapping[str, str]] = []
    for cell in cells.values():
        if cell.environment not in environments:
            environments.append(cell.environment)
    row = {
        "command": shlex.join(["python", *sys.argv]),
        "settings": asdict(settings),
        "environments": environments,
        "seconds": sum(cell.seconds for cell in cells.values()),
        **findings,
        "cells": {name: {"seconds": round(cell.seconds, 1), "result": cell.result} for name, cell in cells.items()},
    }
    write_whole(Path(f"{prefix}.json"), _indented(row) + "\n")
    return prefix


def _indented(row: Any) -> str:
    """JSON with a line for each value, but one for all of a list of numbers."""
    text = json.dumps(row, indent=1, allow_nan=False)
    return re.sub(r"\[[\s\d.,eE+-]*\]", lambda numbers: re.sub(r"\n\s*", " ", numbers[0]), text)


def panels(*titles: str, columns: int | None = None) -> tuple[Any, list[Any]]:
    """Returns a figure and its axes, one for each title and row by row, with a light grid; label them with units.

    Args:
        titles: Of the axes.
        columns: Axes side by side; None: all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = columns or len(titles)
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(5.6 * columns, 4.4 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title)
        panel.grid(alpha=0.3, which="both")
    return figure, axes


STYLES = {
    "rwkv4": {"color": "tab:blue", "marker": "o"},
    "rwkv5": {"color": "tab:cyan", "marker": "v"},
    "rwkv6": {"color": "tab:green", "marker": "^"},
    "rwkv7": {"color": "tab:orange", "marker": "s"},
    "transformer": {"color": "tab:gray", "marker": "D"},
}
"""How each architecture is drawn, in every plot alike and told apart without colours too."""
NAMES = {"rwkv4": "RWKV-4", "rwkv5": "RWKV-5", "rwkv6": "RWKV-6", "rwkv7": "RWKV-7", "transformer": "transformer"}
"""What tables and plots call the architectures."""
