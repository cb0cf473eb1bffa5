"""Batches of a token stream: shuffled windows for training, through grain, and a walk over the whole stream for evaluation."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from .cache import TokenStream


class Batch(NamedTuple):
    """A training batch."""

    inputs: np.ndarray
    """int32 [B, T]."""
    targets: np.ndarray
    """int32 [B, T]: the token after each input."""
    reset: np.ndarray
    """bool [B, T]: True where an input is the first token of a document."""


class EvalBatch(NamedTuple):
    """A part of a walk over a stream; the state is carried from one to the next."""

    inputs: np.ndarray
    """int32 [B, T]."""
    targets: np.ndarray
    """int32 [B, T]."""
    valid: np.ndarray
    """bool [B, T]: False in the padding at the end of rows."""
    reset: np.ndarray
    """bool [B, T]: True where an input is the first token of a document."""


class _Windows:
    """Random access to windows: window i has tokens i*T to i*T + T inclusive, so that every token is a target once."""

    def __init__(self, stream: TokenStream, context_length: int, packed: bool):
        self._stream, self._context_length, self._packed = stream, context_length, packed

    def __len__(self) -> int:
        return (len(self._stream.tokens) - 1) // self._context_length

    def __getitem__(self, index: Any) -> Batch:
        start, length = int(index) * self._context_length, self._context_length
        window = self._stream.tokens[start : start + length + 1].astype(np.int32)
        reset = np.zeros(length, bool)
        if self._packed:
            first, last = np.searchsorted(self._stream.document_starts, [start, start + length])
            reset[self._stream.document_starts[first:last] - start] = True
        return Batch(window[:-1], window[1:], reset)


def train_batches(
    stream: TokenStream,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    documents: Literal["stream", "packed"] = "stream",
) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator over shuffled windows, whose get_state and set_state resume at the very next batch.

    Every epoch visits every window once, in another order. The same seed gives the same batches.

    Args:
        stream: The training text.
        context_length: Tokens a row, T.
        batch_size: Rows, B.
        seed: Of the order.
        documents: "packed" marks the starts of documents in `reset`; "stream" marks none.

    Raises:
        ValueError: The stream has fewer tokens than one window or fewer windows than one batch.
    """
    windows = _Windows(stream, context_length, documents == "packed")
    if len(windows) < batch_size:
        raise ValueError(
            f"the training text has {len(stream.tokens)} tokens; data.batch_size={batch_size} windows of "
            f"data.context_length={context_length} need {batch_size * context_length + 1}: use more text or smaller ones"
        )
    dataset = grain.MapDataset.source(windows).seed(seed).shuffle().repeat().batch(batch_size, batch_fn=_stack)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def validation_batches(
    stream: TokenStream, *, context_length: int, batch_size: int, limit: int | None = None
) -> Iterator[EvalBatch]:
    """Yields a walk over the stream in which every token is a target exactly once, in its own context.

    Row r walks through the r-th of `batch_size` equal parts; its first input is the token before its part (end_of_text before the
    first). With the state carried from batch to batch, only the first tokens of each part lack context.

    Args:
        stream: The held-out text, at least one token.
        context_length: Tokens a row of a batch.
        batch_size: Rows, at most (fewer if there are fewer tokens).
        limit: Use only this many tokens, from the start.
    """
    end = min(len(stream.tokens), limit or len(stream.tokens))
    rows = min(batch_size, end)
    length = -(-end // rows)
    # The separator before the first document is the one after the last.
    targets = stream.tokens[:end].astype(np.int32)
    inputs = np.concatenate([stream.tokens[-1:].astype(np.int32), targets[:-1]])
    padding = rows * length - end
    reset = np.zeros(end, bool)
    first_inputs = stream.document_starts + 1  # An input stands one place after where it is a target.
    reset[first_inputs[first_inputs < end]] = True
    inputs, targets, reset = (np.pad(x, (0, padding)).reshape(rows, length) for x in (inputs, targets, reset))
    valid = (np.arange(rows * length) < end).reshape(rows, length)
    for start in range(0, length, context_length):
        part = slice(start, start + context_length)
        short = max(0, start + context_length - length)
        yield EvalBatch(*(np.pad(x[:, part], ((0, 0), (0, short))) for x in (inputs, targets, valid, reset)))


def _stack(windows: Any) -> Batch:
    return Batch(*(np.stack(field) for field in zip(*windows, strict=True)))
