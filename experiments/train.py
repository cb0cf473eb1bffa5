"""Trains a language model: `python experiments/train.py --cfg experiments/configs/quickstart.toml`.

The run's folder holds everything; the same command continues it. Any field of the config can be overridden, for example
`--model.num_layers 4 --run.folder runs/small`; `--help` lists them all. `--init_from PATH` starts from a trained model.
"""

import launch

if __name__ == "__main__":
    launch.with_huge_pages()  # Before the imports that take seconds.

import dataclasses
import gzip
import lzma
import math
import shlex
import signal
import sys
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import rwkv_jax
from rwkv_jax import checkpoint, config, devices, finetune, generate, lm, optim, run_folder, run_log, text, train
from rwkv_jax.convert import hub

SAMPLE_TOKENS = 320


def main() -> None:
    """Reads the command line, trains, and turns errors that a user can mend into a message and status 1."""
    settings = config.parse_or_exit(sys.argv[1:], "train.py")
    try:
        run(*starting_point(settings, config.given_fields(sys.argv[1:])))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def starting_point(settings: config.Settings, given: Collection[str]) -> tuple[config.Settings, Any]:
    """Returns the settings with the model section of the model that is tuned, and its parameters, None from scratch.

    A run that goes on reads them from its folder, and not from finetune.init_from again.
    """
    tuning, folder = settings.finetune, Path(settings.run.folder)
    origin, commit = tuning.init_from, tuning.init_commit
    if origin is None:
        return settings, None
    if checkpoint.is_checkpoint(folder):
        base, saved = checkpoint.load_base(folder), config.load(folder / run_folder.CONFIG)
        model, commit = saved.model, commit or saved.finetune.init_commit
    else:
        commit = commit or hub.commit_of(origin)
        eps = getattr(settings.model, "ln_x_eps", None) if "model.ln_x_eps" in given else None
        base, model = rwkv_jax.load(hub.at_commit(origin, commit), dtype="float32", ln_x_eps=eps)
    finetune.check_tokenizer(settings.data.tokenizer, model, origin)
    model = finetune.resolve_model(settings.model, given, model, origin)
    return dataclasses.replace(settings, model=model, finetune=dataclasses.replace(tuning, init_commit=commit)), base


def run(settings: config.Settings, base: Any) -> None:
    """Trains from the run's newest checkpoint, or from the start, to the end.

    Args:
        settings: Of the run.
        base: Parameters of the model that is tuned; None: from scratch.
    """
    model, data, run, tuning = settings.model, settings.data, settings.run, settings.finetune
    declaration, assemble = finetune.declare(tuning, model), finetune.assembler(tuning, model)
    resumes = checkpoint.is_checkpoint(run.folder)
    folder = run_folder.claim(settings, resumes)
    run_folder.record(settings)
    print(config.to_toml(settings))
    streams = text.load_streams(settings.data)
    run_folder.check_vocabulary(streams.tokenizer, settings)
    other = None if base is None else second_held_out(settings)
    for difference in run_log.record_environment(folder):
        print(
            f"warning: the run was started elsewhere, and may not repeat bit for bit: {difference}",
            file=sys.stderr,
        )

    optimizer = optim.make_optimizer(settings.optim, declaration, run.steps)
    schedule = optim.learning_rate(settings.optim, run.steps)
    key, trained, frozen = jax.random.key(run.seed), None, None
    if base is not None:
        if not resumes:
            checkpoint.save_base(folder, base, model)
        trained = finetune.init(key, tuning, model, base)
        frozen = None if tuning.method == "all" else base
    state = train.init_train_state(key, model, optimizer, trained)
    batches = text.train_batches(
        streams.train, context_length=data.context_length, batch_size=data.batch_size, seed=data.seed,
        documents=data.documents,
    )  # fmt: skip
    checkpoints = checkpoint.Checkpoints(folder, run.keep_last, run.keep_best)
    if (restored := checkpoints.restore(state, settings)) is not None:
        if restored.data_state["text"] != streams.train.identity:
            raise ValueError(
                f"the training text is not the one that the run in {folder} began with; put it back, or use another --run.folder"
            )
        state = restored.train_state
        batches.set_state(restored.data_state["position"])
    first_step = int(state.step)
    print(
        f"{lm.count_params(model) / 1e6:.2f}M parameters, {len(streams.train.tokens) / 1e6:.2f}M training tokens, "
        f"step {first_step} of {run.steps}, on {jax.devices()[0].device_kind}, in {folder}"
    )
    if first_step >= run.steps:
        print("This run is finished. Train further or otherwise under another --run.folder.")
        checkpoints.close()
        run_log.plot_losses(folder)
        report(*assemble(state.params, frozen), settings, streams, other)
        return

    step_fn = jax.jit(
        partial(
            train.train_step, config=model, optimizer=optimizer, l2wrap=settings.optim.l2wrap,
            accumulate=settings.optim.accumulate, backend=run.backend, assemble=assemble,
        ),
        donate_argnums=0,
    )  # fmt: skip
    log = run_log.RunLog(folder, first_step)
    bar = tqdm(total=run.steps, initial=first_step, desc="training", unit="step", dynamic_ncols=True)
    peak = run.peak_tflops * 1e12 if run.peak_tflops else devices.peak_flops(jax.devices()[0], model.dtype)
    tokens_a_step = data.batch_size * data.context_length
    bits_per_nat = len(streams.train.tokens) / streams.train.num_bytes / math.log(2)
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
            "step": step, "loss": loss, "bits_per_byte": loss * bits_per_nat, "grad_norm": grad_norm,
            "learning_rate": np.asarray(schedule(step - 1)).item(), "tokens_per_second": speed,
        }  # fmt: skip
        if peak:
            row["model_flop_utilisation"] = 3 * lm.flops_per_token(model) * speed / peak
        log.write(run_log.METRICS, row)
        bar.set_postfix_str(
            f"loss {loss:.3f}, {row['bits_per_byte']:.3f} bits/byte, {speed:.0f} tokens/s", refresh=False
        )
        bar.update(1)

    def validate(step: int) -> float:
        nonlocal last_time
        bits = bits_per_byte(*assemble(state.params, frozen), settings, streams.validation, run.validation_tokens)
        log.write(run_log.VALIDATION, {"step": step, "validation_bits_per_byte": bits})
        bar.write(f"step {step}: held out {bits:.4f} bits per byte")
        last_time = time.perf_counter()
        return bits

    try:
        pending: tuple[int, train.Metrics] | None = None
        for step in range(first_step + 1, run.steps + 1):
            batch = next(batches)
            reset = batch.reset if data.documents == "packed" else None
            length = batch.length if data.documents == "rows" else None
            state, metrics = step_fn(state, batch.inputs, batch.targets, reset, length, frozen)
            # The step is running; meanwhile the one before it is read, so that the device never waits.
            if pending is not None:
                finish(*pending)
            pending = (step, metrics)
            save = step % run.checkpoint_every == 0 or step == run.steps or stop.requested
            if save or step % run.validate_every == 0:
                finish(*pending)
                pending = None
                bits = validate(step)
                if save:
                    position = {"text": streams.train.identity, "position": batches.get_state()}
                    checkpoints.save(state, position, settings, bits)
            if stop.requested and save:
                bar.close()
                print(f"stopped by a signal; step {step} is saved, and the same command goes on from there")
                return
        bar.close()
    finally:
        stop.release()
        bar.close()
        log.close()
        checkpoints.close()
    run_log.plot_losses(folder)
    report(*assemble(state.params, frozen), settings, streams, other)


def bits_per_byte(
    params: Any, start: Any, settings: config.Settings, stream: text.TokenStream, limit: int | None
) -> float:
    """Returns the code length of a held-out text, its separators included, in bits per byte of text.

    Args:
        params: The model's.
        start: The state of one row that rows start from; None is the zero state.
        settings: The run's.
        stream: The text.
        limit: Use only this many tokens of it, from the start; None: all.
    """
    data = settings.data
    batches = text.validation_batches(
        stream, context_length=data.context_length, batch_size=data.batch_size, limit=limit, documents=data.documents
    )
    packed = data.documents == "packed"
    cost = train.evaluate(params, settings.model, batches, settings.run.backend, start, packed=packed)
    return cost.nats / cost.num_tokens / math.log(2) * len(stream.tokens) / stream.num_bytes


def second_held_out(settings: config.Settings) -> text.TokenStream | None:
    """Returns the held-out text of finetune.compare_source, cut as by default; None where there is to be none."""
    source, path = settings.finetune.compare_source, settings.finetune.compare_path
    if source == "none":
        return None
    data = text.DataConfig(
        source=source, path=path, tokenizer=settings.data.tokenizer, tokenizer_file=settings.data.tokenizer_file,
        cache_dir=settings.data.cache_dir,
    )  # fmt: skip
    return text.load_streams(data).validation


def report(
    params: Any, start: Any, settings: config.Settings, streams: text.Streams, other: text.TokenStream | None
) -> None:
    """Prints the result beside two compressors' and the model tuned, a sample, and how to go on.

    Args:
        params: The model's.
        start: The state of one row that rows start from; None is the zero state.
        settings: The run's.
        streams: Its text.
        other: The second held-out text of a fine-tuning run, if any.
    """
    bits = bits_per_byte(params, start, settings, streams.validation, None)
    print(f"\nheld-out text, {streams.validation.num_bytes} bytes, bits per byte:")
    print(f"  {settings.model.architecture:8s} {bits:.4f}")
    if (raw := streams.validation_bytes()) is not None:
        print(f"  gzip -9  {8 * len(gzip.compress(raw, 9)) / len(raw):.4f}")
        print(f"  xz -9    {8 * len(lzma.compress(raw, preset=9)) / len(raw):.4f}")
    if settings.finetune.init_from is not None:
        base = checkpoint.load_base(settings.run.folder)
        rows = [
            (f"{settings.data.source}, tuned on", bits_per_byte(base, None, settings, streams.validation, None), bits)
        ]
        if other is not None:
            limit = settings.run.validation_tokens
            before, after = (bits_per_byte(*m, settings, other, limit) for m in ((base, None), (params, start)))
            rows.append((f"{settings.finetune.compare_source}, compared", before, after))
        print("\nheld-out text, bits per byte before and after fine-tuning:")
        for name, before, after in rows:
            print(f"  {name:18s} {before:.4f} -> {after:.4f}")
    if start is not None and hasattr(start, "wkv"):
        path = Path(settings.run.folder, "state.safetensors")
        rwkv_jax.save_state(path, start, settings.model)
        print(f"\nthe learned state, for other programs: {path}")
    print(f"\na sample, after {settings.run.prompt!r}:\n{settings.run.prompt}", end="")
    sampling = generate.Sampling(temperature=0.8, top_p=0.95)
    pieces = generate.stream(
        params,
        settings.model,
        streams.tokenizer,
        settings.run.prompt,
        max_tokens=SAMPLE_TOKENS,
        sampling=sampling,
        state=start,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    folder = settings.run.folder
    print(f"\n\nresume or repeat:  {shlex.join(['python', *sys.argv])}")
    generate_command = [
        "python",
        "experiments/generate.py",
        "--checkpoint",
        folder,
        "--prompt",
        settings.run.prompt,
    ]
    print(f"generate:          {shlex.join(generate_command)}")
    if Path(folder, "loss.png").exists():
        print(f"loss:              {Path(folder, 'loss.png')}")


class StopSignal:
    """Whether SIGTERM or the first Ctrl-C has come since; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.requested = False
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}

    def release(self) -> None:
        """Gives the signals back to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        del frame
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    main()
