"""The names and settings of GPT-NeoX in Hugging Face's transformers, which the Pythia models are released in.

Query, key and value of each head lie together there, as [H, 3, K] rows of one matrix; config.json says how many heads there are.

Source: transformers, models/gpt_neox/modeling_gpt_neox.py and configuration_gpt_neox.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..models import TransformerConfig
from ..models.base import TOKENIZERS
from ..nn.attention import ROTARY_BASE
from ..nn.layer_norm import EPS
from .stored import Stored, Tensors, unique

MODEL_TYPE = "gpt_neox"
_PREFIX = "gpt_neox."
_NAMES = {
    "embed_in": "emb",
    "embed_out": "head",
    "final_layer_norm": "ln_out",
    "layers": "blocks",
    "input_layernorm": "ln1",
    "attention": "att",
    "dense": "output",
    "post_attention_layernorm": "ln2",
    "mlp": "ffn",
    "dense_h_to_4h": "key",
    "dense_4h_to_h": "value",
}
"""Parts of transformers' names, and ours."""
_PACKED = "query_key_value"
_PARTS = ("query", "key", "value")
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq")
"""What older files hold besides the parameters: the causal mask and the frequencies."""
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def recognises(tensors: Tensors) -> bool:
    """Returns whether tensors have these names."""
    return any(key.startswith(f"{_PREFIX}layers.") for key in tensors)


def config_of(settings: Mapping[str, Any]) -> TransformerConfig:
    """Returns the config that config.json describes.

    Raises:
        ValueError: It describes what the transformer here is not.
    """
    _check(settings)
    width, hidden = settings["hidden_size"], settings["intermediate_size"]
    return TransformerConfig(
        vocab_size=settings["vocab_size"],
        num_layers=settings["num_hidden_layers"],
        embed_dim=width,
        ffn_dim=None if hidden == 4 * width else hidden,
        head_dim=width // settings["num_attention_heads"],
        rotary_fraction=_rotary(settings).get("partial_rotary_factor", settings.get("rotary_pct", 0.25)),
        context_length=settings.get("max_position_embeddings", 2048),
        parallel_residual=settings.get("use_parallel_residual", True),
        tokenizer=TOKENIZERS.get(settings["vocab_size"]),
    )


def official(tensors: Tensors, config: TransformerConfig) -> dict[str, Stored]:
    """Returns the tensors under the names of the transformer's declaration; masks and frequencies are left out."""

    def named(key: str, tensor: Stored) -> list[tuple[str, Stored]]:
        name = ".".join(_NAMES.get(part, part) for part in key.removeprefix(_PREFIX).split("."))
        if _PACKED not in name or tensor.shape[:1] != (3 * config.embed_dim,):
            return [(name, tensor)]
        return [(name.replace(_PACKED, part), _unpacked(tensor, i, config)) for i, part in enumerate(_PARTS)]

    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(_BUFFERS)}
    return unique(pair for key, tensor in kept.items() for pair in named(key, tensor))


def exported(tensors: Tensors, config: TransformerConfig) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Returns the tensors under transformers' names, and what config.json says."""
    back = {ours: theirs for theirs, ours in _NAMES.items()}
    named = {}
    for key, tensor in tensors.items():
        parent, _, kind = key.rpartition(".")
        stem, _, part = parent.rpartition(".")
        if stem.endswith(".att") and part in _PARTS:
            if part != _PARTS[0]:
                continue
            tensor = _packed([tensors[f"{stem}.{part}.{kind}"] for part in _PARTS], config)
            key = f"{stem}.{_PACKED}.{kind}"
        name = ".".join(back.get(part, part) for part in key.split("."))
        named[name if name.startswith("embed_out") else _PREFIX + name] = tensor
    return named, {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden_dim,
        "hidden_act": "gelu",
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": int(ROTARY_BASE),
        "max_position_embeddings": config.context_length,
        "layer_norm_eps": EPS,
        "use_parallel_residual": config.parallel_residual,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": tensors["emb.weight"].dtype.name,
    }


def _check(settings: Mapping[str, Any]) -> None:
    rotary = _rotary(settings)
    missing = [name for name in _SIZES if not isinstance(settings.get(name), int) or settings[name] < 1]
    if missing:
        raise ValueError(f"does not say {', '.join(missing)} as positive whole numbers; fetch it again")
    rules = {
        "layer_norm_eps": (settings.get("layer_norm_eps", EPS), EPS),
        "hidden_act": (settings.get("hidden_act", "gelu"), "gelu"),
        "tie_word_embeddings": (settings.get("tie_word_embeddings", False), False),
        "attention_bias": (settings.get("attention_bias", True), True),
        "rotary_emb_base": (rotary.get("rope_theta", settings.get("rotary_emb_base", ROTARY_BASE)), ROTARY_BASE),
        "rope_type": (rotary.get("rope_type", rotary.get("type", "default")), "default"),
    }
    wrong = [f"{name} is {found!r}, not {known!r}" for name, (found, known) in rules.items() if found != known]
    if settings["hidden_size"] % settings["num_attention_heads"]:
        wrong.append(
            f"hidden_size {settings['hidden_size']} is no multiple of {settings['num_attention_heads']} attention heads"
        )
    if wrong:
        raise ValueError(f"not what the transformer here computes: {'; '.join(wrong)}")


def _rotary(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What newer files say of the rotary positions, and older ones only where they differ from the usual."""
    return settings.get("rope_parameters") or settings.get("rope_scaling") or {}


def _unpacked(tensor: Stored, part: int, config: TransformerConfig) -> Stored:
    heads, rest = config.num_heads, tensor.shape[1:]

    def read() -> np.ndarray:
        return tensor.read().reshape(heads, len(_PARTS), -1, *rest)[:, part].reshape(-1, *rest)

    return tensor._replace(shape=(tensor.shape[0] // len(_PARTS), *rest), read=read)


def _packed(parts: list[Stored], config: TransformerConfig) -> Stored:
    heads, (rows, *rest) = config.num_heads, parts[0].shape

    def read() -> np.ndarray:
        return np.stack([part.read().reshape(heads, -1, *rest) for part in parts], axis=1).reshape(-1, *rest)

    return parts[0]._replace(shape=(len(parts) * rows, *rest), read=read)
