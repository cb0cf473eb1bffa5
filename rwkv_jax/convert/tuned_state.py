"""Tuned states: what a model starts from instead of zeros, as `blocks.i.att.time_state` [H, N, N]."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models import Config, module_of
from .official import TIME_STATE
from .stored import FLOATS, Stored, Tensors

_STORED_AS_OURS = {"rwkv5": False, "rwkv6": False, "rwkv7": True}
"""Whether the state has the file's axes, [value, key]; else it has [key, value].

Source: BlinkDL/ChatRWKV, API_DEMO_CHAT.py, transposes what it reads for RWKV-5 and 6.
"""


def to_state(tensors: Tensors, config: Config, origin: Any) -> Any:
    """Returns a float32 state of one sequence, given tensors of which those of other names are passed over.

    Raises:
        ValueError: The version has no such state, or some are missing, extra or mis-shaped (all are listed).
    """
    as_ours = _layout(config)
    zero = module_of(config).init_state(config, 1, jnp.float32)
    num_layers, _, *shape = zero.wkv.shape
    found = {key: tensor for key, tensor in tensors.items() if TIME_STATE.fullmatch(key)}
    expected = [_key(layer) for layer in range(num_layers)]
    problems = [f"missing: {key} {tuple(shape)}" for key in expected if key not in found]
    problems += [f"extra: {key} {tensor.shape}" for key, tensor in found.items() if key not in expected]
    problems += [
        f"shape: {key} is {found[key].shape}, expected {tuple(shape)}"
        for key in expected
        if key in found and found[key].shape != tuple(shape)
    ]
    if problems:
        raise ValueError(f"{origin}: not a tuned state of this {config.architecture}:\n  " + "\n  ".join(problems))
    layers = [found[key].read().astype(np.float32) for key in expected]
    wkv = np.stack([layer if as_ours else layer.swapaxes(1, 2) for layer in layers])[:, None]
    return zero._replace(wkv=jnp.asarray(wkv))


def from_state(state: Any, config: Config) -> dict[str, Stored]:
    """Returns the wkv part of a state of one sequence as tensors under official names.

    Raises:
        ValueError: The version has no such state, or this is not one of a single sequence.
    """
    as_ours = _layout(config)
    given = jax.tree.map(jnp.shape, state)
    wanted = jax.tree.map(jnp.shape, jax.eval_shape(lambda: module_of(config).init_state(config, 1, jnp.float32)))
    if given != wanted:
        raise ValueError(f"state is {given}; a tuned state is that of one sequence of this model, {wanted}")
    wkv = np.asarray(state.wkv)
    if wkv.dtype not in FLOATS.values():
        raise ValueError(f"state.wkv is {wkv.dtype}; files hold {', '.join(FLOATS)}")
    layers = [layer[0] if as_ours else layer[0].swapaxes(1, 2) for layer in wkv]
    return {_key(i): _stored(layer) for i, layer in enumerate(layers)}


def _layout(config: Config) -> bool:
    if config.architecture not in _STORED_AS_OURS:
        raise ValueError(
            f"{config.architecture} has no matrix state that could be tuned; {', '.join(_STORED_AS_OURS)} have one"
        )
    return _STORED_AS_OURS[config.architecture]


def _key(layer: int) -> str:
    return f"blocks.{layer}.att.time_state"


def _stored(values: np.ndarray) -> Stored:
    return Stored(values.shape, values.dtype, values.dtype.name, lambda: values)
