"""The models as Flax NNX modules: thin wrappers that hold the parameters and call the pure functions with them.

Every leaf of a parameter tree is one `nnx.Param` at the same path, so that `nnx.split(model, nnx.Param)` gives the same
parameters under the same names, and blocks are stacked over layers. The state is an argument and a result, as everywhere.
"""

from typing import Any, Literal

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from . import lm
from .models import Config, module_of


class _Parameters(nnx.Module):
    """Holds a NamedTuple of arrays, each as a Param, under its own field names."""

    def __init__(self, params: Any):
        self._kind = type(params)
        for name, value in params._asdict().items():
            setattr(self, name, _hold(value))

    def to_params(self) -> Any:
        """Returns the parameters as the pure functions take them."""
        return self._kind(*(_held(getattr(self, name)) for name in self._kind._fields))


def _hold(value: Any) -> Any:
    if value is None:  # A parameter that this variant of a version does not have.
        return None
    return _Parameters(value) if hasattr(value, "_fields") else nnx.Param(value)


def _held(value: Any) -> Any:
    if value is None:
        return None
    return value.to_params() if isinstance(value, _Parameters) else value[...]


class _Layer(_Parameters):
    def __init__(self, config: Config, params: Any):
        super().__init__(params)
        self.config = config


class TimeMix(_Layer):
    """The time mix of one layer."""

    def __call__(self, x: Any, state: Any, **options: Any) -> tuple[Any, Any]:
        """Returns what `time_mix` of the version's module does for these inputs; options: reset, length, backend."""
        return module_of(self.config).time_mix(self.to_params(), self.config, x, state, **options)


class ChannelMix(_Layer):
    """The channel mix of one layer."""

    def __call__(self, x: Any, state: Any, **options: Any) -> tuple[Any, Any]:
        """Returns what `channel_mix` of the version's module does for these inputs; options: reset, length."""
        return module_of(self.config).channel_mix(self.to_params(), self.config, x, state, **options)


class Block(_Layer):
    """One block; in `RWKV` the blocks of all layers, every Param with a leading layer axis."""

    def __init__(self, config: Config, params: Any):
        super().__init__(config, params)
        self.att = TimeMix(config, params.att)
        self.ffn = ChannelMix(config, params.ffn)

    def __call__(self, inputs: Any, state: Any, **options: Any) -> tuple[Any, Any]:
        """Returns what `block` of the version's module does for (x, depth); options: reset, length, backend."""
        return module_of(self.config).block(self.to_params(), self.config, inputs, state, **options)


class RWKV(_Layer):
    """A whole model of any version.

    Args:
        config: The model's.
        params: From `init` or `load`; None: fresh ones.
        rngs: What fresh ones are drawn from.
    """

    def __init__(self, config: Config, params: Any = None, *, rngs: nnx.Rngs | None = None):
        if (params is None) == (rngs is None):
            raise ValueError("RWKV takes either params, or rngs to draw fresh ones from, such as nnx.Rngs(0)")
        params = lm.init(rngs.params(), config) if rngs is not None else params
        if lm.is_unstacked(params):
            raise ValueError(
                "the layers of these params are apart; RWKV takes them stacked, as before rwkv_jax.unstack"
            )
        super().__init__(config, params)
        self.blocks = Block(config, params.blocks)

    def init_state(self, batch_size: int) -> Any:
        """Returns the zero state of `batch_size` sequences."""
        return lm.init_state(self.config, batch_size)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: Any = None,
        reset: Bool[Array, "B T"] | None = None,
        length: Int[Array, "B"] | None = None,
        backend: str | None = None,
        *,
        positions: Literal["all", "last"] = "all",
    ) -> tuple[Float[Array, "B N A"], Any]:
        """Returns the logits and the next state; arguments as in `rwkv_jax.forward`."""
        return lm.forward(self.to_params(), self.config, tokens, state, reset, length, backend, positions=positions)
