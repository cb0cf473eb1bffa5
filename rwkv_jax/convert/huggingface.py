"""The names and settings of Hugging Face's models: RWKV-4 as transformers has it, RWKV-7 as flash-linear-attention has it.

GPT-NeoX, whose names do not say all, is in `gpt_neox`.

Source: transformers, models/rwkv/convert_rwkv_checkpoint_to_hf.py; fla-org/flash-linear-attention, utils/convert_from_rwkv7.py.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from ..models import Config, TransformerConfig
from ..nn.layer_norm import EPS
from . import gpt_neox
from .stored import Checkpoint, Stored, Tensors, unique

_RWKV4 = {
    "embeddings": "emb",
    "attention": "att",
    "feed_forward": "ffn",
    "pre_ln": "ln0",
    "time_mix_key": "time_mix_k",
    "time_mix_value": "time_mix_v",
    "time_mix_receptance": "time_mix_r",
}
"""Parts of transformers' names, and the official ones."""
_RWKV7 = {
    "embeddings": "emb",
    "norm": "ln_out",
    "lm_head": "head",
    "layers": "blocks",
    "attn": "att",
    "pre_norm": "ln0",
    "attn_norm": "ln1",
    "ffn_norm": "ln2",
    "g_norm": "ln_x",
    "r_proj": "receptance",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
}
"""Parts of flash-linear-attention's names, and the official ones."""
_RWKV7_FFN = {name: name for name in ("key", "value")}
"""What keeps its name in the channel mix, where the time mix's has another."""
_LORA = {"lora.0.weight": "1", "lora.2.weight": "2", "lora.2.bias": "0"}
"""A low-rank map's inner matrix, outer matrix and offset, and the digit of the official name."""
_LORA_KEY = re.compile(r"(.*\.attn\.)([wavg])_lora\.(lora\.[02]\.\w+)")
_OFFICIAL_LORA_KEY = re.compile(r"(.*\.)att\.([wavg])([012])")
_VECTOR = re.compile(r"\.(x_\w|[wav]0|k_k|k_a)$")
"""Official names of what is [1, 1, D]."""
_SHIFTS = "rwkvag"
"""Order of the token-shift weights in `x_x`, the older packing."""
_MODEL_TYPES = ("rwkv", "rwkv7", gpt_neox.MODEL_TYPE)


def config_of(settings: Mapping[str, Any]) -> TransformerConfig | None:
    """Returns the config that config.json describes, where the tensors do not show it themselves.

    Raises:
        ValueError: It is not one of the models here.
    """
    return gpt_neox.config_of(settings) if settings["model_type"] == gpt_neox.MODEL_TYPE else None


def official(tensors: Tensors, config: TransformerConfig | None = None) -> dict[str, Stored]:
    """Returns the tensors under official names if they have Hugging Face's, else as they are; config as of `config_of`.

    Raises:
        ValueError: They are GPT-NeoX's without a config.
    """
    if config is not None:
        return gpt_neox.official(tensors, config)
    if gpt_neox.recognises(tensors):
        raise ValueError("the tensors are GPT-NeoX's, whose heads only its config.json says; load the folder of both")
    if any(key.startswith("rwkv.blocks.") for key in tensors):
        return unique((_translated(key.removeprefix("rwkv."), _RWKV4), tensor) for key, tensor in tensors.items())
    if any(key.startswith("model.layers.") and key.endswith(".attn.r_k") for key in tensors):
        return unique(
            pair for key, tensor in tensors.items() for pair in _of_rwkv7(key.removeprefix("model."), tensor).items()
        )
    return dict(tensors)


def check_config(settings: Mapping[str, Any], path: Any) -> None:
    """Raises ValueError for a model that config.json describes and that these models are not."""
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in _MODEL_TYPES:
        raise ValueError(f"{path}: model_type is {kind!r}; what can be read is {', '.join(map(repr, _MODEL_TYPES))}")
    if kind == gpt_neox.MODEL_TYPE:
        return  # Its own config_of sees to that.
    eps = settings.get("norm_eps" if kind == "rwkv7" else "layer_norm_epsilon", EPS)
    if not isinstance(eps, float | int) or not math.isclose(eps, EPS):
        raise ValueError(f"{path}: layer norms with eps {eps}; RWKV's have {EPS}")
    if settings.get("hidden_act", "sqrelu") != "sqrelu":
        raise ValueError(f"{path}: hidden_act is {settings['hidden_act']!r}; RWKV's channel mix has 'sqrelu'")


def check_sizes(settings: Mapping[str, Any], tensors: Tensors) -> None:
    """Raises ValueError where config.json gives another size than the tensors, which have official names."""
    found = {"num_hidden_layers": len({match[1] for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))})}
    if "emb.weight" in tensors:
        found |= dict(zip(("vocab_size", "hidden_size"), tensors["emb.weight"].shape, strict=False))
    wrong = [f"{key} is {settings[key]}, the tensors' {n}" for key, n in found.items() if settings.get(key, n) != n]
    if wrong:
        raise ValueError(f"config.json is another model's: {'; '.join(wrong)}; fetch both again")


def ln_x_eps(tensors: Tensors) -> float | None:
    """Returns group norm's eps, which RWKV-7's layout implies, given tensors under official names."""
    if "blocks.0.att.r_k" not in tensors or len(tensors["blocks.0.att.r_k"].shape) != 2:
        return None
    return tensors["blocks.0.att.r_k"].shape[-1] * EPS  # check_config sees to it that norm_eps is that.


def exported(checkpoint: Checkpoint, config: Config) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Returns the tensors under Hugging Face's names, and what config.json says, given official names.

    Raises:
        ValueError: There is no such layout for the version, or it cannot say the group norm's eps.
    """
    tensors = checkpoint.tensors
    if config.architecture == "rwkv4":
        return {_named_rwkv4(key): tensor for key, tensor in tensors.items()}, _config_rwkv4(tensors, config)
    if config.architecture == "rwkv7":
        _check_eps(tensors, checkpoint.ln_x_eps)
        return dict(_named_rwkv7(key, tensor) for key, tensor in tensors.items()), _config_rwkv7(tensors, config)
    if isinstance(config, TransformerConfig):
        return gpt_neox.exported(tensors, config)
    raise ValueError(
        f"Hugging Face's folders exist for rwkv4, rwkv7 and transformer, not for {config.architecture}; save it as safetensors or pth"
    )


def _translated(key: str, names: Mapping[str, str]) -> str:
    return ".".join(names.get(part, part) for part in key.split("."))


def _of_rwkv7(key: str, tensor: Stored) -> dict[str, Stored]:
    lora = _LORA_KEY.fullmatch(key)
    if lora:
        prefix, letter, place = lora.groups()
        name = f"{_translated(prefix, _RWKV7)}{letter}{_LORA.get(place, place)}"
        if tensor.shape[1:]:
            return {name: tensor.transposed()}
        return {name: tensor.reshaped((1, 1, math.prod(tensor.shape)))}
    if key.endswith(".x_x") and tensor.shape[:1] == (len(_SHIFTS),):
        width = math.prod(tensor.shape[1:])
        base = _translated(key, _RWKV7).removesuffix("x")

        def part(i: int) -> Stored:
            return tensor._replace(shape=(1, 1, width), read=lambda: tensor.read()[i].reshape(1, 1, width))

        return {f"{base}{letter}": part(i) for i, letter in enumerate(_SHIFTS)}
    name = _translated(key, _RWKV7)
    return {name: tensor.reshaped((1, 1, math.prod(tensor.shape))) if _VECTOR.search(name) else tensor}


def _named_rwkv4(key: str) -> str:
    back = {ours: theirs for theirs, ours in _RWKV4.items()}
    return _translated(key, back) if key.startswith("head.") else f"rwkv.{_translated(key, back)}"


def _named_rwkv7(key: str, tensor: Stored) -> tuple[str, Stored]:
    back = {ours: theirs for theirs, ours in _RWKV7.items()} | (_RWKV7_FFN if ".ffn." in key else {})
    lora = _OFFICIAL_LORA_KEY.fullmatch(key)
    if lora:
        prefix, letter, digit = lora.groups()
        place = next(place for place, own in _LORA.items() if own == digit)
        name = f"model.{_translated(prefix, back)}attn.{letter}_lora.{place}"
        return name, tensor.transposed() if digit != "0" else tensor.reshaped((math.prod(tensor.shape),))
    name = _translated(key, back)
    name = name if name.startswith("lm_head.") else f"model.{name}"
    return name, tensor.reshaped((math.prod(tensor.shape),)) if key.endswith((".k_k", ".k_a")) else tensor


def _config_rwkv4(tensors: Tensors, config: Config) -> dict[str, Any]:
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "attention_hidden_size": config.embed_dim,
        "intermediate_size": tensors["blocks.0.ffn.key.weight"].shape[0],
        "num_hidden_layers": config.num_layers,
        "layer_norm_epsilon": EPS,
        # What transformers takes by default: the first only trains, the second only guards float16 against overflow.
        "context_length": 1024,
        "rescale_every": 6,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": tensors["emb.weight"].dtype.name,
    }


def _config_rwkv7(tensors: Tensors, config: Config) -> dict[str, Any]:
    width = config.embed_dim
    hidden = tensors["blocks.0.ffn.key.weight"].shape[0]
    heads, head_dim = tensors["blocks.0.att.r_k"].shape
    ranks = {"decay": "w", "a": "a", "v": "v", "gate": "g"}
    # v's are in no layer but the second and later.
    last = f"blocks.{config.num_layers - 1}.att"
    found = {
        f"{name}_low_rank_dim": tensors[f"{last}.{letter}1"].shape[1]
        for name, letter in ranks.items()
        if f"{last}.{letter}1" in tensors
    }
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "hidden_ratio": hidden / width,
        "intermediate_size": hidden,
        "num_hidden_layers": config.num_layers,
        "head_dim": head_dim,
        "num_heads": heads,
        **found,
        "value_dim": [width] * config.num_layers,
        "norm_bias": True,
        "norm_eps": EPS,
        "norm_first": True,
        "hidden_act": "sqrelu",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": tensors["emb.weight"].dtype.name,
    }


def _check_eps(tensors: Tensors, eps: float | None) -> None:
    head_dim = tensors["blocks.0.att.r_k"].shape[-1]
    if eps is not None and not math.isclose(eps, head_dim * EPS, rel_tol=1e-9):
        raise ValueError(
            f"ln_x_eps is {eps}, and this layout can only say head_dim * norm_eps = {head_dim} * {EPS} = {head_dim * EPS:g} "
            "(norm_eps is every other norm's too); save it as safetensors or pth"
        )
