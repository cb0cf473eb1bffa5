"""Measures speed: `python experiments/speed.py [SHAPE ...] [--compare] [--json FILE]`.

Every workload has a process of its own, so that peak memory is its own, and those that are compared take turns of some seconds (at
least two calls): a shared machine's speed changes by 10 to 25 % within minutes, so a ratio is the median over rounds of turns of what
two workloads did in the same round. Only one works at a time, but all of a group are in memory. All, GPT-2 too, have the settings of
malloc that `launch.py` describes. "1st call" is the speed of a turn's first call, which is not counted, over that of the counted ones.
A product of two 2048 x 2048 matrices, timed in the same process, gives the limit that the share refers to.
`--compare` also trains a GPT-2 of equal size in torch, if torch is installed; where our batch is cut into parts, GPT-2 trains with its
batch whole and in parts. `--mesh fsdp=2,sequence=2` trains on a mesh too: on a CPU the devices are virtual and share its cores, so
that it shows what cutting costs.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import launch
from turns import Measured, Program, Workload, in_turns, serve


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
COLUMNS = {
    "tokens_per_second": ("tokens/s", ".0f"), "share_of_gemm": ("of GEMM", ".2f"), "compile_s": ("compile s", ".1f"),
    "peak_mb": ("peak MB", ".0f"), "first_call": ("1st call", ".2f"),
}  # fmt: skip
"""What is printed of a workload's figures: title and format."""
DEFAULT = ["train-256", "train-1024", "train-4096"]


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
    arguments.shapes = list(dict.fromkeys(arguments.shapes))
    unknown = [name for name in arguments.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"there is no shape {unknown[0]}; choose from {', '.join(SHAPES)}")
    if arguments.worker:
        serve(WORK[arguments.worker](SHAPES[arguments.shapes[0]], *map(mesh_sizes, arguments.mesh)))
        return
    try:
        cuts = {mesh: mesh_sizes(mesh) for mesh in arguments.mesh}
    except ValueError as error:
        parser.error(str(error))
    if cuts and any(SHAPES[name].work != "train" for name in arguments.shapes):
        parser.error("--mesh is for shapes that train")
    if arguments.compare and importlib.util.find_spec("torch") is None:
        parser.error("--compare needs torch: pip install torch --index-url https://download.pytorch.org/whl/cpu")

    results: dict[str, dict[str, dict[str, float | list[float]]]] = {}
    print(f"{'':28s}", *(f"{title:>9s}" for title, _ in COLUMNS.values()))
    for names in groups(arguments.shapes):
        workloads = {name: ["rwkv", *cuts] for name in names}
        for name in names if arguments.compare else ():
            if SHAPES[name].work == "train":
                workloads[name] += ["gpt2", "gpt2-parts"] if SHAPES[name].accumulate > 1 else ["gpt2"]
        by_kind = sorted(  # Ours beside each other.
            ((name, kind) for name in names for kind in workloads[name]), key=lambda workload: workload[1] != "rwkv"
        )
        measured = in_turns({workload: program(*workload, cuts) for workload in by_kind})
        for name in names:
            results[name] = {
                kind: {**measured[name, kind].figures, "turns": measured[name, kind].speeds} for kind in workloads[name]
            }
            for kind in workloads[name]:
                print_line(name, kind, measured)
        for one, other in RATIOS:
            if one in names and other in names:
                a, b = measured[one, "rwkv"], measured[other, "rwkv"]
                memory = a.figures["peak_mb"] / b.figures["peak_mb"]
                print(f"{one} over {other}: {a.over(b):.2f} in tokens/s, {memory:.2f} in peak memory", flush=True)
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


def groups(names: list[str]) -> list[list[str]]:
    """Returns the shapes with those that they are compared with, by RATIOS, side by side."""
    found: list[list[str]] = []
    for name in names:
        of_it = {other for pair in RATIOS if name in pair for other in pair} | {name}
        near = [group for group in found if of_it & set(group)]
        found = [group for group in found if group not in near]
        found.append([*itertools.chain(*near), name])
    return found


def program(name: str, kind: str, cuts: dict[str, dict[str, int]]) -> Program:
    """Returns what starts the process of a shape's workload; a kind is one of WORK, or a mesh to train on."""
    command, environment = [sys.executable, __file__, name, "--worker"], dict(os.environ)
    if kind in cuts:
        flags = f"--xla_force_host_platform_device_count={math.prod(cuts[kind].values())}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        command += ["rwkv", "--mesh", kind]
    else:
        command.append(kind)
    return Program(f"{kind} at {name}", command, environment)


def print_line(name: str, kind: str, measured: dict[tuple[str, str], Measured]) -> None:
    """Prints what a workload did, and beside another kind than ours the ratio to ours."""
    own, ours = measured[name, kind], measured[name, "rwkv"]
    label = {"rwkv": name, "gpt2": "  GPT-2, batch whole", "gpt2-parts": "  GPT-2, batch in parts"}.get(
        kind, f"  {kind}"
    )
    figures = (f"{own.figures[key]:{form}}" if key in own.figures else "-" for key, (_, form) in COLUMNS.items())
    columns = " ".join(f"{figure:>9s}" for figure in figures)
    ratio = ""
    if kind.startswith("gpt2"):
        ratio = f"   RWKV has {ours.over(own):.2f} times its tokens/s"
    elif kind != "rwkv":
        ratio = f"   {own.over(ours):.2f} of one device"
    print(f"{label:28s} {columns}{ratio}", flush=True)


def rwkv(shape: Shape, sizes: dict[str, int] | None = None) -> Workload:
    """Returns the work of our model at a shape, on a mesh of these sizes if it trains."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import rwkv_jax
    from rwkv_jax import generate, lm, optim, sharding, train
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

    num_tokens = shape.batch_size * shape.num_tokens
    return Workload(lambda carry: jax.block_until_ready(call(carry)), state, num_tokens, compile_s, num_tokens * cost)


def _compile(lowered: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


def gpt2(shape: Shape, parts: int = 1) -> Workload:
    """Returns the training of a GPT-2 in torch: pre-norm, learned positions, 4 heads, fused attention, Adam, a batch in parts."""
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

    return Workload(call, None, shape.batch_size * shape.num_tokens)


WORK = {"rwkv": rwkv, "gpt2": gpt2, "gpt2-parts": lambda shape: gpt2(shape, shape.accumulate)}
"""What a worker's process repeats."""

if __name__ == "__main__":
    launch.with_tuned_malloc()
    main()
