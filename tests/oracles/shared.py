"""What the oracles of all versions share: the walk over tokens and layers."""

import numpy as np


def layer_norm(x, weights, name):
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def group_norm(x, weights, name, eps):
    """Of heads [H, V], joined."""
    centred = x - x.mean(1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + eps)
    return normal.reshape(-1) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def head_shape(per_head, width):
    """(heads, size of each) of a model whose `per_head` tensor has a leading axis of heads."""
    heads = np.shape(per_head)[0]
    return heads, width // heads


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def num_layers(weights):
    return 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))


def walk(block, weights, tokens, state):
    """Runs `block(own weights, x, state of the layer, layer, what this token's layers hand on) -> x` over tokens and layers.

    Args:
        block: Updates the layer's state in place.
        weights: By official name; [1, 1, D] vectors are given to it as [D].
        tokens: Of one sequence.
        state: Arrays with a leading layer axis, by name; not changed.
    """
    weights = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    weights = {key: value.reshape(-1) if value.shape[:-1] == (1, 1) else value for key, value in weights.items()}
    layers = [
        {k.removeprefix(f"blocks.{i}."): v for k, v in weights.items() if k.startswith(f"blocks.{i}.")}
        for i in range(num_layers(weights))
    ]
    state = {name: value.copy() for name, value in state.items()}
    logits = []
    for token in tokens:
        x, handed_on = layer_norm(weights["emb.weight"][token], weights, "blocks.0.ln0"), {}
        for i, own in enumerate(layers):
            x = block(own, x, {name: value[i] for name, value in state.items()}, i, handed_on)
        logits.append(weights["head.weight"] @ layer_norm(x, weights, "ln_out"))
    return np.array(logits), state
