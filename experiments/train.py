"""Trains a language model: `python experiments/train.py --cfg experiments/configs/quickstart.toml`.

The run's folder holds everything; the same command continues it. Any field of the config can be overridden, for example
`--model.num_layers 4 --run.folder runs/small`; `--help` lists them all.
"""

import gzip
import lzma
import math
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import launch
import numpy as np
from tqdm import tqdm

from rwkv_jax import checkpoint, config, devices, generate, lm, optim, run_folder, run_log, text, train
from rwkv_jax.models import module_of

SAMPLE_TOKENS = 320


def main() -> None:
    """Reads the command line, trains, and turns errors that a user can mend into a message and status 1."""
    settings = config.parse_or_exit(sys.argv[1:], "train.py")
    try:
        run(settings)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def run(settings: config.Settings) -> None:
    """Trains from the run's newest checkpoint, or from the start, to the end."""
    folder = run_folder.claim(settings, resumes=checkpoint.is_checkpoint(settings.run.folder))
    run_folder.record(settings)
    print(config.to_toml(settings))
    streams = text.load_streams(settings.data)
    run_folder.check_vocabulary(streams.tokenizer, settings)
    for difference in run_log.record_environment(folder):
        print(
            f"warning: the run was started elsewhere, and may not repeat bit for bit: {difference}",
            file=sys.stderr,
        )

    model, data, run = settings.model, settings.data, settings.run
    optimizer = optim.make_optimizer(settings.optim, module_of(model).declare(model), run.steps)
    schedule = optim.learning_rate(settings.optim, run.steps)
    state = train.init_train_state(jax.random.key(run.seed), model, optimizer)
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
        report(state.params, settings, streams)
        return

    step_fn = jax.jit(
        partial(
            train.train_step, config=model, optimizer=optimizer, l2wrap=settings.optim.l2wrap,
            accumulate=settings.optim.accumulate, backend=run.backend,
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
        bits = held_out_bits_per_byte(state.params, settings, streams, run.validation_tokens)
        log.write(run_log.VALIDATION, {"step": step, "validation_bits_per_byte": bits})
        bar.write(f"step {step}: held out {bits:.4f} bits per byte")
        last_time = time.perf_counter()
        return bits

    try:
        pending: tuple[int, train.Metrics] | None = None
        for step in range(first_step + 1, run.steps + 1):
            batch = next(batches)
            reset = batch.reset if data.documents == "packed" else None
            state, metrics = step_fn(state, batch.inputs, batch.targets, reset)
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
    report(state.params, settings, streams)


def held_out_bits_per_byte(params: Any, settings: config.Settings, streams: text.Streams, limit: int | None) -> float:
    """Returns the code length of the held-out text, its separators included, in bits per byte of text."""
    stream = streams.validation
    batches = text.validation_batches(
        stream, context_length=settings.data.context_length, batch_size=settings.data.batch_size, limit=limit
    )
    packed = settings.data.documents == "packed"
    cost = train.evaluate(params, settings.model, batches, settings.run.backend, packed=packed)
    return cost.nats / cost.num_tokens / math.log(2) * len(stream.tokens) / stream.num_bytes


def report(params: Any, settings: config.Settings, streams: text.Streams) -> None:
    """Prints the result beside two compressors', a sample, and how to go on."""
    bits = held_out_bits_per_byte(params, settings, streams, None)
    print(f"\nheld-out text, {streams.validation.num_bytes} bytes, bits per byte:")
    print(f"  {settings.model.architecture:8s} {bits:.4f}")
    if (raw := streams.validation_bytes()) is not None:
        print(f"  gzip -9  {8 * len(gzip.compress(raw, 9)) / len(raw):.4f}")
        print(f"  xz -9    {8 * len(lzma.compress(raw, preset=9)) / len(raw):.4f}")
    print(f"\na sample, after {settings.run.prompt!r}:\n{settings.run.prompt}", end="")
    sampling = generate.Sampling(temperature=0.8, top_p=0.95)
    pieces = generate.stream(
        params,
        settings.model,
        streams.tokenizer,
        settings.run.prompt,
        max_tokens=SAMPLE_TOKENS,
        sampling=sampling,
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
    launch.with_huge_pages()
    main()
