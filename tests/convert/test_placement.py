"""Where parameters go, in which type, and how much memory that takes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import assert_same_bits, official, random_params, write_torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from small_models import SMALL

import rwkv_jax
from rwkv_jax.models import module_of

ROOT = Path(__file__).parents[2]
HERE = SingleDeviceSharding(jax.devices()[0])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("form", ["one", "function", "tree"])
def test_every_form_of_sharding_gives_the_same_parameters(form, name, tmp_path):
    config, params = SMALL[name], random_params(SMALL[name])
    rwkv_jax.save(tmp_path / "m.st", params, config)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))

    def split(param):
        rank = len(param.shape) + param.stacked
        return NamedSharding(mesh, PartitionSpec(*[None] * (rank - 1), "x"))

    declaration = module_of(config).declare(config)
    sharding = {"one": HERE, "function": split, "tree": jax.tree.map(split, declaration)}[form]
    loaded, _ = rwkv_jax.load(tmp_path / "m.st", sharding=sharding)
    assert_same_bits(loaded, params)
    wanted = HERE if form == "one" else split(declaration.emb)
    assert loaded.emb.sharding == wanted


def test_a_tree_of_another_form_is_refused(tmp_path):
    config = SMALL["rwkv4"]
    rwkv_jax.save(tmp_path / "m.st", random_params(config), config)
    with pytest.raises(ValueError, match="sharding is"):
        rwkv_jax.load(tmp_path / "m.st", sharding={"emb": HERE})


@pytest.mark.parametrize("dtype", ["int8", "nonsense", np.complex64, np.dtype("S4")])
def test_a_type_that_parameters_cannot_have_is_refused(dtype, tmp_path):
    with pytest.raises(ValueError, match="must be one of float64, float32, float16, bfloat16"):
        rwkv_jax.load(tmp_path / "m.st", dtype=dtype)


def test_float64_needs_x64_and_says_so(tmp_path):
    config = SMALL["rwkv4"]
    rwkv_jax.save(tmp_path / "m.st", random_params(config), config)
    with pytest.raises(ValueError, match="jax_enable_x64"):
        rwkv_jax.load(tmp_path / "m.st", dtype="float64")


def test_loaded_parameters_outlive_the_file(tmp_path):
    config, params = SMALL["rwkv4"], random_params(SMALL["rwkv4"])
    rwkv_jax.save(tmp_path / "m.st", params, config)
    loaded, _ = rwkv_jax.load(tmp_path / "m.st")
    (tmp_path / "m.st").write_bytes(bytes((tmp_path / "m.st").stat().st_size))
    assert_same_bits(loaded, params)


MEASURE = """
import sys, jax, numpy as np, rwkv_jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

rwkv_jax.load(sys.argv[2])  # What the first load brings with it is not what is measured.
jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[-1]))
sharding = None
if len(jax.devices()) > 1:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = lambda p: NamedSharding(mesh, PartitionSpec(*[None] * (len(p.shape) + p.stacked - 1), "x"))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
params, config = rwkv_jax.load(sys.argv[1], dtype=sys.argv[3], sharding=sharding)
target = sum(x.nbytes for x in jax.tree.leaves(params))
print(status("VmHWM") - before, target)
"""


@pytest.fixture(scope="module", params=["safetensors", "pth"])
def large(request, tmp_path_factory):
    """A folder with a small model and one of more than 200 MB, in a container each, and the bytes of its largest tensor."""
    folder, small = tmp_path_factory.mktemp(request.param), SMALL["rwkv4"]
    config = rwkv_jax.RWKV4Config(vocab_size=4000, num_layers=4, embed_dim=1024)
    tensors = {key: np.ones(value.shape, np.float32) for key, value in official(_zeros(config), config).items()}
    if request.param == "pth":
        write_torch(folder / "m", tensors)
    else:
        safetensors.numpy.save_file(tensors, folder / "m")
    rwkv_jax.save(folder / "small.st", random_params(small), small)
    assert (folder / "m").stat().st_size > 2e8
    return folder, max(value.nbytes for value in tensors.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_target_and_little_more_than_the_largest_tensor(large, dtype, devices):
    folder, largest = large
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    arguments = [sys.executable, "-c", MEASURE, str(folder / "m"), str(folder / "small.st"), dtype]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    peak, target = map(int, result.stdout.split())
    assert peak <= target + 1.3 * largest


def _zeros(config):
    shapes = jax.eval_shape(lambda: rwkv_jax.init(jax.random.key(0), config))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
