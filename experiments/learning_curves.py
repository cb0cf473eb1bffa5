"""Equal parameters, equal tokens: how the held-out loss of RWKV-4, RWKV-7 and a transformer falls with tokens and with FLOPs.

`python experiments/learning_curves.py --cfg experiments/configs/learning_curves_study.toml`

Every architecture has the learning rate that did best of those tried, in runs of their own. Interrupted, the same command goes on.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from equal_size import non_embedding
from study import NAMES, STYLES, StudyConfig, estimate, panels, record, study_program, table, verdict
from training_cells import TrainingConfig, choose_rates, flops, models, train_all, training_cell

from rwkv_jax.lm import count_params
from rwkv_jax.models import Config
from rwkv_jax.text import DataConfig

UNIT = "bits per byte"


@dataclass(frozen=True)
class SizeConfig:
    """The one size that is compared."""

    num_layers: int = 4
    """Blocks."""
    embed_dim: int = 96
    """Width of the residual stream."""


@dataclass(frozen=True)
class Settings:
    """Of the study."""

    study: StudyConfig = field(default_factory=StudyConfig)
    size: SizeConfig = field(default_factory=SizeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)


def main() -> None:
    """Trains what is not trained yet, prints the table and the verdicts, and writes the record and the plot."""
    with study_program(Settings, "learning_curves.py") as settings:
        run(settings)


def run(settings: Settings) -> None:
    """Runs the study."""
    study, training, data = settings.study, settings.training, settings.data
    sized = models(training, settings.size.num_layers, settings.size.embed_dim, data.context_length)
    rates, how_chosen = choose_rates(study, training, data, sized)
    cells = {
        (name, seed): training_cell(training, data, model, rate=rates[name], seed=seed)
        for seed in study.seeds
        for name, model in sized.items()
    }
    done = train_all(study, list(cells.values()))
    runs = {name: [done[cells[name, seed].name].result for seed in study.seeds] for name in sized}
    final = {name: [result["held_out"] for result in found] for name, found in runs.items()}

    half = training.validations // 2
    rows = [
        [
            NAMES[name], count_params(model), non_embedding(model), f"{rates[name]:g}",
            f"{flops(model, training.tokens):.3g}",
            *([estimate([r["held_out_curve"][half - 1] for r in runs[name]], study.confidence)] if half else []),
            estimate(final[name], study.confidence),
        ]
        for name, model in sized.items()
    ]  # fmt: skip
    header = ["model", "parameters", "without embedding", "learning rate", "training FLOPs"]
    header += [f"after half of the tokens, {UNIT}"] if half else []
    shown = table([*header, f"held out at the end, {UNIT}"], rows)
    verdicts = [
        verdict(NAMES[a], final[a], NAMES[b], final[b], study.confidence, unit=UNIT)
        for a, b in itertools.combinations(sized, 2)
    ]
    print(f"\n{shown}\n")
    print(*verdicts, sep="\n")
    if how_chosen.get("rates_at_the_edge_of_those_tried"):
        print(f"the learning rate is at the edge of those tried: {how_chosen['rates_at_the_edge_of_those_tried']}")
    prefix = record(study, settings, done, {"table": shown.splitlines(), "verdicts": verdicts, **how_chosen})
    plot(f"{prefix}.png", settings, sized, runs)
    print(f"\n{prefix}: .json, .png")


def plot(path: str, settings: Settings, sized: Mapping[str, Config], runs: Mapping[str, list[dict[str, Any]]]) -> None:
    """Draws held-out loss against tokens and against FLOPs, a line for the mean over seeds and a band for its interval."""
    size, seeds = settings.size, len(settings.study.seeds)
    held_out = f"first {settings.training.validation_tokens} held-out tokens"
    title = f"{size.num_layers} layers, width {size.embed_dim}, {seeds} seeds, {held_out}"
    figure, (by_tokens, by_flops) = panels(title, title)
    for name, model in sized.items():
        tokens = runs[name][0]["tokens"]
        columns = zip(*(result["held_out_curve"] for result in runs[name]), strict=True)
        points = [estimate(values, settings.study.confidence) for values in columns]
        middle = [point.mean for point in points]
        for axes, per_token in ((by_tokens, 1), (by_flops, flops(model, 1))):
            x = [n * per_token for n in tokens]
            axes.plot(
                x, middle, label=f"{NAMES[name]}, {non_embedding(model) / 1e6:.2f}M", markersize=4, **STYLES[name]
            )
            if seeds > 1:
                low, high = ([p.mean + sign * p.half_width for p in points] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=STYLES[name]["color"], alpha=0.15, linewidth=0)
    every = [loss for found in runs.values() for result in found for loss in result["held_out_curve"]]
    for axes, label in ((by_tokens, "training tokens"), (by_flops, "training FLOPs (products with weights)")):
        axes.set(
            xscale="log", xlabel=label, ylabel=f"held-out loss ({UNIT})", ylim=(0.97 * min(every), 1.03 * max(every))
        )
        axes.legend(title=f"without embedding; band: {settings.study.confidence:.0%}", fontsize=8, title_fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
