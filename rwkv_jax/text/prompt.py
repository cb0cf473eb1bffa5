"""What a model reads before the text that it is asked about, and where in the tokens that text begins."""

from typing import Literal

import numpy as np

from .tokenizers import Tokenizer

FirstToken = Literal["newline", "zero", "none"]
"""What stands before every context: a newline, token 0, which ends documents, or nothing. RWKV's published figures were made with a
newline or token 0, without which a model may forget the first token. With nothing, an empty context is the tokenizer's end_of_text,
since a model predicts only what follows a token."""


def first_tokens(tokenizer: Tokenizer, convention: FirstToken) -> np.ndarray:
    """Returns the ids, int32, that stand before every context.

    Raises:
        ValueError: The convention is unknown.
    """
    if convention not in ("newline", "zero", "none"):
        raise ValueError(f"first_token is {convention!r}; it must be newline, zero or none")
    if convention == "newline":
        return tokenizer.encode("\n")
    return np.zeros(int(convention == "zero"), np.int32)


def encode_context(tokenizer: Tokenizer, context: str, convention: FirstToken = "newline") -> np.ndarray:
    """Returns the ids of a context, int32, at least one: the first tokens, then its own."""
    ids = np.concatenate([first_tokens(tokenizer, convention), tokenizer.encode(context)])
    return ids if ids.size else np.array([tokenizer.end_of_text], np.int32)


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, convention: FirstToken = "newline"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of a context and of its continuation, which together are the ids of the whole text.

    A token may join the two; the continuation begins with the first token that the context alone does not have. White space at
    the context's end counts to the continuation, as in lm-evaluation-harness, since most vocabularies join it to the next word.

    Args:
        tokenizer: The model's.
        context: May be empty.
        continuation: Not empty.
        convention: What stands before the context.

    Raises:
        ValueError: The continuation is empty.
    """
    if not continuation:
        raise ValueError(f"the continuation of {context[-40:]!r} is empty; there is nothing to score")
    whole, own = tokenizer.encode(context + continuation), tokenizer.encode(context.rstrip())
    shorter = min(len(own), len(whole) - 1)
    differs = np.flatnonzero(own[:shorter] != whole[:shorter])
    cut = int(differs[0]) if differs.size else shorter
    before = np.concatenate([first_tokens(tokenizer, convention), whole[:cut]])
    return (before if before.size else np.array([tokenizer.end_of_text], np.int32)), whole[cut:]
