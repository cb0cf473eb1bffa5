"""Classification tasks for the study of prompts: a file with labels and templates, and the items that templates are filled with."""

import ast
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from rwkv_jax.question import Normalise, Question
from rwkv_jax.text import DataConfig, corpora

CHOICE = "\0"
"""Stands in a text where a choice goes; no item has it."""
PARTS = {"I": "instruction", "D": "data", "Q": "question"}
Order = Literal["IDQ", "IQD", "DIQ", "DQI", "QID", "QDI"]
"""Of a prompt's parts, such as IDQ: instruction, data, question."""
STATEMENTS: dict[type[ast.stmt], str] = {ast.If: "if", ast.For: "for", ast.Return: "return", ast.Raise: "raise"}
_LONGEST_LINE, _LINES_BEFORE = 80, 2


@dataclass(frozen=True)
class Template:
    """How an item becomes text. {choice} stands once, in the question or in the answer; {FIELD} is the item's, as in str.format."""

    name: str
    instruction: str
    data: str
    question: str
    answer: str = ""
    """After the three parts, whatever their order."""
    choices: tuple[str, ...] = ()
    """What stands for each label; empty: the labels themselves."""
    normalise: Normalise = "none"


@dataclass(frozen=True)
class Task:
    """What is asked, and how."""

    source: Literal["stdlib", "jsonl"]
    """Statements in Python's standard library: fields data (lines before), before (the indentation) and after; or lines of JSON."""
    labels: tuple[str, ...]
    templates: tuple[Template, ...]
    gold: str = "gold"
    """Field with the index of the right label."""
    choices: str = ""
    """Field with a list of choices, if there is one: items where they are not as many as the labels, or not all different, are left
    out."""


@dataclass(frozen=True)
class Item:
    """What a template is filled with."""

    values: Mapping[str, Any] = field(hash=False)
    gold: int


def load_task(path: str | Path) -> Task:
    """Returns the task in a TOML file.

    Raises:
        FileNotFoundError, ValueError: There is no such file, or it is no task; the key is named.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        templates = tuple(_section(Template, one) for one in values.pop("templates", []))
        task = _section(Task, {**values, "templates": templates})
        _check(task)
    except (tomllib.TOMLDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return task


def _section(kind: Any, values: Mapping[str, Any]) -> Any:
    if unknown := sorted(values.keys() - {one.name for one in fields(kind)}):
        raise ValueError(f"there is no key {unknown[0]!r} in a {kind.__name__.lower()}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _check(task: Task) -> None:
    if task.source not in ("stdlib", "jsonl"):
        raise ValueError(f"source is {task.source!r}; it must be stdlib or jsonl")
    if task.source == "stdlib" and not set(task.labels) <= set(STATEMENTS.values()):
        raise ValueError(f"labels are {task.labels}; source stdlib has {', '.join(STATEMENTS.values())}")
    if not 2 <= len(set(task.labels)) == len(task.labels) <= 10:
        raise ValueError(f"labels are {task.labels}; give 2 to 10, all different")
    names = [template.name for template in task.templates]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"templates are {names}; give at least one, each with a name of its own")
    for one in task.templates:
        if len(one.choices) not in (0, len(task.labels)):
            raise ValueError(f"template {one.name!r} has {len(one.choices)} choices for {len(task.labels)} labels")
        if (one.question + one.answer).count("{choice}") != 1 or "{choice}" in one.instruction + one.data:
            raise ValueError(f"template {one.name!r} must have {{choice}} once, in its question or its answer")
        if one.normalise not in get_args(Normalise):
            raise ValueError(f"template {one.name!r} has normalise {one.normalise!r}; it must be {get_args(Normalise)}")


def ask(template: Template, labels: Sequence[str], order: Order, item: Item) -> Question:
    """Returns an item as a question: the parts in this order and the answer, a line each, with the blank where the choice goes.

    Raises:
        ValueError: A field of the template is not among the item's.
    """
    parts = [getattr(template, PARTS[letter]) for letter in order] + ([template.answer] if template.answer else [])
    try:
        text = "\n".join(part.format(**item.values, choice=CHOICE) for part in parts)
        choices = [choice.format(**item.values) for choice in template.choices or labels]
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"template {template.name!r} wants {error}, which an item has not; it has {', '.join(item.values)}"
        ) from None
    return Question(text, choices, blank=CHOICE, gold=item.gold)


def sample(task: Task, data: str | None, size: int, number: int) -> list[Item]:
    """Returns sample `number` (0, 1, ...) of the task's items; samples share none, and in each the labels take turns.

    Args:
        task: The task.
        data: The file of a jsonl task.
        size: Items.
        number: Which sample.

    Raises:
        FileNotFoundError, ValueError: There is no such file, a line is not an item, or there are too few items.
    """
    if task.source == "stdlib":
        items = _statements(task.labels)
    elif data is None:
        raise ValueError("this task reads lines of JSON: give --prompts.data FILE")
    else:
        items = _rows(task, Path(data))
    mixed = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    classes = [[item for item in mixed if item.gold == label] for label in range(len(task.labels))]
    turns = [item for items in zip(*classes, strict=False) for item in items]
    if len(turns) < (number + 1) * size:
        raise ValueError(
            f"the task has {len(turns)} items in which labels take turns; seed {number} is the sample from {number * size} to "
            f"{(number + 1) * size}: take a smaller prompts.sample_size, or lower study.seeds"
        )
    return turns[number * size : (number + 1) * size]


@cache
def _statements(labels: tuple[str, ...]) -> tuple[Item, ...]:
    """Short statements in the files that training holds out by default, with the lines before them."""
    found = []
    held_out = corpora.split(corpora.standard_library(), DataConfig().validation_fraction)[1]
    for document in held_out.documents():
        try:
            text = document.text.decode("utf-8") if isinstance(document.text, bytes) else document.text
            nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, UnicodeDecodeError):
            continue  # The standard library has files that are meant not to parse, or are in other encodings.
        lines = text.split("\n")
        for node in nodes:
            label = STATEMENTS.get(type(node)) if isinstance(node, ast.stmt) else None
            if not isinstance(node, ast.stmt) or label is None or label not in labels:
                continue
            line = lines[node.lineno - 1]
            before, after = line[: node.col_offset], line[node.col_offset :].removeprefix(label)
            above = [one for one in lines[: node.lineno - 1] if one.strip()][-_LINES_BEFORE:]
            fits = max(map(len, [line, *above])) <= _LONGEST_LINE and len(above) == _LINES_BEFORE
            # Whole lines only: not elif, not a bare return, nothing after a colon, nothing that goes on in the next line.
            whole = line.endswith(":") if isinstance(node, ast.If | ast.For) else node.end_lineno == node.lineno
            if fits and whole and after.startswith(" ") and not before.strip():
                values = {"data": "\n".join(above), "before": before, "after": after}
                found.append(Item(values, labels.index(label)))
    return tuple(found)


def _rows(task: Task, path: Path) -> list[Item]:
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            gold = row[task.gold]
            choices = row[task.choices] if task.choices else task.labels
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: {error!r}; every line must be a JSON object with {task.gold!r} {task.choices!r}"
            ) from None
        if task.choices and (len(choices) != len(task.labels) or len(set(choices)) != len(choices)):
            continue
        if gold not in range(len(task.labels)):
            raise ValueError(f"{path}:{number}: {task.gold!r} is {gold!r}; it must be 0 to {len(task.labels) - 1}")
        items.append(Item(row, int(gold)))
    return items
