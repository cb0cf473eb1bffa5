"""RWKV-6 in float64 numpy: BlinkDL/ChatRWKV, rwkv_pip_package, version 6."""

import numpy as np

from oracles.shared import group_norm, head_shape, layer_norm, num_layers, sigmoid, walk


def zero_state(weights):
    layers, width = num_layers(weights), weights["emb.weight"].shape[1]
    heads, size = head_shape(weights["blocks.0.att.time_faaaa"], width)
    shift = np.zeros((layers, width))
    return {"att_x": shift, "ffn_x": shift, "wkv": np.zeros((layers, heads, size, size))}


def run(weights, tokens, state=None, ln_x_eps=64e-5):
    def block(own, x, state, layer, handed_on):
        x = x + time_mix(own, layer_norm(x, own, "ln1"), state, ln_x_eps)
        return x + channel_mix(own, layer_norm(x, own, "ln2"), state["ffn_x"])

    return walk(block, weights, tokens, state or zero_state(weights))


def time_mix(own, x, state, eps):
    back, wkv = state["att_x"] - x, state["wkv"]
    state["att_x"][:] = x
    heads, size, _ = wkv.shape
    low = np.tanh((x + back * own["att.time_maa_x"]) @ own["att.time_maa_w1"]).reshape(5, -1)
    w, k, v, r, g = (
        x + back * (own[f"att.time_maa_{name}"] + part @ matrix)
        for name, part, matrix in zip("wkvrg", low, own["att.time_maa_w2"], strict=True)
    )
    raw_decay = own["att.time_decay"] + np.tanh(w @ own["att.time_decay_w1"]) @ own["att.time_decay_w2"]
    decay = np.exp(-np.exp(raw_decay)).reshape(heads, size, 1)
    r, k, v = (
        (own[f"att.{name}.weight"] @ mixed).reshape(heads, size)
        for name, mixed in (("receptance", r), ("key", k), ("value", v))
    )
    gate = own["att.gate.weight"] @ g
    kv = k[:, :, None] * v[:, None, :]
    y = (r[:, None, :] @ (wkv + own["att.time_faaaa"][:, :, None] * kv))[:, 0]
    wkv[:] = decay * wkv + kv
    return own["att.output.weight"] @ (group_norm(y, own, "att.ln_x", eps) * gate * sigmoid(gate))


def channel_mix(own, x, last):
    back = last - x
    k = own["ffn.key.weight"] @ (x + back * own["ffn.time_maa_k"])
    r = own["ffn.receptance.weight"] @ (x + back * own["ffn.time_maa_r"])
    last[:] = x
    return sigmoid(r) * (own["ffn.value.weight"] @ np.maximum(k, 0) ** 2)
