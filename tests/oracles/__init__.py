"""The models in float64 numpy, one token at a time, over weights under their official names. Imports nothing of ours."""

from oracles import rwkv4, rwkv5, rwkv6, rwkv7, transformer

ORACLES = {
    "rwkv4": rwkv4.run,
    "rwkv5": rwkv5.run,
    "rwkv6": rwkv6.run,
    "rwkv7": rwkv7.run,
    "transformer": transformer.run,
}
"""By architecture: (weights, tokens, state=None, **options) -> (logits [T, A], state after the last token), one sequence."""
