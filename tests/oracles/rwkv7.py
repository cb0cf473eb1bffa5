"""RWKV-7 in float64 numpy: arXiv 2503.14456, section 4, as BlinkDL's rwkv_v7_numpy.py has it."""

from functools import partial

import numpy as np

from oracles.shared import layer_norm, num_layers, sigmoid, walk


def zero_state(weights):
    layers, width = num_layers(weights), weights["emb.weight"].shape[1]
    heads, size = weights["blocks.0.att.r_k"].shape
    return {
        "att_x": np.zeros((layers, width)), "ffn_x": np.zeros((layers, width)), "wkv": np.zeros((layers, heads, size, size)),
    }  # fmt: skip


def run(weights, tokens, state=None, *, ln_x_eps=64e-5):
    return walk(partial(block, ln_x_eps=ln_x_eps), weights, tokens, state or zero_state(weights))


def block(own, x, state, layer, handed_on, ln_x_eps):
    x = x + time_mix(own, layer_norm(x, own, "ln1"), state, layer, handed_on, ln_x_eps)
    return x + channel_mix(own, layer_norm(x, own, "ln2"), state["ffn_x"])


def time_mix(own, x, state, layer, handed_on, ln_x_eps):
    own = {key.removeprefix("att."): value for key, value in own.items()}
    heads, size = own["r_k"].shape
    mixed = {z: x + (state["att_x"] - x) * own[f"x_{z}"] for z in "rwkvag"}
    state["att_x"][:] = x
    r, k, v = (own[f"{name}.weight"] @ mixed[name[0]] for name in ("receptance", "key", "value"))
    decay = np.exp(-np.exp(-0.5) * sigmoid(own["w0"] + np.tanh(mixed["w"] @ own["w1"]) @ own["w2"]))
    iclr = sigmoid(own["a0"] + mixed["a"] @ own["a1"] @ own["a2"])
    gate = sigmoid(mixed["g"] @ own["g1"]) @ own["g2"]
    if layer == 0:
        handed_on["v_first"] = v
    else:
        v = v + (handed_on["v_first"] - v) * sigmoid(own["v0"] + mixed["v"] @ own["v1"] @ own["v2"])
    kk = (k * own["k_k"]).reshape(heads, size)
    kk = kk / np.maximum(np.linalg.norm(kk, axis=1, keepdims=True), 1e-12)
    k = k * (1 + (iclr - 1) * own["k_a"])
    r, k, v, decay, iclr = (z.reshape(heads, size) for z in (r, k, v, decay, iclr))
    y = np.zeros((heads, size))
    for h, s in enumerate(state["wkv"]):
        s[:] = s * decay[h] - np.outer(s @ kk[h], kk[h] * iclr[h]) + np.outer(v[h], k[h])
        y[h] = s @ r[h]
    centred = y - y.mean(1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + ln_x_eps)
    y = normal.reshape(-1) * own["ln_x.weight"] + own["ln_x.bias"]
    y = y + ((r * k * own["r_k"]).sum(1, keepdims=True) * v).reshape(-1)
    return own["output.weight"] @ (y * gate)


def channel_mix(own, x, last):
    k = own["ffn.key.weight"] @ (x + (last - x) * own["ffn.x_k"])
    last[:] = x
    return own["ffn.value.weight"] @ np.maximum(k, 0) ** 2
