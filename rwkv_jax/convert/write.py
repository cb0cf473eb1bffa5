"""Writes checkpoints, whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from ..models import Config
from . import huggingface, safetensors_file, torch_file
from .stored import Checkpoint, Stored, Tensors

Format = Literal["safetensors", "pth", "huggingface"]
"""What can be written."""
_BY_SUFFIX: dict[str, Format] = {".safetensors": "safetensors", ".st": "safetensors", ".pth": "pth", "": "huggingface"}
_LAYER = re.compile(r"blocks\.(\d+)\.")
_FOLDER_FILES = {"config.json", "model.safetensors"}


def format_of(path: Path, format: str | None = None) -> Format:
    """Returns the format to write: the one given, else what the path's suffix says.

    Raises:
        ValueError: Neither names one.
    """
    if format is None and path.suffix in _BY_SUFFIX:
        return _BY_SUFFIX[path.suffix]
    for known in get_args(Format):
        if format == known:
            return known
    given = f"format is {format!r}" if format is not None else f"{path}: the suffix {path.suffix!r} names no format"
    raise ValueError(
        f"{given}; give a path that ends in .safetensors, .st, .pth or, for a Hugging Face folder, in no suffix, or "
        f"format= one of {', '.join(get_args(Format))}"
    )


def write_checkpoint(path: Path, checkpoint: Checkpoint, config: Config, format: Format) -> None:
    """Writes tensors under official names; what was at `path` is replaced at the end, and left alone if that is not reached."""
    if format == "huggingface":
        tensors, settings = huggingface.exported(checkpoint, config)
        with whole_folder(path) as folder:
            (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            with (folder / "model.safetensors").open("wb") as file:
                safetensors_file.write(file, tensors)
                _flush(file)
        return
    told = None if config.implied_by_shapes else config
    if format == "pth" and told is not None:
        raise ValueError(
            f"{path}: a .pth has no room for what the tensors of a {config.architecture} do not show; save it as safetensors or "
            "huggingface"
        )
    with whole_file(path) as file:
        if format == "pth":
            torch_file.write(file, _layer_by_layer(checkpoint.tensors))
        else:
            safetensors_file.write(file, checkpoint.tensors, checkpoint.ln_x_eps, told)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Gives a file to write to that gets its name only once it is complete, and is gone otherwise."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give the path of a file")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=_parent(path))
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            _flush(file)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to write to, as `whole_file` does a file; it replaces an empty folder or one of the same files."""
    if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - _FOLDER_FILES):
        raise FileExistsError(f"{path}: is in the way, and holds other things than a saved model; give another path")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=_parent(path)))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _layer_by_layer(tensors: Tensors) -> dict[str, Stored]:
    """In the order of official files, from which the rwkv package tells RWKV-5 by meeting ln_x before a time_decay."""

    def place(key: str) -> tuple[int, int]:
        layer = _LAYER.match(key)
        return (1, int(layer[1])) if layer else (0 if key.startswith("emb.") else 2, 0)

    return {key: tensors[key] for key in sorted(tensors, key=place)}


def _parent(path: Path) -> Path:
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.absolute().parent}: no such folder to save {path.name} in; make it first")
    return path.absolute().parent


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
