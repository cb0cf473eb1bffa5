"""RWKV-6 ("Finch"): RWKV-5 with a decay and token shifts that depend on the data.

Differences from upstream: heads of any size; none of the optional fixes of spikes.

Source: arXiv 2404.05892, section 4.2; BlinkDL/RWKV-LM, RWKV-v5/src/model.py (x060).
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

FFN_WIDTH = (3.5, 32)
"""Hidden width of the channel mix: multiple of embed_dim, and what that is rounded down to a multiple of."""


@dataclass(frozen=True)
class RWKV6Config(ModelConfig):
    """The size of an RWKV-6 and how it computes."""

    architecture: Literal["rwkv6"] = "rwkv6"
    """Which model this is."""
    head_dim: int = 64
    """Keys and values of a head; it divides embed_dim."""
    ln_x_eps: float = 64e-5
    """Added to the variance of a head's output."""
    mix_rank: int = 32
    """Low-rank width of each data-dependent token shift (64 in upstream's models of width 4096)."""
    decay_rank: int = 64
    """Low-rank width of the data-dependent decay (128 in upstream's models of width 4096)."""

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim < 1 or self.embed_dim % self.head_dim:
            raise ValueError(f"model.head_dim is {self.head_dim}; it must divide embed_dim, which is {self.embed_dim}")
        if not self.ln_x_eps > 0:
            raise ValueError(f"model.ln_x_eps is {self.ln_x_eps}; it must be positive")
        for name in ("mix_rank", "decay_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def num_heads(self) -> int:
        """Heads of head_dim channels."""
        return self.embed_dim // self.head_dim

    @property
    def hidden_dim(self) -> int:
        """The hidden width of the channel mix: 3.5 * embed_dim rounded down to a multiple of 32, unless ffn_dim is given."""
        return self.ffn_dim or rounded_width(self.embed_dim, *FFN_WIDTH)


class TimeMix(NamedTuple):
    """Parameters of the time mix, matrices being applied as x @ matrix.

    [D] for time_maa_*, time_decay and ln_x; time_maa_w1 [D, 5 R], time_maa_w2 [5, R, D] (for w, k, v, r, g in this order);
    time_decay_w1 [D, R], time_decay_w2 [R, D]; time_faaaa [H, K]; the others [D, D].
    """

    time_maa_x: p.Leaf
    time_maa_w: p.Leaf
    time_maa_k: p.Leaf
    time_maa_v: p.Leaf
    time_maa_r: p.Leaf
    time_maa_g: p.Leaf
    time_maa_w1: p.Leaf
    time_maa_w2: p.Leaf
    time_decay: p.Leaf
    time_decay_w1: p.Leaf
    time_decay_w2: p.Leaf
    time_faaaa: p.Leaf
    receptance: p.Leaf
    key: p.Leaf
    value: p.Leaf
    gate: p.Leaf
    output: p.Leaf
    ln_x: LayerNorm


class ChannelMix(NamedTuple):
    """Parameters of the channel mix: [D], [D], then key [D, F], receptance [D, D], value [F, D]."""

    time_maa_k: p.Leaf
    time_maa_r: p.Leaf
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
    return "blocks.0.att.time_maa_x" in shapes


def config_of(shapes: Shapes) -> RWKV6Config:
    """Returns the config that an official checkpoint's shapes imply.

    Raises:
        ValueError: The shapes are not a model's.
    """
    ranks = {"time_faaaa": 2, "time_maa_w2": 3, "time_decay_w1": 2}
    own = {name: shapes.get(f"blocks.0.att.{name}", ()) for name in ranks}
    for name, rank in ranks.items():
        if len(own[name]) != rank:
            raise ValueError(f"blocks.0.att.{name} is {own[name] or 'missing'}; it must have {rank} axes")
    return RWKV6Config(
        **common_fields(shapes, *FFN_WIDTH),
        head_dim=own["time_faaaa"][1],
        mix_rank=own["time_maa_w2"][1],
        decay_rank=own["time_decay_w1"][1],
    )


def declare(config: RWKV6Config) -> Params:
    """Declares every parameter, once."""
    width, hidden, layers = config.embed_dim, config.hidden_dim, config.num_layers

    def depth(layer):  # 0 at the first layer, 1 at the last (0 if it is the only one)
        return layer / max(layers - 1, 1)

    def mix(exponent, offset=0.0, power=1):
        def init(key, shape, layer):
            channel = np.arange(width) / width
            return jnp.asarray(1 - channel ** (exponent * (1 - layer / layers) ** power) - offset * depth(layer))

        return init

    def position():
        return np.arange(width) / max(width - 1, 1)

    def decay(key, shape, layer):
        return jnp.asarray(-6 + 5 * position() ** (0.7 + 1.3 * depth(layer)))

    def bonus(key, shape, layer):
        zigzag = 0.1 * ((np.arange(width) + 1) % 3 - 1)
        return jnp.asarray(depth(layer) * (1 - position()) + zigzag).reshape(shape)

    def ln_x_gain(key, shape, layer):
        return jnp.full(shape, ((1 + layer) / layers) ** 0.7)

    def tensor(name, shape, axes, init, lr_multiple=1.0, layout: p.Layout = "same"):
        return p.Param(f"blocks.{{layer}}.{name}", shape, axes, init, lr_multiple, layout=layout)

    def vector(name, init, lr_multiple=1.0, layout: p.Layout = "1x1"):
        return tensor(name, (width,), ("embed",), init, lr_multiple, layout)

    def matrix(name, shape, axes, init):
        key = name if name.startswith(("emb", "head")) else f"blocks.{{layer}}.{name}"
        layout: p.Layout = "same" if name.startswith("emb") else "transposed"
        return p.Param(f"{key}.weight", shape, axes, init, decays=True, layout=layout)

    square, small = (width, width), p.uniform(0.01)
    mix_rank, decay_rank = config.mix_rank, config.decay_rank
    att = TimeMix(
        time_maa_x=vector("att.time_maa_x", mix(1.0)),
        time_maa_w=vector("att.time_maa_w", mix(1.0)),
        time_maa_k=vector("att.time_maa_k", mix(1.0)),
        time_maa_v=vector("att.time_maa_v", mix(1.0, offset=0.3)),
        time_maa_r=vector("att.time_maa_r", mix(0.5)),
        time_maa_g=vector("att.time_maa_g", mix(0.5)),
        time_maa_w1=tensor("att.time_maa_w1", (width, 5 * mix_rank), ("embed", "mix_ranks"), p.zeros),
        time_maa_w2=tensor("att.time_maa_w2", (5, mix_rank, width), ("mix", "mix_rank", "embed"), small),
        time_decay=vector("att.time_decay", decay, lr_multiple=2.0),
        time_decay_w1=tensor("att.time_decay_w1", (width, decay_rank), ("embed", "decay_rank"), p.zeros),
        time_decay_w2=tensor("att.time_decay_w2", (decay_rank, width), ("decay_rank", "att_of_rank"), small),
        time_faaaa=tensor("att.time_faaaa", (config.num_heads, config.head_dim), ("heads", "head"), bonus),
        receptance=matrix("att.receptance", square, ("embed", "att"), p.orthogonal(1.0)),
        key=matrix("att.key", square, ("embed", "att"), p.orthogonal(0.1)),
        value=matrix("att.value", square, ("embed", "att"), p.orthogonal(1.0)),
        gate=matrix("att.gate", square, ("embed", "att"), p.orthogonal(0.1)),
        output=matrix("att.output", square, ("att", "embed"), p.zeros),
        ln_x=LayerNorm(
            weight=vector("att.ln_x.weight", ln_x_gain, layout="same"),
            bias=vector("att.ln_x.bias", p.zeros, layout="same"),
        ),
    )
    ffn = ChannelMix(
        time_maa_k=vector("ffn.time_maa_k", mix(1.0, power=3)),
        time_maa_r=vector("ffn.time_maa_r", mix(1.0, power=3)),
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


def init_state(config: RWKV6Config, batch_size: int, dtype=jnp.float32) -> State:
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
    config: RWKV6Config,
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

    Source: arXiv 2404.05892, equations 10 to 20.
    """
    shifted, att_x = token_shift(x, state.att_x, reset, length)
    delta = shifted - x
    mixed = _mix(x, delta, params.time_maa_x)
    low = jnp.split(jnp.tanh(linear(mixed, params.time_maa_w1)), 5, axis=-1)

    def project(low, matrix, mix, weight):
        return linear(x + delta * (spread(mix, x) + linear(low, matrix)), weight)

    mixes = (params.time_maa_w, params.time_maa_k, params.time_maa_v, params.time_maa_r, params.time_maa_g)
    weights = (params.time_decay_w1, params.key, params.value, params.receptance, params.gate)
    w_low, k, v, r, g = map(project, low, params.time_maa_w2, mixes, weights)

    def heads(y):
        return y.reshape(*y.shape[:2], config.num_heads, config.head_dim)

    wide = state.wkv.dtype
    decay = linear(jnp.tanh(w_low), params.time_decay_w2, dtype=wide)
    decay = spread(params.time_decay, decay) + decay
    w, u = heads(-jnp.exp(decay)), params.time_faaaa.astype(wide)
    wkv, new = wkv6(heads(r), heads(k), heads(v), w, u, state.wkv, reset=reset, length=length, backend=backend)
    y = group_norm(params.ln_x, wkv, config.ln_x_eps) * jax.nn.silu(g)
    return linear(y, params.output), state._replace(att_x=att_x, wkv=new)


def channel_mix(
    params: ChannelMix,
    config: RWKV6Config,
    x: Float[Array, "B T D"],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], State]:
    """Returns sigmoid(r) * Wv relu(k)^2 of the normalised input, and the state with ffn_x moved on.

    Args: as in `time_mix`, with x after ln2.

    Source: arXiv 2404.05892, section 4.2.
    """
    del config
    shifted, ffn_x = token_shift(x, state.ffn_x, reset, length)
    r = linear(_mix(x, shifted - x, params.time_maa_r), params.receptance)
    y = jax.nn.sigmoid(r) * feed_forward(_mix(x, shifted - x, params.time_maa_k), params.key, params.value)
    return y, state._replace(ffn_x=ffn_x)


def init_depth(config: RWKV6Config, x: Float[Array, "B T D"]) -> tuple[()]:
    """Returns what the blocks hand on from layer to layer besides the residual: nothing."""
    del config, x
    return ()


def block(
    params: Block,
    config: RWKV6Config,
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


def _mix(x, delta, weight):
    return x + delta * spread(weight, x)
