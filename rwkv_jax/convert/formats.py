"""Which format a file or folder has, by what is in it, never by its name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..models import TransformerConfig
from . import huggingface, rwkv_cpp, safetensors_file, torch_pickle
from .stored import Checkpoint, unique

# A safetensors file begins with a number that could by chance be another's magic, so its own sign is looked for first but one:
# rwkv.cpp's magic, as a number, would be a header of a gigabyte.
_CONTAINERS = (rwkv_cpp, safetensors_file, torch_pickle)
_PREFIX = "_forward_module."
"""What DeepSpeed's wrapper puts before every name."""
_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""A folder's weights, or the index of their files: the first that there is."""
_HEAD = 16


def open_checkpoint(path: Path) -> Checkpoint:
    """Returns what is in a file, or in a folder of Hugging Face's, under official names; no tensor is read yet.

    Raises:
        FileNotFoundError: There is nothing there, or a part is missing.
        ValueError: It is no format that is known here, or is truncated or damaged.
    """
    if path.is_dir():
        return _open_folder(path)
    checkpoint = _open_file(path)
    with _naming(path):
        return _named(checkpoint)


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


def _named(checkpoint: Checkpoint, config: TransformerConfig | None = None) -> Checkpoint:
    """The checkpoint, all of it, under official names; config as of `huggingface.config_of`."""
    tensors = unique((key.removeprefix(_PREFIX), tensor) for key, tensor in checkpoint.tensors.items())
    named = huggingface.official(tensors, config)
    if checkpoint.ln_x_eps is None and named.keys() != tensors.keys():
        checkpoint = checkpoint._replace(ln_x_eps=huggingface.ln_x_eps(named))
    return checkpoint._replace(tensors=named, config=config or checkpoint.config)


def _open_folder(folder: Path) -> Checkpoint:
    settings = _json(folder / _CONFIG)
    huggingface.check_config(settings, folder / _CONFIG)
    with _naming(folder / _CONFIG):
        config = huggingface.config_of(settings)
    parts = [_open_file(path) for path in _weight_files(folder)]
    with _naming(folder):
        merged = unique(pair for part in parts for pair in part.tensors.items())
        named = _named(Checkpoint(f"Hugging Face folder, {parts[0].format}", merged), config)
        huggingface.check_sizes(settings, named.tensors)
    return named


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the path before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: has {_CONFIG}, but none of {', '.join(_WEIGHTS)}")
    if found.suffix != ".json":
        return [found]
    try:
        names = sorted(set(_json(found)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (KeyError, AttributeError, TypeError):
        names, outside = [], []
    if not names:
        raise ValueError(f"{found}: has no weight_map of names; fetch it again")
    if outside:
        raise ValueError(f"{found}: names {', '.join(outside)}; a part must be a file in the same folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {found.name} names files that are missing: {', '.join(missing)}")
    return [folder / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: truncated, or not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a table in JSON; fetch it again")
    return content
