"""Shape and type annotations are checked at run time in every test."""

import gc
import importlib.metadata
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import jaxtyping
import pytest

# Most of the tests' time is XLA compiling, which takes a third as long without optimising, to the same tolerances.
_XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib") < "0.11":
    _XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
else:  # A later XLA has no other emitters, and compiles three times as long.
    _XLA_FLAGS += " --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
os.environ.setdefault("XLA_FLAGS", _XLA_FLAGS)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # Where each operation was called takes time to note.

gc.set_threshold(50_000)  # Of the objects of a trace few are garbage: looking for it took 7 % of the time.

jaxtyping.install_import_hook(["rwkv_jax", "rwkv_kernels"], "beartype.beartype")


def pytest_configure(config):
    """What XLA has compiled is shared by the workers and the programs that tests start; JAX_COMPILATION_CACHE_DIR keeps it."""
    if hasattr(config, "workerinput"):
        return
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(partial(shutil.rmtree, folder))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with float64 reference vectors and tokenizer cases, which is not part of the project."""
    path = Path(os.environ.get("RWKV_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"no reference data at {path}; set RWKV_SHARED to its folder")
    return path


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked():
    """Without the tests' own shape and type checks, so that the library's errors show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
