"""What a token costs, in time and memory, as a text grows: RWKV-4, RWKV-7 and a transformer of equal size, with random weights.

`python experiments/inference_cost.py --cfg experiments/configs/inference_cost_study.toml`

Every cell generates one text in a process of its own, with `generate.decode`, which draws a block of tokens in one jitted loop. Blocks
are timed, and compilation is not among them. The transformer is there twice. "whole": its cache has room for the whole length from the
start, which is what rwkv_jax does, so that every token costs as much as the last one. "doubled": it begins small and is copied into
one of twice the room when it is full, about the best that fixed shapes allow; each size is compiled, and copying is in the times.
Keys and values are float32 in both dtypes, as all states here are.
"""

import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from study import (
    NAMES,
    STYLES,
    Advance,
    Cell,
    Finished,
    StudyConfig,
    compute_cells,
    environment,
    estimate,
    panels,
    record,
    study_program,
    table,
    verdict,
)

Model = Literal["rwkv4", "rwkv7", "transformer", "transformer-doubled"]
LABELS = {**NAMES, "transformer": "transformer, whole cache", "transformer-doubled": "transformer, doubled cache"}
_STYLES = {**STYLES, "transformer-doubled": {"color": "tab:red", "marker": "x"}}
_MB = 1e6
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class CostConfig:
    """What is generated, by which models."""

    models: tuple[Model, ...] = ("rwkv4", "rwkv7", "transformer", "transformer-doubled")
    """The others get the channel mix's width that brings them nearest to RWKV-4's parameters."""
    sizes: tuple[str, ...] = ("6x256x256",)
    """Of RWKV-4: layers x width x vocabulary."""
    lengths: tuple[int, ...] = (2048,)
    """Tokens generated at each size, after a first one; multiples of `block`."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of parameters, activations and matrix products."""
    prompts: tuple[int, ...] = (256,)
    """Tokens of prompts whose reading is timed too; those longer than a size's length are left out there."""
    block: int = 16
    """Tokens that one call draws and that are timed together; generate.stream has 16."""
    first_room: int = 128
    """Tokens that the doubled cache has room for at first; a multiple of `block`."""

    def __post_init__(self):
        for size in self.sizes:
            parts = size.split("x")
            if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
                raise ValueError(f"cost.sizes has {size!r}; it must be LAYERSxWIDTHxVOCABULARY, such as 12x768x50277")
        if len(self.lengths) != len(self.sizes):
            raise ValueError(
                f"cost.lengths has {len(self.lengths)} lengths for {len(self.sizes)} sizes; give one for each"
            )
        for name, tokens in [("lengths", length) for length in self.lengths] + [("first_room", self.first_room)]:
            if tokens < 1 or tokens % self.block:
                raise ValueError(f"cost.{name} has {tokens}; it must be a multiple of cost.block, {self.block}")
        if any(tokens < 1 for tokens in self.prompts):
            raise ValueError(f"cost.prompts is {self.prompts}; each must be at least 1")


@dataclass(frozen=True)
class Settings:
    """Of the study. Its seeds are repeats: of weights, of what is drawn, and of the measurement."""

    study: StudyConfig = field(default_factory=StudyConfig)
    cost: CostConfig = field(default_factory=CostConfig)


def main() -> None:
    """Measures the cells that are missing, prints the tables and verdicts, and writes the record and the plot."""
    if sys.argv[1:2] == ["--worker"]:
        from rwkv_jax.run_log import environment as devices

        result = measure(json.loads(sys.argv[2]), lambda share: print(json.dumps({"share": share}), flush=True))
        print(json.dumps({"result": result, "environment": devices()}))
        return
    with study_program(Settings, "inference_cost.py") as settings:
        run(settings)


def run(settings: Settings) -> None:
    """Runs the study."""
    study, cost = settings.study, settings.cost
    kinds = list(itertools.product(zip(cost.sizes, cost.lengths, strict=True), cost.dtypes))
    # Repeats stand furthest apart, so that what else the machine does falls on all models alike.
    cells = {
        (size, dtype, model, seed): cost_cell(cost, size, length, dtype, model, seed)
        for seed in study.seeds
        for (size, length), dtype in kinds
        for model in cost.models
    }
    devices: dict[str, Mapping[str, str]] = {}

    def compute(cell: Cell, advance: Advance) -> Any:
        found = in_own_process(cell, advance)
        devices[cell.name] = found["environment"]  # This process leaves the devices to its cells.
        return found["result"]

    done = compute_cells(study, list(cells.values()), compute, lambda cell: environment(devices[cell.name]))
    rows, verdicts = [], []
    for (size, length), dtype in kinds:
        found = {model: [done[cells[size, dtype, model, s].name].result for s in study.seeds] for model in cost.models}
        rows += [
            [size, dtype, LABELS[model], f"{runs[0]['parameters'] / 1e6:.2f}", length, *_figures(cost, runs, study)]
            for model, runs in found.items()
        ]
        totals = {model: [sum(run["seconds"]) for run in runs] for model, runs in found.items()}
        verdicts += [
            f"{size}, {dtype}, {length} tokens: "
            + verdict(LABELS[a], totals[a], LABELS[b], totals[b], study.confidence, unit="s", paired=False)
            for a, b in itertools.combinations(cost.models, 2)
        ]
    some = next(iter(done.values())).result
    memory = f"{some['memory']}, of which {some['start_bytes'] / _MB:.0f} MB before them"
    shown = table(
        ["size", "dtype", "model", "M parameters", "tokens", "ms a token, first eighth", "last eighth", "s in all",
         "state MB", "peak MB", *(f"prompt of {tokens}, ms" for tokens in cost.prompts), "compile s"], rows,
    )  # fmt: skip
    notes = (
        f"± is the {study.confidence:.0%} t-interval over {len(study.seeds)} repeats. Peak is {memory}. Keys and values are float32 "
        "in both dtypes; in bfloat16 they would take half."
    )
    print("\n".join(["", shown, "", notes, *verdicts]))
    prefix = record(study, settings, done, {"table": shown.splitlines(), "notes": notes, "verdicts": verdicts})
    plot(Path(f"{prefix}.png"), settings, cells, done, memory)
    print(f"\n{prefix}.json and .png")


def _figures(cost: CostConfig, runs: Sequence[Mapping[str, Any]], study: StudyConfig) -> list[str]:
    """The table's figures of one model over its repeats."""
    eighth = max(len(runs[0]["seconds"]) // 8, 1)
    milliseconds = [1000 * np.array(run["seconds"]) / cost.block for run in runs]
    parts = (
        [float(np.mean(times[where])) for times in milliseconds] for where in (slice(eighth), slice(-eighth, None))
    )
    figures = [_shown(part, study) for part in parts] + [_shown([sum(run["seconds"]) for run in runs], study)]
    figures.append(f"{runs[0]['state_bytes'][-1] / _MB:.3g}")
    figures.append(f"{np.mean([run['peak_bytes'][-1] for run in runs]) / _MB:.0f}")
    for tokens in cost.prompts:
        times = [1000 * run["prompt_seconds"][str(tokens)] for run in runs if str(tokens) in run["prompt_seconds"]]
        figures.append(_shown(times, study) if times else "-")
    return [*figures, f"{np.mean([run['compile_s'] for run in runs]):.1f}"]


def _shown(values: Sequence[float], study: StudyConfig) -> str:
    found = estimate(values, study.confidence)
    return f"{found.mean:.3g} ± {found.half_width:.2g}" if np.isfinite(found.half_width) else f"{found.mean:.3g}"


def cost_cell(cost: CostConfig, size: str, length: int, dtype: str, model: str, seed: int) -> Cell:
    """Returns the cell that generates one text."""
    settings = {
        "model": model, "size": size, "dtype": dtype, "length": length, "seed": seed, "block": cost.block,
        "first_room": cost.first_room, "prompts": [tokens for tokens in cost.prompts if tokens <= length],
    }  # fmt: skip
    layers, width, vocab_size = map(int, size.split("x"))
    # A token costs about its weights, and whatever the size some seconds go into starting and compiling.
    weight = length * (13 * layers * width**2 + width * vocab_size) + 5e9
    return Cell(f"{model}-{size}-{dtype}-seed{seed}", settings, weight)


def in_own_process(cell: Cell, advance: Advance) -> dict[str, Any]:
    """Returns, from a fresh process, the `result` that `measure` gives, memory and compilation its own, and its `environment`."""
    command = [sys.executable, __file__, "--worker", json.dumps(cell.settings)]
    said: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        try:
            for line in worker.stdout:
                said = json.loads(line)
                if "share" in said:
                    advance(said["share"])
        except BaseException:  # Interrupted, this program must not wait for the cell to end.
            worker.kill()
            raise
    if worker.returncode or "result" not in said:
        raise OSError(f"{cell.name}: its process ended with status {worker.returncode}; what it said stands above")
    return said


def measure(settings: Mapping[str, Any], report: Callable[[float], object]) -> dict[str, Any]:
    """Returns a generated text's times and memory; settings are those of `cost_cell`.

    seconds, state_bytes and peak_bytes have one value for each block, and the last two are those after it; start_bytes is the peak
    before there are weights.
    """
    import jax
    import jax.numpy as jnp

    from rwkv_jax import count_params, generate, init_state, params
    from rwkv_jax.models import module_of

    config: Any = model_config(settings["model"], settings["size"], settings["length"], settings["dtype"])
    key = jax.random.key(settings["seed"])
    start_bytes = _peak_bytes()

    rng = np.random.default_rng(settings["seed"])

    def tensor(one: Any) -> Any:
        # Some matrices would start orthogonal, which takes minutes in large models, and nothing here depends on it.
        if len(one.shape) < 2:
            return params.init(key, one, config.num_layers).astype(settings["dtype"])
        drawn = rng.standard_normal(one.stacked_shape(config.num_layers), np.float32)
        return jnp.asarray(drawn * one.shape[0] ** -0.5, settings["dtype"])

    weights = jax.block_until_ready(jax.tree.map(tensor, module_of(config).declare(config)))
    counted = _count_from_here()
    block, length = settings["block"], settings["length"]
    doubled = settings["model"] == "transformer-doubled"
    if doubled:
        config = replace(config, context_length=min(settings["first_room"], length))
    compile_s = 0.0

    def compiled(config: Any, carry: Any) -> Callable[[Any], Any]:
        nonlocal compile_s
        start = time.perf_counter()
        done = generate.decode.lower(
            weights, config, *carry, sampling=generate.Sampling(), num_tokens=block
        ).compile()  # fmt: skip
        compile_s += time.perf_counter() - start
        return lambda carry: jax.block_until_ready(done(weights, *carry)[1])

    def begin() -> Any:
        # Anew for each text: decode takes the arrays over.
        logits, state = jnp.zeros((1, config.vocab_size)), init_state(config, 1)
        return jax.block_until_ready((logits, state, jnp.zeros_like(logits), jax.random.key(settings["seed"])))

    carry = begin()
    draw = compiled(config, carry)
    draw(carry)  # The first call touches memory that later ones find in place.
    carry = begin()
    seconds, state_bytes, peak_bytes = [], [], []
    for done in range(0, length, block):
        copying = 0.0
        if doubled and done == config.context_length:
            config = replace(config, context_length=min(2 * config.context_length, length))
            jax.block_until_ready(with_room(carry[1], config.context_length))  # This one compiles.
            start = time.perf_counter()
            state = jax.block_until_ready(with_room(carry[1], config.context_length))
            copying = time.perf_counter() - start
            carry = (carry[0], state, *carry[2:])
            draw = compiled(config, carry)
        start = time.perf_counter()
        carry = draw(carry)
        seconds.append(time.perf_counter() - start + copying)
        state_bytes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(carry[1])))
        peak_bytes.append(_peak_bytes())
        report(0.9 * (done + block) / length)
    prompt_seconds = {}
    for tokens in settings["prompts"]:
        ids = rng.integers(0, config.vocab_size, tokens)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(generate.prefill(weights, config, ids))
            times.append(time.perf_counter() - start)
        prompt_seconds[str(tokens)] = float(np.median(times[1:]))  # The first one compiles.
    return {
        "parameters": count_params(config), "seconds": [round(s, 7) for s in seconds], "state_bytes": state_bytes,
        "start_bytes": start_bytes, "peak_bytes": peak_bytes, "prompt_seconds": prompt_seconds, "compile_s": round(compile_s, 3),
        "memory": counted,
    }  # fmt: skip


def model_config(model: str, size: str, length: int, dtype: str) -> Any:
    """Returns a model's config, of RWKV-4's size."""
    from equal_size import as_large_as_rwkv4

    from rwkv_jax.models import ARCHITECTURES

    layers, width, vocab_size = map(int, size.split("x"))
    shape = {"num_layers": layers, "embed_dim": width, "vocab_size": vocab_size, "dtype": dtype}
    name = model.partition("-")[0]
    if name == "transformer":
        shape["context_length"] = length
    return as_large_as_rwkv4(ARCHITECTURES[name](**shape))


def with_room(state: Any, room: int) -> Any:
    """Returns a transformer's state with room for more tokens, of which the newest stand last."""
    import jax.numpy as jnp

    added = room - state.key.shape[2]
    key, value = (jnp.pad(kept, ((0, 0), (0, 0), (added, 0), (0, 0), (0, 0))) for kept in (state.key, state.value))
    return state._replace(key=key, value=value)


def _count_from_here() -> str:
    """Forgets the peak of making the weights, where that can be done, and says what `_peak_bytes` counts from now on."""
    import jax

    if jax.devices()[0].memory_stats():
        return "the device's memory, the making of the weights included"
    if not _CLEAR.exists():
        return "the process's resident memory, the making of the weights included"
    _CLEAR.write_text("5")  # Source: proc(5): it sets the peak resident size to the present one.
    return "the process's resident memory from when there are weights"


def _peak_bytes() -> int:
    """Of the device, or, where it does not count (a CPU), of this process."""
    import jax

    if stats := jax.devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    if _CLEAR.exists():
        lines = _CLEAR.with_name("status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plot(path: Path, settings: Settings, cells: Mapping[Any, Cell], done: Mapping[str, Finished], memory: str) -> None:
    """Draws time per token, time in all, state and peak memory against length, with the range over repeats; a row for each size."""
    study, cost = settings.study, settings.cost
    quantities = ("time per token, ms", "time in all, s", "state, MB", "peak memory, MB")
    titles = [f"{size}: {quantity}" for size in cost.sizes for quantity in quantities]
    figure, axes = panels(*titles, columns=len(quantities))
    for row, (size, length) in enumerate(zip(cost.sizes, cost.lengths, strict=True)):
        position = np.arange(cost.block, length + 1, cost.block)
        for dtype, model in itertools.product(cost.dtypes, cost.models):
            runs = [done[cells[size, dtype, model, seed].name].result for seed in study.seeds]
            seconds = np.array([run["seconds"] for run in runs])
            drawn = [
                _medians(1000 * seconds / cost.block),
                np.cumsum(seconds, axis=1),
                np.array([run["state_bytes"] for run in runs]) / _MB,
                np.array([run["peak_bytes"] for run in runs]) / _MB,
            ]
            for panel, values in zip(axes[4 * row : 4 * row + 4], drawn, strict=True):
                style = _STYLES[model] | {"linestyle": "-" if dtype == "float32" else "--"}
                label = f"{LABELS[model]}, {dtype}" if row == 0 and panel is axes[0] else None
                panel.plot(position, values.mean(0), **style, markevery=0.2, markersize=5, linewidth=1.2, label=label)
                panel.fill_between(
                    position, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0
                )
    for panel, title in zip(axes, titles, strict=True):
        quantity = title.partition(": ")[2]
        panel.set_xlabel("tokens generated")
        panel.set_ylabel(quantity)
        if quantity.startswith(("time per", "state")):
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
    where = next(iter(done.values())).environment
    device = f"{where['devices']} ({where['cores']} cores)"
    figure.suptitle(
        f"Generation with random weights on {device}: mean and range of {len(study.seeds)} repeats. "
        f"Keys and values are float32 in both dtypes. Peak is {memory}."
    )
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _medians(values: np.ndarray) -> np.ndarray:
    """Each repeat's running median over 5 blocks: single blocks that something else held up do not hide the rest."""
    padded = np.pad(values, ((0, 0), (2, 2)), mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 5, axis=1), axis=2)


if __name__ == "__main__":
    main()
