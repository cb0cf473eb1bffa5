"""The run of a training script: from the command line to the last step, whatever it learns from and is measured by."""

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from steps import make_step
from tqdm import tqdm

import rwkv_jax
from rwkv_jax import (
    checkpoint,
    config,
    devices,
    distributed,
    finetune,
    lm,
    optim,
    run_folder,
    run_log,
    sharding,
    text,
    train,
)
from rwkv_jax.convert import hub

MENDABLE = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)
DIVERGED = 3
"""Status of a run whose loss or gradient was not finite; of one that ended otherwise by what a user can mend: 1."""
STEPS_BETWEEN_STOPS = 10
"""Of several processes, which must stop at the same step: how often each asks whether another got a signal."""


class Work(NamedTuple):
    """What a run learns from and is measured by."""

    description: str
    """How much there is to learn from."""
    identity: str
    """Hash of it: a run goes on only with what it began with."""
    tokenizer: text.Tokenizer
    batches: Any
    """Endless iterator over batches of this process's rows, NamedTuples of arrays, with get_state and set_state."""
    arguments: Callable[[Any], dict[str, Any]]
    """Those of `train_step` for a batch."""
    bits_per_nat: float
    """Of a training target, in bits per byte of text."""
    validate: Callable[[Any, Any], float]
    """(parameters, first state) -> held-out bits per byte, while training."""
    report: Callable[[Any, Any], None]
    """(parameters, first state): what the run ends with."""


Prepare = Callable[[config.Settings, Mesh, np.ndarray], Work]
"""(settings, mesh, rows of a batch that this process reads) -> the work, whose files process 0 makes first."""


def main(program: str, prepare: Prepare) -> None:
    """Reads the command line, trains, and turns errors that a user can mend into a message and status 1 (DIVERGED)."""
    settings = config.parse_or_exit(sys.argv[1:], program)
    try:
        distributed.start(settings.mesh)
        mesh = sharding.make_mesh(settings.mesh)
        with jax.set_mesh(mesh):
            run(*starting_point(settings, config.given_fields(sys.argv[1:]), mesh), mesh, prepare)
    # Of whatever kind it is: the other processes wait for this one, and would for ever. leave_after does not return.
    except Exception as error:
        if settings.mesh.coordinator is not None:
            distributed.leave_after(error)
        if not isinstance(error, MENDABLE):
            raise
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(DIVERGED if isinstance(error, FloatingPointError) else 1) from error


def starting_point(settings: config.Settings, given: Collection[str], mesh: Mesh) -> tuple[config.Settings, Any]:
    """Returns the settings with the model section of the model that is tuned, and its parameters on the mesh, None from scratch.

    A run that goes on reads them from its folder, and not from finetune.init_from again.
    """
    tuning, folder = settings.finetune, Path(settings.run.folder)
    origin, commit = tuning.init_from, tuning.init_commit
    if origin is None:
        return settings, None
    if checkpoint.is_checkpoint(folder):
        base, saved = checkpoint.load_base(folder, sharding.on(mesh)), config.load(folder / run_folder.CONFIG)
        model, commit = saved.model, commit or saved.finetune.init_commit
    else:
        if not origin.startswith("hf://") and not Path(origin).exists():
            raise FileNotFoundError(
                f"{origin}: no such model; finetune.init_from names the one to start from. The quickstart's, runs/quickstart, is "
                "made by: python experiments/train.py --cfg experiments/configs/quickstart.toml"
            )
        commit = commit or distributed.main_first(lambda: hub.commit_of(origin))  # It fetches a model that is not here.
        eps = getattr(settings.model, "ln_x_eps", None) if "model.ln_x_eps" in given else None
        path = hub.at_commit(origin, commit)
        base, model = rwkv_jax.load(path, dtype="float32", ln_x_eps=eps, sharding=sharding.on(mesh))
    finetune.check_tokenizer(settings.data.tokenizer, model, origin)
    model = finetune.resolve_model(settings.model, given, model, origin)
    return dataclasses.replace(settings, model=model, finetune=dataclasses.replace(tuning, init_commit=commit)), base


def run(settings: config.Settings, base: Any, mesh: Mesh, prepare: Prepare) -> None:
    """Trains from the run's newest checkpoint, or from the start, to the end.

    Args:
        settings: Of the run.
        base: Parameters of the model that is tuned; None: from scratch.
        mesh: On which it runs, over the devices of all processes.
        prepare: Gives what it learns from.
    """
    model, data, run, tuning = settings.model, settings.data, settings.run, settings.finetune
    declaration, assemble = finetune.declare(tuning, model), finetune.assembler(tuning, model)
    resumes, folder = checkpoint.is_checkpoint(run.folder), Path(run.folder)
    distributed.check_same(shared_by_processes(settings) | {"whether run.folder has a checkpoint": resumes})
    sharding.check_batch(
        mesh, data.batch_size, settings.optim.accumulate, settings.optim.segment or data.context_length
    )
    rows, is_main = distributed.rows_here(mesh, data.batch_size), distributed.is_main()
    if is_main:
        run_folder.claim(settings, resumes)
        run_folder.record(settings)
        print(config.to_toml(settings))
    work = prepare(settings, mesh, rows)
    run_folder.check_vocabulary(work.tokenizer, settings)
    for difference in run_log.record_environment(folder) if is_main else ():
        print(
            f"warning: the run was started elsewhere, and may not repeat bit for bit: {difference}",
            file=sys.stderr,
        )

    optimizer = optim.make_optimizer(settings.optim, declaration, run.steps)
    # All of them now: computed between steps, each would stand in the device's queue behind the step that is running.
    rates = np.asarray(optim.learning_rate(settings.optim, run.steps)(np.arange(run.steps)))
    key, trained, frozen = jax.random.key(run.seed), None, None
    if base is not None:
        if is_main and not resumes:
            checkpoint.save_base(folder, base, model)
        trained = finetune.init(key, tuning, model, base)
        frozen = None if tuning.method == "all" else base
    state = train.init_train_state(
        key, model, optimizer, trained, mesh=mesh if mesh.size > 1 else None, declaration=declaration,
        param_dtype=settings.optim.param_dtype, carried_rows=data.batch_size if data.carry else None,
    )  # fmt: skip
    checkpoints = checkpoint.Checkpoints(folder, run.keep_last, run.keep_best)
    if (restored := checkpoints.restore(state, settings)) is not None:
        if restored.data_state["text"] != work.identity:
            raise ValueError(
                f"the training text is not the one that the run in {folder} began with; put it back, or use another --run.folder"
            )
        state = restored.train_state
        work.batches.set_state(restored.data_state["position"])
    first_step = int(state.step)
    if is_main:
        print(
            f"{lm.count_params(model) / 1e6:.2f}M parameters, {work.description}, "
            f"step {first_step} of {run.steps}, on {describe(mesh)}, in {folder}"
        )
    if first_step >= run.steps:
        if is_main:
            print("This run is finished. Train further or otherwise under another --run.folder.")
            run_log.plot_losses(folder)
        checkpoints.close()
        work.report(*assemble(state.params, frozen))
        return

    step_fn = make_step(settings, optimizer, jax.tree.map(lambda x: x.sharding, state))
    log = run_log.RunLog(folder, first_step) if is_main else None
    bar = tqdm(
        total=run.steps, initial=first_step, desc="training", unit="step", dynamic_ncols=True, disable=not is_main
    )
    peak = run.peak_tflops * 1e12 * mesh.size if run.peak_tflops else peak_flops(mesh, model.dtype)
    tokens_a_step = data.batch_size * data.context_length
    stop = StopSignal()
    last_time = time.perf_counter()

    def finish(step: int, metrics: train.Metrics) -> None:
        """Waits for a step, refuses a non-finite one, and logs it."""
        nonlocal last_time
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            last = checkpoints.latest_step()
            good = (
                "there is no checkpoint yet"
                if last is None
                else f"the last good checkpoint is {checkpoints.folder}/{last}"
            )
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; {good}. "
                "Lower optim.lr, or look at the data of this step"
            )
        now = time.perf_counter()
        speed, last_time = tokens_a_step / (now - last_time), now
        row = {
            "step": step, "loss": loss, "bits_per_byte": loss * work.bits_per_nat, "grad_norm": grad_norm,
            "learning_rate": rates[step - 1].item(), "tokens_per_second": speed,
        }  # fmt: skip
        if peak:
            row["model_flop_utilisation"] = 3 * lm.flops_per_token(model) * speed / peak
        if log is not None:
            log.write(run_log.METRICS, row)
        bar.set_postfix_str(
            f"loss {loss:.3f}, {row['bits_per_byte']:.3f} bits/byte, {speed:.0f} tokens/s", refresh=False
        )
        bar.update(1)

    def validate(step: int) -> float:
        nonlocal last_time
        bits = work.validate(*assemble(state.params, frozen))
        if log is not None:
            log.write(run_log.VALIDATION, {"step": step, "validation_bits_per_byte": bits})
            bar.write(f"step {step}: held out {bits:.4f} bits per byte")
        last_time = time.perf_counter()
        return bits

    try:
        pending: tuple[int, train.Metrics] | None = None
        for step in range(first_step + 1, run.steps + 1):
            batch = distributed.place(next(work.batches), mesh, rows, data.batch_size)
            with naming_a_batch_that_fits(settings):
                state, metrics = step_fn(state, **work.arguments(batch), frozen=frozen)
                # The step is running; meanwhile the one before it is read, so that the device never waits.
                if pending is not None:
                    finish(*pending)
            pending = (step, metrics)
            stopping = stop.agreed(step)
            save = step % run.checkpoint_every == 0 or step == run.steps or stopping
            if save or step % run.validate_every == 0:
                finish(*pending)
                pending = None
                bits = validate(step)
                if save:
                    position = {"text": work.identity, "position": work.batches.get_state()}
                    checkpoints.save(state, position, settings, bits)
            if stopping:
                bar.close()
                if is_main:
                    print(f"stopped by a signal; step {step} is saved, and the same command goes on from there")
                return
        bar.close()
    finally:
        stop.release()
        bar.close()
        if log is not None:
            log.close()
        checkpoints.close()
    if is_main:
        run_log.plot_losses(folder)
    work.report(*assemble(state.params, frozen))


@contextmanager
def naming_a_batch_that_fits(settings: config.Settings) -> Iterator[None]:
    """Turns a device's want of memory in a step into a MemoryError that says what to try."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size, parts, length = settings.data.batch_size, settings.optim.accumulate, settings.data.context_length
        more = next((n for n in range(2 * parts, size + 1) if size % n == 0), None)
        advice = (
            f"a row is all that it computes at once: try --data.context_length {length // 2}, or a smaller model"
            if more is None
            else f"try --optim.accumulate {more}, which computes the same in smaller parts, or --data.batch_size {size // 2}"
        )
        raise MemoryError(
            f"data.batch_size={size} rows of data.context_length={length} tokens, in optim.accumulate={parts} parts, do not fit in "
            f"the device's memory; {advice}"
        ) from error


def shared_by_processes(settings: config.Settings) -> dict[str, Any]:
    """Returns what all processes of a run must have alike: every field but who they are, the code, and the versions."""
    fields = {
        f"{section}.{key}": value
        for section, values in config.to_dict(settings).items()
        for key, value in values.items()
        if (section, key) not in {("mesh", "process_id"), ("mesh", "coordinator")}
    }
    return {**fields, "rwkv_jax's code": distributed.source_digest(), "JAX": jax.__version__}


def describe(mesh: Mesh) -> str:
    """Returns the devices of a mesh in words."""
    kind = mesh.devices.flat[0].device_kind
    if mesh.size == 1:
        return kind
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.size} {kind} ({sharding.describe(mesh)}){processes}"


def peak_flops(mesh: Mesh, dtype: str) -> float | None:
    """Returns the peak FLOP/s of a mesh; the devices of a CPU share its cores."""
    device = jax.local_devices()[0]
    peak = devices.peak_flops(device, dtype)
    return peak if peak is None or device.platform == "cpu" else peak * mesh.size


class StopSignal:
    """Whether SIGTERM or the first Ctrl-C has come since; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.requested = False
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}

    def agreed(self, step: int) -> bool:
        """Returns whether any process has had one; True in all of them at the same step."""
        if jax.process_count() == 1:
            return self.requested
        return step % STEPS_BETWEEN_STOPS == 0 and distributed.any_process(self.requested)

    def release(self) -> None:
        """Gives the signals back to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        del frame
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
