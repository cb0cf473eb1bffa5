"""RWKV-4 ("Dove"): the model of the paper.

Differences from upstream: only what the released Pile models use (no pre_ffn, tiny_att, head_qk or positional embedding);
the initialisation is that of the code where the paper's text deviates.

Source: arXiv 2305.13048, section 3 and appendices D and E; BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rwkv_kernels import WKV4State
from rwkv_kernels.wkv4 import init_wkv4_state

from .. import params as p
from ..nn.axes import spread
from ..nn.feed_forward import feed_forward
from ..nn.layer_norm import LayerNorm, declare_layer_norm, layer_norm
from ..nn.linear import embed, linear
from ..nn.token_shift import token_shift
from ..nn.wkv import wkv4
from .base import ModelConfig, Shapes, common_fields


@dataclass(frozen=True)
class RWKV4Config(ModelConfig):
    """The size of an RWKV-4 and how it computes."""

    architecture: Literal["rwkv4"] = "rwkv4"
    """Which model this is."""

    @property
    def hidden_dim(self) -> int:
        """The hidden width of the channel mix, 4 * embed_dim unless ffn_dim is given."""
        return self.ffn_dim or 4 * self.embed_dim


class TimeMix(NamedTuple):
    """Parameters of the time mix: [D] for the first five, then [D, D], applied as x @ matrix."""

    time_mix_k: p.Leaf
    time_mix_v: p.Leaf
    time_mix_r: p.Leaf
    time_decay: p.Leaf
    time_first: p.Leaf
    key: p.Leaf
    value: p.Leaf
    receptance: p.Leaf
    output: p.Leaf


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
    """What the model remembers: [B, D] each in one layer, [L, B, D] for the model; float32 (or float64).

    att_x and ffn_x are the normalised inputs of the last token; aa, bb, pp are WKV's sums, scaled by exp(-pp).
    """

    att_x: Array
    ffn_x: Array
    aa: Array
    bb: Array
    pp: Array


def recognises(shapes: Shapes) -> bool:
    """Returns whether an official checkpoint's keys are this version's."""
    return "blocks.0.att.time_first" in shapes and "blocks.0.att.ln_x.weight" not in shapes


def config_of(shapes: Shapes) -> RWKV4Config:
    """Returns the config that an official checkpoint's shapes imply."""
    return RWKV4Config(**common_fields(shapes, ffn_multiple=4))


def declare(config: RWKV4Config) -> Params:
    """Declares every parameter, once."""
    width, hidden, layers = config.embed_dim, config.hidden_dim, config.num_layers

    def depth(layer):  # 0 at the first layer, 1 at the last (0 if it is the only one)
        return layer / max(layers - 1, 1)

    def mix(exponent, offset=0.0):
        def init(key, shape, layer):
            channel = np.arange(width) / width
            return jnp.asarray(channel ** (exponent * (1 - layer / layers)) + offset * depth(layer))

        return init

    def decay(key, shape, layer):
        position = np.arange(width) / max(width - 1, 1)
        return jnp.asarray(-5 + 8 * position ** (0.7 + 1.3 * depth(layer)))

    def bonus(key, shape, layer):
        return jnp.asarray(np.log(0.3) + 0.5 * ((np.arange(width) + 1) % 3 - 1))

    def vector(name, init, lr_multiple=1.0, layout: p.Layout = "1x1"):
        return p.Param(f"blocks.{{layer}}.{name}", (width,), ("embed",), init, lr_multiple, layout=layout)

    def matrix(name, shape, axes, init):
        key = name if name.startswith(("emb", "head")) else f"blocks.{{layer}}.{name}"
        layout: p.Layout = "same" if name.startswith("emb") else "transposed"
        return p.Param(f"{key}.weight", shape, axes, init, decays=True, layout=layout)

    square = (width, width)
    att = TimeMix(
        time_mix_k=vector("att.time_mix_k", mix(1.0)),
        time_mix_v=vector("att.time_mix_v", mix(1.0, offset=0.3)),
        time_mix_r=vector("att.time_mix_r", mix(0.5)),
        time_decay=vector("att.time_decay", decay, lr_multiple=2.0, layout="same"),
        time_first=vector("att.time_first", bonus, lr_multiple=3.0, layout="same"),
        key=matrix("att.key", square, ("embed", "att"), p.zeros),
        value=matrix("att.value", square, ("embed", "att"), p.orthogonal(1.0)),
        receptance=matrix("att.receptance", square, ("embed", "att"), p.zeros),
        output=matrix("att.output", square, ("att", "embed"), p.zeros),
    )
    ffn = ChannelMix(
        time_mix_k=vector("ffn.time_mix_k", mix(1.0)),
        time_mix_r=vector("ffn.time_mix_r", mix(1.0)),
        key=matrix("ffn.key", (width, hidden), ("embed", "ffn"), p.orthogonal(max(1.0, hidden / width) ** 0.5)),
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


def init_state(config: RWKV4Config, batch_size: int, dtype=jnp.float32) -> State:
    """Returns the zero state of all layers, [L, batch_size, D] each."""
    layer = partial(jnp.zeros, (batch_size, config.embed_dim), dtype)
    one = State(layer(), layer(), *init_wkv4_state(batch_size, config.embed_dim, dtype))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (config.num_layers, *x.shape)), one)


fresh_state = init_state
"""What a call without a state begins with."""


def embed_tokens(params: Params, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """Returns what the first block reads, in `dtype`: the tokens' rows of the embedding, normalised by ln0."""
    return layer_norm(params.ln0, embed(params.emb, tokens).astype(dtype))


def time_mix(
    params: TimeMix,
    config: RWKV4Config,
    x: Float[Array, "B T D"],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "B T D"], State]:
    """Returns Wo (sigmoid(r) * wkv(k, v)) of the normalised input, and the state with att_x, aa, bb, pp moved on.

    Args:
        params: One layer's, without the layer axis.
        config: The model's.
        x: Input after ln1, in the compute dtype.
        state: One layer's, [B, D] each.
        reset: True where a token starts a sequence.
        length: Tokens of each row that count; None is T.
        backend: Of wkv4.

    Source: arXiv 2305.13048, equations 13 to 17.
    """
    del config
    shifted, att_x = token_shift(x, state.att_x, reset, length)
    k = linear(_mix(x, shifted, params.time_mix_k), params.key)
    v = linear(_mix(x, shifted, params.time_mix_v), params.value)
    r = linear(_mix(x, shifted, params.time_mix_r), params.receptance)
    w = -jnp.exp(params.time_decay.astype(state.aa.dtype))
    wkv, (aa, bb, pp) = wkv4(
        k, v, w, params.time_first, WKV4State(state.aa, state.bb, state.pp),
        reset=reset, length=length, backend=backend,
    )  # fmt: skip
    y = linear(jax.nn.sigmoid(r) * wkv, params.output)
    return y, state._replace(att_x=att_x, aa=aa, bb=bb, pp=pp)


def channel_mix(
    params: ChannelMix,
    config: RWKV4Config,
    x: Float[Array, "B T D"],
    state: State,
    *,
    reset: Bool[Array, "B T"] | None = None,
    length: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], State]:
    """Returns sigmoid(r) * Wv relu(k)^2 of the normalised input, and the state with ffn_x moved on.

    Args: as in `time_mix`, with x after ln2.

    Source: arXiv 2305.13048, equation 18.
    """
    del config
    shifted, ffn_x = token_shift(x, state.ffn_x, reset, length)
    r = linear(_mix(x, shifted, params.time_mix_r), params.receptance)
    y = jax.nn.sigmoid(r) * feed_forward(_mix(x, shifted, params.time_mix_k), params.key, params.value)
    return y, state._replace(ffn_x=ffn_x)


def init_depth(config: RWKV4Config, x: Float[Array, "B T D"]) -> tuple[()]:
    """Returns what the blocks hand on from layer to layer besides the residual: nothing."""
    del config, x
    return ()


def block(
    params: Block,
    config: RWKV4Config,
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


def _mix(x, shifted, weight):
    weight = spread(weight, x)
    return x * weight + shifted * (1 - weight)
