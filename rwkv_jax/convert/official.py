"""Checkpoints under BlinkDL's official key names, as .safetensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .. import params as p
from ..models import Config, module_of
from ..models.rwkv4 import RWKV4Config


def load_safetensors(path: str | Path, dtype: Any = None) -> tuple[Any, Config]:
    """Returns the parameters and config of an RWKV-4 under the official key names.

    The file is memory-mapped and read a tensor at a time.

    Args:
        path: The file.
        dtype: Of the parameters; None keeps the file's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is truncated or not safetensors, or keys are missing, extra or mis-shaped (all are listed).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            config = config_of_official(shapes, str(path))
            declaration = module_of(config).declare(config)
            problems = p.official_problems(shapes, declaration, config.num_layers)
            if problems:
                raise ValueError(f"{path}: not a whole {config.architecture} checkpoint:\n  " + "\n  ".join(problems))
            return p.from_official(file.get_tensor, declaration, config.num_layers, dtype), config
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error}); fetch or convert it again") from None


def save_safetensors(path: str | Path, params: Any, config: Config) -> None:
    """Writes parameters under the official key names, in their dtype; an existing file is replaced only at the end."""
    path = Path(path)
    declaration = module_of(config).declare(config)
    p.check_shapes(params, declaration, config.num_layers)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(p.to_official(params, declaration, config.num_layers), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def config_of_official(shapes: Mapping[str, tuple[int, ...]], origin: str) -> Config:
    """Returns the config that the shapes of official tensors imply.

    Raises:
        ValueError: The keys are not RWKV-4's.
    """
    needed = ("emb.weight", "blocks.0.ffn.key.weight", "blocks.0.att.time_first")
    missing = [key for key in needed if key not in shapes]
    if missing:
        some = ", ".join(list(shapes)[:4])
        raise ValueError(
            f"{origin}: not an RWKV-4 under the official names: {', '.join(missing)} missing (it has {some}, ...)"
        )
    layers = [int(match[1]) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))]
    if len(shapes["emb.weight"]) != 2 or len(shapes["blocks.0.ffn.key.weight"]) != 2:
        raise ValueError(f"{origin}: emb.weight and blocks.0.ffn.key.weight must be matrices")
    vocab_size, embed_dim = shapes["emb.weight"]
    hidden_dim = shapes["blocks.0.ffn.key.weight"][0]
    return RWKV4Config(
        vocab_size=vocab_size, num_layers=max(layers) + 1, embed_dim=embed_dim,
        ffn_dim=None if hidden_dim == 4 * embed_dim else hidden_dim,
    )  # fmt: skip
