"""Many devices: the numbers of one, where parameters lie, what is exchanged, and meshes that do not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from scripts import ROOT

import rwkv_jax
from rwkv_jax import config, distributed, sharding
from rwkv_jax.models import module_of
from rwkv_jax.sharding import AXES, MeshConfig

CONFIGS = sorted((ROOT / "experiments" / "configs").glob("*.toml"))


def abstract_mesh(data=1, fsdp=1, tensor=1, sequence=1):
    """A mesh without devices."""
    return AbstractMesh((data, fsdp, tensor, sequence), AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("rwkv4", ["data", "mixed"]), ("rwkv5", ["tensor"]), ("rwkv6", ["sequence"]),
        ("rwkv7", ["fsdp", "sequence"]), ("transformer", ["tensor"]),
    ],
)  # fmt: skip
def test_eight_devices_train_and_generate_as_one_and_exchange_what_they_must(name, meshes):
    """The other pairs: `XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/eight_devices.py rwkv7`."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("eight_devices.py")), name, *meshes],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert list(found) == meshes
    for kind, result in found.items():
        assert result["gradient"] < 1e-5, kind
        assert result["loss"] < 1e-4, kind
        assert result["learned"] > 0.3, kind
        assert result["same text"], kind
    if "data" in found:  # Parameters are whole everywhere, and only gradients and the loss are summed.
        assert set(found["data"]["collectives"]) == {"all-reduce"}
    if "fsdp" in found:
        assert set(found["fsdp"]["collectives"]) <= {"all-gather", "all-reduce", "reduce-scatter"}
        assert found["fsdp"]["collectives"]["all-gather"] > 0
    if (
        "sequence" in found
    ):  # Neighbours exchange a token, and states are composed; the one gather is of foreign tokens' marks.
        assert found["sequence"]["collectives"].pop("all-gather", 0) <= 1
        assert set(found["sequence"]["collectives"]) == {"all-reduce", "collective-permute"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_under_fsdp_no_parameter_of_a_shipped_config_above_1_mb_is_whole_on_a_device(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = config.load(path).model
    declaration = module_of(model).declare(model)
    where = sharding.param_shardings(declaration, model.num_layers, abstract_mesh(fsdp=8))
    for param, own in zip(jax.tree.leaves(declaration), jax.tree.leaves(where), strict=True):
        shape = param.stacked_shape(model.num_layers)
        if 4 * jax.numpy.prod(jax.numpy.asarray(shape, float)) > 1e6:
            assert own.shard_shape(shape) != shape, param.key


def test_the_table_has_every_axis_that_a_model_declares():
    for model in (rwkv_jax.RWKV4Config, rwkv_jax.RWKV5Config, rwkv_jax.RWKV6Config, rwkv_jax.RWKV7Config):
        own = model(vocab_size=256, num_layers=2, embed_dim=64)
        axes = {axis for param in jax.tree.leaves(module_of(own).declare(own)) for axis in param.axes}
        assert axes <= sharding.RULES.keys()


def test_an_axis_of_a_mesh_that_does_not_divide_a_parameter_is_named_with_it():
    model = rwkv_jax.RWKV4Config(vocab_size=250, num_layers=2, embed_dim=96)
    with pytest.raises(ValueError, match=r"head.weight: 250 does not divide by mesh.tensor=4"):
        sharding.param_shardings(module_of(model).declare(model), 2, abstract_mesh(tensor=4))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"data 3 x fsdp 1 x tensor 1 x sequence 1 is 3 devices, but there are 1"),
        ({"data": -1, "fsdp": 2}, r"is 2 devices, but there are 1; choose sizes that multiply to 1"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fsdp": 0}, "mesh.fsdp is 0; it must be at least 1, or -1"),
        ({"fsdp": -1}, "only one axis can be -1"),
        ({"coordinator": "host:1234"}, "go together; give all three"),
        ({"num_processes": 2, "process_id": 0}, "go together; give all three"),
        ({"timeout": 0}, "mesh.timeout is 0; it must be at least 1 second"),
    ],
)
def test_meshes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**fields)


def test_a_batch_that_the_mesh_does_not_divide_is_refused(unchecked):
    with pytest.raises(
        ValueError, match=r"data.batch_size is 6; it must be a multiple of mesh.data x mesh.fsdp, 2 x 2"
    ):
        distributed.rows_here(abstract_mesh(data=2, fsdp=2), 6)


def test_a_coordinator_that_does_not_answer_is_named_in_time():
    own = MeshConfig(coordinator="127.0.0.1:9", num_processes=2, process_id=1, timeout=1)
    with pytest.raises(ConnectionError, match=r"127.0.0.1:9 cannot be reached in mesh.timeout=1 s"):
        distributed.start(own)


def test_without_a_mesh_nothing_is_constrained():
    x = jax.numpy.ones((4, 8))
    assert sharding.constrain(x, "batch", "embed") is x
    assert sharding.fitting(x.shape, ("batch", None)) == PartitionSpec(None, None)
