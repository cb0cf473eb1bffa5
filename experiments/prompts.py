"""Prompt sensitivity: one task under several templates, and with instruction, data and question in every order.

`python experiments/prompts.py --cfg experiments/configs/prompts_study.toml`

An RNN reads once: what it was not yet asked for when the data went by, it may not have kept. A transformer looks back. Every model
answers the same items under each template and order. Intervals are over items; a model is one checkpoint, so that nothing here
says how another training run of it would do. Interrupted, the same command goes on.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from prompt_task import Order, Task, Template, ask, load_task, sample
from scipy import stats
from study import (
    NAMES,
    STYLES,
    Advance,
    Cell,
    Finished,
    StudyConfig,
    compute_cells,
    panels,
    record,
    study_program,
    table,
)

from rwkv_jax.pretrained import Pretrained, load_pretrained
from rwkv_jax.question import answer_all
from rwkv_jax.text.prompt import FirstToken
from rwkv_jax.text.tokenizers import TokenizerName

RESAMPLES = 2000
"""Of the items, behind each bootstrapped interval."""


@dataclass(frozen=True)
class PromptsConfig:
    """What is asked, of which models."""

    task: str = "experiments/tasks/prompts_keywords.toml"
    """File with labels and templates."""
    data: str | None = None
    """Lines of JSON, for a task that reads them."""
    checkpoints: tuple[str, ...] = ("runs/quickstart", "runs/quickstart_rwkv7", "runs/quickstart_transformer")
    """Each a run's folder or whatever else rwkv_jax.load reads. Another one under the same path needs another study.folder."""
    orders: tuple[Order, ...] = ("IDQ", "IQD", "DIQ", "DQI", "QID", "QDI")
    """Of I, the instruction, D, the data, and Q, the question."""
    sample_size: int = 80
    """Items of each seed's sample; samples share none, and labels take turns in them."""
    batch_size: int | Literal["auto"] = "auto"
    """Rows read together; auto: 64, and half as many whenever the device runs out of memory."""
    first_token: FirstToken = "newline"
    """What stands before every prompt: a newline, token 0, or nothing."""
    tokenizer: TokenizerName | None = None
    """none: the one that each model was trained with."""
    tokenizer_file: str | None = None
    """Vocabulary of the 20b or world tokenizer; none: the one in the checkpoint, or an installed or downloaded one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of parameters and activations; none: the checkpoint's."""

    def __post_init__(self):
        for name in ("checkpoints", "orders"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"prompts.{name} is {values}; give at least one, each once")
        if len({_label(path) for path in self.checkpoints}) != len(self.checkpoints):
            raise ValueError(
                f"prompts.checkpoints is {self.checkpoints}; their last parts must differ, for they are shown"
            )
        if self.sample_size < 2 or (self.batch_size != "auto" and self.batch_size < 1):
            raise ValueError(
                f"prompts.sample_size is {self.sample_size}, batch_size {self.batch_size}; at least 2 and 1"
            )


@dataclass(frozen=True)
class Settings:
    """Of the study. Its seeds are samples of items."""

    study: StudyConfig = field(default_factory=StudyConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)


class Answers(NamedTuple):
    """What one model said."""

    architecture: str
    predicted: np.ndarray
    """Index of a label [prompt, item]."""
    gold: np.ndarray
    """[item]."""

    @property
    def correct(self) -> np.ndarray:
        """1.0 where the prediction is right [prompt, item]."""
        return (self.predicted == self.gold).astype(float)


def main() -> None:
    """Asks what is not yet asked, prints tables and verdicts, and writes the record and the plot."""
    with study_program(Settings, "prompts.py") as settings:
        run(settings)


def run(settings: Settings) -> None:
    """Runs the study."""
    study, prompts = settings.study, settings.prompts
    task = load_task(prompts.task)
    for seed in study.seeds:
        sample(task, prompts.data, prompts.sample_size, seed)  # What cannot be had shows before anything is computed.
    check_there(prompts.checkpoints)
    cells = {
        (path, template.name, order, seed): prompt_cell(prompts, task, template, path, order, seed)
        for path in prompts.checkpoints
        for template in task.templates
        for order in prompts.orders
        for seed in study.seeds
    }
    done = compute_cells(study, list(cells.values()), Asker(prompts, task).answer)
    shown = [(template.name, order) for template in task.templates for order in prompts.orders]
    found = {_label(path): _answers(path, shown, study.seeds, cells, done) for path in prompts.checkpoints}
    scores = {name: _scores(answers, len(task.labels), study.confidence) for name, answers in found.items()}

    each = table(
        ["model", "template", "order", "accuracy, %", "macro F1, %"],
        [
            [name, *prompt, *(_interval(scores[name], key, i) for key in ("accuracy", "f1"))]
            for name in found
            for i, prompt in enumerate(shown)
        ],
    )
    header = ["model", "metric", "mean, %", "SD over prompts, points", "SD over orders", "lowest, %", "highest, %"]
    spread = table(header, [row for name in found for row in _spread(name, scores[name], len(prompts.orders), study)])
    chance = 100 / len(task.labels)
    asked = f"{len(study.seeds) * prompts.sample_size} items, chance {chance:.0f} %; {study.confidence:.0%} intervals"
    notes = (
        f"{asked}: of accuracies Wilson's, of all else from {RESAMPLES} resamplings of the items. An SD over prompts contains the "
        "items' own sampling noise; over orders it is that within a template, averaged over templates."
    )
    verdicts = _verdicts(found, shown, scores, study, chance)
    print("\n".join(["", each, "", spread, "", notes, *verdicts]))
    findings = {"prompts": each.splitlines(), "spread": spread.splitlines(), "notes": notes, "verdicts": verdicts}
    prefix = record(study, settings, done, findings)
    plot(Path(f"{prefix}.png"), found, shown, scores, chance, asked)
    print(f"\n{prefix}.json and .png")


def _label(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def check_there(checkpoints: Sequence[str]) -> None:
    """Raises FileNotFoundError for those that are not on disk, with the commands that make them."""
    missing = [path for path in checkpoints if not path.startswith("hf://") and not Path(path).exists()]
    if missing:
        configs = {path: Path(__file__).with_name("configs") / f"{_label(path)}.toml" for path in missing}
        lines = [
            f"  {path}: make it with python experiments/train.py --cfg experiments/configs/{config.name} --run.folder {path}"
            if config.exists()
            else f"  {path}: give the path of a checkpoint"
            for path, config in configs.items()
        ]
        raise FileNotFoundError("these models are missing:\n" + "\n".join(lines))


def prompt_cell(prompts: PromptsConfig, task: Task, template: Template, path: str, order: str, seed: int) -> Cell:
    """Returns the cell that asks a model one sample of items under a template, in an order."""
    names = ("data", "sample_size", "first_token", "tokenizer", "tokenizer_file", "dtype")
    settings = {
        "checkpoint": path, "order": order, "seed": seed, "template": asdict(template), "source": task.source,
        "labels": list(task.labels), "python": platform.python_version() if task.source == "stdlib" else None,
        **{name: getattr(prompts, name) for name in names},
    }  # fmt: skip
    # With the choice in the question, all after it is read once for every choice.
    after = 1 if "{choice}" in template.answer else len(task.labels) * (2 - order.index("Q") / 2)
    return Cell(f"{_label(path)}-{template.name}-{order}-seed{seed}", settings, after)


class Asker:
    """Answers cells; it keeps one model at a time, and the samples."""

    def __init__(self, prompts: PromptsConfig, task: Task):
        self.prompts, self.task = prompts, task
        self._model = lru_cache(maxsize=1)(self._load)
        self._sample = cache(lambda seed: sample(task, prompts.data, prompts.sample_size, seed))

    def _load(self, path: str) -> Pretrained:
        prompts = self.prompts
        jax.clear_caches()  # What was compiled for the last model.
        return load_pretrained(
            path, tokenizer=prompts.tokenizer, tokenizer_file=prompts.tokenizer_file, dtype=prompts.dtype
        )  # fmt: skip

    def answer(self, cell: Cell, advance: Advance) -> dict[str, Any]:
        """Returns the labels predicted and the right ones, as digits, an item each."""
        advance(0)
        wanted = cell.settings
        model, items = self._model(wanted["checkpoint"]), self._sample(wanted["seed"])
        template = next(one for one in self.task.templates if one.name == wanted["template"]["name"])
        answers = answer_all(
            model.params, model.config, model.tokenizer,
            [ask(template, self.task.labels, wanted["order"], item) for item in items],
            normalise=template.normalise, first_token=self.prompts.first_token, batch_size=self.prompts.batch_size,
            start=model.start,
        )  # fmt: skip
        return {
            "architecture": model.config.architecture,
            "predicted": "".join(str(answer.index) for answer in answers),
            "gold": "".join(str(item.gold) for item in items),
        }


def _answers(
    path: str, shown: Sequence[tuple[str, str]], seeds: Sequence[int], cells: Mapping[Any, Cell], done: Mapping[str, Finished]
) -> Answers:  # fmt: skip
    """A model's answers, samples side by side."""
    results = [[done[cells[path, *prompt, seed].name].result for seed in seeds] for prompt in shown]
    digits = [[int(digit) for result in row for digit in result["predicted"]] for row in results]
    gold = [int(digit) for result in results[0] for digit in result["gold"]]
    return Answers(results[0][0]["architecture"], np.array(digits), np.array(gold))


class Scores(NamedTuple):
    """Of one model, over prompts [P] and over resamplings of the items [R, P]."""

    accuracy: np.ndarray
    f1: np.ndarray
    drawn: Mapping[str, np.ndarray]
    """accuracy and f1 of every resampling; the same items for every model."""
    low: Mapping[str, np.ndarray]
    high: Mapping[str, np.ndarray]


def _scores(answers: Answers, num_labels: int, confidence: float) -> Scores:
    num_items = len(answers.gold)
    drawn = [(answers.predicted[:, items], answers.gold[items]) for items in _resamplings(num_items)]
    accuracies = np.array([(predicted == gold).mean(1) for predicted, gold in drawn])
    f1s = np.array([macro_f1(predicted, gold, num_labels) for predicted, gold in drawn])
    right = answers.correct.sum(1).astype(int)
    wilson = [stats.binomtest(k, num_items).proportion_ci(confidence, method="wilson") for k in right]
    low, high = np.quantile(f1s, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return Scores(
        answers.correct.mean(1), macro_f1(answers.predicted, answers.gold, num_labels),
        {"accuracy": accuracies, "f1": f1s},
        {"accuracy": np.array([one.low for one in wilson]), "f1": low},
        {"accuracy": np.array([one.high for one in wilson]), "f1": high},
    )  # fmt: skip


def _resamplings(num_items: int) -> np.ndarray:
    """The same for every model, so that differences are of pairs [R, N]."""
    return np.random.default_rng(0).integers(0, num_items, (RESAMPLES, num_items))


def macro_f1(predicted: np.ndarray, gold: np.ndarray, num_labels: int) -> np.ndarray:
    """Returns the mean over labels of F1, which is 0 for a label that is neither predicted nor there, of predictions [..., N]."""
    found = []
    for label in range(num_labels):
        said, there = predicted == label, gold == label
        both = said.sum(-1) + there.sum()
        found.append(2 * (said & there).sum(-1) / np.maximum(both, 1))
    return np.mean(found, axis=0)


def _interval(scores: Scores, key: str, prompt: int) -> str:
    value = getattr(scores, key)[prompt]
    return f"{100 * value:.1f} [{100 * scores.low[key][prompt]:.1f}, {100 * scores.high[key][prompt]:.1f}]"


def _spread(name: str, scores: Scores, num_orders: int, study: StudyConfig) -> list[list[str]]:
    """Rows of the table of spreads."""

    def shown(figure: Callable[[np.ndarray], Any], values: np.ndarray, draws: np.ndarray) -> str:
        low, high = _quantiles([figure(one) for one in draws], study.confidence)
        return f"{100 * figure(values):.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    rows = []
    for key in ("accuracy", "f1"):
        values, draws = getattr(scores, key), scores.drawn[key]
        figures = [
            shown(figure, values, draws)
            for figure in (np.mean, np.std, lambda one: one.reshape(-1, num_orders).std(1).mean())
        ]
        rows.append([name, key, *figures, f"{100 * values.min():.1f}", f"{100 * values.max():.1f}"])
    return rows


def _quantiles(draws: Sequence[float] | np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _verdicts(
    found: Mapping[str, Answers], shown: Sequence[tuple[str, str]], scores: Mapping[str, Scores], study: StudyConfig, chance: float
) -> list[str]:  # fmt: skip
    """What can be said of each model, and of pairs of them."""
    data_first = np.array([order.index("D") < order.index("Q") for _, order in shown])
    compare_orders = data_first.any() and not data_first.all()
    lines, effects = [], {}
    for name, answers in found.items():
        above = int((100 * scores[name].low["accuracy"] > chance).sum())
        lines.append(f"{name}: above chance under {above} of {len(shown)} prompts")
        # The best and the worst of many are far apart by chance too: one half of the items picks them, and the other tells.
        half = len(answers.gold) // 2
        picked = answers.correct[:, :half].mean(1)
        best, worst = int(picked.argmax()), int(picked.argmin())
        rest = answers.correct[:, half:]
        names = (f"{name}, {' '.join(shown[best])}", f"{name}, {' '.join(shown[worst])}")
        lines.append(
            judged(*names, rest[best] - rest[worst], study.confidence)
            + ": best and worst prompt of the other half of items"
        )
        if compare_orders:
            effects[name] = answers.correct[data_first].mean(0) - answers.correct[~data_first].mean(0)
            lines.append(
                judged(f"{name}, data before question", "question before data", effects[name], study.confidence)
            )
    pairs = [(a, b) for i, a in enumerate(found) for b in list(found)[i + 1 :]]
    for a, b in pairs:
        gap = found[a].correct.mean(0) - found[b].correct.mean(0)
        lines.append(judged(a, b, gap, study.confidence) + ", accuracy over all prompts")
        for key, what in (("accuracy", "accuracy"), ("f1", "macro F1")):
            spreads = [scores[one].drawn[key].std(1) for one in (a, b)]
            value = getattr(scores[a], key).std() - getattr(scores[b], key).std()
            low, high = _quantiles(spreads[0] - spreads[1], study.confidence)
            more, less = (a, b) if value > 0 else (b, a)
            said = f"{more} is more sensitive than {less}" if low > 0 or high < 0 else f"{a} and {b}: not resolved"
            lines.append(
                f"{said}, SD of {what} over prompts ({100 * value:+.1f} [{100 * low:.1f}, {100 * high:.1f}] points)"
            )
        if compare_orders:
            more = judged(
                f"what {a} gains from data before question", f"what {b} does", effects[a] - effects[b], study.confidence
            )
            lines.append(more)
    return lines


def judged(a: str, b: str, differences: np.ndarray, confidence: float) -> str:
    """Returns in words which of two is greater, or that it is not resolved.

    Args:
        a: The first.
        b: The second.
        differences: a - b of every item, as shares.
        confidence: Of the interval from resampling the items; it is resolved if that leaves out zero.
    """
    value = differences.mean()
    low, high = _quantiles(differences[_resamplings(len(differences))].mean(1), confidence)
    figures = f"({100 * value:+.1f} [{100 * low:.1f}, {100 * high:.1f}] points)"
    if low <= 0 <= high:
        return f"{a} and {b}: not resolved {figures}"
    return f"{a if value > 0 else b} beats {b if value > 0 else a} {figures}"


def plot(
    path: Path, found: Mapping[str, Answers], shown: Sequence[tuple[str, str]], scores: Mapping[str, Scores], chance: float,
    asked: str,
) -> None:  # fmt: skip
    """Draws accuracy and F1 of every prompt with their intervals, the models side by side."""
    figure, axes = panels("accuracy", "macro F1")
    figure.set_size_inches(12, 1.8 + 0.1 * (1 + len(found)) * len(shown))
    place = -np.arange(len(shown), dtype=float)
    for panel, key in zip(axes, ("accuracy", "f1"), strict=True):
        for i, (name, answers) in enumerate(found.items()):
            own, style = scores[name], STYLES[answers.architecture]
            values, low, high = 100 * getattr(own, key), 100 * own.low[key], 100 * own.high[key]
            at = place + 0.25 * ((len(found) - 1) / 2 - i)
            error = [values - low, high - values]
            label = f"{NAMES[answers.architecture]} ({name})"
            panel.errorbar(values, at, xerr=error, **style, linestyle="none", markersize=4, elinewidth=1, label=label)
        panel.set_xlabel(f"{panel.get_title()}, %")
        panel.set_yticks(place, [f"{template} {order}" for template, order in shown])
        panel.set_ylim(place[-1] - 0.7, 0.7)
    axes[0].axvline(chance, color="black", linestyle=":", linewidth=1, label="chance")
    figure.suptitle(f"I: instruction, D: data, Q: question, in the order read. {asked}", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
