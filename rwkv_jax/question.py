"""Questions with given answers: which choice continues a text, or fills a blank in it, most likely."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .models import Config
from .score import BatchSize, Request, score
from .text.prompt import FirstToken, encode_context, encode_pair
from .text.questions import Completion, Item, Normalise, Question
from .text.tokenizers import Tokenizer


class Answer(NamedTuple):
    """Which choice a model takes."""

    index: int
    """Of the choice with the greatest score; of equal ones the first."""
    scores: tuple[float, ...]
    """Of each choice, in nats, normalised."""


def answer(
    params: Any,
    config: Config,
    tokenizer: Tokenizer,
    text: str,
    choices: Sequence[str],
    *,
    normalise: Normalise = "none",
    first_token: FirstToken = "newline",
    separator: str = " ",
    start: Any = None,
) -> Answer:
    """Returns the index of the choice that most likely continues a text, and the scores of all.

    Args:
        params: The model's.
        config: The model's.
        tokenizer: The model's.
        text: Such as a question.
        choices: At least two, all different.
        normalise: How the scores of choices are made comparable.
        first_token: What stands before the text.
        separator: Between the text and each choice.
        start: The state of one row that the text starts from; None is the zero state.

    Raises:
        ValueError: The choices are fewer than two, empty or equal, or the tokenizer is not the model's.
    """
    one = [Question(text, choices, separator=separator)]
    return answer_all(params, config, tokenizer, one, normalise=normalise, first_token=first_token, start=start)[0]


def fill_blank(
    params: Any,
    config: Config,
    tokenizer: Tokenizer,
    text: str,
    choices: Sequence[str],
    *,
    normalise: Normalise = "none",
    first_token: FirstToken = "newline",
    blank: str = "_",
    start: Any = None,
) -> Answer:
    """Returns the index of the choice that most likely fills a blank, and the scores of all: of the choice and the rest after it.

    Args, but for these: as in `answer`.
        text: With one blank, such as "The _ sat".
        normalise: The rest after the blank counts in, as tokens and bytes too.
        blank: What marks the blank.

    Raises:
        ValueError: As in `answer`, or the text has no blank or several.
    """
    one = [Question(text, choices, blank=blank)]
    return answer_all(params, config, tokenizer, one, normalise=normalise, first_token=first_token, start=start)[0]


def answer_all(
    params: Any,
    config: Config,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    normalise: Normalise = "none",
    first_token: FirstToken = "newline",
    batch_size: BatchSize = "auto",
    start: Any = None,
    backend: str | None = None,
) -> list[Answer]:
    """Returns the answers to many questions, scored together; arguments and errors as in `answer` and `score.score`."""
    if normalise not in ("none", "tokens", "bytes", "unconditional"):
        raise ValueError(f"normalise is {normalise!r}; it must be none, tokens, bytes or unconditional")
    check_tokenizer(tokenizer, config)
    texts = [(question.context, text) for question in questions for text in question.continuations]
    requests = [Request(*encode_pair(tokenizer, context, text, first_token)) for context, text in texts]
    alone: list[Request] = []
    if normalise == "unconditional":
        # The same tokens as after the text, without it.
        nothing = encode_context(tokenizer, "", first_token)
        alone = [Request(nothing, request.continuation) for request in requests]
    found = score(params, config, [*requests, *alone], batch_size=batch_size, start=start, backend=backend)
    values = [one.log_likelihood for one in found[: len(requests)]]
    if normalise == "tokens":
        values = [value / len(request.continuation) for value, request in zip(values, requests, strict=True)]
    elif normalise == "bytes":
        lengths = [
            len(text.removeprefix("" if question.blank else question.separator).encode())
            for question in questions
            for text in question.continuations
        ]
        values = [value / length for value, length in zip(values, lengths, strict=True)]
    elif normalise == "unconditional":
        values = [value - own.log_likelihood for value, own in zip(values, found[len(requests) :], strict=True)]
    answers, at = [], 0
    for question in questions:
        scores = tuple(values[at : at + len(question.choices)])
        at += len(question.choices)
        answers.append(Answer(scores.index(max(scores)), scores))
    return answers


def right(
    params: Any,
    config: Config,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    normalise: Normalise = "none",
    first_token: FirstToken = "newline",
    batch_size: BatchSize = "auto",
    start: Any = None,
    backend: str | None = None,
) -> list[bool]:
    """Returns whether each item is answered rightly: by its gold choice, or, where it has no choices, whether every token of the
    answer is the most likely one.

    Args and Raises: as in `answer_all`; normalise is for choices alone.
    """
    check_tokenizer(tokenizer, config)
    asked = [item.question for item in items if isinstance(item.question, Question)]
    ends = [item.question for item in items if isinstance(item.question, Completion)]
    answers = iter(
        answer_all(
            params, config, tokenizer, asked, normalise=normalise, first_token=first_token, batch_size=batch_size,
            start=start, backend=backend,
        )
    )  # fmt: skip
    requests = [Request(*encode_pair(tokenizer, end.context, end.answer, first_token)) for end in ends]
    scores = iter(score(params, config, requests, batch_size=batch_size, start=start, backend=backend))
    return [
        next(answers).index == item.question.gold if isinstance(item.question, Question) else next(scores).is_greedy
        for item in items
    ]


def check_tokenizer(tokenizer: Tokenizer, config: Config) -> None:
    """Raises ValueError unless the tokenizer is the model's own, as far as that is known, and the model has a row for every id."""
    if config.tokenizer not in (None, tokenizer.name):
        raise ValueError(
            f"the tokenizer is {tokenizer.name!r}, but the model was trained with {config.tokenizer!r}; use that one"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name!r} has ids up to {tokenizer.vocab_size - 1}, but the model's vocab_size is "
            f"{config.vocab_size}; use the tokenizer that it was trained with"
        )
