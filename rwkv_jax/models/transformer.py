"""A transformer for comparison: GPT-NeoX's, which the Pythia models are.

Its state is the keys and values of the last `context_length` tokens, so that it is constant in size like the others'. A token
attends to itself and to at most `context_length - 1` tokens before it, wherever the sequence is cut: a longer text is read
through a sliding window, and nothing is refused. Keys are kept before their rotation, and turned by their place in the window,
of which only differences matter; so a sequence can be of any length, and starts anew at a reset.

Differences from upstream: the window, where upstream ends at 2048 positions; query, key and value are separate matrices.

Source: arXiv 2204.06745, section 2; arXiv 2304.01373, section 2.1; EleutherAI/gpt-neox, megatron/model/transformer.py.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .. import params as p
from ..nn.attention import attention, rotate
from ..nn.axes import spread
from ..nn.layer_norm import LayerNorm, declare_layer_norm, layer_norm
from ..nn.linear import embed, linear
from ..nn.slices import in_slices
from .base import ModelConfig, Shapes


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """The size of a transformer and how it computes."""

    implied_by_shapes: ClassVar[bool] = False
    reference_backend: ClassVar[str | None] = None

    architecture: Literal["transformer"] = "transformer"
    """Which model this is."""
    head_dim: int = 64
    """Channels of a head; it divides embed_dim."""
    rotary_fraction: float = 0.25
    """Share of a head's channels that rotary positions turn, rounded down to a whole number of channels, which is even."""
    context_length: int = 2048
    """Tokens that are attended to and kept in the state: the latest ones, the present one included."""
    parallel_residual: bool = True
    """Whether the channel mix reads what the attention reads, or what comes after it."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("head_dim", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.embed_dim % self.head_dim:
            raise ValueError(
                f"model.embed_dim is {self.embed_dim}; it must be a multiple of model.head_dim, {self.head_dim}"
            )
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"model.rotary_fraction is {self.rotary_fraction}, {self.rotary_dim} of the head's {self.head_dim} channels; "
                f"they must be 2, 4, ... or at most {self.head_dim}"
            )
        if self.embed_init != ModelConfig.embed_init:
            raise ValueError(
                f"model.embed_init is {self.embed_init}; a transformer's embedding starts like its other matrices: leave it out"
            )

    @property
    def hidden_dim(self) -> int:
        """The hidden width of the channel mix, 4 * embed_dim unless ffn_dim is given."""
        return self.ffn_dim or 4 * self.embed_dim

    @property
    def num_heads(self) -> int:
        """Heads of a layer."""
        return self.embed_dim // self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotary positions turn."""
        return int(self.rotary_fraction * self.head_dim)


class TimeMix(NamedTuple):
    """Parameters of the attention: [D, D] each, applied as x @ matrix, then offsets [D]."""

    query: p.Leaf
    key: p.Leaf
    value: p.Leaf
    output: p.Leaf
    query_bias: p.Leaf
    key_bias: p.Leaf
    value_bias: p.Leaf
    output_bias: p.Leaf


class ChannelMix(NamedTuple):
    """Parameters of the channel mix: key [D, F], value [F, D], then offsets [F] and [D]."""

    key: p.Leaf
    value: p.Leaf
    key_bias: p.Leaf
    value_bias: p.Leaf


class Block(NamedTuple):
    """Parameters of one block; in `Params` every leaf has a leading layer axis."""

    ln1: LayerNorm
    att: TimeMix
    ln2: LayerNorm
    ffn: ChannelMix


class Params(NamedTuple):
    """All parameters: embedding [A, D], blocks stacked over layers, head [D, A]."""

    emb: p.Leaf
    blocks: Block
    ln_out: LayerNorm
    head: p.Leaf


class State(NamedTuple):
    """What the model remembers, in one layer; with a leading layer axis for the model. float32 (or float64).

    key (not rotated) and value [B, S, H, K] are those of the last S = context_length tokens, the newest last, zeros where the
    sequence has had fewer; held [B] is how many it has had, S at most.
    """

    key: Array
    value: Array
    held: Array


def recognises(shapes: Shapes) -> bool:
    """Returns whether a checkpoint's keys are this model's."""
    return "blocks.0.att.query.weight" in shapes


def config_of(shapes: Shapes) -> TransformerConfig:
    """Raises ValueError: shapes do not say how many heads there are, and what is rotated."""
    raise ValueError(
        f"a transformer's {len(shapes)} tensors do not show its heads; load the Hugging Face folder, or a .safetensors file that "
        "rwkv_jax.save has written"
    )


def declare(config: TransformerConfig) -> Params:
    """Declares every parameter, once.

    Matrices are normal: into a layer and of embedding and head with variance 2 / (5 D) ("small init"), out of one with standard
    deviation 2 / (L sqrt(D)) ("Wang init"); offsets are 0.

    Source: EleutherAI/gpt-neox, megatron/model/init_functions.py, chosen by the Pythia models' configs.
    """
    width, hidden = config.embed_dim, config.hidden_dim
    small = p.normal((2 / (5 * width)) ** 0.5)
    wang = p.normal(2 / config.num_layers / width**0.5)

    def matrix(name, axes, shape=(width, width), init=small, layout: p.Layout = "transposed"):
        return p.Param(f"{name}.weight", shape, axes, init, decays=True, layout=layout)

    def offset(name, axis, size=width):
        return p.Param(f"{name}.bias", (size,), (axis,), p.zeros)

    att, ffn = "blocks.{layer}.att", "blocks.{layer}.ffn"
    block = Block(
        ln1=declare_layer_norm("blocks.{layer}.ln1", width),
        att=TimeMix(
            query=matrix(f"{att}.query", ("embed", "att")),
            key=matrix(f"{att}.key", ("embed", "att")),
            value=matrix(f"{att}.value", ("embed", "att")),
            output=matrix(f"{att}.output", ("att", "embed"), init=wang),
            query_bias=offset(f"{att}.query", "att"),
            key_bias=offset(f"{att}.key", "att"),
            value_bias=offset(f"{att}.value", "att"),
            output_bias=offset(f"{att}.output", "embed"),
        ),
        ln2=declare_layer_norm("blocks.{layer}.ln2", width),
        ffn=ChannelMix(
            key=matrix(f"{ffn}.key", ("embed", "ffn"), (width, hidden)),
            value=matrix(f"{ffn}.value", ("ffn", "embed"), (hidden, width), wang),
            key_bias=offset(f"{ffn}.key", "ffn", hidden),
            value_bias=offset(f"{ffn}.value", "embed"),
        ),
    )
    return Params(
        emb=matrix("emb", ("vocab", "embed"), (config.vocab_size, width), layout="same"),
        blocks=block,
        ln_out=declare_layer_norm("ln_out", width),
        head=matrix("head", ("embed", "vocab"), (width, config.vocab_size)),
    )


def init_state(config: TransformerConfig, batch_size: int, dtype=jnp.float32) -> State:
    """Returns the empty state of all layers, with room for context_length tokens."""
    return _empty(config, batch_size, dtype, config.context_length)


def fresh_state(config: TransformerConfig, batch_size: int, dtype=jnp.float32) -> State:
    """Returns what a call without a state begins with: no room, so that nothing is attended to but the call's own tokens."""
    return _empty(config, batch_size, dtype, 0)


def _empty(config: TransformerConfig, batch_size: int, dtype, room: int) -> State:
    kept = jnp.zeros((config.num_layers, batch_size, room, config.num_heads, config.head_dim), dtype)
    return State(kept, jnp.zeros_like(kept), jnp.zeros((config.num_layers, batch_size), dtype))


def embed_tokens(params: Params, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """Returns what the first block reads, in `dtype`: the tokens' rows of the embedding."""
    return embed(params.emb, tokens).astype(dtype)


def init_depth(config: TransformerConfig, x: Float[Array, "B T D"]) -> tuple[()]:
    """Returns what the blocks hand on from layer to layer besides the residual: nothing."""
    del config, x
    return ()


def time_mix(
    params: TimeMix,
    config: TransformerConfig,
    x: Float[Array, "B T D"],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "B T D"], State]:
    """Returns Wo attention(q, k, v) + bo of the normalised input, and the state with these tokens' keys and values.

    Args:
        params: One layer's, without the layer axis.
        config: The model's.
        x: Input after ln1, in the compute dtype.
        state: One layer's, of `init_state` or `fresh_state`; what is returned has room for context_length tokens.
        reset: True where a token starts a sequence.
        length: Tokens of each row that count; None is T.
        backend: None.

    Raises:
        ValueError: A backend is asked for.
    """
    if backend is not None:
        raise ValueError(
            f"backend={backend!r}: backends are those of the WKV operator, which a transformer does not have; leave it out"
        )
    room, window = state.key.shape[1], config.context_length
    q, k, v = (
        _affine(x, matrix, bias).reshape(*x.shape[:2], config.num_heads, config.head_dim)
        for matrix, bias in (
            (params.query, params.query_bias), (params.key, params.key_bias), (params.value, params.value_bias),
        )
    )  # fmt: skip
    # Keys stand in a row of places: those of the state, then these tokens'. A row whose state is not a number begins at -1: what
    # belongs to that sequence is not a number either, and nothing of it reaches the next.
    spoilt = jnp.isnan(state.held)
    begin = jnp.where(spoilt, -1, room - state.held.astype(jnp.int32))
    first = _first_places(begin, reset, room, x.shape[1])
    places = np.arange(room + x.shape[1])
    age = places[room:, None] - places
    visible = jnp.asarray((age >= 0) & (age < window)) & (places >= first[..., None])

    def joined(kept, new):
        kept = jnp.where(spoilt[:, None, None, None], 0, kept).astype(new.dtype)
        return jnp.concatenate([kept, jnp.where((first < 0)[..., None, None], 0, new)], axis=1)

    keys, values = joined(state.key, k), joined(state.value, v)
    y = attention(
        rotate(q, places[room:], config.rotary_dim), rotate(keys, places, config.rotary_dim), values, visible
    ).reshape(x.shape)
    y = jnp.where((first < 0)[..., None], jnp.nan, y)

    if length is None:
        counted, own = x.shape[1], first[:, -1]
    else:
        counted = length
        own = jnp.take_along_axis(jnp.concatenate([begin[:, None], first], axis=1), length[:, None], axis=1)[:, 0]
    held = jnp.minimum(room + counted - own, window)
    state = State(
        *(_newest(rows, held, length, room, window).astype(state.key.dtype) for rows in (keys, values)),
        held=jnp.where(own < 0, jnp.nan, held).astype(state.held.dtype),
    )
    return _affine(y, params.output, params.output_bias), state


def channel_mix(
    params: ChannelMix,
    config: TransformerConfig,
    x: Float[Array, "B T D"],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], State]:
    """Returns Wv gelu(Wk x + bk) + bv of the normalised input, with the exact gelu, and the state as it is.

    Args: as in `time_mix`, with x after ln2.
    """
    del config, reset, length

    def of_tokens(x):
        hidden = jax.nn.gelu(_affine(x, params.key, params.key_bias), approximate=False)
        return _affine(hidden, params.value, params.value_bias)

    return in_slices(of_tokens, x, params.key.shape[-1]), state


def block(
    params: Block,
    config: TransformerConfig,
    inputs: tuple[Float[Array, "B T D"], tuple[()]],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> tuple[tuple[Float[Array, "B T D"], tuple[()]], State]:
    """Returns ((x + attention + channel mix, depth), the layer's new state).

    Args: as in `time_mix`, but inputs are the residual x and the depth, from `init_depth` or the layer before.
    """
    x, depth = inputs
    attended, state = time_mix(
        params.att, config, layer_norm(params.ln1, x), state, reset=reset, length=length, backend=backend
    )
    between = x if config.parallel_residual else x + attended
    mixed, state = channel_mix(params.ffn, config, layer_norm(params.ln2, between), state)
    return (x + attended + mixed, depth), state


def _affine(x, matrix, bias):
    y = linear(x, matrix)
    return y + spread(bias, y)


def _first_places(begin: Int[Array, "B"], reset: Bool[Array, "B T"] | None, room: int, num_tokens: int) -> Array:
    """The place [B, T] of the first key of each token's sequence; `begin` is that of the state's."""
    if reset is None:
        return jnp.broadcast_to(begin[:, None], (begin.size, num_tokens))
    own = jnp.where(reset, room + jnp.arange(num_tokens), begin[:, None])
    return jax.lax.cummax(own, axis=1)


def _newest(rows: Array, held: Array, length: Int[Array, "B"] | None, room: int, window: int) -> Array:
    """The last `window` of rows [B, S, H, K], up to the last that counts, with zeros for those before the last `held`."""
    padded = jnp.pad(rows, ((0, 0), (window - room, 0), (0, 0), (0, 0)))
    if length is None:
        kept = padded[:, -window:]
    else:
        take = partial(jax.lax.dynamic_slice_in_dim, slice_size=window)
        kept = jax.vmap(take)(padded, length)
    return jnp.where((np.arange(window) >= window - held[:, None])[..., None, None], kept, 0)
