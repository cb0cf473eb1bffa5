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
from small_models import RWKV, SMALL

import rwkv_jax
from rwkv_jax import config, distributed, finetune, sharding
from rwkv_jax.models import module_of
from rwkv_jax.sharding import AXES, MeshConfig

FILES = sorted((ROOT / "experiments" / "configs").glob("*.toml"))
CONFIGS = [path for path in FILES if "[study]" not in path.read_text(encoding="utf-8")]


def abstract_mesh(data=1, fsdp=1, tensor=1, sequence=1):
    """A mesh without devices."""
    return AbstractMesh((data, fsdp, tensor, sequence), AXES, axis_types=(AxisType.Auto,) * 4)


def run(arguments):
    """What Python prints with eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("rwkv4", ["data", "mixed"]), ("rwkv5", ["tensor"]), ("rwkv6", ["sequence"]),
        ("rwkv7", ["fsdp", "sequence"]), ("transformer", ["tensor"]),
    ],
)  # fmt: skip
def test_eight_devices_train_and_generate_as_one_and_exchange_what_they_must(name, meshes):
    """The other pairs: `python tests/eight_devices.py rwkv7`."""
    found = json.loads(run([str(Path(__file__).with_name("eight_devices.py")), name, *meshes]))
    assert list(found) == meshes
    for kind, result in found.items():
        assert result["gradient"] < 1e-5, kind
        assert result["loss"] < 1e-4, kind
        assert result["learned"] > 0.3, kind
        assert result["same text"], kind
    if "data" in found:  # Parameters are whole everywhere, and only gradients and the loss are summed.
        assert found["data"]["collectives"].keys() == {"all-reduce"}
    if "fsdp" in found:
        assert {"all-gather"} <= found["fsdp"]["collectives"].keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    if "sequence" in found:
        # Neighbours exchange a token, and states are composed; what is gathered is marks of tokens.
        _, gathered = found["sequence"]["collectives"].pop("all-gather", (0, 0))
        assert gathered <= 4 * 8 * 32
        assert found["sequence"]["collectives"].keys() == {"all-reduce", "collective-permute"}


MEMORY = """
import sys
from functools import partial
import jax, jax.numpy as jnp, optax
from jax.sharding import NamedSharding
from eight_devices import MODELS
from rwkv_jax import sharding, train
from rwkv_jax.models import module_of

config, found = MODELS[sys.argv[1]], []
for parts in (2, 4):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, sequence=parts), jax.devices()[:parts])
    optimizer = optax.adam(1e-3)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: train.init_train_state(jax.random.key(0), config, optimizer))
        where = sharding.param_shardings(module_of(config).declare(config), config.num_layers, mesh)
        where = train.train_state_shardings(shapes, where, optimizer, mesh)
        state = jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), shapes, where)
        tokens = jax.ShapeDtypeStruct((2, 4096), jnp.int32, sharding=NamedSharding(mesh, sharding.spec("batch", None)))
        step = jax.jit(partial(train.train_step, config=config, optimizer=optimizer, l2wrap=0.0, loss_chunk=64))
        found.append(step.lower(state, tokens, tokens, None).compile().memory_analysis().temp_size_in_bytes)
print(*found)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rwkv4", "rwkv7"])
def test_twice_the_devices_along_a_row_hold_half_the_activations_each(name):
    two, four = map(int, run(["-c", MEMORY, name]).split())
    assert four < 0.6 * two


@pytest.mark.slow
def test_states_composed_in_a_tree_or_handed_along_a_ring_give_the_gradients_of_one_device():
    script = str(ROOT / "experiments/sequence.py")
    lines = run([script, "--tokens", "128", "--heads", "1"]).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [op, way] for op in ("wkv4", "wkv6", "wkv7") for way in ("one", "tree", "ring")
    ]
    for line in lines[1:]:
        assert float(line.removeprefix(line[:17]).split()[1]) < 1e-5, line


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
    for name, model in SMALL.items():
        methods = ("all", "lora", "state") if name in RWKV else ("all",)
        for method in methods:
            declared = finetune.declare(finetune.FinetuneConfig(method=method, init_from="x"), model)
            assert {axis for param in jax.tree.leaves(declared) for axis in param.axes} <= sharding.RULES.keys()


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
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "'host'; it must be HOST:PORT"),
        ({"timeout": 0}, "mesh.timeout is 0; it must be at least 1 second"),
    ],
)
def test_meshes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**fields)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((6, 1, 64), r"data.batch_size is 6; it must be a multiple of .*, 2 x 2 x 1"),
        ((6, 2, 64), r"data.batch_size is 6; it must be a multiple of .*, 2 x 2 x 2"),
        ((4, 1, 65), r"mesh.sequence is 2; it must divide the 65 tokens"),
    ],
)
def test_a_batch_that_the_mesh_does_not_divide_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        sharding.check_batch(abstract_mesh(data=2, fsdp=2, sequence=2), *batch)


def test_a_coordinator_that_does_not_answer_is_named_in_time():
    own = MeshConfig(coordinator="127.0.0.1:9", num_processes=2, process_id=1, timeout=1)
    with pytest.raises(ConnectionError, match=r"127.0.0.1:9 cannot be reached in mesh.timeout=1 s"):
        distributed.start(own)


def test_without_a_mesh_nothing_is_constrained():
    x = jax.numpy.ones((4, 8))
    assert sharding.constrain(x, "batch", "embed") is x
    assert sharding.fitting(x.shape, ("batch", None)) == PartitionSpec(None, None)
