"""Shape and type annotations are checked at run time in every test."""

import os
from pathlib import Path

import jaxtyping
import pytest

# Most of the tests' time is XLA compiling: without its optimisations it takes half as long, to the same tolerances.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

jaxtyping.install_import_hook(["rwkv_jax", "rwkv_kernels"], "beartype.beartype")


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
