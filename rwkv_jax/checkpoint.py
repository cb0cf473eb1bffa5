"""Checkpoints of a run, through Orbax: written in the background, complete or absent, never half.

A run's `checkpoints/` folder has one folder a step, named by the step, with the items params, training (optimiser, random key,
step), data (the iterator's position) and settings (the whole config). Orbax writes under another name and renames at the end,
so that a folder with a step's name is a whole checkpoint.

params is what is trained. A fine-tuning run has the model that it tunes beside its checkpoints, once, in base.safetensors.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from . import config as configs
from . import finetune
from . import params as p
from .config import Settings
from .convert import load_safetensors, save_safetensors
from .models import Config
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
        """Starts writing a checkpoint named by the state's step; returns once the arrays are copied."""
        params, training = _split(train_state)
        items = {
            "params": ocp.args.StandardSave(params),
            "training": ocp.args.StandardSave(training),
            "data": ocp.args.JsonSave(dict(data_state)),
            "settings": ocp.args.JsonSave(configs.to_dict(settings)),
        }
        metrics = {_METRIC: validation_bits_per_byte}
        self._manager.save(int(train_state.step), args=ocp.args.Composite(**items), metrics=metrics)

    def latest_step(self) -> int | None:
        """Returns the step of the newest whole checkpoint, or None; waits for one that is being written."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def restore(self, like: TrainState, settings: Settings) -> Restored | None:
        """Returns the newest checkpoint, or None where there is none.

        Args:
            like: Any state of the run, or its shapes.
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
        params, training = _split(jax.eval_shape(lambda: like))
        items = {
            "params": ocp.args.StandardRestore(params),
            "training": ocp.args.StandardRestore(training),
            "data": ocp.args.JsonRestore(),
        }
        restored = _restore(folder, partial(restore, **items))
        key = jax.random.wrap_key_data(restored["training"]["key"])
        own = restored["training"]
        return Restored(TrainState(own["step"], restored["params"], own["opt_state"], key), restored["data"])

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def is_checkpoint(path: str | Path) -> bool:
    """Returns whether a path is a run's folder, its checkpoints, or one checkpoint of ours."""
    return _find(Path(path)) is not None


def save_base(run_folder: str | Path, params: Any, config: Config) -> None:
    """Copies the model that a run fine-tunes to the run's folder, under the official key names."""
    save_safetensors(Path(run_folder, BASE), params, config)


def load_base(run_folder: str | Path) -> Any:
    """Returns the float32 parameters of the model that a run fine-tunes.

    Raises:
        FileNotFoundError: The run's folder does not have them.
    """
    path = Path(run_folder, BASE)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it holds the model that this run fine-tunes, put it back")
    return load_safetensors(path, "float32")[0]


def load_checkpoint(path: str | Path, dtype: Any = None) -> tuple[Any, Config, Settings]:
    """Returns the parameters, adapters merged into them, the model config and the settings in a checkpoint of ours.

    Args:
        path: A run's folder or its `checkpoints` (the newest one is taken), or the folder of one step.
        dtype: Of the parameters; None keeps float32.

    Raises:
        FileNotFoundError: There is no whole checkpoint at `path`.
        ValueError: It is damaged.
    """
    trained, settings, run_folder = _load_trained(path)
    tuning = settings.finetune
    base = None if tuning.method == "all" else load_base(run_folder)
    params, _ = finetune.assembler(tuning, settings.model)(trained, base)
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    return params, dataclasses.replace(settings.model, tokenizer=settings.data.tokenizer), settings


def load_first_state(path: str | Path) -> Any:
    """Returns the state of one row that a run of state tuning has learned to start from; None for any other run.

    Args and Raises: as in `load_checkpoint`.
    """
    trained, settings, _ = _load_trained(path)
    if settings.finetune.method != "state":
        return None
    return finetune.first_state(trained, settings.model)


def _load_trained(path: str | Path) -> tuple[Any, Settings, Path]:
    """What is trained, the settings, and the run's folder."""
    found = _find(Path(path))
    if found is None:
        raise FileNotFoundError(
            f"{path}: no whole checkpoint here; give a run's folder, or one of its checkpoints/STEP"
        )
    folder = found[0].resolve() / str(found[1])
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:

        def restore(**items: Any) -> Any:
            return checkpointer.restore(folder, args=ocp.args.Composite(**items))

        values = _restore(folder, partial(restore, settings=ocp.args.JsonRestore()))["settings"]
        settings = configs.from_dict(values, str(folder))
        declaration = finetune.declare(settings.finetune, settings.model)
        fresh = partial(p.init, declaration=declaration, num_layers=settings.model.num_layers)
        shapes = _on_device(jax.eval_shape(fresh, jax.random.key(0)))
        trained = _restore(folder, partial(restore, params=ocp.args.StandardRestore(shapes)))["params"]
    return trained, settings, folder.parent.parent


def _split(train_state: TrainState) -> tuple[Any, dict[str, Any]]:
    state = train_state._replace(key=jax.eval_shape(jax.random.key_data, train_state.key))
    if not isinstance(train_state.key, jax.ShapeDtypeStruct):
        state = state._replace(key=jax.random.key_data(train_state.key))
    return state.params, {"step": state.step, "opt_state": state.opt_state, "key": state.key}


def _on_device(shapes: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _restore(folder: Path, restore: Callable[[], Any]) -> Any:
    try:
        return restore()
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files; all are named in the chain.
        raise ValueError(
            f"{folder}: this checkpoint is damaged or not one of ours; remove it to use an earlier one"
        ) from error


def _find(path: Path) -> tuple[Path, int] | None:
    """The checkpoints folder and step that a path means."""
    if path.name.isdigit() and (path / "settings").is_dir() and (path / "params").is_dir():
        return path.parent, int(path.name)
    for folder in (path / FOLDER, path):
        steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / "settings").is_dir()]
        if steps:
            return folder, max(steps)
    return None
