"""Log-likelihoods of continuations given contexts, for any model: in batches, and each context read once.

Contexts are sorted by length, and a batch of them is read together; the states after them are then copied to the rows of their
continuations. What is longer than a piece is read piece after piece, the state being carried, so that a run compiles a few shapes
only: pieces of 16, 32, 64, 128 or 256 tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .lm import forward, init_state
from .loss import cross_entropy
from .models import Config

BatchSize = int | Literal["auto"]
"""Rows read together; "auto" begins with `AUTO_ROWS` and halves them whenever the device runs out of memory."""
AUTO_ROWS = 64
SHORTEST_PIECE, LONGEST_PIECE = 16, 256
_MOST_LOGITS = 2**26
"""Of one piece of continuations, 256 MB in float32: a large vocabulary is read in shorter pieces."""


class Request(NamedTuple):
    """What to score: ids, at least one of each."""

    context: Sequence[int] | np.ndarray
    continuation: Sequence[int] | np.ndarray


class Score(NamedTuple):
    """Of a continuation."""

    log_likelihood: float
    """Sum of log p over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


def score(
    params: Any,
    config: Config,
    requests: Sequence[Request],
    *,
    batch_size: BatchSize = "auto",
    start: Any = None,
    backend: str | None = None,
    report: Callable[[int], object] | None = None,
) -> list[Score]:
    """Returns the scores of requests, in their order; they do not depend on it, nor on the batch size, but for rounding.

    Args:
        params: The model's.
        config: The model's.
        requests: Those with the same context share its reading.
        batch_size: Most rows read together.
        start: The state of one row that every context starts from; None is the zero state.
        backend: Of the WKV operator.
        report: Is told how many requests were finished, after each batch.

    Raises:
        ValueError: A context or continuation is empty, or has a token outside the vocabulary; the batch size is below 1.
        MemoryError: The device has too little memory; the message says which batch to try.
    """
    if batch_size != "auto" and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1, or 'auto'")
    groups = _by_context(requests, config.vocab_size)
    # The longest come first: if memory is too small, that shows at once.
    waiting = sorted(groups, key=len, reverse=True)
    rows = AUTO_ROWS if batch_size == "auto" else batch_size
    start = init_state(config, 1, jnp.promote_types(jnp.float32, params.emb.dtype)) if start is None else start
    scores: dict[int, Score] = {}
    while waiting:
        sizes = min(rows, _power_of_two(len(groups))), min(rows, _power_of_two(len(requests)))
        batch = waiting[: sizes[0]]
        try:
            found = _score_batch(params, config, [(c, groups[c]) for c in batch], requests, sizes, start, backend)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if max(sizes) == 1:
                raise MemoryError(
                    "a batch of one row does not fit in the device's memory; take a smaller model"
                ) from error
            smaller = max(sizes) // 2
            if batch_size != "auto":
                raise MemoryError(
                    f"batch_size={batch_size} does not fit in the device's memory; try {smaller}, or 'auto'"
                ) from error
            rows = smaller
            continue
        waiting = waiting[len(batch) :]
        scores |= found
        if report is not None:
            report(len(found))
    return [scores[i] for i in range(len(requests))]


def _by_context(requests: Sequence[Request], vocab_size: int) -> dict[tuple[int, ...], list[int]]:
    """The positions of the requests with each context."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        for name, part in request._asdict().items():
            ids = np.asarray(part)
            if ids.size == 0:
                raise ValueError(
                    f"request {i} has an empty {name}; a model predicts what follows a token, so give at least one, such as "
                    "the tokenizer's end_of_text"
                )
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(
                    f"the {name} of request {i} has token {ids.max() if ids.min() >= 0 else ids.min()}, outside the model's "
                    f"{vocab_size=}: the tokenizer does not fit this model"
                )
        groups.setdefault(tuple(np.asarray(request.context).tolist()), []).append(i)
    return groups


def _score_batch(params, config, contexts, requests, sizes, start, backend) -> dict[int, Score]:
    """Scores of all requests with these contexts, by position; sizes are those of the batches of contexts and continuations."""
    context_rows, rows = sizes
    # A context's last token is read with the continuation, whose first one it predicts.
    state = _take(start, np.zeros(context_rows, np.int32))
    prefixes = [np.array(context[:-1], np.int32) for context, _ in contexts]
    for tokens, length in _pieces(prefixes, context_rows, LONGEST_PIECE):
        state = _advance(params, config, tokens, length, state, backend)

    wanted = [(slot, i) for slot, (_, members) in enumerate(contexts) for i in members]
    wanted.sort(key=lambda pair: len(requests[pair[1]].continuation), reverse=True)
    # The power of two below what the vocabulary leaves room for.
    fits = _power_of_two(_MOST_LOGITS // (rows * config.vocab_size) + 1) // 2
    longest = min(max(fits, SHORTEST_PIECE), LONGEST_PIECE)
    scores = {}
    for first in range(0, len(wanted), rows):
        batch = wanted[first : first + rows]
        slots = np.zeros(rows, np.int32)
        slots[: len(batch)] = [slot for slot, _ in batch]
        targets = [np.asarray(requests[i].continuation, np.int32) for _, i in batch]
        inputs = [np.append(contexts[slot][0][-1], own[:-1]) for (slot, _), own in zip(batch, targets, strict=True)]
        own_state, total, greedy = _take(state, slots), np.zeros(rows), np.ones(rows, bool)
        for (tokens, length), (wished, _) in zip(
            _pieces(inputs, rows, longest), _pieces(targets, rows, longest), strict=True
        ):
            log_p, right, own_state = _predict(params, config, tokens, wished, length, own_state, backend)
            counts = np.arange(tokens.shape[1]) < length[:, None]
            total += np.where(counts, np.asarray(log_p, np.float64), 0).sum(1)
            greedy &= np.where(counts, right, True).all(1)
        for row, (_, i) in enumerate(batch):
            scores[i] = Score(float(total[row]), bool(greedy[row]))
    return scores


def _pieces(sequences: Sequence[np.ndarray], rows: int, longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts sequences, all at the same places, into tokens [rows, T] and how many of each row count [rows]."""
    end = max(len(sequence) for sequence in sequences)
    for begin in range(0, end, longest):
        width = max(SHORTEST_PIECE, _power_of_two(min(longest, end - begin)))
        tokens, length = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for row, sequence in enumerate(sequences):
            piece = sequence[begin : begin + longest]
            tokens[row, : len(piece)], length[row] = piece, len(piece)
        yield tokens, length


def _power_of_two(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << (number - 1).bit_length()


@jax.jit
def _take(state, rows):
    return jax.tree.map(lambda leaf: leaf[:, rows], state)


@partial(jax.jit, static_argnames=("config", "backend"))
def _advance(params, config, tokens, length, state, backend):
    return forward(params, config, tokens, state, length=length, backend=backend, positions="last")[1]


@partial(jax.jit, static_argnames=("config", "backend"))
def _predict(params, config, tokens, targets, length, state, backend):
    """log p of the targets, whether each is the most likely token, and the state."""
    logits, state = forward(params, config, tokens, state, length=length, backend=backend)
    return -cross_entropy(logits, targets), jnp.argmax(logits, -1) == targets, state
