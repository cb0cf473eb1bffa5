"""Contexts at equal tokens: loss against the length trained at, and by position in long documents with the state carried past it.

`python experiments/context.py --cfg experiments/configs/context_study.toml`

Every step has as many tokens at every length, in fewer rows where they are longer. After training, long held-out documents are
read from their start in three ways, over the same tokens:

carried   the state goes on past the trained length. A transformer's state is its window, the last tokens of the trained length.
cleared   the state is emptied after every trained length, so that nothing older is known.
widened   a transformer attends to all tokens before, at rotary positions that it was not trained at and that nothing corrects.

Interrupted, the same command goes on.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from study import (
    NAMES,
    STYLES,
    Cell,
    StudyConfig,
    compute_cells,
    estimate,
    panels,
    record,
    study_program,
    table,
    verdict,
)
from training_cells import TrainingConfig, choose_rates, models, run_folder, train_all, training_cell

import rwkv_jax
from rwkv_jax.loss import cross_entropy
from rwkv_jax.models import Config, TransformerConfig
from rwkv_jax.text import DataConfig, TokenStream, load_streams

UNIT = "bits per byte"
WAYS = ("carried", "cleared", "widened")


@dataclass(frozen=True)
class LengthsConfig:
    """The context lengths, and the documents that are read."""

    trained: tuple[int, ...] = (64, 128, 256, 512)
    """Tokens a row, shortest first; a step has as many tokens as data.context_length and data.batch_size say."""
    num_layers: int = 4
    """Blocks."""
    embed_dim: int = 64
    """Width of the residual stream."""
    positions: int = 4096
    """Tokens read of every held-out document that has as many; a multiple of every trained length."""
    documents: int = 16
    """At most so many are read, the first ones."""
    piece: int = 256
    """Tokens read at once, the state going on; positions is a multiple."""
    shown: int = 128
    """The trained length whose losses by position are drawn."""

    def __post_init__(self):
        if list(self.trained) != sorted(set(self.trained)) or self.shown not in self.trained:
            raise ValueError(
                f"lengths.trained is {self.trained}; it must increase, and have lengths.shown, {self.shown}"
            )
        bad = [n for n in (*self.trained, self.piece) if self.positions % n]
        if bad:
            raise ValueError(f"lengths.positions is {self.positions}; it must be a multiple of {bad[0]}")


@dataclass(frozen=True)
class Settings:
    """Of the study."""

    study: StudyConfig = field(default_factory=StudyConfig)
    lengths: LengthsConfig = field(default_factory=LengthsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        tokens = self.data.context_length * self.data.batch_size
        bad = [length for length in self.lengths.trained if tokens % length]
        if bad:
            raise ValueError(
                f"a step has {tokens} tokens (data.context_length * data.batch_size); it must be a multiple of every one of "
                f"lengths.trained, and {bad[0]} does not divide it"
            )


def documents(stream: TokenStream, positions: int, most: int) -> np.ndarray:
    """Returns the first positions + 1 tokens of documents that have as many, `most` at most, [documents, positions + 1].

    Raises:
        ValueError: There is none.
    """
    starts = np.asarray(stream.document_starts)
    long = starts[np.diff(np.append(starts, len(stream.tokens))) > positions]
    if not len(long):
        raise ValueError(f"no held-out document has more than lengths.positions={positions} tokens; take fewer")
    return np.stack([stream.tokens[start : start + positions + 1] for start in long[:most]]).astype(np.int32)


@partial(jax.jit, static_argnums=1)
def losses_and_state(params: Any, model: Config, inputs: jax.Array, targets: jax.Array, state: Any) -> tuple[Any, Any]:
    """Returns nats at every position, and the state after the last."""
    logits, state = rwkv_jax.forward(params, model, inputs, state)
    return cross_entropy(logits, targets), state


def read(params: Any, model: Config, tokens: np.ndarray, piece: int) -> np.ndarray:
    """Returns the nats [B, T] of tokens [B, T + 1] after the first, read in pieces with the state carried."""
    state, found = rwkv_jax.init_state(model, len(tokens)), []
    for start in range(0, tokens.shape[1] - 1, piece):
        part = tokens[:, start : start + piece + 1]
        nats, state = losses_and_state(params, model, *map(jnp.asarray, (part[:, :-1], part[:, 1:])), state)
        found.append(np.asarray(nats, np.float64))
    return np.concatenate(found, axis=1)


def read_cleared(params: Any, model: Config, tokens: np.ndarray, length: int) -> np.ndarray:
    """Returns the nats [B, T] of tokens [B, T + 1] after the first, read `length` at a time, each from the zero state."""
    rows, end = len(tokens), tokens.shape[1] - 1
    inputs, targets = (jnp.asarray(side.reshape(-1, length)) for side in (tokens[:, :-1], tokens[:, 1:]))
    # In parts of as many tokens as `read` holds at once.
    parts = [
        losses_and_state(params, model, inputs[i : i + rows], targets[i : i + rows], rwkv_jax.init_state(model, rows))[
            0
        ]
        for i in range(0, len(inputs), rows)
    ]
    return np.concatenate([np.asarray(part, np.float64) for part in parts]).reshape(rows, end)


def bins(positions: int) -> list[int]:
    """Returns the edges of bins of positions: 0, 16, and each twice the one before, up to `positions`."""
    edges = [0]
    while edges[-1] < positions:
        edges.append(min(max(16, 2 * edges[-1]), positions))
    return edges


def by_position(nats: np.ndarray, bits_per_nat: float, length: int) -> dict[str, Any]:
    """Returns bits per byte of every bin, and of all positions from the trained length on."""
    mean = nats.mean(axis=0) * bits_per_nat
    edges = bins(len(mean))
    past = float(mean[length:].mean()) if length < len(mean) else None
    return {"bins": [float(mean[a:b].mean()) for a, b in itertools.pairwise(edges)], "past": past}


def measure(
    folder: str, length: int, lengths: LengthsConfig, tokens: np.ndarray, bits_per_nat: float
) -> dict[str, Any]:
    """Returns the losses of a trained model, read in each way."""
    params, model = rwkv_jax.load(folder)
    found = {
        "carried": read(params, model, tokens, lengths.piece),
        "cleared": read_cleared(params, model, tokens, length),
    }
    if isinstance(model, TransformerConfig):
        wide = replace(model, context_length=lengths.positions)
        found["widened"] = read(params, wide, tokens, lengths.piece)
    return {way: by_position(nats, bits_per_nat, length) for way, nats in found.items()}


def main() -> None:
    """Trains what is not trained yet, reads, prints the tables and the verdicts, and writes the record and the plot."""
    with study_program(Settings, "context.py") as settings:
        run(settings)


def run(settings: Settings) -> None:
    """Runs the study."""
    study, lengths, training, data = settings.study, settings.lengths, settings.training, settings.data
    tokens_a_step = data.context_length * data.batch_size
    sized = {n: models(training, lengths.num_layers, lengths.embed_dim, n) for n in lengths.trained}
    at_rates = models(training, lengths.num_layers, lengths.embed_dim, data.context_length)
    rates, how_chosen = choose_rates(study, training, data, at_rates)
    cells = {
        (name, n, seed): training_cell(
            training, replace(data, context_length=n, batch_size=tokens_a_step // n), model, rate=rates[name], seed=seed
        )
        for seed in study.seeds
        for n, size in sized.items()
        for name, model in size.items()
    }
    done = train_all(study, list(cells.values()))

    held_out = load_streams(data).validation
    tokens = documents(held_out, lengths.positions, lengths.documents)
    bits_per_nat = float(len(held_out.tokens) / held_out.num_bytes / np.log(2))
    reading = {
        "positions": lengths.positions,
        "piece": lengths.piece,
        "documents": len(tokens),
        "text": held_out.identity,
    }
    readers = {
        key: Cell(f"read-{lengths.positions}-{cell.name}", {"run": cell.settings, "reading": reading})
        for key, cell in cells.items()
    }
    length_of = {cell.name: (cells[key].name, key[1]) for key, cell in readers.items()}

    def compute(cell: Cell, advance: Any) -> dict[str, Any]:
        del advance
        run_name, length = length_of[cell.name]
        return measure(str(run_folder(study, run_name)), length, lengths, tokens, bits_per_nat)

    done |= compute_cells(study, list(readers.values()), compute)
    runs = {key: done[cell.name].result["held_out"] for key, cell in cells.items()}
    reads = {key: done[cell.name].result for key, cell in readers.items()}

    def ended(name: str, n: int) -> list[float]:
        return [runs[name, n, seed] for seed in study.seeds]

    def past(name: str, n: int, way: str) -> list[float]:
        return [reads[name, n, seed][way]["past"] for seed in study.seeds]

    by_length = table(
        ["trained at", *(f"{NAMES[name]}, {UNIT}" for name in rates)],
        [[n, *(estimate(ended(name, n), study.confidence) for name in rates)] for n in lengths.trained],
    )
    beyond = [n for n in lengths.trained if n < lengths.positions]
    ways = {name: [way for way in WAYS if way in reads[name, lengths.shown, study.seeds[0]]] for name in rates}
    by_way = table(
        ["trained at", "model", *(f"{way}, {UNIT}" for way in WAYS)],
        [
            [
                n,
                NAMES[name],
                *(estimate(past(name, n, way), study.confidence) if way in ways[name] else "" for way in WAYS),
            ]
            for n in beyond
            for name in rates
        ],
    )
    confidence, (first, *_, last) = study.confidence, (lengths.trained[0], lengths.trained[-1])
    verdicts = [
        f"{NAMES[name]}: " + verdict(f"trained at {last}", ended(name, last), f"at {first}", ended(name, first), confidence, unit=UNIT)
        for name in rates if last > first
    ]  # fmt: skip
    verdicts += [
        f"trained at {n}: " + verdict(NAMES[a], ended(a, n), NAMES[b], ended(b, n), confidence, unit=UNIT)
        for n in lengths.trained
        for a, b in itertools.combinations(rates, 2)
    ]
    verdicts += [
        f"{NAMES[name]} trained at {n}, positions from {n} on: "
        + verdict(way, past(name, n, way), other, past(name, n, other), confidence, unit=UNIT)
        for n in beyond
        for name in rates
        for way, other in (("carried", "cleared"), ("widened", "carried"))
        if way in ways[name]
    ]
    note = f"{len(tokens)} held-out documents, positions from the trained length to {lengths.positions}"
    print(f"\nheld out, all of it\n{by_length}\n\n{note}\n{by_way}\n")
    print(*verdicts, sep="\n")
    findings = {
        "table": by_length.splitlines(), "past_the_trained_length": [note, *by_way.splitlines()],
        "edges_of_bins": bins(lengths.positions), "verdicts": verdicts,
    }  # fmt: skip
    prefix = record(study, settings, done, {**findings, **how_chosen})
    plot(f"{prefix}.png", settings, ended, past, reads, ways)
    print(f"\n{prefix}: .json, .png")


def plot(
    path: str, settings: Settings, ended: Any, past: Any, reads: Mapping[Any, Any], ways: Mapping[str, Sequence[str]]
) -> None:
    """Draws loss against the trained length, loss by position, and what the carried state is worth past the trained length."""
    study, lengths = settings.study, settings.lengths
    shown, several = lengths.shown, len(study.seeds) > 1
    figure, (by_length, by_place, gains) = panels(
        f"{settings.training.tokens / 1e6:.3g}M tokens each, {len(study.seeds)} seeds",
        f"trained at {shown}", "carried against cleared",
    )  # fmt: skip
    edges = np.array(bins(lengths.positions))
    middles = np.sqrt(np.maximum(edges[:-1], 4) * edges[1:])
    lines = {"carried": "-", "cleared": "--", "widened": ":"}
    beyond = [n for n in lengths.trained if n < lengths.positions]

    def bars(x: Any, samples: list[list[float]], axes: Any, name: str) -> None:
        points = [estimate(values, study.confidence) for values in samples]
        errors = [point.half_width for point in points] if several else None
        axes.errorbar(
            x, [point.mean for point in points], errors, capsize=3, markersize=4, label=NAMES[name], **STYLES[name]
        )

    for name, own in ways.items():
        bars(lengths.trained, [ended(name, n) for n in lengths.trained], by_length, name)
        for way in own:
            mean = np.mean([reads[name, shown, seed][way]["bins"] for seed in study.seeds], axis=0)
            style = STYLES[name] if way == "carried" else {"color": STYLES[name]["color"]}
            by_place.plot(middles, mean, linestyle=lines[way], markersize=4, label=f"{NAMES[name]}, {way}", **style)
        bars(
            beyond,
            [np.subtract(past(name, n, "cleared"), past(name, n, "carried")).tolist() for n in beyond],
            gains,
            name,
        )
    by_place.axvline(shown, color="black", linewidth=0.8, label="trained length")
    gains.axhline(0, color="black", linewidth=0.8)
    by_length.set(xlabel="context trained at (tokens)", ylabel=f"held-out loss ({UNIT})")
    by_place.set(xlabel="position in the document (tokens)", ylabel=f"held-out loss ({UNIT})")
    gains.set(xlabel="context trained at (tokens)", ylabel=f"gain past the trained length ({UNIT})")
    for axes in (by_length, by_place, gains):
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=8, **({"loc": "upper left", "ncols": 2} if axes is by_place else {}))
    low, high = by_place.get_ylim()
    by_place.set_ylim(low, high + 0.5 * (high - low))  # Room for the legend above the lines.
    for axes in (by_length, gains):
        axes.set_xticks(lengths.trained, [str(n) for n in lengths.trained])
    figure.savefig(path)


if __name__ == "__main__":
    main()
