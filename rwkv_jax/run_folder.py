"""The folder of a run: one config, one process at a time."""

import fcntl
import os
from pathlib import Path

from . import config as configs
from .config import ConfigError, Settings
from .text import Tokenizer

CONFIG = "config.toml"
_locks: dict[Path, int] = {}


def claim(settings: Settings, resumes: bool) -> Path:
    """Returns the run's folder, made if need be and locked for this process until it ends.

    Args:
        settings: The run's.
        resumes: Whether the folder has a checkpoint, to which the settings must fit; without one, nothing is lost by a change.

    Raises:
        ConfigError: The folder belongs to a run with another config; the fields that differ are listed.
        OSError: It cannot be written, or another process is training in it.
    """
    folder = Path(settings.run.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
    except BlockingIOError:
        raise OSError(
            f"{folder}: another process is training in this folder; wait for it, or use another --run.folder"
        ) from None
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror}); choose another --run.folder") from None
    changed = configs.differences(configs.load(folder / CONFIG), settings) if resumes else []
    if changed:
        raise ConfigError(
            f"{folder} holds a run with another config; use another --run.folder, or undo:\n  " + "\n  ".join(changed)
        )
    return folder


def record(settings: Settings) -> None:
    """Writes the config of a run that is about to start into its folder."""
    path = Path(settings.run.folder, CONFIG)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(configs.to_toml(settings), encoding="utf-8")
    temporary.replace(path)


def check_vocabulary(tokenizer: Tokenizer, settings: Settings) -> None:
    """Raises ConfigError unless the model has a row for every id of the tokenizer."""
    if tokenizer.vocab_size > settings.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {settings.model.vocab_size}, but data.tokenizer={tokenizer.name!r} has ids up to "
            f"{tokenizer.vocab_size - 1}; set it to at least {tokenizer.vocab_size}"
        )


def _lock(folder: Path) -> None:
    if folder.resolve() in _locks:
        return
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    _locks[folder.resolve()] = descriptor
