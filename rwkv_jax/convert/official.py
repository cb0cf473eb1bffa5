"""Between official checkpoints and parameter trees: what must be there, and one tensor at a time."""

import dataclasses
import re
from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from .. import params as p
from ..models import Config, config_of, module_of
from .placement import placed
from .progress import progress
from .stored import FLOATS, Checkpoint, Stored, Tensors

LN_X_EPS = 64e-5
"""Group norm's eps of the released models, which official files do not hold."""
TIME_STATE = re.compile(r"blocks\.\d+\.att\.time_state")
"""What state tuning learns; not a part of the model."""

Shardings = Sharding | Callable[[p.Param], Sharding] | Any
"""Of every parameter: one for all, a function of the declaration, or a tree like the parameters."""


def config_in(checkpoint: Checkpoint, origin: Any, ln_x_eps: float | None = None) -> Config:
    """Returns the config of a checkpoint under official names that has every tensor it must have.

    Args:
        checkpoint: Of `open_checkpoint`.
        origin: Named in errors.
        ln_x_eps: Of a version with group norm; None: what the format says, else that of the released models.

    Raises:
        ValueError: It is no version's, or tensors are missing, extra, mis-shaped or not floating-point; all are listed.
    """
    shapes = {key: tensor.shape for key, tensor in weights(checkpoint.tensors).items()}
    if checkpoint.tensors and not shapes:
        raise ValueError(f"{origin}: a tuned state, not a model; read it with rwkv_jax.load_state(path, config)")
    try:
        config = checkpoint.config or config_of(shapes)
    except ValueError as error:
        raise ValueError(f"{origin}: not a checkpoint of RWKV under the official names: {error}") from None
    problems = p.official_problems(shapes, module_of(config).declare(config), config.num_layers)
    problems += [
        f"type: {key} is {tensor.dtype}, expected one of {', '.join(FLOATS)}"
        for key, tensor in checkpoint.tensors.items()
        if tensor.dtype not in FLOATS.values()
    ]
    if problems:
        raise ValueError(f"{origin}: not a whole {config.architecture} checkpoint:\n  " + "\n  ".join(problems))
    if hasattr(config, "ln_x_eps"):
        given = checkpoint.ln_x_eps if ln_x_eps is None else ln_x_eps
        config = dataclasses.replace(config, **{"ln_x_eps": LN_X_EPS if given is None else given})
    return config


def weights(tensors: Tensors) -> dict[str, Stored]:
    """Returns the tensors that belong to the model."""
    return {key: tensor for key, tensor in tensors.items() if not TIME_STATE.fullmatch(key)}


def float_dtype(dtype: Any) -> np.dtype | None:
    """Returns a parameter type as numpy has it, or None.

    Raises:
        ValueError: It is not one that parameters can have here.
    """
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(FLOATS)}")
    return FLOATS[name]


def check_available(dtype: np.dtype | None, what: str) -> None:
    """Raises ValueError for float64 where JAX has none; `what` would have it."""
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{what} would be float64, which JAX has only with jax_enable_x64; set it, or give dtype='float32'"
        )


def to_params(tensors: Tensors, config: Config, dtype: Any = None, sharding: Shardings | None = None) -> Any:
    """Returns the parameters in a checkpoint that `config_in` accepts.

    Each parameter is filled layer by layer and then put on its devices, so that beside what is on devices the host holds at most
    one parameter and one tensor of the file.

    Args:
        tensors: Under official names.
        config: The model's.
        dtype: Of the result; None keeps each parameter's own.
        sharding: Where each parameter goes; None is JAX's default device.

    Raises:
        ValueError: The type cannot be had, or shardings do not fit the parameters.
    """
    declaration = module_of(config).declare(config)
    wanted = float_dtype(dtype)
    leaves, structure = jax.tree.flatten(declaration)
    shardings = _shardings(sharding, declaration)

    def one(param: p.Param, where: Sharding | None) -> jax.Array:
        layers = [tensors.get(key) for key in param.keys(config.num_layers)]
        types = [tensor.dtype for tensor in layers if tensor is not None] or [tensors["emb.weight"].dtype]
        own = wanted or np.dtype(reduce(jnp.promote_types, types))
        check_available(own, param.key)
        array = placed(param, layers, config.num_layers, own, where)
        bar.update(sum(tensor.num_bytes for tensor in layers if tensor is not None))
        return array

    with progress("loading", tensors) as bar:
        return structure.unflatten([one(param, where) for param, where in zip(leaves, shardings, strict=True)])


def shardings_of(sharding: Shardings, config: Config) -> Any:
    """Returns a tree like the parameters, with the sharding of each."""
    declaration = module_of(config).declare(config)
    return jax.tree.structure(declaration).unflatten(_shardings(sharding, declaration))


def from_params(params: Any, config: Config) -> dict[str, Stored]:
    """Returns the parameters as tensors under official names, each of which is laid out when it is read.

    Raises:
        ValueError: They are not of this config, or of a type that files cannot hold.
    """
    declaration = module_of(config).declare(config)
    p.check_shapes(params, declaration, config.num_layers)
    tensors: dict[str, Stored] = {}
    pairs = list(zip(jax.tree.leaves(declaration), jax.tree.leaves(params), strict=True))
    # What a layer does not use is written only where there is something in it to give back, and all of it or none; of a single layer
    # always, since no other shows its widths.
    held = {
        layer
        for param, value in pairs
        for layer in param.may_lack
        if config.num_layers == 1 or _layer(param, value, layer).read().any()
    }
    for param, value in pairs:
        if value.dtype not in FLOATS.values():
            raise ValueError(f"{param.key} is {value.dtype}; files hold {', '.join(FLOATS)}")
        for layer, key in enumerate(param.keys(config.num_layers)):
            if layer not in param.may_lack or layer in held:
                tensors[key] = _layer(param, value, layer)
    return tensors


def _layer(param: p.Param, value: Any, layer: int) -> Stored:
    dtype = np.dtype(value.dtype)

    def read() -> np.ndarray:
        return param.to_official(np.asarray(value[layer] if param.stacked else value))

    return Stored(param.official_shape, dtype, dtype.name, read)


def _shardings(sharding: Any, declaration: Any) -> list[Any]:
    declared = jax.tree.leaves(declaration)
    if sharding is None or isinstance(sharding, Sharding):
        return [sharding] * len(declared)
    if callable(sharding):
        return [sharding(param) for param in declared]
    given, expected = jax.tree.structure(sharding), jax.tree.structure(declaration)
    if given != expected:
        raise ValueError(
            f"sharding is {given}; give a Sharding, a function from Param to Sharding, or a tree like the parameters: {expected}"
        )
    return jax.tree.leaves(sharding)
