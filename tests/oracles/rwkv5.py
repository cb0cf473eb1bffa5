"""RWKV-5 in float64 numpy: BlinkDL/ChatRWKV, rwkv_pip_package, versions 5, 5.1 and 5.2."""

import numpy as np

from oracles.shared import group_norm, head_shape, layer_norm, num_layers, sigmoid, walk


def zero_state(weights):
    layers, width = num_layers(weights), weights["emb.weight"].shape[1]
    heads, size = head_shape(weights["blocks.0.att.time_decay"], width)
    shift = np.zeros((layers, width))
    return {"att_x": shift, "ffn_x": shift, "wkv": np.zeros((layers, heads, size, size))}


def run(weights, tokens, state=None, ln_x_eps=64e-5):
    def block(own, x, state, layer, handed_on):
        x = x + time_mix(own, layer_norm(x, own, "ln1"), state, ln_x_eps)
        return x + channel_mix(own, layer_norm(x, own, "ln2"), state["ffn_x"])

    return walk(block, weights, tokens, state or zero_state(weights))


def mixed(x, last, weight):
    return x * weight + last * (1 - weight)


def time_mix(own, x, state, eps):
    last, wkv = state["att_x"].copy(), state["wkv"]
    state["att_x"][:] = x
    heads, size, _ = wkv.shape
    r, k, v = (
        (own[f"att.{name}.weight"] @ mixed(x, last, own[f"att.time_mix_{name[0]}"])).reshape(heads, size)
        for name in ("receptance", "key", "value")
    )
    decay = np.exp(-np.exp(own["att.time_decay"])).reshape(heads, -1, 1)
    bonus = np.exp(own["att.time_first"]) if "att.time_first" in own else own["att.time_faaaa"]
    kv = k[:, :, None] * v[:, None, :]
    y = (r[:, None, :] @ (wkv + bonus.reshape(heads, -1, 1) * kv))[:, 0]
    wkv[:] = decay * wkv + kv
    y = group_norm(y, own, "att.ln_x", eps)
    if "att.gate.weight" in own:
        gate = own["att.gate.weight"] @ mixed(x, last, own["att.time_mix_g"])
        y = y * gate * sigmoid(gate)
    return own["att.output.weight"] @ y


def channel_mix(own, x, last):
    k = own["ffn.key.weight"] @ mixed(x, last, own["ffn.time_mix_k"])
    r = own["ffn.receptance.weight"] @ mixed(x, last, own["ffn.time_mix_r"])
    last[:] = x
    return sigmoid(r) * (own["ffn.value.weight"] @ np.maximum(k, 0) ** 2)
