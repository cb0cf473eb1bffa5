"""Devices to compile for that need not be here: the compilers of XLA, Triton and TPUs run without one.

The environment that has them is made by the command in `ENVIRONMENT`. Nothing is run on such a device, so no time can be had from it.
"""

import importlib.util
import os
import re
from typing import Any, NamedTuple

ENVIRONMENT = 'python3.11 -m venv .venv-aot && .venv-aot/bin/pip install -e ".[test,aot]"'
"""Makes the environment, beside the usual one: a JAX with CUDA and TPU plugins warns on a machine without either."""


class Gpu(NamedTuple):
    """What XLA wants to know of an NVIDIA GPU, from its data sheet."""

    name: str
    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    clock_ghz: float
    memory: int
    """Bytes."""
    bandwidth: int
    """Bytes a second."""
    l2_cache: int
    shared_memory: int
    """Bytes a core; a block can have 1 KiB less."""


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 85_100_068_864, 2_039_040_000_000, 41_943_040, 167_936),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800, 233_472),
}
TPUS = {"v5e": ("v5e:2x2", "TPU v5 lite"), "v5p": ("v5p:2x2x1", "TPU v5")}
"""The least topology that can be described, and the kind of its devices."""
TPU_MEMORY = {"v5e": 17_179_869_184, "v5p": 102_005_473_280}
"""Bytes a device, from Google Cloud's pages: 16 and 95 GiB."""
TARGETS = (*GPUS, *TPUS)


def why_not() -> str | None:
    """Returns why nothing can be compiled for absent hardware here, or None where it can."""
    missing = [name for name in ("jax_cuda12_plugin", "libtpu", "absl") if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(missing)}: {ENVIRONMENT}" if missing else None


def prepare() -> None:
    """Sets what the plugins read from the process's environment; call it before JAX is used."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # One process at a time loads libtpu, since a TPU has one user; a compiler needs no TPU.
    }
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def devices(target: str, count: int = 1) -> list[Any]:
    """Returns devices that programs can be compiled for: `count` GPUs of a host, or the first TPUs of the least topology.

    Raises:
        ValueError: The target is not one of `TARGETS`.
    """
    from jax.experimental import topologies

    if target in GPUS:
        description = _describe(GPUS[target])
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x{count}x1", target_config=description
        ).devices
    if target in TPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target][0]).devices[:count]
    raise ValueError(f"there is no target {target!r}; choose from {', '.join(TARGETS)}")


def abstract(target: str, mesh: Any) -> Any:
    """Returns an abstract mesh on the target's devices: under it, `backend=None` chooses for them, and Pallas lowers for them."""
    import jax

    if target in GPUS:
        device = jax.sharding.AbstractDevice(GPUS[target].name, GPUS[target].cores, "cuda")
    else:
        device = jax.sharding.AbstractDevice(TPUS[target][1], 1, "tpu")
    return jax.sharding.AbstractMesh(
        mesh.devices.shape, mesh.axis_names, axis_types=mesh.axis_types, abstract_device=device
    )


class Target(NamedTuple):
    """Many devices of a kind, such as a cluster or a slice."""

    kind: str
    memory: int
    """Bytes a device."""
    devices: list[Any]
    name: str

    def abstract(self, mesh: Any) -> Any:
        """As the function `abstract`."""
        return abstract(self.name, mesh)


def target(text: str) -> Target:
    """Returns the devices of h200:HOSTSxGPUS or a100:HOSTSxGPUS, or of a TPU topology such as v5e:4x4 or v5p:2x2x2.

    Raises:
        ValueError: There is no such target.
    """
    from jax.experimental import topologies

    name, _, size = text.partition(":")
    if not re.fullmatch(r"\d+(x\d+)+", size) or name not in TARGETS or (name in GPUS and size.count("x") != 1):
        raise ValueError(f"the target is {text!r}; it must be h200:4x8 (hosts x GPUs), a100:1x8, v5e:4x4 or v5p:2x2x2")
    if name in GPUS:
        description = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"{size}x1", target_config=_describe(GPUS[name])
        )
        return Target(GPUS[name].name, GPUS[name].memory, list(description.devices), name)
    description = topologies.get_topology_desc(platform="tpu", topology_name=text)
    return Target(TPUS[name][1], TPU_MEMORY[name], list(description.devices), name)


def _describe(gpu: Gpu) -> str:
    """XLA's target configuration, in protobuf's text form."""
    major, minor = gpu.capability
    feature = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  core_count: {gpu.cores} fpus_per_core: {128 if major >= 9 else 64} clock_rate_ghz: {gpu.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2_cache} device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  device_vendor: "NVIDIA Corporation" driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{gpu.name}"
"""
