"""Sets of questions by name: where their records lie and how each becomes a question, in the form in which benchmarks ask it."""

import dataclasses
import difflib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import corpora
from .blanks import make_blanks
from .config import DataConfig, load_corpora
from .prompt import FirstToken
from .questions import Completion, Item, Normalise, Question

BLANKS = "blanks"


@dataclass(frozen=True)
class QuestionsConfig:
    """Which questions experiments/finetune_qa.py learns to answer. The data section says where they are read, and holds some out."""

    task: str | None = None
    """blanks, which are made of the text of data.source; arc_easy, arc_challenge, piqa, winogrande, sciq or lambada, from data.source
    jsonl, tfds or huggingface; none: a run of experiments/train.py."""
    training_items: int | None = None
    """Most questions trained on, drawn by the seed; none: all."""
    held_out_items: int | None = None
    """Most questions held out for the accuracy, drawn by the seed; none: all."""
    normalise: Normalise = "none"
    """How scores of choices are made comparable: none, tokens, bytes or unconditional."""
    first_token: FirstToken = "newline"
    """What stands before every text: a newline, token 0, or nothing."""
    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self):
        if self.task is not None and self.task not in TASKS and self.task != BLANKS:
            known = [BLANKS, *TASKS]
            nearest = difflib.get_close_matches(self.task, known, n=3, cutoff=0.3) or known
            raise ValueError(
                f"questions.task is {self.task!r}; there is none of that name, the nearest: {', '.join(nearest)}"
            )
        for name in ("training_items", "held_out_items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"questions.{name} is {value}; it must be at least 1, or left out for all")


class Task(NamedTuple):
    """A set of questions that others have published."""

    read: Callable[[Mapping[str, Any]], Question | Completion]
    """Makes the question of a record, whose text is str."""
    tfds: str | None
    """Its name in TensorFlow Datasets."""
    hub: tuple[str, str | None]
    """Its name and subset on the Hugging Face hub."""


class Sides(NamedTuple):
    """Questions to learn from and to be measured by."""

    training: list[Item]
    held_out: list[Item]
    repeated: int
    """Questions left out of the training side since they are held out, word for word."""


def load_questions(config: QuestionsConfig, data: DataConfig) -> Sides:
    """Returns the questions of a task.

    Args:
        config: Which questions, and how many.
        data: Where they are read, which are held out, and, for blanks, the most bytes of a text: context_length.

    Raises:
        ValueError: A record is not a question of the task, has choices that are empty or equal, or a gold out of range: it is named.
        OSError: The data cannot be read.
    """
    if config.task == BLANKS:
        sides = load_corpora(data)[:2]
        limits = config.training_items, config.held_out_items
        training, held_out = (
            make_blanks(side.documents(), most_bytes=data.context_length, seed=config.seed, limit=limit)
            for side, limit in zip(sides, limits, strict=True)
        )
    else:
        assert config.task is not None
        tables = load_corpora(_completed(config, data))[:2]
        training, held_out = (read_items(config.task, table) for table in tables)
        training = _draw(training, config.training_items, config.seed)
        held_out = _draw(held_out, config.held_out_items, config.seed)
    for name, side in (("to train on", training), ("held out", held_out)):
        if not side:
            raise ValueError(f"{config.task}: there are no questions {name}; look at data.source and its split")
    known = {_words(item) for item in held_out}
    kept = [item for item in training if _words(item) not in known]
    if not kept:
        raise ValueError(f"{config.task}: every question to train on is held out, too; give another file or split")
    return Sides(kept, held_out, len(training) - len(kept))


def _completed(config: QuestionsConfig, data: DataConfig) -> DataConfig:
    """The data section with the names that the task has where it is published."""
    assert config.task is not None
    task = TASKS[config.task]
    if data.source == "tfds" and data.tfds_name is None:
        if task.tfds is None:
            raise ValueError(
                f"{config.task} is not in TensorFlow Datasets; set data.source to 'jsonl' or 'huggingface'"
            )
        return dataclasses.replace(data, tfds_name=task.tfds)
    if data.source == "huggingface" and data.hub_name is None:
        return dataclasses.replace(data, hub_name=task.hub[0], hub_subset=data.hub_subset or task.hub[1])
    if data.source not in ("jsonl", "tfds", "huggingface"):
        raise ValueError(
            f"questions.task={config.task!r} is read from records, and data.source is {data.source!r}; set it to 'jsonl' with a "
            "data.path, or to what fetches them once: 'tfds' or 'huggingface'"
        )
    return data


def read_items(task: str, table: corpora.Corpus) -> list[Item]:
    """Returns the questions in the records of a published task.

    Raises:
        ValueError: A record is not such a question; it is named.
    """
    assert isinstance(table, corpora.Table)
    items = []
    for where, record in table.records():
        try:
            items.append(Item(where, TASKS[task].read(_decoded(record))))
        except KeyError as error:
            raise ValueError(
                f"{where}: not a question of {task}: no field {error}; it has {', '.join(record)}"
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: not a question of {task}: {error}") from None
    return items


def _decoded(value: Any) -> Any:
    """A record of plain values: TFDS gives bytes and arrays."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _decoded(own) for key, own in value.items()}
    if hasattr(value, "tolist"):
        return _decoded(value.tolist())
    return [_decoded(own) for own in value] if isinstance(value, list) else value


def _draw(items: list[Item], limit: int | None, seed: int) -> list[Item]:
    return items if limit is None or limit >= len(items) else random.Random(seed).sample(items, limit)


def _words(item: Item) -> str:
    return item.question.context + item.gold


def _with_gold(text: str, choices: list[str], gold: int) -> Question:
    """Choices without white space around them."""
    return Question(text, [choice.strip() for choice in choices], gold=gold)


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _arc(record: Mapping[str, Any]) -> Question:
    question, choices = record["question"], record.get("choices")
    if isinstance(question, dict):  # The release's own lines.
        question, choices = question["stem"], question["choices"]
    if choices is None:
        raise KeyError("choices")
    if "gold" in record:
        return _with_gold(_asked(question), choices, record["gold"])
    answer = record["answerKey"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = ([choice[key] for choice in choices] for key in ("text", "label"))
    if answer not in labels:
        raise ValueError(f"answerKey is {answer!r}; it must be one of the labels {labels}")
    return _with_gold(_asked(question), texts, labels.index(answer))


def _piqa(record: Mapping[str, Any]) -> Question:
    return _with_gold(_asked(record["goal"]), [record["sol1"], record["sol2"]], int(record["label"]))


def _winogrande(record: Mapping[str, Any]) -> Question:
    """Scored as any blank: an option counts with the rest of the sentence after it."""
    gold = int(record["answer"]) - 1 if "answer" in record else int(record["label"])
    return Question(record["sentence"], [record["option1"], record["option2"]], blank="_", gold=gold)


def _sciq(record: Mapping[str, Any]) -> Question:
    choices = [record[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return _with_gold(f"{record.get('support', '').lstrip()}\n{_asked(record['question'])}", choices, 3)


def _lambada(record: Mapping[str, Any]) -> Completion:
    """The last word, without choices: a model is right, as in published figures, if its every token is the likeliest."""
    text = record["text"] if "text" in record else record["passage"]
    before, space, word = text.rstrip().rpartition(" ")
    if not before:
        raise ValueError(f"the text is {text[:40]!r}; it must have at least two words")
    return Completion(before, space + word)


TASKS = {
    "arc_easy": Task(_arc, "ai2_arc/ARC-Easy", ("allenai/ai2_arc", "ARC-Easy")),
    "arc_challenge": Task(_arc, "ai2_arc/ARC-Challenge", ("allenai/ai2_arc", "ARC-Challenge")),
    "piqa": Task(_piqa, "piqa", ("baber/piqa", None)),
    "winogrande": Task(_winogrande, "winogrande", ("allenai/winogrande", "winogrande_xl")),
    "sciq": Task(_sciq, None, ("allenai/sciq", None)),
    "lambada": Task(_lambada, "lambada", ("EleutherAI/lambada_openai", None)),
}
