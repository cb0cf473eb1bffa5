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
    length: np.ndarray
    """int32 [B]: how many inputs of a row count; those after are padding."""


class EvalBatch(NamedTuple):
    """A part of a walk over a stream; the state is carried from one to the next, unless that one is fresh."""

    inputs: np.ndarray
    """int32 [B, T]."""
    targets: np.ndarray
    """int32 [B, T]."""
    valid: np.ndarray
    """bool [B, T]: False in the padding at the end of rows."""
    reset: np.ndarray
    """bool [B, T]: True where an input is the first token of a document."""
    fresh: bool = False
    """Whether all rows start anew here."""


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
        return Batch(window[:-1], window[1:], reset, np.asarray(length, np.int32))


class _Rows:
    """Random access to pieces of documents, a row each, so that every token but a document's first is a target once."""

    def __init__(self, stream: TokenStream, context_length: int):
        starts, lengths = _documents(stream)
        pieces = -(-lengths // context_length)
        index_in_document = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts = np.repeat(starts, pieces) + context_length * index_in_document
        self._lengths = np.minimum(np.repeat(starts + lengths, pieces) - self._starts, context_length)
        self._stream, self._context_length = stream, context_length

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Batch:
        start, length = self._starts[index], self._lengths[index]
        inputs, targets = _row(self._stream, start, length, self._context_length)
        return Batch(inputs, targets, np.zeros(self._context_length, bool), np.asarray(length, np.int32))


class _Walk:
    """Random access to batches of rows that walk on: item n has the n-th `context_length` tokens of each of `batch_size` parts of the
    stream, and marks the first tokens of all."""

    def __init__(self, stream: TokenStream, context_length: int, batch_size: int, packed: bool):
        self._windows = _Windows(stream, context_length, packed)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._windows) // self._batch_size

    def __getitem__(self, index: Any) -> Batch:
        batch = _stack([self._windows[row * len(self) + int(index)] for row in range(self._batch_size)])
        batch.reset[:, 0] |= int(index) == 0
        return batch


class _RowsOfBatches:
    """Random access to some rows of every batch of an endless dataset of rows."""

    def __init__(self, dataset: Any, batch_size: int, rows: np.ndarray):
        self._dataset, self._batch_size, self._rows = dataset, batch_size, rows

    def __len__(self) -> int:
        return len(self._dataset) // self._batch_size

    def __getitem__(self, index: Any) -> Any:
        return _stack([self._dataset[int(index) * self._batch_size + int(row)] for row in self._rows])


def train_batches(
    stream: TokenStream,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    documents: Literal["stream", "packed", "rows"] = "stream",
    carry: bool = False,
    rows: np.ndarray | None = None,
) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator over shuffled windows or rows, whose get_state and set_state resume at the very next batch.

    Every epoch visits every window once, in another order. The same seed gives the same batches, whatever rows of them are asked for.

    Args:
        stream: The training text.
        context_length: Tokens a row, T.
        batch_size: Rows, B.
        seed: Of the order.
        documents: "packed" marks the starts of documents in `reset`; "stream" marks none; "rows" gives each row one
            document, or a piece of a longer one, and its `length`.
        carry: Whether row r walks through the r-th of `batch_size` parts of the stream instead, unshuffled; `reset` marks where it
            begins, too.
        rows: Which rows of each batch to return, such as those of this process; None: all.

    Raises:
        ValueError: The stream has fewer tokens than one window or fewer windows than one batch.
    """
    own = documents == "rows"
    windows = _Rows(stream, context_length) if own else _Windows(stream, context_length, documents == "packed")
    if len(windows) < batch_size and own:
        raise ValueError(
            f"the training text makes {len(windows)} rows of at most data.context_length={context_length}; "
            f"data.batch_size={batch_size} needs as many: use more text or a smaller batch"
        )
    if len(windows) < batch_size:
        raise ValueError(
            f"the training text has {len(stream.tokens)} tokens; data.batch_size={batch_size} windows of "
            f"data.context_length={context_length} need {batch_size * context_length + 1}: use more text or smaller ones"
        )
    if carry:
        walk = _Walk(stream, context_length, batch_size, documents == "packed")
        dataset = grain.MapDataset.source(walk).repeat()
        if rows is not None:
            dataset = dataset.map(lambda batch: Batch(*(x[rows] for x in batch)))
        return _read_ahead(dataset)
    return shuffled_batches(windows, batch_size=batch_size, seed=seed, rows=rows)


def shuffled_batches(
    windows: Any, *, batch_size: int, seed: int, rows: np.ndarray | None = None
) -> grain.DatasetIterator[Any]:
    """Returns an endless iterator over batches of what `windows` gives random access to, NamedTuples of arrays; as `train_batches`."""
    shuffled = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    every = np.arange(batch_size) if rows is None else rows
    return _read_ahead(grain.MapDataset.source(_RowsOfBatches(shuffled, batch_size, every)))


def _read_ahead(dataset: Any) -> Any:
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def validation_batches(
    stream: TokenStream,
    *,
    context_length: int,
    batch_size: int,
    limit: int | None = None,
    documents: Literal["stream", "packed", "rows"] = "stream",
) -> Iterator[EvalBatch]:
    """Yields a walk over the stream in which every token is a target exactly once, in its own context.

    Row r walks through the r-th of `batch_size` equal parts; its first input is the token before its part (end_of_text before the
    first). With the state carried from batch to batch, only the first tokens of each part lack context. With documents="rows"
    a row walks through one document, from its first token, which is no target.

    Args:
        stream: The held-out text, at least one token.
        context_length: Tokens a row of a batch.
        batch_size: Rows, at most (fewer if there are fewer tokens).
        limit: Use only this many tokens, from the start.
        documents: As for training; "stream" and "packed" are walked alike.
    """
    if documents == "rows":
        yield from _document_batches(stream, context_length, batch_size, limit)
        return
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
        yield EvalBatch(
            *(np.pad(x[:, part], ((0, 0), (0, short))) for x in (inputs, targets, valid, reset)), fresh=start == 0
        )


def _document_batches(
    stream: TokenStream, context_length: int, batch_size: int, limit: int | None
) -> Iterator[EvalBatch]:
    starts, lengths = _documents(stream)
    if limit is not None:
        lengths = np.clip(limit - (np.cumsum(lengths) - lengths), 0, lengths)
    # Documents of like length walk together, so that few rows wait for the others to end.
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    for first in range(0, len(order), batch_size):
        group = order[first : first + batch_size]
        for offset in range(0, int(lengths[group].max()), context_length):
            left = np.clip(lengths[group] - offset, 0, context_length)
            rows = [_row(stream, starts[i] + offset, n, context_length) for i, n in zip(group, left, strict=True)]
            valid = np.arange(context_length) < left[:, None]
            missing = ((0, batch_size - len(group)), (0, 0))
            inputs, targets = (np.pad(np.stack(side), missing) for side in zip(*rows, strict=True))
            yield EvalBatch(inputs, targets, np.pad(valid, missing), np.zeros(inputs.shape, bool), fresh=offset == 0)


def _documents(stream: TokenStream) -> tuple[np.ndarray, np.ndarray]:
    """Where every document starts, and how many of its tokens follow another."""
    starts = np.asarray(stream.document_starts)
    return starts, np.diff(np.append(starts, len(stream.tokens))) - 1


def _row(stream: TokenStream, start: Any, length: Any, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of `length` tokens from `start`, padded."""
    tokens = stream.tokens[start : start + length + 1].astype(np.int32)
    padding = (0, context_length - length)
    return np.pad(tokens[:-1], padding), np.pad(tokens[1:], padding)


def _stack(windows: Any) -> Any:
    return type(windows[0])(*(np.stack(field) for field in zip(*windows, strict=True)))
