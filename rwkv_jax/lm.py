"""The language model: tokens and a state in, logits and the next state out."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from . import params as p
from .models import Config, module_of
from .nn.layer_norm import layer_norm
from .nn.linear import linear
from .sharding import constrain

_REMAT_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "elementwise": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

_RESIDUAL = ("batch", "time", "residual")


def init(key: PRNGKeyArray, config: Config) -> Any:
    """Returns freshly initialised float32 parameters, as the version's own code initialises them."""
    return p.init(key, module_of(config).declare(config), config.num_layers)


def init_state(config: Config, batch_size: int, dtype: Any = jnp.float32) -> Any:
    """Returns the zero state of `batch_size` sequences: layers first, then batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    return module_of(config).init_state(config, batch_size, dtype)


def unstack(params: Any, *, donate: bool = False) -> Any:
    """Returns the parameters with a tree for every layer instead of one whose leaves are stacked, for `forward` to generate with.

    A step over stacked layers copies the weights of each out of the stack before it multiplies, which on a CPU takes as long as
    multiplying. Layers that are apart spare that, but every one is compiled, and `remat` saves nothing. Only `forward`, `hidden`
    and what is made of them (`generate.prefill`, `decode`, `stream`) take such parameters.

    Args:
        params: From `init` or `load`. Those whose layers are apart are returned as they are.
        donate: Whether the stacked arrays are deleted as they are copied, so that memory holds no more than one of them twice. As
            with `jax.jit`, they must then be nobody else's.

    Raises:
        ValueError: The leaves are not stacked over one number of layers.
    """
    if is_unstacked(params):
        return params
    leaves, structure = jax.tree.flatten(params.blocks)
    if len(sizes := {jnp.shape(leaf)[:1] for leaf in leaves}) != 1:
        raise ValueError(
            f"leading sizes of params.blocks are {sizes}; all must be the number of layers, as init makes them"
        )
    apart = []
    for leaf in leaves:
        apart.append(jax.block_until_ready(_unstack(leaf)))
        if donate and isinstance(leaf, jax.Array):
            leaf.delete()
    return params._replace(blocks=tuple(jax.tree.unflatten(structure, layer) for layer in zip(*apart, strict=True)))


_unstack = jax.jit(jnp.unstack)


def count_params(config: Config) -> int:
    """Returns the number of scalars in the parameters."""
    return p.count(module_of(config).declare(config), config.num_layers)


def flops_per_token(config: Config) -> int:
    """Returns the floating-point operations of a forward pass a token, in matrix products: 2 a weight, WKV and attention not counted.

    Training costs three times as much. Source: arXiv 2305.13048, appendix B.
    """
    declared = jax.tree.leaves(module_of(config).declare(config))
    matrices = [param for param in declared if len(param.shape) >= 2 and param.axes[0] not in ("vocab", "heads")]
    return 2 * sum(int(np.prod(param.stacked_shape(config.num_layers))) for param in matrices)


def forward(
    params: Any,
    config: Config,
    tokens: Int[Array, "B T"],
    state: Any = None,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
    *,
    positions: Literal["all", "last"] = "all",
) -> tuple[Float[Array, "B N A"], Any]:
    """Returns the logits of the next token at every position, and the state after the last token.

    One function for every mode: T = 1 is the RNN's step, T > 1 is training or prefill, and a sequence cut anywhere and
    carried over in the state gives the same numbers as the whole.

    Args:
        params: From `init` or `load`, their layers stacked or apart (`unstack`). float64 parameters compute everything in float64.
        config: The model's; static under jit.
        tokens: Ids. One outside the vocabulary raises here, or, traced under jit, makes its row's
            logits from there on, and the row's state, NaN.
        state: From an earlier call or `init_state`; None is the zero state.
        reset: True where a token starts a new sequence: it sees nothing before it, not even `state`. None: nowhere.
        length: How many tokens of each row count, 0 to T; those after leave the state untouched and their logits
            unspecified. None: all T.
        backend: Of the WKV operator: "scan" (one lax.scan over time, differentiable in any mode), "parallel" (over time,
            reverse-mode), a kernel ("pallas_gpu", "pallas_tpu", reverse-mode), or None for the best here. A transformer has
            none to choose.
        positions: "last" gives the logits of the last token that counts only, [B, 1, A], and computes no others.

    Returns:
        logits float32 (float64 for float64 parameters) [B, T, A], and the state, constant in size.

    Raises:
        ValueError, TypeError: Shapes, dtypes, tokens or backend do not fit; the message names value and rule.
    """
    x, state = hidden(params, config, tokens, state, reset, length, backend)
    if positions == "last":
        index = jnp.full((x.shape[0],), x.shape[1] - 1) if length is None else jnp.maximum(length - 1, 0)
        x = jnp.take_along_axis(x, index[:, None, None], axis=1)
    elif positions != "all":
        raise ValueError(f"positions={positions!r}; it must be 'all' or 'last'")
    return unembed(params, x), state


def hidden(
    params: Any,
    config: Config,
    tokens: Int[Array, "B T"],
    state: Any = None,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """Returns what the head reads, after ln_out, in the compute dtype; arguments and state as in `forward`."""
    model = module_of(config)
    _check(params, config, tokens, state, reset, length)
    wide = jnp.float64 if params.emb.dtype == jnp.float64 else jnp.float32
    dtype = wide if wide == jnp.float64 else jnp.dtype(config.dtype)
    state = model.fresh_state(config, tokens.shape[0], wide) if state is None else state
    state = jax.tree.map(lambda leaf: leaf.astype(wide), state)

    def layer(carry, inputs):
        block_params, block_state = inputs
        (x, depth), new = model.block(
            block_params, config, carry, block_state, reset=reset, length=length, backend=backend
        )
        return (constrain(x, *_RESIDUAL), depth), new

    if config.remat != "none":
        layer = jax.checkpoint(layer, prevent_cse=is_unstacked(params), policy=_REMAT_POLICIES[config.remat])
    # A foreign token must not pass for another one. It is marked at the end: inside, NaN would reach tokens before it, since an
    # operator may form its products over a whole chunk.
    foreign = (tokens < 0) | (tokens >= config.vocab_size)
    if length is not None:
        foreign &= jnp.arange(tokens.shape[1]) < length[:, None]
    x = model.embed_tokens(params, jnp.where(foreign, 0, tokens), dtype)
    (x, _), state = _over_layers(layer, (x, model.init_depth(config, x)), params, state)
    x = jnp.where(jnp.cumsum(foreign, axis=1)[..., None] > 0, jnp.nan, x)
    spoilt = foreign.any(1)
    state = jax.tree.map(lambda s: jnp.where(spoilt.reshape(-1, *[1] * (s.ndim - 2)), jnp.nan, s), state)
    return layer_norm(params.ln_out, x), state


def _over_layers(layer: Any, carry: Any, params: Any, state: Any) -> tuple[Any, Any]:
    """layer(carry, (block, state)) -> (carry, state) for one layer after the other; the last carry, and the states stacked."""
    if not is_unstacked(params):
        return jax.lax.scan(layer, carry, (params.blocks, state))
    states = []
    for i, block in enumerate(params.blocks):
        carry, new = layer(carry, (block, jax.tree.map(lambda s, i=i: s[i], state)))
        states.append(new)
    return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *states)


def is_unstacked(params: Any) -> bool:
    """Returns whether the layers of these parameters are apart, by `unstack`."""
    return type(params.blocks) is tuple  # One of named fields is a block.


def unembed(params: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T A"]:
    """Returns the logits, float32 or wider, of what `hidden` gives."""
    logits = linear(x, params.head, dtype=jnp.promote_types(x.dtype, jnp.float32))
    return constrain(logits, "batch", "time", "vocab")


def _check(params, config, tokens, state, reset, length):
    declaration = module_of(config).declare(config)
    if is_unstacked(params):
        if len(params.blocks) != config.num_layers:
            raise ValueError(
                f"params have {len(params.blocks)} layers (apart) where the config has num_layers={config.num_layers}; "
                "pass the config they were made with"
            )
        declaration = declaration._replace(
            blocks=tuple(p.of_layer(declaration.blocks, layer) for layer in range(config.num_layers))
        )
    p.check_shapes(params, declaration, config.num_layers)
    if not isinstance(tokens, jax.Array | np.ndarray):
        raise TypeError(f"tokens are {type(tokens).__name__}; they must be an array [B, T], such as jnp.array(tokens)")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens are {tokens.dtype}; they must be integer ids, such as int32")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            f"tokens have shape {tokens.shape}; they must be [B, T], both at least 1 (tokens[None] for one row)"
        )
    batch_size, num_tokens = tokens.shape
    if not isinstance(tokens, Tracer):
        low, high = int(np.asarray(tokens).min()), int(np.asarray(tokens).max())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"tokens run from {low} to {high}; with vocab_size={config.vocab_size} they must be 0 to "
                f"{config.vocab_size - 1}: the tokenizer does not fit this model"
            )
    if reset is not None and (reset.shape != tokens.shape or reset.dtype != jnp.bool_):
        raise ValueError(f"reset is {reset.dtype} {reset.shape}; it must be bool {tokens.shape}, as tokens")
    if length is not None and (length.shape != (batch_size,) or not jnp.issubdtype(length.dtype, jnp.integer)):
        raise ValueError(
            f"length is {length.dtype} {length.shape}; it must be an integer for each row, ({batch_size},)"
        )
    if length is not None and not isinstance(length, Tracer):
        low, high = int(np.asarray(length).min()), int(np.asarray(length).max())
        if low < 0 or high > num_tokens:
            raise ValueError(f"length runs from {low} to {high}; it must be 0 to T, which is {num_tokens}")
    if state is not None:
        expected = jax.eval_shape(lambda: init_state(config, batch_size))
        given, wanted = jax.tree.map(jnp.shape, state), jax.tree.map(jnp.shape, expected)
        if given != wanted:
            raise ValueError(f"state is {given}; {batch_size} rows of this model need {wanted}")
