"""One declaration a parameter, and everything that follows from it.

A model declares its parameters as a tree of `Param` (its own NamedTuples with a `Param` at each leaf). Initialisation, shapes,
parameter counts, optimiser groups, sharding axes and the official checkpoint keys are read off that tree here.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Initialiser = Callable[[jax.Array, tuple[int, ...], int], jax.Array]
"""(random key, shape, index of the layer) -> float32 array."""

Layout = Literal["same", "transposed", "1x1"]
"""How an official checkpoint stores one layer's tensor: as ours, with its two axes swapped, or as [1, 1, D]."""


Leaf = Any
"""A leaf of a parameter tree: an array, or what stands in its place, such as its `Param`, its shape or its sharding."""


@dataclass(frozen=True)
class Param:
    """The declaration of one parameter. It is a leaf of a tree, not a node."""

    key: str
    """Official name in checkpoints, with {layer} where it has one; ours are then stacked on a leading layer axis."""
    shape: tuple[int, ...]
    """Shape in one layer."""
    axes: tuple[str, ...]
    """Logical name of each axis, for sharding."""
    init: Initialiser
    lr_multiple: float = 1.0
    """Multiple of the learning rate."""
    decays: bool = False
    """Whether weight decay, if any, applies."""
    layout: Layout = "same"
    may_lack: tuple[int, ...] = ()
    """Layers that do not use theirs: official checkpoints may lack it, and it then loads as zeros."""

    @property
    def stacked(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.key

    def stacked_shape(self, num_layers: int) -> tuple[int, ...]:
        """The shape in the parameter tree."""
        return (num_layers, *self.shape) if self.stacked else self.shape

    def keys(self, num_layers: int) -> list[str]:
        """The official name of every layer's tensor."""
        return [self.key.format(layer=layer) for layer in range(num_layers)] if self.stacked else [self.key]

    @property
    def official_shape(self) -> tuple[int, ...]:
        """The shape of one layer's tensor in an official checkpoint."""
        return {"same": self.shape, "transposed": self.shape[::-1], "1x1": (1, 1, *self.shape)}[self.layout]

    def to_official(self, tensor: np.ndarray) -> np.ndarray:
        """Returns one layer's tensor, which is ours, as an official checkpoint lays it out."""
        tensor = tensor.T if self.layout == "transposed" else tensor
        return np.ascontiguousarray(tensor).reshape(self.official_shape)

    def from_official(self, tensor: np.ndarray) -> np.ndarray:
        """Returns one layer's tensor, which is an official checkpoint's, as ours; a view where that can be."""
        return tensor.T if self.layout == "transposed" else tensor.reshape(self.shape)


def zeros(key: jax.Array, shape: tuple[int, ...], layer: int) -> jax.Array:
    """All 0."""
    del key, layer
    return jnp.zeros(shape)


def ones(key: jax.Array, shape: tuple[int, ...], layer: int) -> jax.Array:
    """All 1."""
    del key, layer
    return jnp.ones(shape)


def uniform(bound: float) -> Initialiser:
    """Uniform between -bound and bound."""
    return lambda key, shape, layer: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def normal(std: float) -> Initialiser:
    """Normal with mean 0 and this standard deviation."""
    return lambda key, shape, layer: std * jax.random.normal(key, shape)


def orthogonal(gain: float) -> Initialiser:
    """A random matrix with orthogonal rows or columns, times `gain`."""
    return lambda key, shape, layer: jax.nn.initializers.orthogonal(gain)(key, shape)


def init(key: jax.Array, declaration: Any, num_layers: int, shardings: Any = None) -> Any:
    """Returns fresh float32 parameters. Each draws from its own key, which depends on nothing but `key` and its name.

    Args:
        key: Of the whole.
        declaration: The parameters.
        num_layers: The model's.
        shardings: Of each parameter, which is then made in its place, one at a time; None: the default device.
    """

    def one(key: jax.Array, param: Param) -> jax.Array:
        own_key = jax.random.fold_in(key, zlib.crc32(param.key.encode()))
        if not param.stacked:
            return param.init(own_key, param.shape, 0).astype(jnp.float32)
        layers = [param.init(jax.random.fold_in(own_key, i), param.shape, i) for i in range(num_layers)]
        return jnp.stack(layers).astype(jnp.float32)

    if shardings is None:
        return jax.tree.map(partial(one, key), declaration)
    return jax.tree.map(
        lambda param, where: jax.jit(one, static_argnums=1, out_shardings=where)(key, param), declaration, shardings
    )


def count(declaration: Any, num_layers: int) -> int:
    """Returns the number of scalars in all parameters."""
    return sum(int(np.prod(p.stacked_shape(num_layers))) for p in jax.tree.leaves(declaration))


def of_layer(declaration: Any, layer: int) -> Any:
    """Returns the declaration of one layer's own parameters, none of which is stacked."""
    return jax.tree.map(lambda param: replace(param, key=param.key.format(layer=layer)), declaration)


def check_shapes(params: Any, declaration: Any, num_layers: int) -> None:
    """Raises ValueError, listing every parameter whose shape is not the declared one."""
    expected_tree, given_tree = jax.tree.structure(declaration), jax.tree.structure(params)
    if expected_tree != given_tree:
        raise ValueError(
            f"params is {given_tree}, but this config's model has {expected_tree}; make params with "
            "rwkv_jax.init or load, and give those of unstack to forward alone"
        )
    wrong = [
        f"{param.key}: shape {jnp.shape(x)}, the config asks for {param.stacked_shape(num_layers)}"
        for param, x in zip(jax.tree.leaves(declaration), jax.tree.leaves(params), strict=True)
        if jnp.shape(x) != param.stacked_shape(num_layers)
    ]
    if wrong:
        raise ValueError("params do not fit the config; pass the config they were made with:\n  " + "\n  ".join(wrong))


def to_official(params: Any, declaration: Any, num_layers: int) -> dict[str, np.ndarray]:
    """Returns the parameters as an official checkpoint names, shapes and lays them out."""
    tensors = {}
    for param, value in zip(jax.tree.leaves(declaration), jax.tree.leaves(params), strict=True):
        layers = np.asarray(value) if param.stacked else np.asarray(value)[None]
        for layer, (key, tensor) in enumerate(zip(param.keys(num_layers), layers, strict=True)):
            if layer not in param.may_lack:
                tensors[key] = param.to_official(tensor)
    return tensors


def official_problems(shapes: Mapping[str, tuple[int, ...]], declaration: Any, num_layers: int) -> list[str]:
    """Returns a line for every missing, extra or mis-shaped tensor of an official checkpoint, given its shapes."""
    declared = jax.tree.leaves(declaration)
    expected = {key: param.official_shape for param in declared for key in param.keys(num_layers)}
    optional = {param.key.format(layer=layer) for param in declared for layer in param.may_lack}
    missing = [
        f"missing: {key} {shape}" for key, shape in expected.items() if key not in shapes and key not in optional
    ]
    extra = [f"extra: {key} {shape}" for key, shape in shapes.items() if key not in expected]
    wrong = [
        f"shape: {key} is {tuple(shapes[key])}, expected {shape}"
        for key, shape in expected.items()
        if key in shapes and tuple(shapes[key]) != shape
    ]
    return missing + extra + wrong
