"""Checkpoints of a run, through Orbax: written in the background, complete or absent, never half.

A run's `checkpoints/` folder has one folder a step, named by the step, with the items params, training (optimiser, random key,
step), data (the iterator's position) and settings (the whole config). Orbax writes under another name and renames at the end,
so that a folder with a step's name is a whole checkpoint.

params is what is trained. A fine-tuning run has the model that it tunes beside its checkpoints, once, in base.safetensors.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from . import config as configs
from . import finetune
from . import params as p
from .config import Settings
from .convert.formats import open_checkpoint
from .convert.official import Shardings, config_in, float_dtype, to_params, weights
from .models import Config
from .save import save
from .train import TrainState

FOLDER = "checkpoints"
BASE = "base.safetensors"
_METRIC = "validation_bits_per_byte"


class Restored(NamedTuple):
    """What a run needs to go on."""

    train_state: TrainState
    data_state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: keeps the newest `keep_last` and the `keep_best` with the fewest held-out bits per byte."""

    def __init__(self, run_folder: str | Path, keep_last: int, keep_best: int):
        policies: list[Any] = [checkpoint_managers.LatestN(keep_last)]
        if keep_best:
            best = checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[_METRIC], reverse=True, n=keep_best,
                keep_checkpoints_without_metrics=False,
            )  # fmt: skip
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=lambda metrics: metrics[
                _METRIC
            ],  # Without it metrics are not written, and a resumed run forgets the best.
            best_mode="min",
            enable_async_checkpointing=True,
        )
        self.folder = Path(run_folder).resolve() / FOLDER
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(
        self,
        train_state: TrainState,
        data_state: Mapping[str, Any],
        settings: Settings,
        validation_bits_per_byte: float,
    ) -> None:
        """Starts writing a checkpoint named by the state's step; returns once the arrays are copied.

        Raises:
            OSError: This checkpoint, or the one before, could not be written.
        """
        params, training = _split(train_state)
        items = {
            "params": ocp.args.StandardSave(params),
            "training": ocp.args.StandardSave(training),
            "data": ocp.args.JsonSave(dict(data_state)),
            "settings": ocp.args.JsonSave(configs.to_dict(settings)),
        }
        metrics = {_METRIC: validation_bits_per_byte}
        with self._naming_the_last():
            self._manager.save(int(train_state.step), args=ocp.args.Composite(**items), metrics=metrics)

    def latest_step(self) -> int | None:
        """Returns the step of the newest whole checkpoint, or None; waits for one that is being written."""
        with self._naming_the_last():
            self._manager.wait_until_finished()
        return self._manager.latest_step()

    def restore(self, like: TrainState, settings: Settings) -> Restored | None:
        """Returns the newest checkpoint, or None where there is none.

        Args:
            like: Any state of the run, or its shapes; arrays come back where its own lie, whatever mesh they were saved from.
            settings: The run's.

        Raises:
            ValueError: The checkpoint is damaged or was made with other settings, which are listed.
        """
        step = self.latest_step()
        if step is None:
            return None

        def restore(**items: Any) -> Any:
            return self._manager.restore(step, args=ocp.args.Composite(**items))

        folder = self.folder / str(step)
        saved = _restore(folder, partial(restore, settings=ocp.args.JsonRestore()))["settings"]
        changed = configs.differences(configs.from_dict(saved, str(folder)), settings)
        if changed:
            raise ValueError(
                f"{folder} was made with another config; use another --run.folder, or undo:\n  " + "\n  ".join(changed)
            )
        params, training = jax.tree.map(_shape, _split(like))
        items = {
            "params": ocp.args.StandardRestore(params),
            "training": ocp.args.StandardRestore(training),
            "data": ocp.args.JsonRestore(),
        }
        restored = _restore(folder, partial(restore, **items))
        key = jax.random.wrap_key_data(restored["training"]["key"])
        own = restored["training"]
        state = TrainState(own["step"], restored["params"], own["opt_state"], key, own.get("memory"))
        return Restored(state, restored["data"])

    def close(self) -> None:
        """Waits for what is being written."""
        with self._naming_the_last():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextmanager
    def _naming_the_last(self) -> Iterator[None]:
        try:
            yield
        # Orbax and TensorStore raise many kinds for what the disk refuses; the chain has them all.
        except Exception as error:
            reason = _first_line(error)
            last = max((int(path.name) for path in self.folder.glob("*") if path.name.isdigit()), default=None)
            raise OSError(
                f"{self.folder}: a checkpoint could not be written ({reason}); the last whole one is "
                f"{'none' if last is None else f'that of step {last}'}. If the disk is full, make room; the same command goes on from "
                "there"
            ) from error


def is_checkpoint(path: str | Path) -> bool:
    """Returns whether a path is a run's folder, its checkpoints, or one checkpoint of ours."""
    return _find(Path(path)) is not None


def save_base(run_folder: str | Path, params: Any, config: Config) -> None:
    """Copies the model that a run fine-tunes to the run's folder, under the official key names."""
    save(Path(run_folder, BASE), params, config)


def load_base(run_folder: str | Path, sharding: Shardings | None = None, dtype: Any = None) -> Any:
    """Returns the parameters of the model that a run fine-tunes.

    Args:
        run_folder: The run's.
        sharding: As in `rwkv_jax.load`.
        dtype: Of the parameters; None is float32.

    Raises:
        FileNotFoundError: The run's folder does not have them.
    """
    path = Path(run_folder, BASE)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it holds the model that this run fine-tunes, put it back")
    base = open_checkpoint(path)
    return to_params(weights(base.tensors), config_in(base, path), float_dtype(dtype or "float32"), sharding)


def load_checkpoint(
    path: str | Path, dtype: Any = None, shardings: Callable[[Config], Any] | None = None
) -> tuple[Any, Config, Settings]:
    """Returns the parameters, adapters merged into them, the model config and the settings in a checkpoint of ours.

    They go to their devices in the dtype asked for; of a model with adapters there is a copy in float32 beside them meanwhile.

    Args:
        path: A run's folder or its `checkpoints` (the newest one is taken), or the folder of one step.
        dtype: Of the parameters; None keeps float32.
        shardings: Gives the model's sharding of each parameter; None is the first device.

    Raises:
        FileNotFoundError: There is no whole checkpoint at `path`.
        ValueError: It is damaged.
    """
    config, settings = load_settings(path)
    where = None if shardings is None else shardings(config)
    base = partial(load_base, _folder(path).parent.parent, where)
    if settings.finetune.method == "all":
        params = _load_trained(path, settings, where, dtype)
    elif settings.finetune.method == "state":  # Which is not among the parameters.
        params = base(dtype)
    else:
        assemble = finetune.assembler(settings.finetune, config)

        @partial(jax.jit, out_shardings=where)
        def merged(adapters: Any, base: Any) -> Any:
            return jax.tree.map(lambda x: x.astype(dtype or x.dtype), assemble(adapters, base)[0])

        # On no device: `where` may have others than the first.
        params = merged(jax.tree.map(np.asarray, _load_trained(path, settings)), base())
    return params, config, settings


def load_settings(path: str | Path) -> tuple[Config, Settings]:
    """Returns the model config and settings in a checkpoint of ours, without its weights; path and errors as in `load_checkpoint`."""
    folder = _folder(path)
    settings = configs.from_dict(_restore_item(folder, "settings", ocp.args.JsonRestore()), str(folder))
    return dataclasses.replace(settings.model, tokenizer=settings.data.tokenizer), settings


def load_first_state(path: str | Path) -> Any:
    """Returns the state of one row that a run of state tuning has learned to start from; None for any other run.

    Args and Raises: as in `load_checkpoint`.
    """
    config, settings = load_settings(path)
    if settings.finetune.method != "state":
        return None
    return finetune.first_state(_load_trained(path, settings), config)


def _load_trained(path: str | Path, settings: Settings, shardings: Any = None, dtype: Any = None) -> Any:
    declaration = finetune.declare(settings.finetune, settings.model)
    fresh = partial(p.init, declaration=declaration, num_layers=settings.model.num_layers)
    shapes = jax.eval_shape(fresh, jax.random.key(0))
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: first, shapes) if shardings is None else shardings
    shapes = jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=own), shapes, where)
    return _restore_item(_folder(path), "params", ocp.args.StandardRestore(shapes))


def _folder(path: str | Path) -> Path:
    found = _find(Path(path))
    if found is None:
        raise FileNotFoundError(
            f"{path}: no whole checkpoint here; give a run's folder, or one of its checkpoints/STEP"
        )
    return found[0].resolve() / str(found[1])


def _restore_item(folder: Path, name: str, how: Any) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restore = partial(checkpointer.restore, folder, args=ocp.args.Composite(**{name: how}))
        return _restore(folder, restore)[name]


def _split(train_state: TrainState) -> tuple[Any, dict[str, Any]]:
    key = train_state.key
    is_shape = isinstance(key, jax.ShapeDtypeStruct)
    data = jax.eval_shape(jax.random.key_data, key) if is_shape else jax.random.key_data(key)
    training = {"step": train_state.step, "opt_state": train_state.opt_state, "key": data}
    if train_state.memory is not None:
        training["memory"] = train_state.memory
    return train_state.params, training


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _restore(folder: Path, restore: Callable[[], Any]) -> Any:
    try:
        return restore()
    except (PermissionError, MemoryError):
        raise  # The checkpoint may be sound.
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files; the chain has them all.
        reason = _first_line(error)
        raise ValueError(
            f"{folder}: this checkpoint is damaged or not one of ours ({reason}); if so, remove it to use an earlier one"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300] or type(error).__name__


def _find(path: Path) -> tuple[Path, int] | None:
    """The checkpoints folder and step that a path means."""
    if path.name.isdigit() and (path / "settings").is_dir() and (path / "params").is_dir():
        return path.parent, int(path.name)
    for folder in (path / FOLDER, path):
        steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / "settings").is_dir()]
        if steps:
            return folder, max(steps)
    return None
