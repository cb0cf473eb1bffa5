"""RWKV-4 in float64 numpy: arXiv 2305.13048, appendix D."""

import numpy as np

from oracles.shared import layer_norm, num_layers, sigmoid, walk


def zero_state(weights):
    shape = (num_layers(weights), weights["emb.weight"].shape[1])
    state = {name: np.zeros(shape) for name in ("att_x", "ffn_x", "aa", "bb", "pp")}
    state["pp"] -= 1e38
    return state


def run(weights, tokens, state=None):
    return walk(block, weights, tokens, state or zero_state(weights))


def block(own, x, state, layer, handed_on):
    x = x + time_mix(own, layer_norm(x, own, "ln1"), state)
    return x + channel_mix(own, layer_norm(x, own, "ln2"), state["ffn_x"])


def mixed(x, last, weight):
    return x * weight + last * (1 - weight)


def time_mix(own, x, state):
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


def channel_mix(own, x, last):
    k = own["ffn.key.weight"] @ mixed(x, last, own["ffn.time_mix_k"])
    r = own["ffn.receptance.weight"] @ mixed(x, last, own["ffn.time_mix_r"])
    last[:] = x
    return sigmoid(r) * (own["ffn.value.weight"] @ np.maximum(k, 0) ** 2)
