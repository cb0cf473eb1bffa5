"""RWKV-7 ("Goose", x070): the state, a matrix a head, is edited by a delta rule with data-dependent decay.

Differences from upstream: layer 0 has the parameters of the value residual (v0, v1, v2) too, so that all layers are alike, and
does not use them; official checkpoints are written without them where they are 0. The log-decay is formed directly, as
-exp(-0.5) sigmoid(z), which is upstream's -exp(-softplus(-z) - 0.5).

Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py and RWKV-v7/rwkv_v7_demo.py; arXiv 2503.14456.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rwkv_kernels import init_wkv7_state

from .. import params as p
from ..nn.axes import spread, squeezed
from ..nn.feed_forward import feed_forward
from ..nn.group_norm import group_norm
from ..nn.layer_norm import LayerNorm, declare_layer_norm, layer_norm
from ..nn.linear import embed, linear
from ..nn.token_shift import token_shift
from ..nn.wkv import wkv7
from .base import ModelConfig, Shapes, common_fields

STRONGEST_DECAY = float(np.exp(-0.5))
"""The least log-decay a step is minus this."""
SMALLEST_NORM = 1e-12
"""A key shorter than this is divided by this, not by its length."""


class Ranks(NamedTuple):
    """Widths of the low-rank maps that decay, in-context learning rate, value residual and gate come from."""

    decay: int
    iclr: int
    value: int
    gate: int


@dataclass(frozen=True)
class RWKV7Config(ModelConfig):
    """The size of an RWKV-7 and how it computes."""

    architecture: Literal["rwkv7"] = "rwkv7"
    """Which model this is."""
    vocab_size: int = 65536
    """Rows of the embedding and of the head (256 for bytes, 50277 or 50304 for 20B, 65536 for World)."""
    head_dim: int = 64
    """Channels of a head; it divides embed_dim."""
    decay_rank: int | None = None
    """Low-rank width of the decay; none, here and below: what the released models have at this embed_dim (most of them)."""
    iclr_rank: int | None = None
    """Low-rank width of the in-context learning rate."""
    value_rank: int | None = None
    """Low-rank width of the value residual."""
    gate_rank: int | None = None
    """Low-rank width of the gate."""
    ln_x_eps: float = 64e-5
    """Added to the variance of each head."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("head_dim", "decay_rank", "iclr_rank", "value_rank", "gate_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} is {value}; it must be at least 1")
        if self.embed_dim % self.head_dim:
            raise ValueError(
                f"model.embed_dim is {self.embed_dim}; it must be a multiple of model.head_dim, {self.head_dim}"
            )
        if not self.ln_x_eps > 0:
            raise ValueError(f"model.ln_x_eps is {self.ln_x_eps}; it must be positive")

    @property
    def hidden_dim(self) -> int:
        """The hidden width of the channel mix, 4 * embed_dim unless ffn_dim is given."""
        return self.ffn_dim or 4 * self.embed_dim

    @property
    def num_heads(self) -> int:
        """Heads of a layer."""
        return self.embed_dim // self.head_dim

    @property
    def ranks(self) -> Ranks:
        """The low-rank widths: those given, and for the others those of released models."""
        released = released_ranks(self.embed_dim)
        return Ranks(
            self.decay_rank or released.decay,
            self.iclr_rank or released.iclr,
            self.value_rank or released.value,
            self.gate_rank or released.gate,
        )


def released_ranks(embed_dim: int) -> Ranks:
    """Returns the low-rank widths that most released models of a width have, multiples of 32.

    They are 1.8 sqrt(D), 1.8 sqrt(D), 1.3 sqrt(D) and 0.6 D^0.8, rounded to such a multiple, ties to the even one. The released
    0.4B deviates (its gate has 128, not 160), as does upstream's newest training code: checkpoints' shapes are read instead.

    Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py as of the releases.
    """

    def rounded(width):
        return max(32, round(width / 32) * 32)

    root = embed_dim**0.5
    return Ranks(rounded(1.8 * root), rounded(1.8 * root), rounded(1.3 * root), rounded(0.6 * embed_dim**0.8))


class TimeMix(NamedTuple):
    """Parameters of the time mix: [D], but w1, a1, v1, g1 [D, R], w2, a2, v2, g2 [R, D], r_k [H, K], the last four [D, D]."""

    x_r: p.Leaf
    x_w: p.Leaf
    x_k: p.Leaf
    x_v: p.Leaf
    x_a: p.Leaf
    x_g: p.Leaf
    w0: p.Leaf
    w1: p.Leaf
    w2: p.Leaf
    a0: p.Leaf
    a1: p.Leaf
    a2: p.Leaf
    v0: p.Leaf
    v1: p.Leaf
    v2: p.Leaf
    g1: p.Leaf
    g2: p.Leaf
    k_k: p.Leaf
    k_a: p.Leaf
    r_k: p.Leaf
    ln_x: LayerNorm
    receptance: p.Leaf
    key: p.Leaf
    value: p.Leaf
    output: p.Leaf


class ChannelMix(NamedTuple):
    """Parameters of the channel mix: [D], then key [D, F], value [F, D]."""

    x_k: p.Leaf
    key: p.Leaf
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
    """What the model remembers, float32 (or float64): of one layer, and with a leading layer axis for the model.

    att_x and ffn_x [B, D] are the normalised inputs of the last token; wkv [B, H, V, K] is WKV's matrix a head.
    """

    att_x: Array
    ffn_x: Array
    wkv: Array


class Depth(NamedTuple):
    """What the blocks hand on from layer to layer besides the residual."""

    layer: Array
    """Index of the layer that reads this."""
    v_first: Array
    """Values of layer 0 [B, T, D], which every later layer mixes into its own."""


def recognises(shapes: Shapes) -> bool:
    """Returns whether an official checkpoint's keys are this version's."""
    return "blocks.0.att.r_k" in shapes


def config_of(shapes: Shapes) -> RWKV7Config:
    """Returns the config that an official checkpoint's shapes imply; ln_x_eps, which they do not show, is 64e-5."""
    fields = common_fields(shapes, ffn_multiple=4)
    if len(shapes["blocks.0.att.r_k"]) != 2:
        raise ValueError(f"blocks.0.att.r_k is {shapes['blocks.0.att.r_k']}; it must be [heads, head size]")
    released = released_ranks(fields["embed_dim"])
    layer = min(1, fields["num_layers"] - 1)  # Layer 0 may lack v1.
    for name, key in {"decay": "w1", "iclr": "a1", "value": "v1", "gate": "g1"}.items():
        rank = shapes.get(f"blocks.{layer}.att.{key}", (0, 0))[-1]
        fields[f"{name}_rank"] = None if rank in (0, getattr(released, name)) else rank
    return RWKV7Config(**fields, head_dim=shapes["blocks.0.att.r_k"][1])


def declare(config: RWKV7Config) -> Params:
    """Declares every parameter, once."""
    width, hidden, layers, ranks = config.embed_dim, config.hidden_dim, config.num_layers, config.ranks
    position = np.arange(width) / max(width - 1, 1)
    middle = (config.head_dim - 1) / 2
    in_head = (np.arange(width) % config.head_dim - middle) / (middle or 1.0)
    zigzag = in_head * np.abs(in_head)

    def mix(exponent):
        def init(key, shape, layer):
            return jnp.asarray(1 - (np.arange(width) / width) ** exponent(1 - layer / layers))

        return init

    def decay(key, shape, layer):
        depth = layer / max(layers - 1, 1)
        return jnp.asarray(-6 + 6 * position ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)

    def constant(value):
        return lambda key, shape, layer: jnp.broadcast_to(jnp.asarray(value), shape)

    def head_gain(key, shape, layer):
        return jnp.full(shape, ((1 + layer) / layers) ** 0.7)

    def vector(name, init, lr_multiple=1.0, layout: p.Layout = "1x1", may_lack=()):
        return p.Param(
            f"blocks.{{layer}}.{name}", (width,), ("embed",), init, lr_multiple, layout=layout, may_lack=may_lack
        )

    def down(name, rank, may_lack=()):
        return p.Param(f"blocks.{{layer}}.att.{name}", (width, rank), ("embed", "rank"), p.zeros, may_lack=may_lack)

    def up(name, rank, may_lack=()):
        init = p.orthogonal(0.1 * max(1.0, rank / width) ** 0.5)
        return p.Param(f"blocks.{{layer}}.att.{name}", (rank, width), ("rank", "att_of_rank"), init, may_lack=may_lack)

    def matrix(name, shape, axes, init):
        key = name if name.startswith(("emb", "head")) else f"blocks.{{layer}}.{name}"
        layout: p.Layout = "same" if name.startswith("emb") else "transposed"
        return p.Param(f"{key}.weight", shape, axes, init, decays=True, layout=layout)

    heads = (config.num_heads, config.head_dim)
    square = (width, width)
    centred = position - 0.5
    unused = (0,)
    att = TimeMix(
        x_r=vector("att.x_r", mix(lambda rest: 0.2 * rest)),
        x_w=vector("att.x_w", mix(lambda rest: 0.9 * rest)),
        x_k=vector("att.x_k", mix(lambda rest: 0.7 * rest)),
        x_v=vector("att.x_v", mix(lambda rest: 0.7 * rest)),
        x_a=vector("att.x_a", mix(lambda rest: 0.9 * rest)),
        x_g=vector("att.x_g", mix(lambda rest: 0.2 * rest)),
        w0=vector("att.w0", decay, lr_multiple=2.0),
        w1=down("w1", ranks.decay),
        w2=up("w2", ranks.decay),
        a0=vector("att.a0", constant(-0.19 + 0.3 * zigzag + 0.4 * centred)),
        a1=down("a1", ranks.iclr),
        a2=up("a2", ranks.iclr),
        v0=vector("att.v0", constant(0.73 - 0.4 * centred), may_lack=unused),
        v1=down("v1", ranks.value, may_lack=unused),
        v2=up("v2", ranks.value, may_lack=unused),
        g1=down("g1", ranks.gate),
        g2=up("g2", ranks.gate),
        k_k=vector("att.k_k", constant(0.71 - 0.1 * centred)),
        k_a=vector("att.k_a", constant(1.02)),
        r_k=p.Param("blocks.{layer}.att.r_k", heads, ("heads", "head"), constant(-0.04)),
        ln_x=LayerNorm(
            weight=vector("att.ln_x.weight", head_gain, layout="same"),
            bias=vector("att.ln_x.bias", p.zeros, layout="same"),
        ),
        receptance=matrix("att.receptance", square, ("embed", "att"), p.orthogonal(1.0)),
        key=matrix("att.key", square, ("embed", "att"), p.orthogonal(0.1)),
        value=matrix("att.value", square, ("embed", "att"), p.orthogonal(1.0)),
        output=matrix("att.output", square, ("att", "embed"), p.zeros),
    )
    ffn = ChannelMix(
        x_k=vector("ffn.x_k", mix(lambda rest: rest**4)),
        key=matrix("ffn.key", (width, hidden), ("embed", "ffn"), p.orthogonal(1.0)),
        value=matrix("ffn.value", (hidden, width), ("ffn", "embed"), p.zeros),
    )
    block = Block(
        declare_layer_norm("blocks.{layer}.ln1", width),
        att,
        declare_layer_norm("blocks.{layer}.ln2", width),
        ffn,
    )
    head_gain_all = 0.5 * max(1.0, config.vocab_size / width) ** 0.5
    return Params(
        emb=matrix("emb", (config.vocab_size, width), ("vocab", "embed"), p.uniform(config.embed_init)),
        ln0=declare_layer_norm("blocks.0.ln0", width),
        blocks=block,
        ln_out=declare_layer_norm("ln_out", width),
        head=matrix("head", (width, config.vocab_size), ("embed", "vocab"), p.orthogonal(head_gain_all)),
    )


def init_state(config: RWKV7Config, batch_size: int, dtype=jnp.float32) -> State:
    """Returns the zero state of all layers."""
    last = jnp.zeros((config.num_layers, batch_size, config.embed_dim), dtype)
    wkv = init_wkv7_state(batch_size, config.num_heads, config.head_dim, config.head_dim, dtype)
    return State(last, jnp.zeros_like(last), jnp.broadcast_to(wkv, (config.num_layers, *wkv.shape)))


def init_depth(config: RWKV7Config, x: Float[Array, "B T D"]) -> Depth:
    """Returns what layer 0 is handed besides the residual."""
    del config
    return Depth(jnp.zeros((), jnp.int32), jnp.zeros_like(x))


fresh_state = init_state
"""What a call without a state begins with."""


def embed_tokens(params: Params, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """Returns what the first block reads, in `dtype`: the tokens' rows of the embedding, normalised by ln0."""
    return layer_norm(params.ln0, embed(params.emb, tokens).astype(dtype))


def time_mix(
    params: TimeMix,
    config: RWKV7Config,
    inputs: tuple[Float[Array, "B T D"], Depth],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> tuple[tuple[Float[Array, "B T D"], Depth], State]:
    """Returns (Wo (g * (norm(wkv) + bonus)) of the normalised input, the depth), and the state with att_x and wkv moved on.

        w = -e^{-1/2} sigmoid(w0 + tanh(x_w w1) w2)      iclr = sigmoid(a0 + x_a a1 a2)      g = sigmoid(x_g g1) g2
        kk = normalised(k k_k)      k' = k (1 + (iclr - 1) k_a)      v' = v + (v_first - v) sigmoid(v0 + x_v v1 v2)
        wkv = wkv7(r, w, k', v', -kk, kk iclr)      bonus = v' sum_j r_j k'_j r_k_j

    Args:
        params: One layer's, without the layer axis.
        config: The model's.
        inputs: The input after ln1, in the compute dtype, and the depth.
        state: One layer's.
        reset: True where a token starts a sequence.
        length: Tokens of each row that count; None is T.
        backend: Of wkv7.

    Source: arXiv 2503.14456, section 4.
    """
    x, depth = inputs
    wide = state.wkv.dtype
    shifted, att_x = token_shift(x, state.att_x, reset, length)
    difference = shifted - x
    r = linear(_mix(x, difference, params.x_r), params.receptance)
    k = linear(_mix(x, difference, params.x_k), params.key)
    x_v = _mix(x, difference, params.x_v)
    v = linear(x_v, params.value)
    decay = linear(jnp.tanh(linear(_mix(x, difference, params.x_w), params.w1)), params.w2).astype(wide)
    iclr = linear(linear(_mix(x, difference, params.x_a), params.a1), params.a2)
    gate = linear(jax.nn.sigmoid(linear(_mix(x, difference, params.x_g), params.g1)), params.g2)

    w = -STRONGEST_DECAY * jax.nn.sigmoid(spread(params.w0, decay) + decay)
    iclr = jax.nn.sigmoid(spread(params.a0, x) + iclr)
    residual = jax.nn.sigmoid(spread(params.v0, x) + linear(linear(x_v, params.v1), params.v2))
    v_first = jnp.where(depth.layer == 0, v, depth.v_first)
    v = v + (v_first - v) * residual  # Layer 0's v_first is its own v.

    kk = k * spread(params.k_k, x)
    k = k * (1 + (iclr - 1) * spread(params.k_a, x))
    r, w, k, v, kk, iclr = (z.reshape(*z.shape[:2], -1, config.head_dim) for z in (r, w, k, v, kk, iclr))
    kk = _normalised(kk)
    y, wkv = wkv7(r, w, k, v, -kk, kk * iclr, state.wkv, reset=reset, length=length, backend=backend)
    bonus = squeezed(r * k * spread(params.r_k, r)).sum(-1, keepdims=True) * squeezed(v)
    y = group_norm(params.ln_x, y, config.ln_x_eps) + bonus.reshape(x.shape)
    y = linear(y * gate, params.output)
    return (y, Depth(depth.layer + 1, v_first)), state._replace(att_x=att_x, wkv=wkv)


def channel_mix(
    params: ChannelMix,
    config: RWKV7Config,
    x: Float[Array, "B T D"],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], State]:
    """Returns Wv relu(Wk x_k)^2 of the normalised input, and the state with ffn_x moved on.

    Args: as in `time_mix`, with x after ln2.

    Source: arXiv 2503.14456, section 4.
    """
    del config
    shifted, ffn_x = token_shift(x, state.ffn_x, reset, length)
    y = feed_forward(_mix(x, shifted - x, params.x_k), params.key, params.value)
    return y, state._replace(ffn_x=ffn_x)


def block(
    params: Block,
    config: RWKV7Config,
    inputs: tuple[Float[Array, "B T D"], Depth],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> tuple[tuple[Float[Array, "B T D"], Depth], State]:
    """Returns ((x + time mix + channel mix, the depth of the next layer), the layer's new state).

    Args: as in `time_mix`, but inputs are the residual x and the depth, from `init_depth` or the layer before.
    """
    x, depth = inputs
    (y, depth), state = time_mix(
        params.att, config, (layer_norm(params.ln1, x), depth), state, reset=reset, length=length, backend=backend
    )
    x = x + y
    y, state = channel_mix(params.ffn, config, layer_norm(params.ln2, x), state, reset=reset, length=length)
    return (x + y, depth), state


def _mix(x, difference, weight):
    return x + difference * spread(weight, x)


def _normalised(k):
    """k at length 1 in each head, with a finite gradient at 0."""
    wide = squeezed(k).astype(jnp.promote_types(k.dtype, jnp.float32))
    length = jnp.maximum((wide * wide).sum(-1, keepdims=True), SMALLEST_NORM**2)
    return (wide * jax.lax.rsqrt(length)).astype(k.dtype).reshape(k.shape)
