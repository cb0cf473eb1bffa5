"""Batches of answers to learn: a question a row, of which the answer's tokens alone count."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from .batches import shuffled_batches
from .prompt import FirstToken, encode_pair
from .questions import Item
from .tokenizers import Tokenizer


class AnswerBatch(NamedTuple):
    """A training batch."""

    inputs: np.ndarray
    """int32 [B, T]."""
    targets: np.ndarray
    """int32 [B, T]: the token after each input."""
    length: np.ndarray
    """int32 [B]: how many inputs of a row count; those after are padding."""
    counts: np.ndarray
    """bool [B, T]: True where the target is a token of the answer."""


class Answers:
    """Random access to rows: the text of a question and its right answer, encoded as they are scored, and padded to one length."""

    def __init__(self, items: Sequence[Item], tokenizer: Tokenizer, first_token: FirstToken, context_length: int):
        """Encodes the questions.

        Args:
            items: With their gold.
            tokenizer: The model's.
            first_token: What stands before the text.
            context_length: Tokens a row; `too_long` counts the questions that need more and are left out.

        Raises:
            ValueError: None fits, or a question has no gold.
        """
        pairs = [encode_pair(tokenizer, item.question.context, item.gold, first_token) for item in items]
        lengths = [len(before) + len(answer) - 1 for before, answer in pairs]
        fits = [length <= context_length for length in lengths]
        if not any(fits):
            raise ValueError(
                f"all {len(items)} questions have more than data.context_length={context_length} tokens, the shortest "
                f"{min(lengths)}; raise it"
            )
        self._pairs = [pair for pair, whole in zip(pairs, fits, strict=True) if whole]
        self._context_length = context_length
        self.longest = max(lengths)
        """Tokens of the longest question, left out or not."""
        self.too_long = len(items) - len(self._pairs)
        self.num_tokens = sum(len(answer) for _, answer in self._pairs)
        """Of the answers."""
        self.num_bytes = sum(len(item.gold.encode()) for item, whole in zip(items, fits, strict=True) if whole)
        """Of the answers."""

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: Any) -> AnswerBatch:
        before, answer = self._pairs[int(index)]
        tokens = np.concatenate([before, answer]).astype(np.int32)
        length, places = len(tokens) - 1, np.arange(self._context_length)
        padding = (0, self._context_length - length)
        counts = (places >= len(before) - 1) & (places < length)
        inputs, targets = np.pad(tokens[:-1], padding), np.pad(tokens[1:], padding)
        return AnswerBatch(inputs, targets, np.asarray(length, np.int32), counts)

    @property
    def identity(self) -> str:
        """Hash of the tokens: a run goes on only with the questions it began with."""
        digest = hashlib.sha256()
        for pair in self._pairs:
            for part in pair:
                digest.update(len(part).to_bytes(8, "big") + part.astype(np.int32).tobytes())
        return digest.hexdigest()


def answer_batches(
    answers: Answers, *, batch_size: int, seed: int, rows: np.ndarray | None = None
) -> grain.DatasetIterator[AnswerBatch]:
    """Returns an endless iterator over shuffled rows; it resumes, and its arguments mean, as in `train_batches`.

    Raises:
        ValueError: There are fewer questions than rows of a batch.
    """
    if len(answers) < batch_size:
        raise ValueError(
            f"there are {len(answers)} questions to train on; data.batch_size={batch_size} needs as many: use more, or a smaller "
            "batch"
        )
    return shuffled_batches(answers, batch_size=batch_size, seed=seed, rows=rows)


def check_choices(items: Sequence[Item], tokenizer: Tokenizer, first_token: FirstToken) -> None:
    """Raises ValueError where two choices of a question are the same tokens, as they may be after a tokenizer's normalisation."""
    for item in items:
        texts = item.question.continuations
        ids = [tuple(encode_pair(tokenizer, item.question.context, text, first_token)[1].tolist()) for text in texts]
        for i, own in enumerate(ids):
            if own in ids[:i]:
                raise ValueError(
                    f"{item.name}: {texts[ids.index(own)]!r} and {texts[i]!r} are the same tokens to the tokenizer "
                    f"{tokenizer.name!r}; leave one out"
                )
