"""Checkpoints under BlinkDL's official key names, as .safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .. import params as p
from ..models import Config, config_of, module_of


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
            config = _config(shapes, path)
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


def _config(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Config:
    try:
        return config_of(shapes)
    except ValueError as error:
        raise ValueError(f"{path}: not a checkpoint of RWKV under the official names: {error}") from None
