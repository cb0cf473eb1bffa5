"""Fine-tuning: all parameters of a model, low-rank adapters of its matrices, or its first state.

A method is what is trained (`declare`, `init`) and how the model is formed from it and from the model tuned (`assembler`); the
training step, the optimiser and the checkpoints are those of training from scratch.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from . import lm
from . import params as p
from .models import Config, module_of
from .train import Assemble, whole

_COMPUTE_FIELDS = ("dtype", "remat")
"""Fields of a model's config that say how it computes, and not what."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Which model a run starts from, and what of it is trained. The default is training from scratch."""

    init_from: str | None = None
    """The model to start from, in any format that rwkv_jax.load reads; none: from scratch. Fields of the model section that are
    not given are taken from it, and it is copied to the run's folder, so that it is read only once."""
    init_commit: str | None = None
    """Commit of an hf:// init_from; none: what its revision stands for when the run starts, which is then recorded here."""
    method: Literal["all", "lora", "state"] = "all"
    """all parameters; lora: low-rank adapters of matrices; state: only the WKV state that every row starts from."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """The adapters' product counts lora_alpha / lora_rank times."""
    lora_targets: tuple[str, ...] | None = None
    """Names of the matrices that are adapted, such as key, in both mixes, or att.key; none: all of both mixes."""
    compare_source: Literal["stdlib", "text", "none"] = "stdlib"
    """A second held-out corpus whose bits per byte are shown before and after, on run.validation_tokens of it: Python's standard
    library, text files, or none."""
    compare_path: str | None = None
    """Its file, folder or glob (text)."""

    def __post_init__(self):
        if self.method != "all" and self.init_from is None:
            raise ValueError(f"finetune.method={self.method!r} needs finetune.init_from, the model to tune")
        if self.lora_rank < 1:
            raise ValueError(f"finetune.lora_rank is {self.lora_rank}; it must be at least 1")
        if self.lora_alpha <= 0:
            raise ValueError(f"finetune.lora_alpha is {self.lora_alpha}; it must be positive")
        if self.lora_targets == ():
            raise ValueError("finetune.lora_targets is empty; leave it out for all matrices, or name some")
        if self.compare_source == "text" and self.compare_path is None:
            raise ValueError("finetune.compare_source='text' needs finetune.compare_path")


class Adapter(NamedTuple):
    """A change of one matrix [D, F], scale * a @ b, in every layer: a [L, D, R], b [L, R, F]."""

    a: p.Leaf
    b: p.Leaf


def declare(config: FinetuneConfig, model: Config) -> Any:
    """Declares what is trained: the model's parameters; adapters, by mix and matrix; or the learned field of its state.

    Raises:
        ValueError: A target is no matrix of the model, or it has no WKV state.
    """
    if config.method == "lora":
        return _declare_adapters(config, model)
    if config.method == "state":
        return _declare_state(model)
    return module_of(model).declare(model)


def init(key: PRNGKeyArray, config: FinetuneConfig, model: Config, base: Any) -> Any:
    """Returns what is trained as it is at the start, where the model formed from it is `base` itself."""
    return base if config.method == "all" else p.init(key, declare(config, model), model.num_layers)


def assembler(config: FinetuneConfig, model: Config) -> Assemble:
    """Returns the function from what is trained and the model tuned to all parameters and the first state of a row."""
    if config.method == "lora":
        scale = config.lora_alpha / config.lora_rank
        return lambda adapters, base: (merge(base, adapters, scale), None)
    if config.method == "state":
        return lambda learned, base: (base, first_state(learned, model))
    return whole


def merge(params: Any, adapters: Any, scale: float) -> Any:
    """Returns the parameters with W + scale * a @ b in place of every adapted matrix W.

    Args:
        params: The model's.
        adapters: An `Adapter` by mix and matrix, as declared.
        scale: alpha / rank.

    Source: arXiv 2106.09685, section 4.1.
    """
    mixes = {}
    for mix, matrices in adapters.items():
        own = getattr(params.blocks, mix)
        mixes[mix] = own._replace(**{name: getattr(own, name) + scale * (a @ b) for name, (a, b) in matrices.items()})
    return params._replace(blocks=params.blocks._replace(**mixes))


def first_state(learned: dict[str, jax.Array], model: Config) -> Any:
    """Returns the state of one row that has the learned WKV state of every layer, and is zero elsewhere.

    RWKV-4 has a weighted mean for a state: its numerator aa, at the scale exp(pp), over a denominator bb that must stay positive. Only
    the numerator is learned; pp, which is -1e38 in the zero state, is 0, so that it counts.
    """
    (dtype,) = {value.dtype for value in learned.values()}
    state = lm.init_state(model, 1, dtype)
    if "pp" in state._fields:
        state = state._replace(pp=jnp.zeros_like(state.pp))
    return state._replace(**{name: value[:, None] for name, value in learned.items()})


def resolve_model(wanted: Config, given: Collection[str], base: Config, origin: str) -> Config:
    """Returns the config of the model that is tuned, which computes as asked.

    Args:
        wanted: The config's model section, defaults included.
        given: Names of the fields that a file or the command line gives, such as model.dtype.
        base: The config of the model tuned.
        origin: Where that comes from, for the error.

    Raises:
        ValueError: Fields given differ from the model's; they are listed.
    """
    names = {name.removeprefix("model.") for name in given if name.startswith("model.")}
    wrong = [
        f"model.{name}: {getattr(wanted, name)!r}, in {origin} {getattr(base, name, None)!r}"
        for name in sorted(names.difference(_COMPUTE_FIELDS))
        if getattr(wanted, name) != getattr(base, name, None)
    ]
    if wrong:
        raise ValueError(
            f"{origin} is another model than the config's; leave these out and they are taken from it:\n  "
            + "\n  ".join(wrong)
        )
    return dataclasses.replace(base, **{name: getattr(wanted, name) for name in names.intersection(_COMPUTE_FIELDS)})


def check_tokenizer(name: str, model: Config, origin: str) -> None:
    """Raises ValueError unless the tokenizer is the model's own, or the model does not say which it wants."""
    if model.tokenizer is not None and model.tokenizer != name:
        raise ValueError(
            f"data.tokenizer is {name!r}, but {origin} was trained with {model.tokenizer!r}; set data.tokenizer to that"
        )


def _declare_adapters(config: FinetuneConfig, model: Config) -> dict[str, dict[str, Adapter]]:
    blocks = module_of(model).declare(model).blocks
    matrices = {mix: _matrices(getattr(blocks, mix)) for mix in ("att", "ffn")}
    names = {f"{mix}.{name}" for mix, own in matrices.items() for name in own}
    short = {name.partition(".")[2] for name in names}
    targets = names if config.lora_targets is None else set(config.lora_targets)
    if unknown := sorted(targets - names - short):
        raise ValueError(
            f"finetune.lora_targets has {', '.join(unknown)}; the matrices of {model.architecture} are "
            f"{', '.join(sorted(short))}, or one mix's alone, such as {min(names)}"
        )
    chosen = {
        mix: {
            name: _declare_adapter(matrix, config.lora_rank)
            for name, matrix in own.items()
            if targets & {name, f"{mix}.{name}"}
        }
        for mix, own in matrices.items()
    }
    return {mix: own for mix, own in chosen.items() if own}


def _matrices(mix: Any) -> dict[str, p.Param]:
    """The mix's linear layers, which the official names call weights; other two-dimensional parameters are not applied so."""
    return {
        name: param
        for name, param in mix._asdict().items()
        if isinstance(param, p.Param) and len(param.shape) == 2 and param.key.endswith(".weight")
    }


def _declare_adapter(matrix: p.Param, rank: int) -> Adapter:
    rows, columns = matrix.shape
    key, (row_axis, column_axis) = matrix.key.removesuffix(".weight"), matrix.axes

    def normal(key, shape, layer):
        return jax.random.normal(key, shape) / rows**0.5

    declare_one = partial(p.Param, lr_multiple=matrix.lr_multiple, decays=True)
    return Adapter(
        a=declare_one(f"{key}.lora_A.weight", (rows, rank), (row_axis, "lora"), normal),
        b=declare_one(f"{key}.lora_B.weight", (rank, columns), ("lora", column_axis), p.zeros),
    )


def _declare_state(model: Config) -> dict[str, p.Param]:
    state = jax.eval_shape(lambda: lm.init_state(model, 1))
    name = next((name for name in ("wkv", "aa") if name in state._fields), None)
    if name is None:
        raise ValueError(
            f"finetune.method is 'state', and a {model.architecture} has no WKV state to learn; set it to 'lora' or 'all'"
        )
    shape = getattr(state, name).shape[2:]
    axes = ("heads", "head", "head") if len(shape) == 3 else ("embed",)
    return {name: p.Param("blocks.{layer}.att.time_state", shape, axes, p.zeros, decays=len(shape) == 3)}
