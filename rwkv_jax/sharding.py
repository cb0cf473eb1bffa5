"""Where arrays lie on many devices: a mesh with named axes, and one table from logical axes to them.

`jax.jit` partitions the pure functions of this library (GSPMD): parameters are put on the mesh by `param_shardings`, and `constrain`
says in a few places of the model how activations lie. Without a mesh in use (`jax.set_mesh`) nothing here does anything.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from .params import Param

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Parameters, by the names in their declarations.
    "embed": "fsdp",
    "embed_out": "tensor",
    "att": "tensor",
    "att_of_rank": ("tensor", "fsdp"),
    "ffn": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "head": None,
    "rank": None,
    "mix": None,
    "mix_rank": None,
    "mix_ranks": None,
    "decay_rank": None,
    "lora": None,
    "layers": None,
    # Activations.
    "batch": ("data", "fsdp"),
    "time": "sequence",
    "residual": None,
}
"""Mesh axes by logical axis; None is not cut. The slow network, between slices and hosts, belongs to `data`."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged, and how processes find each other. The product of the sizes is the number of devices."""

    data: int = -1
    """Parts of the batch, each with all parameters; -1, here and below, takes the devices that are left."""
    fsdp: int = 1
    """Parts of the batch among which parameters and optimiser state are split; each layer's are gathered as it runs."""
    tensor: int = 1
    """Parts of the heads, of the hidden channels and of the vocabulary."""
    sequence: int = 1
    """Parts of every row's tokens; the state goes from one to the next."""
    coordinator: str | None = None
    """HOST:PORT of process 0 for a run of several processes; auto: found by JAX (Slurm, Open MPI, Kubernetes, TPU pods); none:
    one process."""
    num_processes: int | None = None
    """Processes in all, where the coordinator is given."""
    process_id: int | None = None
    """Which of them this is, where the coordinator is given."""
    timeout: int = 120
    """Seconds to wait for the other processes at the start, and for a silent one later."""

    def __post_init__(self):
        sizes = self.sizes
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name} is {size}; it must be at least 1, or -1 for the devices that are left")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError(f"mesh has {sizes}; only one axis can be -1")
        if self.coordinator not in (None, "auto") and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"mesh.coordinator is {self.coordinator!r}; it must be HOST:PORT of process 0, or auto")
        given = (self.coordinator not in (None, "auto"), self.num_processes is not None, self.process_id is not None)
        if len(set(given)) > 1:
            raise ValueError(
                "mesh.coordinator=HOST:PORT, mesh.num_processes and mesh.process_id go together; give all three, or "
                "coordinator='auto', or none"
            )
        if self.timeout < 1:
            raise ValueError(f"mesh.timeout is {self.timeout}; it must be at least 1 second")

    @property
    def sizes(self) -> dict[str, int]:
        """The axes' sizes, slowest network first."""
        return {name: getattr(self, name) for name in AXES}


AXES = tuple(field.name for field in fields(MeshConfig))[:4]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of a config, its axis `data` outermost, so that it crosses slices and hosts first.

    Args:
        config: Sizes of the axes.
        devices: Of JAX; None: all there are.

    Raises:
        ValueError: The sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(config.sizes)
    known = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            sizes[name] = max(len(devices) // known, 1)
    product = math.prod(sizes.values())
    if product != len(devices):
        raise ValueError(
            f"mesh {' x '.join(f'{name} {size}' for name, size in sizes.items())} is {product} devices, but there are "
            f"{len(devices)}; choose sizes that multiply to {len(devices)}, one of them -1"
        )
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        return Mesh(_over_slices(devices, sizes, len(slices)), AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=types)


def describe(mesh: Mesh | AbstractMesh) -> str:
    """Returns the axes of a mesh that cut something, such as "fsdp 4 x sequence 2"."""
    return " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulate: int, num_tokens: int) -> None:
    """Raises ValueError unless the mesh divides each of the `accumulate` parts of a batch, and the tokens that a row has at once.

    Whether `accumulate` divides the batch is for `train_step` to say.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % accumulate == 0 and batch_size // accumulate % parts:
        raise ValueError(
            f"data.batch_size is {batch_size}; it must be a multiple of mesh.data x mesh.fsdp x optim.accumulate, "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} x {accumulate}"
        )
    if num_tokens % mesh.shape["sequence"]:
        raise ValueError(
            f"mesh.sequence is {mesh.shape['sequence']}; it must divide the {num_tokens} tokens that a row has at once "
            "(data.context_length or optim.segment)"
        )


def _over_slices(devices: list[Any], sizes: dict[str, int], slices: int) -> np.ndarray:
    from jax.experimental import mesh_utils

    if sizes["data"] % slices:
        raise ValueError(
            f"mesh.data is {sizes['data']}, but the devices are {slices} slices joined by a slow network, which only `data` "
            f"may cross; make it a multiple of {slices}"
        )
    inner = (sizes["data"] // slices, *list(sizes.values())[1:])
    return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices)


def spec(*axes: str | None) -> PartitionSpec:
    """Returns the partition of an array whose axes have these logical names; None is an axis that is not cut."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def on(mesh: Mesh | AbstractMesh) -> Callable[[Param], Sharding]:
    """Returns where a mesh has each declared parameter, for `rwkv_jax.load(path, sharding=on(mesh))`."""
    if mesh.size == 1 and isinstance(mesh, Mesh):
        return lambda param: SingleDeviceSharding(mesh.devices.flat[0])
    return lambda param: NamedSharding(mesh, _of_param(param))


def _of_param(param: Param) -> PartitionSpec:
    return spec(*(("layers",) if param.stacked else ()), *param.axes)


def param_shardings(declaration: Any, num_layers: int, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the sharding of every declared parameter on a mesh.

    Raises:
        ValueError: A mesh axis does not divide the dimension of a parameter that it cuts; all are listed.
    """
    wrong = []
    for param in jax.tree.leaves(declaration):
        for size, cut in zip(param.stacked_shape(num_layers), _of_param(param), strict=True):
            names = () if cut is None else (cut,) if isinstance(cut, str) else cut
            if size % math.prod(mesh.shape[name] for name in names):
                parts = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in names)
                wrong.append(f"{param.key}: {size} does not divide by {parts}")
    if wrong:
        raise ValueError(
            "the mesh does not fit the model; change the mesh's sizes or the model's:\n  " + "\n  ".join(wrong)
        )
    return jax.tree.map(on(mesh), declaration)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def in_use() -> dict[str, int]:
    """Returns the sizes above 1 of the mesh axes that `jax.set_mesh` has set and GSPMD partitions; a caller's own shard_map takes
    its axes out."""
    mesh = jax.sharding.get_abstract_mesh()
    every = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in every if kind == AxisType.Auto and size > 1 and name in AXES}


def fitting(shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """Returns the partition on the mesh in use of an activation with these logical axes: cut where a mesh axis divides it, else whole
    there, such as one row of generation among many devices."""
    sizes = in_use()
    parts = []
    for size, axis in zip(shape, axes, strict=True):
        rule = None if axis is None else RULES[axis]
        names = tuple(name for name in ((rule,) if isinstance(rule, str) else rule or ()) if name in sizes)
        while names and size % math.prod(sizes[name] for name in names):
            names = names[:-1]
        parts.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x, laid out on the mesh in use by its logical axes; without one, x as it is."""
    if not in_use():
        return x
    return jax.lax.with_sharding_constraint(x, fitting(x.shape, axes))
