"""RWKV-5 ("Eagle"): a matrix-valued state in each head, decaying at a learnt rate.

Differences from upstream: heads of any size, and ln_x on the undivided output (upstream divides it by 8 and adds 1e-5 to the
variance, which is 64e-5 here).

Source: arXiv 2404.05892, section 4.1; BlinkDL/RWKV-LM, RWKV-v5/src/model.py; for 5.0 and 5.1 also BlinkDL/ChatRWKV, rwkv_pip_package.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rwkv_kernels import init_wkv6_state

from .. import params as p
from ..nn.axes import spread
from ..nn.feed_forward import feed_forward
from ..nn.group_norm import group_norm
from ..nn.layer_norm import LayerNorm, declare_layer_norm, layer_norm
from ..nn.linear import embed, linear
from ..nn.token_shift import token_shift
from ..nn.wkv import wkv6
from .base import ModelConfig, Shapes, common_fields, rounded_width

FFN_WIDTHS: dict[str, tuple[int | float, int]] = {"5.0": (4, 1), "5.1": (4, 1), "5.2": (3.5, 32)}
"""Hidden width of the channel mix by variant: multiple of embed_dim, and what that is rounded down to a multiple of."""


@dataclass(frozen=True)
class RWKV5Config(ModelConfig):
    """The size of an RWKV-5 and how it computes."""

    architecture: Literal["rwkv5"] = "rwkv5"
    """Which model this is."""
    variant: Literal["5.0", "5.1", "5.2"] = "5.2"
    """5.0 has one decay and bonus a head and no gate, 5.1 the same with a gate, 5.2 one a channel with a gate."""
    raw_bonus: bool = False
    """Whether 5.0 and 5.1 hold the bonus itself, as time_faaaa, and not its logarithm, as time_first; 5.2 always does."""
    head_dim: int = 64
    """Keys and values of a head; it divides embed_dim."""
    ln_x_eps: float = 64e-5
    """Added to the variance of a head's output (1e-5 in rwkv.cpp and the models made with it)."""

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim < 1 or self.embed_dim % self.head_dim:
            raise ValueError(f"model.head_dim is {self.head_dim}; it must divide embed_dim, which is {self.embed_dim}")
        if not self.ln_x_eps > 0:
            raise ValueError(f"model.ln_x_eps is {self.ln_x_eps}; it must be positive")

    @property
    def num_heads(self) -> int:
        """Heads of head_dim channels."""
        return self.embed_dim // self.head_dim

    @property
    def hidden_dim(self) -> int:
        """The hidden width of the channel mix: the variant's own unless ffn_dim is given."""
        return self.ffn_dim or rounded_width(self.embed_dim, *FFN_WIDTHS[self.variant])


class TimeMix(NamedTuple):
    """Parameters of the time mix: [D] for the mixes and ln_x, [H] or [H, K] for decay and bonus, then [D, D] as x @ matrix.

    None stands for what the variant does not have: the gate and its mix, and all but one form of the bonus.
    """

    time_mix_k: p.Leaf
    time_mix_v: p.Leaf
    time_mix_r: p.Leaf
    time_mix_g: p.Leaf | None
    time_decay: p.Leaf
    time_first: p.Leaf | None
    time_faaaa: p.Leaf | None
    receptance: p.Leaf
    key: p.Leaf
    value: p.Leaf
    gate: p.Leaf | None
    output: p.Leaf
    ln_x: LayerNorm


class ChannelMix(NamedTuple):
    """Parameters of the channel mix: [D], [D], then key [D, F], receptance [D, D], value [F, D]."""

    time_mix_k: p.Leaf
    time_mix_r: p.Leaf
    key: p.Leaf
    receptance: p.Leaf
    value: p.Leaf


class Block(NamedTuple):
    """Parameters of one block; in `Params` every leaf has a leading layer axis."""

    ln1: LayerNorm
    att: TimeMix
    ln2: LayerNorm
    ffn: ChannelMix


class Params(NamedTuple):
    """All parameters: embedding [A, D], blocks stacked over layers, head [D, A]."""

    emb: p.Leaf
    ln0: LayerNorm
    blocks: Block
    ln_out: LayerNorm
    head: p.Leaf


class State(NamedTuple):
    """What the model remembers, in one layer, with a leading layer axis for the model; float32 (or float64).

    att_x and ffn_x [B, D] are the normalised inputs of the last token; wkv [B, H, K, V] is the sum of each head.
    """

    att_x: Array
    ffn_x: Array
    wkv: Array


def recognises(shapes: Shapes) -> bool:
    """Returns whether an official checkpoint's keys are this version's."""
    return "blocks.0.att.ln_x.weight" in shapes and "blocks.0.att.time_mix_k" in shapes


def config_of(shapes: Shapes) -> RWKV5Config:
    """Returns the config that an official checkpoint's shapes imply.

    Raises:
        ValueError: The shapes are not a model's.
    """
    decay = shapes.get("blocks.0.att.time_decay", ())
    if len(decay) not in (1, 2):
        raise ValueError(f"blocks.0.att.time_decay is {decay or 'missing'}; it must be [heads] or [heads, head_dim]")
    per_head = "5.1" if "blocks.0.att.gate.weight" in shapes else "5.0"
    variant = "5.2" if len(decay) == 2 else per_head
    fields = common_fields(shapes, *FFN_WIDTHS[variant])
    return RWKV5Config(
        **fields,
        variant=variant,
        raw_bonus=variant != "5.2" and "blocks.0.att.time_faaaa" in shapes,
        head_dim=fields["embed_dim"] // max(decay[0], 1),
    )


def declare(config: RWKV5Config) -> Params:
    """Declares every parameter, once."""
    width, hidden, layers, heads = config.embed_dim, config.hidden_dim, config.num_layers, config.num_heads
    per_channel, gated = config.variant == "5.2", config.variant != "5.0"
    rates, rate_axes = ((heads, config.head_dim), ("heads", "head")) if per_channel else ((heads,), ("heads",))

    def depth(layer):  # 0 at the first layer, 1 at the last (0 if it is the only one)
        return layer / max(layers - 1, 1)

    def position(size):
        return np.arange(size) / max(size - 1, 1)

    def mix(exponent, offset=0.0):
        def init(key, shape, layer):
            channel = np.arange(width) / width
            return jnp.asarray(channel ** (exponent * (1 - layer / layers)) + offset * depth(layer))

        return init

    def decay(key, shape, layer):
        low, rise = (-6, 5) if per_channel else (-8, 7)
        size = width if per_channel else heads
        return jnp.asarray(low + rise * position(size) ** (0.7 + 1.3 * depth(layer))).reshape(shape)

    def log_bonus(key, shape, layer):
        return jnp.full(shape, -3.0)

    def bonus(key, shape, layer):
        if not per_channel:
            return jnp.full(shape, 0.05)
        zigzag = 0.1 * ((np.arange(width) + 1) % 3 - 1)
        return jnp.asarray(depth(layer) * (1 - position(width)) + zigzag).reshape(shape)

    def ln_x_gain(key, shape, layer):
        return jnp.full(shape, ((1 + layer) / layers) ** 0.7)

    def vector(name, init, layout: p.Layout = "1x1"):
        return p.Param(f"blocks.{{layer}}.{name}", (width,), ("embed",), init, layout=layout)

    def rate(name, init, lr_multiple=1.0):
        return p.Param(f"blocks.{{layer}}.{name}", rates, rate_axes, init, lr_multiple)

    def matrix(name, shape, axes, init):
        key = name if name.startswith(("emb", "head")) else f"blocks.{{layer}}.{name}"
        layout: p.Layout = "same" if name.startswith("emb") else "transposed"
        return p.Param(f"{key}.weight", shape, axes, init, decays=True, layout=layout)

    square = (width, width)
    raw_bonus = per_channel or config.raw_bonus
    att = TimeMix(
        time_mix_k=vector("att.time_mix_k", mix(1.0)),
        time_mix_v=vector("att.time_mix_v", mix(1.0, offset=0.3)),
        time_mix_r=vector("att.time_mix_r", mix(0.5)),
        time_mix_g=vector("att.time_mix_g", mix(0.5)) if gated else None,
        time_decay=rate("att.time_decay", decay, lr_multiple=2.0),
        time_first=None if raw_bonus else rate("att.time_first", log_bonus),
        time_faaaa=rate("att.time_faaaa", bonus) if raw_bonus else None,
        receptance=matrix("att.receptance", square, ("embed", "att"), p.orthogonal(1.0)),
        key=matrix("att.key", square, ("embed", "att"), p.orthogonal(0.1)),
        value=matrix("att.value", square, ("embed", "att"), p.orthogonal(1.0)),
        gate=matrix("att.gate", square, ("embed", "att"), p.orthogonal(0.1)) if gated else None,
        output=matrix("att.output", square, ("att", "embed"), p.zeros),
        ln_x=LayerNorm(
            weight=vector("att.ln_x.weight", ln_x_gain, layout="same"),
            bias=vector("att.ln_x.bias", p.zeros, layout="same"),
        ),
    )
    ffn = ChannelMix(
        time_mix_k=vector("ffn.time_mix_k", mix(1.0)),
        time_mix_r=vector("ffn.time_mix_r", mix(1.0)),
        key=matrix("ffn.key", (width, hidden), ("embed", "ffn"), p.orthogonal(1.0)),
        receptance=matrix("ffn.receptance", square, ("embed", "embed_out"), p.zeros),
        value=matrix("ffn.value", (hidden, width), ("ffn", "embed"), p.zeros),
    )
    block = Block(
        declare_layer_norm("blocks.{layer}.ln1", width),
        att,
        declare_layer_norm("blocks.{layer}.ln2", width),
        ffn,
    )
    head_gain = 0.5 * max(1.0, config.vocab_size / width) ** 0.5
    return Params(
        emb=matrix("emb", (config.vocab_size, width), ("vocab", "embed"), p.uniform(config.embed_init)),
        ln0=declare_layer_norm("blocks.0.ln0", width),
        blocks=block,
        ln_out=declare_layer_norm("ln_out", width),
        head=matrix("head", (width, config.vocab_size), ("embed", "vocab"), p.orthogonal(head_gain)),
    )


def init_state(config: RWKV5Config, batch_size: int, dtype=jnp.float32) -> State:
    """Returns the zero state of all layers: [L, batch_size, D] twice and [L, batch_size, H, K, V]."""
    shift = jnp.zeros((config.num_layers, batch_size, config.embed_dim), dtype)
    wkv = init_wkv6_state(batch_size, config.num_heads, config.head_dim, config.head_dim, dtype)
    return State(shift, jnp.zeros_like(shift), jnp.broadcast_to(wkv, (config.num_layers, *wkv.shape)))


fresh_state = init_state
"""What a call without a state begins with."""


def embed_tokens(params: Params, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """Returns what the first block reads, in `dtype`: the tokens' rows of the embedding, normalised by ln0."""
    return layer_norm(params.ln0, embed(params.emb, tokens).astype(dtype))


def time_mix(
    params: TimeMix,
    config: RWKV5Config,
    x: Float[Array, "B T D"],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "B T D"], State]:
    """Returns Wo (silu(g) * ln_x(wkv(r, k, v))) of the normalised input, and the state with att_x and wkv moved on.

    Args:
        params: One layer's, without the layer axis.
        config: The model's.
        x: Input after ln1, in the compute dtype.
        state: One layer's.
        reset: True where a token starts a sequence.
        length: Tokens of each row that count; None is T.
        backend: Of wkv6.

    Source: arXiv 2404.05892, equations 3 to 9.
    """
    shifted, att_x = token_shift(x, state.att_x, reset, length)

    def heads(mix, weight):
        y = linear(_mix(x, shifted, mix), weight)
        return y.reshape(*y.shape[:2], config.num_heads, config.head_dim)

    r = heads(params.time_mix_r, params.receptance)
    k = heads(params.time_mix_k, params.key)
    v = heads(params.time_mix_v, params.value)
    wkv, new = wkv6(r, k, v, *_rates(params, config, state), state.wkv, reset=reset, length=length, backend=backend)
    y = group_norm(params.ln_x, wkv, config.ln_x_eps)
    if params.gate is not None:
        y = y * jax.nn.silu(linear(_mix(x, shifted, params.time_mix_g), params.gate))
    return linear(y, params.output), state._replace(att_x=att_x, wkv=new)


def channel_mix(
    params: ChannelMix,
    config: RWKV5Config,
    x: Float[Array, "B T D"],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], State]:
    """Returns sigmoid(r) * Wv relu(k)^2 of the normalised input, and the state with ffn_x moved on.

    Args: as in `time_mix`, with x after ln2.

    Source: arXiv 2404.05892, section 4.1, as in RWKV-4.
    """
    del config
    shifted, ffn_x = token_shift(x, state.ffn_x, reset, length)
    r = linear(_mix(x, shifted, params.time_mix_r), params.receptance)
    y = jax.nn.sigmoid(r) * feed_forward(_mix(x, shifted, params.time_mix_k), params.key, params.value)
    return y, state._replace(ffn_x=ffn_x)


def init_depth(config: RWKV5Config, x: Float[Array, "B T D"]) -> tuple[()]:
    """Returns what the blocks hand on from layer to layer besides the residual: nothing."""
    del config, x
    return ()


def block(
    params: Block,
    config: RWKV5Config,
    inputs: tuple[Float[Array, "B T D"], tuple[()]],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> tuple[tuple[Float[Array, "B T D"], tuple[()]], State]:
    """Returns ((x + time mix + channel mix, depth), the layer's new state).

    Args: as in `time_mix`, but inputs are the residual x and the depth, from `init_depth` or the layer before.
    """
    x, depth = inputs
    y, state = time_mix(
        params.att, config, layer_norm(params.ln1, x), state, reset=reset, length=length, backend=backend
    )
    x = x + y
    y, state = channel_mix(params.ffn, config, layer_norm(params.ln2, x), state, reset=reset, length=length)
    return (x + y, depth), state


def _rates(params, config, state):
    """Log-decay and bonus a channel, [H, K], in the state's dtype."""
    dtype = state.wkv.dtype
    w = -jnp.exp(params.time_decay.astype(dtype))
    raw = params.time_faaaa is not None
    u = params.time_faaaa.astype(dtype) if raw else jnp.exp(params.time_first.astype(dtype))
    if w.ndim == 1:
        w, u = (jnp.repeat(x[:, None], config.head_dim, 1) for x in (w, u))
    return w, u


def _mix(x, shifted, weight):
    weight = spread(weight, x)
    return x * weight + shifted * (1 - weight)
