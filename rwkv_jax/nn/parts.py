"""Rows whose tokens are cut into parts on devices along the mesh axis `sequence`: what a part hands to the next, under shard_map."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

AXIS = "sequence"


class Map(NamedTuple):
    """How maps of a state are applied and composed."""

    apply: Callable[[Any, Any], Any]
    """apply(map, state) -> the state after it."""
    compose: Callable[[Any, Any], Any]
    """compose(first, second) -> the map of one after the other."""


Prefix = Callable[[Any, Any, Map], Any]
"""(a part's map, the state before the first part, how maps are applied) -> the state that the part enters with."""


def tree(own: Any, start: Any, maps: Map) -> Any:
    """Composes maps of parts at doubling distances, in log2 of their number of steps."""
    size, index, distance = lax.axis_size(AXIS), lax.axis_index(AXIS), 1
    while distance < size:
        before = shift(own, distance)
        own = _where(index >= distance, maps.compose(before, own), own)
        distance *= 2
    return _where(index == 0, start, maps.apply(shift(own), start))


def ring(own: Any, start: Any, maps: Map) -> Any:
    """Hands the state from part to part: as many steps as there are parts, each with one state and no product of maps."""
    index, entry = lax.axis_index(AXIS), start
    for part in range(1, lax.axis_size(AXIS)):
        entry = _where(index == part, shift(maps.apply(own, entry)), entry)
    return entry


def shift(x: Any, distance: int = 1) -> Any:
    """Returns what the part `distance` before has; zeros where there is none."""
    pairs = [(i, i + distance) for i in range(lax.axis_size(AXIS) - distance)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, AXIS, pairs), x)


def from_last(x: Array) -> Array:
    """Returns the last part's x in all of them."""
    return lax.psum(jnp.where(lax.axis_index(AXIS) == lax.axis_size(AXIS) - 1, x, 0), AXIS)


def local_length(length: Int[Array, "B"], num_tokens: int) -> Int[Array, "B"]:
    """Returns how many of a part's `num_tokens` tokens count."""
    return jnp.clip(length - lax.axis_index(AXIS) * num_tokens, 0, num_tokens)


def _where(condition: Array, x: Any, y: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)
