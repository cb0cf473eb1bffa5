"""Measures speed: `python experiments/speed.py [SHAPE ...] [--compare] [--json FILE]`.

Every shape runs in a process of its own, so that peak memory is its own. A product of two 2048 x 2048 matrices, timed in the
same process, gives the limit that the share refers to. `--compare` also trains a GPT-2 of equal size in torch, if torch is
installed, in turns with ours, each the better of two runs, and prints the ratio; where our batch is cut into parts, GPT-2 trains
with its batch whole and in parts. `--mesh fsdp=2,sequence=2` trains on a mesh too, after one device once more, and prints the
ratio: on a CPU the devices are virtual and share its cores, so that it shows what cutting costs. Timings on a shared machine vary
by 10 to 25 %: compare ratios of one run.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import launch


class Shape(NamedTuple):
    """One workload. Training is float32 with Adam, on random tokens."""

    work: str
    """"train", "prefill" (head at the last token only) or "decode" (greedy, 64 tokens)."""
    num_layers: int
    embed_dim: int
    vocab_size: int
    batch_size: int
    num_tokens: int
    """A row, in one call."""
    architecture: str = "rwkv4"
    backend: str | None = None
    """Of the WKV operator; None: the best here."""
    remat: Literal["block", "elementwise", "none"] = "elementwise"
    accumulate: int = 1
    """Parts that a training batch is cut into, as by `optim.accumulate`: less memory, and on CPU more of it in cache. GPT-2 is
    trained with and without, and its better figure is the one to compare with."""
    stacked: bool = False
    """Whether layers are left in their stack for decoding."""


SHAPES = {
    "train-256": Shape("train", 6, 256, 256, 8, 256),
    "train-1024": Shape("train", 6, 256, 256, 8, 1024, accumulate=4),
    "train-4096": Shape("train", 6, 256, 256, 8, 4096, accumulate=8),
    "train7-256": Shape("train", 6, 256, 256, 8, 256, "rwkv7"),
    "train7-1024": Shape("train", 6, 256, 256, 8, 1024, "rwkv7"),
    "train7-4096": Shape("train", 6, 256, 256, 8, 4096, "rwkv7", accumulate=4),
    "train7-1024-scan": Shape("train", 6, 256, 256, 8, 1024, "rwkv7", "scan", remat="none"),
    "prefill-512": Shape("prefill", 12, 768, 50277, 1, 512),
    "decode-1": Shape("decode", 12, 768, 50277, 1, 64),
    "decode-8": Shape("decode", 12, 768, 50277, 8, 64),
    "decode-1-stacked": Shape("decode", 12, 768, 50277, 1, 64, stacked=True),
    "decode-8-stacked": Shape("decode", 12, 768, 50277, 8, 64, stacked=True),
    "decode7-1": Shape("decode", 12, 768, 65536, 1, 64, "rwkv7"),
}
RATIOS = [
    ("train-4096", "train-1024"), ("train7-4096", "train7-1024"), ("train7-1024", "train7-1024-scan"),
    ("decode-1", "decode-1-stacked"), ("decode-8", "decode-8-stacked"),
]  # fmt: skip
"""Pairs of shapes that are compared where both were measured."""
DEFAULT = ["train-256", "train-1024", "train-4096"]
SECONDS = 12.0
"""Of measurement a shape and framework."""


def main() -> None:
    """Measures the named shapes, prints a line for each, and writes them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("shapes", nargs="*", default=DEFAULT, metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--compare", action="store_true", help="train a GPT-2 of equal size in torch too")
    parser.add_argument(
        "--mesh",
        action="append",
        default=[],
        metavar="AXIS=SIZE,...",
        help="a mesh to train on too; may be given again",
    )
    parser.add_argument("--json", type=Path, help="write results, versions and machine here")
    parser.add_argument("--worker", choices=[*WORK], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"there is no shape {unknown[0]}; choose from {', '.join(SHAPES)}")
    if arguments.worker:
        print(json.dumps(WORK[arguments.worker](SHAPES[arguments.shapes[0]], *map(mesh_sizes, arguments.mesh))))
        return
    try:
        cuts = {mesh: mesh_sizes(mesh) for mesh in arguments.mesh}
    except ValueError as error:
        parser.error(str(error))
    if cuts and any(SHAPES[name].work != "train" for name in arguments.shapes):
        parser.error("--mesh is for shapes that train")
    if arguments.compare and importlib.util.find_spec("torch") is None:
        parser.error("--compare needs torch: pip install torch --index-url https://download.pytorch.org/whl/cpu")

    results, speed = {}, itemgetter("tokens_per_second")
    print(f"{'shape':16s} {'tokens/s':>9s} {'of GEMM':>8s} {'compile s':>9s} {'peak MB':>8s}")
    for name in arguments.shapes:
        kinds = ["rwkv"]
        if arguments.compare and SHAPES[name].work == "train":
            kinds += ["gpt2", "gpt2-parts"] if SHAPES[name].accumulate > 1 else ["gpt2"]
        runs = [{kind: worker(kind, name) for kind in kinds} for _ in range(min(len(kinds), 2))]
        results[name] = {kind: max((run[kind] for run in runs), key=speed) for kind in kinds}
        ours = results[name]["rwkv"]
        print(
            f"{name:16s} {speed(ours):9.0f} {ours['share_of_gemm']:8.2f} {ours['compile_s']:9.1f} {ours['peak_mb']:8.0f}", flush=True
        )  # fmt: skip
        for kind in kinds[1:]:
            peer, label = results[name][kind], "GPT-2, batch whole" if kind == "gpt2" else "GPT-2, batch in parts"
            ratio = speed(ours) / speed(peer)
            print(
                f"  {label:24s} {speed(peer):9.0f} tokens/s, {peer['peak_mb']:.0f} MB; RWKV has {ratio:.2f} times",
                flush=True,
            )
        for mesh, sizes in cuts.items():
            alone, cut = worker("rwkv", name), worker("rwkv", name, mesh, math.prod(sizes.values()))
            results[name][mesh] = {"rwkv": cut, "one device": alone}
            print(
                f"{'  ' + mesh:30s} {cut['tokens_per_second']:9.0f} tokens/s, {cut['compile_s']:.1f} s to compile, "
                f"{cut['tokens_per_second'] / alone['tokens_per_second']:.2f} of one device", flush=True,
            )  # fmt: skip
    for one, other in RATIOS:
        if one in results and other in results:
            a, b = results[one]["rwkv"], results[other]["rwkv"]
            speed, memory = (a[figure] / b[figure] for figure in ("tokens_per_second", "peak_mb"))
            print(f"{one} over {other}: {speed:.2f} in tokens/s, {memory:.2f} in peak memory")
    if arguments.json:
        packages = ["jax", "jaxlib", "numpy"] + (["torch"] if arguments.compare else [])
        machine = {
            "cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        }  # fmt: skip
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


def mesh_sizes(text: str) -> dict[str, int]:
    """Returns the sizes of a mesh's axes, of fsdp=2,sequence=2.

    Raises:
        ValueError: It is none.
    """
    from rwkv_jax.sharding import AXES

    pairs = [part.partition("=") for part in text.split(",")]
    if any(name not in AXES or not size.isdigit() for name, _, size in pairs):
        raise ValueError(f"--mesh is {text!r}; it must be AXIS=SIZE,..., the axes being {', '.join(AXES)}")
    return {name: int(size) for name, _, size in pairs}


def worker(kind: str, name: str, mesh: str | None = None, num_devices: int = 1) -> dict[str, float]:
    """Runs one measurement in a fresh process, on a mesh if one is given, and returns its figures."""
    command, environment = [sys.executable, __file__, name, "--worker", kind], dict(os.environ)
    if mesh is not None:
        command += ["--mesh", mesh]
        flags = os.environ.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={num_devices}"
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: Shape, sizes: dict[str, int] | None = None) -> dict[str, float]:
    """Returns the figures of our model at a shape, on a mesh of these sizes if it trains."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import rwkv_jax
    from rwkv_jax import devices, generate, lm, optim, sharding, train
    from rwkv_jax.models import ARCHITECTURES, module_of

    config = ARCHITECTURES[shape.architecture](
        vocab_size=shape.vocab_size, num_layers=shape.num_layers, embed_dim=shape.embed_dim, remat=shape.remat
    )
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (shape.batch_size, shape.num_tokens + 1))
    tokens = jnp.asarray(tokens, jnp.int32)
    cost = lm.flops_per_token(config)
    state: Any
    if shape.work == "train":
        optimizer = optim.make_optimizer(optim.OptimConfig(), module_of(config).declare(config), 1000)
        mesh = sharding.make_mesh(replace(sharding.MeshConfig(data=1), **sizes)) if sizes else None
        state = train.init_train_state(jax.random.key(0), config, optimizer, mesh=mesh)
        if mesh is not None:
            tokens = jax.device_put(tokens, jax.NamedSharding(mesh, sharding.spec("batch", None)))
        step = partial(
            train.train_step,
            config=config,
            optimizer=optimizer,
            l2wrap=1e-4,
            backend=shape.backend,
            accumulate=shape.accumulate,
        )
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        where = jax.tree.map(lambda x: x.sharding, state)
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            lowered = jax.jit(step, donate_argnums=0, out_shardings=(where, None)).lower(state, inputs, targets, None)
        compiled, compile_s = _compile(lowered)

        def call(carry: Any) -> Any:
            return compiled(carry, inputs, targets, None)[0]

        cost *= 3
    elif shape.work == "prefill":
        params = rwkv_jax.init(jax.random.key(0), config)
        forward = jax.jit(partial(rwkv_jax.forward, positions="last", backend=shape.backend), static_argnums=1)
        compiled, compile_s = _compile(forward.lower(params, config, tokens[:, :-1]))
        state = None

        def call(carry: Any) -> Any:
            return compiled(params, tokens[:, :-1])

        cost -= 2 * shape.embed_dim * shape.vocab_size
    else:
        params = rwkv_jax.init(jax.random.key(0), config)
        logits, rwkv_state = rwkv_jax.forward(params, config, tokens[:, :1])
        if not shape.stacked:
            params = rwkv_jax.unstack(params, donate=True)
        state = (logits[:, 0], rwkv_state, jnp.zeros_like(logits[:, 0]), jax.random.key(0))
        kwargs = {"sampling": generate.Sampling(temperature=0), "num_tokens": shape.num_tokens}
        compiled, compile_s = _compile(generate.decode.lower(params, config, *state, **kwargs))

        def call(carry: Any) -> Any:
            return compiled(params, *carry)[1]

    seconds = _time(call, state, jax.block_until_ready)
    speed = shape.batch_size * shape.num_tokens / seconds
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    share = speed * cost / devices.measure_gemm("float32")
    return {"tokens_per_second": speed, "share_of_gemm": share, "compile_s": compile_s, "peak_mb": peak_mb}


def _compile(lowered: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


def _time(call: Any, carry: Any, wait: Any) -> float:
    """The median seconds of a call, over at least 3 of them and about SECONDS, after one to warm up."""
    carry = wait(call(carry))
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        start = time.perf_counter()
        carry = wait(call(carry))
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def measure_gpt2(shape: Shape, parts: int = 1) -> dict[str, float]:
    """Returns the figures of a GPT-2 in torch: pre-norm, learned positions, 4 heads, fused attention, Adam, a batch in parts."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]
    from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

    class Block(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            q, k, v = (z.unflatten(-1, (4, -1)).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT2(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(shape.vocab_size, shape.embed_dim)
            self.positions = nn.Parameter(0.01 * torch.randn(shape.num_tokens, shape.embed_dim))
            self.blocks = nn.Sequential(*(Block(shape.embed_dim) for _ in range(shape.num_layers)))
            self.norm = nn.LayerNorm(shape.embed_dim)
            self.head = nn.Linear(shape.embed_dim, shape.vocab_size, bias=False)

        def forward(self, tokens):
            return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions)))

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = GPT2()
    optimizer = torch.optim.Adam(model.parameters(), 6e-4)
    tokens = torch.randint(0, shape.vocab_size, (shape.batch_size, shape.num_tokens + 1))

    def call(carry):
        optimizer.zero_grad()
        for part in tokens.chunk(parts):
            loss = F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
            (loss / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return carry

    seconds = _time(call, None, lambda carry: carry)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tokens_per_second": shape.batch_size * shape.num_tokens / seconds, "peak_mb": peak_mb}


WORK = {
    "rwkv": measure,
    "gpt2": measure_gpt2,
    "gpt2-parts": lambda shape: measure_gpt2(shape, shape.accumulate),
}
"""What a worker's process measures."""

if __name__ == "__main__":
    launch.with_huge_pages()
    main()
