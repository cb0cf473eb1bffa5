"""Cells that are runs of train.py: architectures of equal size, on the same text in the same order, and their learning rates.

Equal size means as many layers, as wide, and a hidden width of the channel mix at which the parameters without embedding and
head come nearest to those of RWKV-4 with its own 4 D; embedding and head are then equal too. What else an architecture is trained
with (Adam's constants, weight decay, initialisation) is its recipe's; schedule, tokens, text, order and vocabulary are one for all.
With the same seed two architectures see the same batches, so that they are compared seed by seed.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from equal_size import as_large_as_rwkv4, non_embedding
from loop import DIVERGED
from report import RESULT
from study import Advance, Cell, Finished, StudyConfig, compute_cells, environment, locked, write_whole

from rwkv_jax import config, run_log
from rwkv_jax.lm import count_params, flops_per_token
from rwkv_jax.models import Config
from rwkv_jax.text import DataConfig

CONFIGS = "experiments/configs/"


@dataclass(frozen=True)
class TrainingConfig:
    """How every cell of a study is trained."""

    recipes: tuple[str, ...] = tuple(f"{CONFIGS}quickstart{x}.toml" for x in ("", "_rwkv7", "_transformer"))
    """Configs of train.py, one for each architecture; sizes, text, schedule and length of the run are replaced."""
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Learning rates tried for every architecture, of which the one with the least held-out loss is used; one: it is used."""
    rates_from: str | None = None
    """The record (.json) of a study of the same recipes, whose choice is used instead."""
    sweep_seed: int = 1000
    """Of the cells that choose the learning rate, which count for nothing else."""
    tokens: int = 1_048_576
    """Trained on, in every cell."""
    validations: int = 8
    """Points of a curve, evenly spaced in tokens; a checkpoint is kept at each."""
    validation_tokens: int = 65_536
    """Held-out tokens, the first ones, at each of these; what a cell ends with is measured on all."""
    schedule: str = "cosine"
    """How the learning rate falls, as optim.schedule."""
    warmup_share: float = 0.04
    """Share of the steps over which it rises."""
    final_share: float = 0.05
    """The last learning rate, as a share of the first."""
    head_dim: int = 32
    """Channels of a head, where an architecture has heads."""
    dtype: str = "float32"
    """What activations are computed in, as model.dtype."""
    vocab_size: int = 256
    """Rows of the embedding and of the head."""
    remat: str = "elementwise"
    """What the backward pass recomputes, as model.remat."""

    def __post_init__(self):
        for name in ("recipes", "rates"):
            if not getattr(self, name):
                raise ValueError(f"training.{name} is empty; give at least one")
        if self.validations < 1:
            raise ValueError(f"training.validations is {self.validations}; it must be at least 1")


def of_equal_size(model: Config, training: TrainingConfig, num_layers: int, embed_dim: int, window: int) -> Config:
    """Returns the architecture at a size.

    Args:
        model: A recipe's, whose other fields stay.
        training: Vocabulary, width of heads, and how it computes.
        num_layers: Blocks.
        embed_dim: Width.
        window: Tokens that a transformer attends to.

    Raises:
        ValueError: No hidden width makes the architecture as small as RWKV-4 of this size.
    """
    shared = {
        "vocab_size": training.vocab_size, "num_layers": num_layers, "embed_dim": embed_dim, "dtype": training.dtype,
        "remat": training.remat, "head_dim": training.head_dim, "context_length": window,
    }  # fmt: skip
    own = {field.name for field in fields(model)}
    model = replace(model, **{name: value for name, value in shared.items() if name in own})
    return as_large_as_rwkv4(model)


def models(training: TrainingConfig, num_layers: int, embed_dim: int, window: int) -> dict[str, Config]:
    """Returns the recipes' architectures at a size, by name."""
    found = [
        of_equal_size(config.load(path).model, training, num_layers, embed_dim, window) for path in training.recipes
    ]
    return {model.architecture: model for model in found}


def training_cell(training: TrainingConfig, data: DataConfig, model: Config, *, rate: float, seed: int) -> Cell:
    """Returns the cell of a run of train.py, its settings being that run's config but for the folder."""
    size = f"{model.num_layers}x{model.embed_dim}-context{data.context_length}"
    name = f"{model.architecture}-{size}-rate{rate:g}-seed{seed}"
    (recipe,) = [r for r in map(config.load, training.recipes) if r.model.architecture == model.architecture]
    tokens_a_step = data.batch_size * data.context_length
    if training.tokens % (tokens_a_step * training.validations):
        raise ValueError(
            f"training.tokens is {training.tokens}; it must be a multiple of training.validations={training.validations} times "
            f"the {tokens_a_step} tokens of a step"
        )
    steps = training.tokens // tokens_a_step
    every = steps // training.validations
    values = config.to_dict(
        replace(
            recipe, model=model, data=replace(data, seed=seed),
            run=config.RunConfig(
                steps=steps, seed=seed, validate_every=every, checkpoint_every=every, keep_last=1, keep_best=0,
                validation_tokens=training.validation_tokens, sample_tokens=0,
            ),
        )
    )  # fmt: skip
    values["optim"] |= {
        "lr": rate, "lr_final": rate * training.final_share, "schedule": training.schedule, "constant_steps": 0,
        "warmup_steps": round(training.warmup_share * steps),
    }  # fmt: skip
    del values["run"]["folder"]
    config.from_dict(values, name)  # Refuses what train.py would, before any cell is computed.
    return Cell(name, values, cost=flops(model, training.tokens) * OVERHEAD.get(model.architecture, 1.0))


OVERHEAD = {"rwkv7": 1.6}
"""How much slower than its matrix products say an architecture is on a CPU; for the time left only."""


def flops(model: Config, tokens: int) -> float:
    """Returns the floating-point operations of training on so many tokens, in matrix products with weights."""
    return 3.0 * flops_per_token(model) * tokens


def run_folder(study: StudyConfig, name: str) -> Path:
    """Returns where the run of a cell lies."""
    return Path(study.folder, "runs", name)


def train_cell(study: StudyConfig, cell: Cell, advance: Advance) -> dict[str, Any]:
    """Trains, or trains on, and returns the held-out loss at the end (bits per byte) and the curves; of a run that diverged, how.

    Raises:
        OSError: train.py failed otherwise; the message has the end of what it printed.
    """
    folder = run_folder(study, cell.name)
    settings = config.from_dict({**cell.settings, "run": {**cell.settings["run"], "folder": str(folder)}}, cell.name)
    file, log = Path(f"{folder}.toml"), Path(f"{folder}.log")
    write_whole(file, config.to_toml(settings))
    # What one seed's run has compiled serves the others.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(Path(study.folder, "compiled").resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--cfg", str(file)]
    with locked(folder / ".lock", None):
        pass  # A study that was killed may have left its run going on; its work is used when it ends.
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**cache, **os.environ})
        try:
            while process.poll() is None:
                try:
                    process.wait(1)
                except subprocess.TimeoutExpired:
                    metrics = folder / run_log.METRICS
                    if metrics.exists():
                        advance(metrics.read_bytes().count(b"\n") / settings.run.steps)
        finally:
            process.terminate()
            process.wait()
    training = run_log.read_rows(folder / run_log.METRICS)
    end = log.read_text(encoding="utf-8").strip().splitlines()[-5:]
    if process.returncode == DIVERGED:
        return {"diverged": end[-1]}
    if process.returncode or len(training) < settings.run.steps:
        raise OSError(
            f"{cell.name}: train.py ended with status {process.returncode}; {log} ends with:\n" + "\n".join(end)
        )
    return curves(folder, settings, training)


def curves(folder: Path, settings: config.Settings, training: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what a finished run's folder says, losses in bits per byte."""
    validation = run_log.read_rows(folder / run_log.VALIDATION)
    steps = [row["step"] for row in validation]
    losses = np.array([row["bits_per_byte"] for row in training])
    end = json.loads((folder / RESULT).read_text())["held_out_bits_per_byte"]
    held_out = [row["validation_bits_per_byte"] for row in validation]
    return {
        "held_out": end,
        "tokens": [step * settings.data.batch_size * settings.data.context_length for step in steps],
        "held_out_curve": held_out,
        # The mean since the point before.
        "training_curve": [float(losses[a:b].mean()) for a, b in zip([0, *steps], steps, strict=False)],
        "parameters": count_params(settings.model),
        "non_embedding": non_embedding(settings.model),
        "flops_per_token": 3 * flops_per_token(settings.model),
    }


def train_all(study: StudyConfig, cells: Sequence[Cell]) -> dict[str, Finished]:
    """Returns all cells, those trained that are not finished; as `compute_cells`.

    Raises:
        ValueError: A run diverged; each is named.
    """
    done = train_or_diverge(study, cells)
    diverged = [f"{name}: {cell.result['diverged']}" for name, cell in done.items() if "diverged" in cell.result]
    if diverged:
        raise ValueError(
            "a run of the comparison diverged; take lower training.rates (or another training.rates_from):\n  "
            + "\n  ".join(diverged)
        )
    return done


def train_or_diverge(study: StudyConfig, cells: Sequence[Cell]) -> dict[str, Finished]:
    """Returns all cells as `train_all`, but those that diverged too."""

    def where(cell: Cell) -> dict[str, str]:
        # As the run wrote it: this process leaves the devices to it.
        return environment(json.loads((run_folder(study, cell.name) / run_log.ENVIRONMENT).read_text()))

    return compute_cells(study, cells, lambda cell, advance: train_cell(study, cell, advance), where)


def choose_rates(
    study: StudyConfig, training: TrainingConfig, data: DataConfig, sized: Mapping[str, Config]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns every architecture's learning rate, and how it was chosen, for the record.

    Raises:
        ValueError, OSError: training.rates_from is not there, or lacks an architecture; or an architecture diverged at all rates.
    """
    if training.rates_from is not None:
        return _chosen_elsewhere(training.rates_from, sized)
    if len(training.rates) == 1:
        return dict.fromkeys(sized, training.rates[0]), {"rates": dict.fromkeys(sized, training.rates[0])}
    cells = {
        (name, rate): training_cell(training, data, model, rate=rate, seed=training.sweep_seed)
        for name, model in sized.items()
        for rate in training.rates
    }
    done = train_or_diverge(study, list(cells.values()))
    losses = {
        name: {rate: done[cells[name, rate].name].result.get("held_out", math.inf) for rate in training.rates}
        for name in sized
    }
    hopeless = [name for name, found in losses.items() if min(found.values()) == math.inf]
    if hopeless:
        raise ValueError(
            f"{', '.join(hopeless)} diverged at every one of training.rates={training.rates}; add lower ones"
        )
    rates = {name: min(found, key=found.__getitem__) for name, found in losses.items()}
    at_edge = [name for name, rate in rates.items() if rate in (min(training.rates), max(training.rates))]
    tried = {
        name: {f"{rate:g}": round(loss, 4) if loss < math.inf else "diverged" for rate, loss in found.items()}
        for name, found in losses.items()
    }
    return rates, {"rates": rates, "rates_tried": tried, "rates_at_the_edge_of_those_tried": at_edge}


def _chosen_elsewhere(path: str, sized: Mapping[str, Config]) -> tuple[dict[str, float], dict[str, Any]]:
    try:
        rates = json.loads(Path(path).read_text())["rates"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such record; training.rates_from names the .json of a study that chose learning rates: run that first, or "
            "leave it out, and training.rates are tried"
        ) from None
    missing = [name for name in sized if name not in rates]
    if missing:
        raise ValueError(f"{path}: it chose no learning rate for {', '.join(missing)}; it has {', '.join(rates)}")
    return {name: rates[name] for name in sized}, {"rates": {name: rates[name] for name in sized}, "rates_from": path}
