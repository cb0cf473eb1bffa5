"""Benchmarks a model with lm-evaluation-harness: `python experiments/evaluate.py --checkpoint runs/quickstart --tasks piqa,arc_easy`.

Tasks are the harness's own, whose data it fetches once; with `--data FOLDER` those of experiments/tasks are read from files there,
with no network. A table shows the figures beside the published ones of the nearest size; results.json and samples_TASK.jsonl are
the harness's. Needs `pip install "rwkv-jax[eval]"`.
"""

import difflib
import json
import math
import os
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, set_parsing_settings

from rwkv_jax.text.prompt import FirstToken

TASKS = Path(__file__).with_name("tasks")
SHIPPED = ",".join(sorted(path.stem for path in TASKS.glob("*.yaml")))
PUBLISHED = Path(__file__).with_name("published.toml")


@dataclass(frozen=True)
class EvaluateConfig:
    """Which model, on which tasks."""

    checkpoint: str
    """A run's folder, one of its checkpoints/STEP, or whatever else rwkv_jax.load reads."""
    tasks: str
    """Names with commas between, such as winogrande,piqa,arc_easy,arc_challenge,lambada_openai,sciq."""
    data: str | None = None
    """Folder with the files that experiments/tasks/*.yaml name; none: the harness fetches the data of its own tasks."""
    limit: int | None = None
    """Only the first so many items of each task."""
    num_fewshot: int | None = None
    """Solved items before each question; none: as the task says, mostly 0."""
    batch_size: int | Literal["auto"] = "auto"
    """Rows read together; auto: 64, and half as many whenever the device runs out of memory."""
    first_token: FirstToken = "newline"
    """What stands before every context: a newline, token 0, or nothing."""
    tokenizer: Literal["bytes", "20b", "world"] | None = None
    """none: the one that the model was trained with."""
    tokenizer_file: str | None = None
    """Vocabulary of the 20b or world tokenizer; none: the one in the checkpoint, or an installed or downloaded one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of parameters and activations; none: the file's."""
    ln_x_eps: float | None = None
    """Group norm's eps, where the file does not say it; none: 64e-5."""
    bootstrap_iters: int = 1000
    """Resamplings behind the standard error of a perplexity."""
    output: str = "evaluation"
    """Folder for results.json, samples_TASK.jsonl and table.md."""


def main() -> None:
    """Reads the command line, evaluates, and prints the table."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="evaluate.py", description=__doc__, allow_abbrev=False)
    parser.add_class_arguments(EvaluateConfig)
    values = vars(parser.parse_args())
    try:
        run(EvaluateConfig(**{field.name: values[field.name] for field in fields(EvaluateConfig)}))
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Writes results, samples and table to the output folder, prints the table, and returns the harness's results."""
    names = [name.strip() for name in config.tasks.split(",") if name.strip()]
    local = local_tasks(Path(config.data)) if config.data is not None else {}
    if names and set(names) <= local.keys():
        os.environ["HF_HUB_OFFLINE"] = "1"  # Read when the harness is imported, which is below for that reason.
    # The harness would fork to bootstrap, which is not safe beside JAX's threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    import rwkv_jax.harness  # noqa: F401  It registers the model.

    manager, specs = find_tasks(names, local)
    tasks = load_tasks(manager, specs)  # Before the model: what is not there shows before anything is computed.

    from lm_eval.evaluator import simple_evaluate

    arguments = ("tokenizer", "tokenizer_file", "first_token", "dtype", "ln_x_eps")
    results = simple_evaluate(
        model="rwkv_jax",
        model_args={"pretrained": config.checkpoint} | {name: getattr(config, name) for name in arguments},
        tasks=tasks,
        task_manager=manager,
        batch_size=config.batch_size,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        bootstrap_iters=config.bootstrap_iters,
    )
    assert results is not None  # It is on other ranks than 0 only.
    table = comparison(results, config.limit)
    write(Path(config.output), dict(results), table)
    print(f"\n{table}\n{config.output}: results.json, samples_TASK.jsonl, table.md")
    return dict(results)


def local_tasks(data: Path) -> dict[str, dict[str, Any]]:
    """Returns the configs of the shipped tasks by name, their files taken from a folder."""
    try:
        import yaml  # It comes with the harness.
    except ImportError as error:
        raise ImportError(f'benchmarks need lm-evaluation-harness ({error}): pip install "rwkv-jax[eval]"') from error

    found = {}
    for path in sorted(TASKS.glob("*.yaml")):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = task["dataset_kwargs"]["data_files"]
        task["dataset_kwargs"]["data_files"] = {split: str(data.resolve() / name) for split, name in files.items()}
        found[task["task"]] = task
    return found


def find_tasks(names: list[str], local: dict[str, dict[str, Any]]) -> tuple[Any, list[Any]]:
    """Returns the harness's manager, and for each name a config or the name of a task of its own.

    Raises:
        ValueError: There are no names, or one is unknown; the nearest are listed.
        FileNotFoundError: A task's file is not in the folder.
    """
    from lm_eval.tasks import TaskManager

    if not names:
        raise ValueError(f"--tasks is empty; give names such as {SHIPPED}")
    foreign = [name for name in names if name not in local]
    manager = TaskManager(include_defaults=bool(foreign))
    for name in foreign:
        if name not in manager.all_tasks:
            known = sorted({*manager.all_tasks, *local})
            nearest = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
            raise ValueError(f"there is no task {name!r}; the nearest are {', '.join(nearest) or 'none'}")
    for name in sorted(set(names) & local.keys()):
        for file in local[name]["dataset_kwargs"]["data_files"].values():
            if not Path(file).is_file():
                raise FileNotFoundError(f"{file}: no such file; the task {name} reads it from --data")
    return manager, [local.get(name, name) for name in names]


def load_tasks(manager: Any, specs: list[Any]) -> list[Any]:
    """Returns the tasks with their data.

    Raises:
        OSError: The data of one cannot be had.
    """
    found = []
    for spec in specs:
        if isinstance(spec, str):
            print(f"{spec}: its data is fetched from the Hugging Face hub, unless it was before", file=sys.stderr)
        try:
            loaded = manager.load([spec])
        # The datasets library and its readers raise many kinds for what a network or a file refuses; the chain has them all.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:300]
            if isinstance(spec, str):
                raise OSError(
                    f"{spec}: its data is not here and could not be fetched, which needs a network ({reason}); without one, use "
                    f"--data FOLDER and tasks of {SHIPPED}"
                ) from error
            files = spec["dataset_kwargs"]["data_files"]
            raise OSError(f"{spec['task']}: {files} cannot be read ({reason})") from error
        found += [*loaded.get("groups", {}).values()] or [*loaded["tasks"].values()]
    return found


def comparison(results: Any, limit: int | None) -> str:
    """Returns a table in Markdown: the results beside the published figures of each family's nearest size."""
    published = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    own = results["config"]["model_num_parameters"]
    nearest: dict[str, Any] = {}
    for model in published["models"]:
        best = nearest.get(model["family"])
        if best is None or _distance(model, own) < _distance(best, own):
            nearest[model["family"]] = model
    models = list(nearest.values())
    header = ["task", "metric", f"this model, {own / 1e6:.3g}M", *(f"{m['family']} {m['name']}" for m in models)]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            scale = 1 if "perplexity" in metric else 100
            error = values.get(f"{metric}_stderr,{filtered}")
            spread = f" ± {scale * error:.2f}" if isinstance(error, int | float) else ""
            others = [f"{m[task][metric]:.2f}" if metric in m.get(task, {}) else "-" for m in models]
            lines.append(f"| {task} | {metric} | {scale * value:.2f}{spread} | {' | '.join(others)} |")
    sources = dict.fromkeys(f"{m['family']}: {published['sources'][m['source']]}" for m in models)
    part = "" if limit is None else f" This model: the first {limit} items of each task only."
    note = f"Percent, but for perplexity; ± is one standard error.{part} As published: {'; '.join(sources)}."
    return "\n".join([*lines, "", note, ""])


def _distance(model: dict[str, Any], parameters: int) -> float:
    return abs(math.log(model["parameters"] / parameters))


def write(folder: Path, results: dict[str, Any], table: str) -> None:
    """Writes the harness's results, a file of samples for each task, and the table."""
    from lm_eval.utils import handle_non_serializable

    folder.mkdir(parents=True, exist_ok=True)
    for task, samples in results.pop("samples").items():
        lines = [json.dumps(one, default=handle_non_serializable, ensure_ascii=False) + "\n" for one in samples]
        (folder / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
