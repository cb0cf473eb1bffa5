"""Which format a file or folder has, by what is in it, never by its name."""

import json
from pathlib import Path
from typing import Any

from . import huggingface, rwkv_cpp, safetensors_file, torch_pickle
from .stored import Checkpoint

# A safetensors file begins with a number that could by chance be another's magic, so its own sign is looked for first but one:
# rwkv.cpp's magic, as a number, would be a header of a gigabyte.
_CONTAINERS = (rwkv_cpp, safetensors_file, torch_pickle)
_PREFIX = "_forward_module."
"""What DeepSpeed's wrapper puts before every name."""
_CONFIG = "config.json"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_HEAD = 16


def open_checkpoint(path: Path) -> Checkpoint:
    """Returns what is in a file, or in a folder of Hugging Face's, under official names; no tensor is read yet.

    Raises:
        FileNotFoundError: There is nothing there, or a part is missing.
        ValueError: It is no format that is known here, or is truncated or damaged.
    """
    return _open_folder(path) if path.is_dir() else _named(_open_file(path))


def is_huggingface(path: Path) -> bool:
    """Returns whether a path is a folder of Hugging Face's."""
    return (path / _CONFIG).is_file()


def _open_file(path: Path) -> Checkpoint:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for container in _CONTAINERS:
        if container.begins(head):
            return container.read(path)
    raise ValueError(
        f"{path}: truncated, or no format that is known here: it begins with {head!r}; what can be read is .safetensors, "
        "torch's .pth, rwkv.cpp's .bin, Hugging Face folders and runs of this library"
    )


def _named(checkpoint: Checkpoint) -> Checkpoint:
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in checkpoint.tensors.items()}
    return checkpoint._replace(tensors=huggingface.official(tensors))


def _open_folder(folder: Path) -> Checkpoint:
    settings = _json(folder / _CONFIG)
    huggingface.check_config(settings, folder / _CONFIG)
    parts = [_open_file(path) for path in _weight_files(folder)]
    merged = {key: tensor for part in parts for key, tensor in part.tensors.items()}
    named = _named(Checkpoint(f"Hugging Face folder, {parts[0].format}", merged))
    return named._replace(ln_x_eps=huggingface.ln_x_eps(settings, named.tensors))


def _weight_files(folder: Path) -> list[Path]:
    for name in _SINGLE:
        if (folder / name).is_file():
            return [folder / name]
    for name in _INDEXES:
        if (folder / name).is_file():
            try:
                files = sorted({folder / file for file in _json(folder / name)["weight_map"].values()})
            except (KeyError, AttributeError, TypeError):
                raise ValueError(f"{folder / name}: has no weight_map of names; fetch it again") from None
            missing = [file.name for file in files if not file.is_file() or file.parent != folder]
            if missing:
                raise FileNotFoundError(f"{folder}: {name} names files that are missing: {', '.join(missing)}")
            return files
    raise FileNotFoundError(f"{folder}: has {_CONFIG}, but none of {', '.join(_SINGLE + _INDEXES)}")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: truncated, or not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a table in JSON; fetch it again")
    return content
