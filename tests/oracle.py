"""RWKV in float64 numpy, one token at a time, over weights under their official names. Imports nothing of ours."""

import numpy as np


def layer_norm(x, weights, name):
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def zero_state_4(weights):
    width = weights["emb.weight"].shape[1]
    num_layers = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    state = {name: np.zeros((num_layers, width)) for name in ("att_x", "ffn_x", "aa", "bb", "pp")}
    state["pp"] -= 1e38
    return state


def rwkv4(weights, tokens, state=None):
    """Returns logits [T, A] and the state after the last token, for one sequence."""
    weights = {key: np.asarray(value, np.float64).squeeze() for key, value in weights.items()}
    state = {name: value.copy() for name, value in (state or zero_state_4(weights)).items()}
    logits = []
    for token in tokens:
        x = layer_norm(weights["emb.weight"][token], weights, "blocks.0.ln0")
        for layer in range(len(state["pp"])):
            own = {
                k.removeprefix(f"blocks.{layer}."): v for k, v in weights.items() if k.startswith(f"blocks.{layer}.")
            }
            x = x + time_mix_4(own, layer_norm(x, own, "ln1"), {name: value[layer] for name, value in state.items()})
            x = x + channel_mix_4(own, layer_norm(x, own, "ln2"), state["ffn_x"][layer])
        logits.append(weights["head.weight"] @ layer_norm(x, weights, "ln_out"))
    return np.array(logits), state


def mixed(x, last, weight):
    return x * weight + last * (1 - weight)


def time_mix_4(own, x, state):
    """One token; the rows in `state` are updated in place."""
    k = own["att.key.weight"] @ mixed(x, state["att_x"], own["att.time_mix_k"])
    v = own["att.value.weight"] @ mixed(x, state["att_x"], own["att.time_mix_v"])
    r = own["att.receptance.weight"] @ mixed(x, state["att_x"], own["att.time_mix_r"])
    state["att_x"][:] = x
    aa, bb, pp = state["aa"], state["bb"], state["pp"]
    u, w = own["att.time_first"], np.exp(own["att.time_decay"])
    top = np.maximum(pp, u + k)
    past, now = np.exp(pp - top), np.exp(u + k - top)
    wkv = (past * aa + now * v) / (past * bb + now)
    top = np.maximum(pp - w, k)
    past, now = np.exp(pp - w - top), np.exp(k - top)
    aa[:], bb[:], pp[:] = past * aa + now * v, past * bb + now, top
    return own["att.output.weight"] @ (sigmoid(r) * wkv)


def channel_mix_4(own, x, last):
    k = own["ffn.key.weight"] @ mixed(x, last, own["ffn.time_mix_k"])
    r = own["ffn.receptance.weight"] @ mixed(x, last, own["ffn.time_mix_r"])
    last[:] = x
    return sigmoid(r) * (own["ffn.value.weight"] @ np.maximum(k, 0) ** 2)
