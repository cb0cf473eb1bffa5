"""GPT-NeoX in float64 numpy, token by token over lists of keys and values: arXiv 2204.06745, section 2.

Each head's keys are turned by their position since the start, as complex numbers; what is older than the window is left out.
"""

import math

import numpy as np

from oracles.shared import layer_norm, num_layers, softmax

ERF = np.vectorize(math.erf)


def run(weights, tokens, state=None, *, head_dim, rotary_fraction=0.25, context_length=2048, parallel_residual=True):
    assert state is None
    weights = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    layers, logits = num_layers(weights), []
    keys, values = ([[] for _ in range(layers)] for _ in range(2))

    def affine(x, name):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def attention(x, layer):
        name = f"blocks.{layer}.att"
        q, k, v = (affine(x, f"{name}.{z}").reshape(-1, head_dim) for z in ("query", "key", "value"))
        keys[layer].append(k)
        values[layer].append(v)
        now, heads = len(keys[layer]) - 1, []
        seen = range(max(0, now + 1 - context_length), now + 1)
        for h in range(len(q)):
            turned = turn(q[h], now, int(rotary_fraction * head_dim))
            scores = [turned @ turn(keys[layer][t][h], t, int(rotary_fraction * head_dim)) for t in seen]
            heads.append(softmax(np.array(scores) / np.sqrt(head_dim)) @ np.array([values[layer][t][h] for t in seen]))
        return affine(np.concatenate(heads), f"{name}.output")

    def channel_mix(x, layer):
        k = affine(x, f"blocks.{layer}.ffn.key")
        return affine(k * 0.5 * (1 + ERF(k / np.sqrt(2))), f"blocks.{layer}.ffn.value")

    for token in tokens:
        x = weights["emb.weight"][token]
        for layer in range(layers):
            attended = attention(layer_norm(x, weights, f"blocks.{layer}.ln1"), layer)
            between = x if parallel_residual else x + attended
            x = x + attended + channel_mix(layer_norm(between, weights, f"blocks.{layer}.ln2"), layer)
        logits.append(weights["head.weight"] @ layer_norm(x, weights, "ln_out"))
    held = min(len(tokens), context_length)
    return np.array(logits), {
        **{name: newest(kept, held, context_length) for name, kept in (("key", keys), ("value", values))},
        "held": np.full(layers, held),
    }  # fmt: skip


def turn(x, position, width):
    """The first `width` channels, pairs (i, i + width / 2), turned by position * 10000^(-2 i / width)."""
    pairs = x[: width // 2] + 1j * x[width // 2 : width]
    pairs = pairs * np.exp(1j * position * 10000.0 ** (-2 * np.arange(width // 2) / width))
    return np.concatenate([pairs.real, pairs.imag, x[width:]])


def newest(kept, held, room):
    kept = np.array(kept)[:, -held:]
    return np.concatenate([np.zeros((len(kept), room - held, *kept.shape[2:])), kept], axis=1)
