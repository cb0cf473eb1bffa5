"""Compiles a run's step for hardware that is not here, and says what it takes and whether it fits.

`python experiments/plan.py --target a100:8x8 --cfg experiments/configs/rwkv4_14b.toml --mesh.fsdp 64`

GPU targets are h200:HOSTSxGPUS and a100:HOSTSxGPUS; TPU targets v5e:4x4 and v5p:4x4x4 (their topologies). Every field of the config
can be overridden as for train.py. Memory, FLOPs and collectives are the compiler's; tokens/s is an estimate from --mfu. Nothing is
run. It needs the environment that rwkv_kernels/hardware.py names, and says so.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from rwkv_kernels import hardware

hardware.prepare()

import jax
import jax.numpy as jnp
import numpy as np
from hlo import collectives
from jax.sharding import Mesh, NamedSharding
from steps import make_step

from rwkv_jax import config, devices, finetune, lm, optim, sharding, train

GIB = 2**30
HEADROOM = 0.92
"""Share of a device's memory that a program gets: the rest is the runtime's and the collectives'."""


class Plan(NamedTuple):
    """What a compiled step takes on each device, in bytes."""

    parameters: int
    optimiser: int
    other: int
    """The batch, the carried state, and what else is given."""
    temporaries: int
    """Activations, gradients, gathered parameters, logits."""
    peak: int
    """All of it, where buffers that are given are used again for what comes back."""
    collectives: dict[str, tuple[int, int]]
    """Executions a step and bytes of their results, by name."""
    seconds: float
    """Of compiling."""


class DoesNotCompile(Exception):
    """A compiler that plans memory itself, such as a TPU's, finds no room."""


def main() -> None:
    """Reads the command line, compiles, and prints the plan."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--target", required=True)
    parser.add_argument("--mfu", type=float, default=0.4)
    own, rest = parser.parse_known_args()
    settings = config.parse_or_exit(rest, "plan.py")
    if (reason := hardware.why_not()) is not None:
        raise SystemExit(f"plan.py: {reason}")
    try:
        target = hardware.target(own.target)
        mesh = sharding.make_mesh(settings.mesh, target.devices)
        plan = compiled(settings, mesh, target)
    except ValueError as error:
        raise SystemExit(f"plan.py: {error}") from error
    except DoesNotCompile as error:
        print(error)
    else:
        show(plan, settings, mesh, target, own.mfu)
        if fits(plan, target):
            return
    print("\nIt does not fit. Settings that take less, nearest first:")
    for change, other in smaller(settings, mesh):
        try:
            plan = compiled(other, sharding.make_mesh(other.mesh, target.devices), target)
        except (ValueError, DoesNotCompile) as error:
            print(f"  {change}: {error}", flush=True)
            continue
        print(f"  {change}: {plan.peak / GIB:.1f} GiB{', fits' if fits(plan, target) else ''}", flush=True)
        if fits(plan, target):
            return
    print("None of them fits: use more devices or a smaller model.")
    raise SystemExit(1)


def compiled(settings: config.Settings, mesh: Mesh, target: hardware.Target) -> Plan:
    """Returns what the step of a run takes.

    Raises:
        DoesNotCompile: The device has no room.
        ValueError: The mesh does not fit the model or the batch.
    """
    model, data = settings.model, settings.data
    declaration = finetune.declare(settings.finetune, model)
    if settings.finetune.method != "all":
        raise ValueError(f"finetune.method is {settings.finetune.method!r}; only training of all parameters is planned")
    optimizer = optim.make_optimizer(settings.optim, declaration, settings.run.steps)
    where = sharding.param_shardings(declaration, model.num_layers, mesh)
    sharding.check_batch(
        mesh, data.batch_size, settings.optim.accumulate, settings.optim.segment or data.context_length
    )

    def fresh(key):
        return train.init_train_state(
            key, model, optimizer, param_dtype=settings.optim.param_dtype,
            carried_rows=data.batch_size if data.carry else None,
        )  # fmt: skip

    shapes = jax.eval_shape(fresh, jax.random.key(0))
    shardings = train.train_state_shardings(shapes, where, optimizer, mesh)
    state = jax.tree.map(placed, shapes, shardings)
    batch = NamedSharding(mesh, sharding.spec("batch", None))
    shape = (data.batch_size, data.context_length)
    tokens, marks = (jax.ShapeDtypeStruct(shape, kind, sharding=batch) for kind in (jnp.int32, jnp.bool_))
    lengths = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=NamedSharding(mesh, sharding.spec("batch")))
    reset = marks if data.documents == "packed" or data.carry else None
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(target.abstract(mesh)):
        lowered = make_step(settings, optimizer, shardings).lower(
            state, tokens, tokens, reset, lengths if data.documents == "rows" else None
        )
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
                raise
            raise DoesNotCompile(f"{target.kind}: {str(error).splitlines()[0]}") from error
    memory = program.memory_analysis()
    own, moments = held(state.params), held(state.opt_state)
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        own, moments, memory.argument_size_in_bytes - own - moments, memory.temp_size_in_bytes, peak,
        collectives(program.as_text()), time.perf_counter() - start,
    )  # fmt: skip


def placed(shape: Any, where: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape with its place."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def held(tree: Any) -> int:
    """Returns the bytes that a device holds of arrays."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def fits(plan: Plan, target: hardware.Target) -> bool:
    """Returns whether a step fits a device, with room for the runtime."""
    return plan.peak <= HEADROOM * target.memory


def smaller(settings: config.Settings, mesh: Mesh) -> Iterator[tuple[str, config.Settings]]:
    """Yields changes that take less memory, each on top of those before it: the cheapest in speed first."""

    def changed(section: str, **fields: Any) -> tuple[str, config.Settings]:
        nonlocal settings
        settings = dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **fields)})
        return ", ".join(f"{section}.{key}={value}" for key, value in fields.items()), settings

    if settings.optim.loss_chunk is None:
        yield changed("optim", loss_chunk=256)
    if settings.model.remat != "block":
        yield changed("model", remat="block")
    if mesh.shape["data"] > 1:
        yield changed("mesh", data=1, fsdp=mesh.shape["data"] * mesh.shape["fsdp"])
    rows = settings.data.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    while rows % (2 * settings.optim.accumulate) == 0:
        yield changed("optim", accumulate=2 * settings.optim.accumulate)
    if settings.optim.param_dtype != "bfloat16":
        yield changed("optim", param_dtype="bfloat16")


def show(plan: Plan, settings: config.Settings, mesh: Mesh, target: hardware.Target, mfu: float) -> None:
    """Prints a plan."""
    model, data = settings.model, settings.data
    where = f"{mesh.size} {target.kind}: {sharding.describe(mesh)}"
    print(f"{lm.count_params(model) / 1e9:.2f}B parameters ({model.architecture}) on {where}")
    print(f"{data.batch_size} rows of {data.context_length} tokens a step; compiled in {plan.seconds:.0f} s\n")
    print("GiB a device:")
    for name in ("parameters", "optimiser", "other", "temporaries", "peak"):
        print(f"  {name:12s} {getattr(plan, name) / GIB:8.2f}")
    room = target.memory / GIB
    print(
        f"  {'of':12s} {room:8.2f}: {'fits' if fits(plan, target) else 'does not fit'}, {HEADROOM:.0%} being usable\n"
    )
    tokens = data.batch_size * data.context_length
    flops = 3 * lm.flops_per_token(model)
    peak = devices.published_peak(target.kind)
    print(f"{flops * tokens:.3g} FLOPs a step in matrix products, without rematerialisation")
    if peak:
        print(
            f"estimate: {mfu * peak * mesh.size / flops:,.0f} tokens/s at a utilisation of {mfu:.0%}, assumed, not measured"
        )
    own = " (a TPU's compiler has others as calls of its own)" if target.kind.startswith("TPU") else ""
    print(f"\ncollectives a step{own}: name, executions, GiB of results a device")
    for name, (count, size) in sorted(plan.collectives.items()):
        print(f"  {name:20s} {count:6d} {size / GIB:10.2f}")


if __name__ == "__main__":
    main()
