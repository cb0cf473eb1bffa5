"""Generation: a prompt is read in parallel, then tokens are drawn one at a time inside one jitted loop."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .lm import forward, init_state
from .models import Config
from .text import StreamDecoder, Tokenizer

TOKENS_A_CALL = 16
"""Tokens drawn by one call of the jitted loop: text appears in portions of this many tokens."""
_LONGEST_PREFILL = 1024


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. In this order: penalties, temperature, top_k, top_p."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Only this many of the most likely tokens are kept; 0 keeps all."""
    top_p: float = 1.0
    """Only the fewest most likely tokens that together have at least this probability are kept; 1 keeps all."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token drawn before."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it was drawn before."""
    penalty_decay: float = 1.0
    """Factor by which that count shrinks with each further token; 1 never forgets."""

    def __post_init__(self):
        rules = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "penalty_decay": (0 <= self.penalty_decay <= 1, "between 0 and 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}")


def sample(
    key: PRNGKeyArray, logits: Float[Array, "B A"], counts: Float[Array, "B A"], sampling: Sampling
) -> Int[Array, "B"]:
    """Returns one token a row, drawn from its logits.

    Args:
        key: Random key.
        logits: Of the next token.
        counts: How often each token was drawn before, decayed.
        sampling: Static under jit.
    """
    logits = logits - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    vocab_size = logits.shape[-1]
    ordered, tokens = jax.lax.top_k(logits, min(sampling.top_k or vocab_size, vocab_size))
    probabilities = jax.nn.softmax(ordered)
    # A token is kept while those before it do not reach top_p.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    drawn = jax.random.categorical(key, jnp.where(before < sampling.top_p, ordered, -jnp.inf))
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def prefill(
    params: Any, config: Config, tokens: Sequence[int] | np.ndarray, state: Any = None
) -> tuple[Float[Array, "1 A"], Any]:
    """Returns the logits after a prompt and the state, read in parallel in pieces of power-of-two lengths.

    Args:
        params: The model's.
        config: The model's.
        tokens: At least one id; long prompts take memory for 1024 tokens at a time.
        state: To go on from, of one row; None is the zero state.
    """
    ids = np.asarray(tokens, np.int32)
    if ids.size == 0:
        raise ValueError("the prompt has no tokens; begin with the tokenizer's end_of_text")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(
            f"the prompt has token {ids.max() if ids.min() >= 0 else ids.min()}, outside the model's vocab_size="
            f"{config.vocab_size}: the tokenizer does not fit this model"
        )
    state = init_state(config, 1) if state is None else state
    logits = None
    for start in range(0, ids.size, _LONGEST_PREFILL):
        piece = ids[start : start + _LONGEST_PREFILL]
        padded = np.zeros((1, 1 << (piece.size - 1).bit_length()), np.int32)
        padded[0, : piece.size] = piece
        logits, state = _prefill_piece(params, config, padded, np.array([piece.size], np.int32), state)
    assert logits is not None
    return logits, state


@partial(jax.jit, static_argnames="config")
def _prefill_piece(params, config, tokens, length, state):
    logits, state = forward(params, config, tokens, state, length=length, positions="last")
    return logits[:, 0], state


@partial(
    jax.jit, static_argnames=("config", "sampling", "num_tokens", "vocab_size"), donate_argnames=("state", "counts")
)
def decode(
    params: Any,
    config: Config,
    logits: Float[Array, "B A"],
    state: Any,
    counts: Float[Array, "B A"],
    key: PRNGKeyArray,
    *,
    sampling: Sampling,
    num_tokens: int,
    vocab_size: int | None = None,
) -> tuple[Int[Array, "B T"], tuple[Any, ...]]:
    """Returns `num_tokens` drawn tokens a row, and (logits, state, counts, key) to go on from. state and counts are donated.

    Only ids below `vocab_size` are drawn; a model may have more rows than its tokenizer has ids. None: all.
    """

    def step(carry, _):
        logits, state, counts, key = carry
        key, own_key = jax.random.split(key)
        known = jnp.arange(logits.shape[-1]) < (vocab_size or logits.shape[-1])
        tokens = sample(own_key, jnp.where(known, logits, -jnp.inf), counts, sampling)
        counts = counts * sampling.penalty_decay + jax.nn.one_hot(tokens, counts.shape[-1], dtype=counts.dtype)
        logits, state = forward(params, config, tokens[:, None], state)
        return (logits[:, 0], state, counts, key), tokens

    carry, tokens = jax.lax.scan(step, (logits, state, counts, key), length=num_tokens)
    return tokens.T, carry


def stream(
    params: Any,
    config: Config,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    state: Any = None,
) -> Iterator[str]:
    """Yields the continuation of a prompt in pieces, until end_of_text, a stop string or `max_tokens`.

    A character of several bytes is never cut, and a stop string is never shown, not even in part.

    Args:
        params: The model's.
        config: The model's.
        tokenizer: The model's.
        prompt: Empty stands for the start of a document.
        max_tokens: At most this many tokens are drawn.
        sampling: How they are drawn; None is plain sampling.
        stop: Strings that end the text.
        seed: The same seed gives the same text.
        state: What the prompt starts from, of one row; None is the zero state.

    Raises:
        ValueError: The tokenizer does not fit the model.
    """
    if any(not text for text in stop):
        raise ValueError("a stop string is empty; leave it out")
    ids = tokenizer.encode(prompt)
    logits, state = prefill(params, config, ids if len(ids) else [tokenizer.end_of_text], state)
    counts, key = jnp.zeros_like(logits), jax.random.key(seed)
    decoder, held, left = StreamDecoder(tokenizer), "", max_tokens
    while left > 0:
        tokens, (logits, state, counts, key) = decode(
            params,
            config,
            logits,
            state,
            counts,
            key,
            sampling=sampling or Sampling(),
            num_tokens=TOKENS_A_CALL,
            vocab_size=tokenizer.vocab_size,
        )
        drawn = np.asarray(tokens[0])[:left]
        left -= len(drawn)
        ends = np.flatnonzero(drawn == tokenizer.end_of_text)
        if ends.size:
            drawn, left = drawn[: ends[0]], 0
        held += decoder.feed(drawn.tolist())
        ready, held, stopped = _before_stop(held, stop)
        if ready:
            yield ready
        if stopped:
            return
    if held:
        yield held


def _before_stop(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """Cuts text into what can be shown, what may yet become a stop string, and whether one has come."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    if found:
        return text[: min(found)], "", True
    longest = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - longest], text[len(text) - longest :], False
