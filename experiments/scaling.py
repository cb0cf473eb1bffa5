"""Equal tokens, growing models: whether the losses of RWKV-4, RWKV-7 and a transformer stay together as parameters grow.

`python experiments/scaling.py --cfg experiments/configs/scaling_study.toml`

To each seed's losses L at N parameters without embedding and head, L = floor + a N^-alpha is fitted; alpha's spread is that over
seeds, and two architectures' alphas are compared as losses are. Interrupted, the same command goes on.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from equal_size import non_embedding
from scipy import optimize
from study import NAMES, STYLES, StudyConfig, estimate, panels, record, study_program, table, verdict
from training_cells import TrainingConfig, choose_rates, flops, models, train_all, training_cell

from rwkv_jax.models import Config
from rwkv_jax.text import DataConfig

UNIT = "bits per byte"


@dataclass(frozen=True)
class SizesConfig:
    """The sizes that are compared, smallest first."""

    num_layers: tuple[int, ...] = (2, 4, 4, 5)
    """Blocks of each."""
    embed_dim: tuple[int, ...] = (64, 64, 96, 128)
    """Width of each."""
    rates_at: int = 2
    """At which of them, from 0, learning rates are chosen; all have the same one."""
    floor: bool = False
    """Whether the fit has a loss that no size gets below, a third unknown; false: it is 0."""

    def __post_init__(self):
        if len(self.num_layers) != len(self.embed_dim) or len(self.embed_dim) < (4 if self.floor else 2):
            raise ValueError(
                f"sizes.num_layers is {self.num_layers} and sizes.embed_dim {self.embed_dim}; they must be as long as each other, "
                f"at least {4 if self.floor else 2}"
            )
        if not 0 <= self.rates_at < len(self.embed_dim):
            raise ValueError(f"sizes.rates_at is {self.rates_at}; it must be 0 to {len(self.embed_dim) - 1}")


@dataclass(frozen=True)
class Settings:
    """Of the study."""

    study: StudyConfig = field(default_factory=StudyConfig)
    sizes: SizesConfig = field(default_factory=SizesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)


class PowerLaw(NamedTuple):
    """loss = floor + scale * parameters ** -exponent."""

    scale: float
    exponent: float
    floor: float

    def __call__(self, parameters: np.ndarray) -> np.ndarray:
        """Returns the losses at these sizes."""
        return self.floor + self.scale * parameters**-self.exponent


def fit(parameters: Sequence[float], losses: Sequence[float], floor: bool) -> PowerLaw:
    """Returns the power law with the least squares of log(loss - floor); with `floor` the floor is fitted too, from 0 up."""
    logs, least = np.log(np.asarray(parameters, float)), min(losses)

    def line(level: float) -> tuple[PowerLaw, float]:
        values = np.log(np.asarray(losses) - level)
        slope, start = np.polyfit(logs, values, 1)
        # Errors of log(loss - floor), brought to those of the loss, so that floors can be compared.
        errors = (values - start - slope * logs) * (np.asarray(losses) - level)
        return PowerLaw(float(np.exp(start)), float(-slope), level), float(np.sum(errors**2))

    if not floor:
        return line(0.0)[0]
    found = optimize.minimize_scalar(
        lambda level: line(level)[1], bounds=(0, 0.999 * least), method="bounded", options={"xatol": 1e-6}
    )
    return line(float(found.x))[0]


def main() -> None:
    """Trains what is not trained yet, prints the tables and the verdicts, and writes the record and the plot."""
    with study_program(Settings, "scaling.py") as settings:
        run(settings)


def run(settings: Settings) -> None:
    """Runs the study."""
    study, sizes, training, data = settings.study, settings.sizes, settings.training, settings.data
    shapes = zip(sizes.num_layers, sizes.embed_dim, strict=True)
    sized = [models(training, layers, width, data.context_length) for layers, width in shapes]
    rates, how_chosen = choose_rates(study, training, data, sized[sizes.rates_at])
    cells = {
        (name, i, seed): training_cell(training, data, model, rate=rates[name], seed=seed)
        for seed in study.seeds
        for i, size in enumerate(sized)
        for name, model in size.items()
    }
    done = train_all(study, list(cells.values()))
    losses = {
        name: [[done[cells[name, i, seed].name].result["held_out"] for seed in study.seeds] for i in range(len(sized))]
        for name in rates
    }
    laws = {
        name: [
            fit([non_embedding(size[name]) for size in sized], [row[s] for row in losses[name]], sizes.floor)
            for s in range(len(study.seeds))
        ]
        for name in rates
    }
    exponents = {name: [law.exponent for law in found] for name, found in laws.items()}

    rows = [
        [f"{size[name].num_layers} x {size[name].embed_dim}", NAMES[name], non_embedding(size[name]),
         f"{flops(size[name], training.tokens):.3g}", estimate(losses[name][i], study.confidence)]
        for i, size in enumerate(sized) for name in size
    ]  # fmt: skip
    header = ["layers x width", "model", "without embedding", "training FLOPs", f"held out, {UNIT}"]
    by_size = table(header, rows)
    fits = table(
        ["model", "exponent", *([f"floor, {UNIT}"] if sizes.floor else [])],
        [
            [NAMES[name], estimate(exponents[name], study.confidence)]
            + ([estimate([law.floor for law in laws[name]], study.confidence)] if sizes.floor else [])
            for name in rates
        ],
    )
    verdicts = [
        f"{size[a].num_layers} x {size[a].embed_dim}: "
        + verdict(NAMES[a], losses[a][i], NAMES[b], losses[b][i], study.confidence, unit=UNIT)
        for i, size in enumerate(sized)
        for a, b in itertools.combinations(rates, 2)
    ] + [
        "exponent: "
        + verdict(NAMES[a], exponents[a], NAMES[b], exponents[b], study.confidence, unit="", lower_is_better=False)
        for a, b in itertools.combinations(rates, 2)
    ]
    print(f"\n{by_size}\n\nloss = {'floor + ' if sizes.floor else ''}a N^-exponent\n{fits}\n")
    print(*verdicts, sep="\n")
    findings = {"table": by_size.splitlines(), "fits": fits.splitlines(), "exponents": exponents, "verdicts": verdicts}
    prefix = record(study, settings, done, {**findings, **how_chosen})
    plot(f"{prefix}.png", settings, sized, losses, laws)
    print(f"\n{prefix}: .json, .png")


def plot(
    path: str, settings: Settings, sized: Sequence[Mapping[str, Config]], losses: Mapping[str, list[list[float]]],
    laws: Mapping[str, list[PowerLaw]],
) -> None:  # fmt: skip
    """Draws loss against parameters with the fits, and against training FLOPs, on logarithmic axes."""
    study, training = settings.study, settings.training
    title = f"{training.tokens / 1e6:.3g}M tokens each, {len(study.seeds)} seeds, {study.confidence:.0%} intervals"
    figure, (by_parameters, by_flops) = panels(title, title)
    for name, found in laws.items():
        parameters = np.array([non_embedding(size[name]) for size in sized], float)
        points = [estimate(values, study.confidence) for values in losses[name]]
        middle = np.array([point.mean for point in points])
        bars = [point.half_width for point in points] if len(study.seeds) > 1 else None
        exponent = estimate([law.exponent for law in found], study.confidence)
        fine = np.geomspace(parameters[0], parameters[-1], 50)
        color = STYLES[name]["color"]
        by_parameters.plot(fine, np.mean([law(fine) for law in found], axis=0), color=color, linewidth=1)
        by_parameters.errorbar(
            parameters, middle, bars, linestyle="none", capsize=3, markersize=4, **STYLES[name],
            label=f"{NAMES[name]}, exponent {exponent}",
        )  # fmt: skip
        x = [flops(size[name], training.tokens) for size in sized]
        by_flops.errorbar(x, middle, bars, capsize=3, markersize=4, **STYLES[name], label=NAMES[name])
    labels = "parameters without embedding and head", "training FLOPs (products with weights)"
    for axes, label in zip((by_parameters, by_flops), labels, strict=True):
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=f"held-out loss ({UNIT})")
        axes.yaxis.set_major_formatter("{x:.2f}")
        axes.yaxis.set_minor_formatter("{x:.2f}")
        axes.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
