"""Which backend is chosen where, and what is said of the others."""

import importlib.metadata
import sys
from functools import partial

import jax
import numpy as np
import pytest
from rwkv_kernels import dispatch, explain_wkv7, triton_gpu, wkv7
from rwkv_kernels.dispatch import Call
from rwkv_kernels.wkv7.api import BACKENDS


def chosen(call):
    return next(name for name, backend in BACKENDS.items() if backend is dispatch.choose("wkv7", BACKENDS, None, call))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call("cpu"), "parallel"),
        (Call("gpu", 9.0, 64, 4096), "pallas_gpu"),
        (Call("gpu", 8.0, 128, 16), "pallas_gpu"),
        (Call("gpu", 9.0, 64, 1), "parallel"),
        (Call("gpu", 7.5, 64, 4096), "parallel"),
        (Call("gpu", 9.0, 256, 4096), "pallas_gpu"),
        (Call("gpu", 9.0, 257, 4096), "parallel"),
        (Call("tpu", None, 256, 4096), "pallas_tpu"),
        (Call("tpu", None, 64, 15), "parallel"),
        (Call("tpu", None, 64, 4096, "float16"), "parallel"),
        (Call("tpu", None, 64, 4096, "bfloat16"), "pallas_tpu"),
    ],
)
def test_the_best_backend_is_chosen(call, name):
    assert chosen(call) == name


@pytest.mark.parametrize(
    ("name", "call", "reason"),
    [
        ("pallas_gpu", Call("cpu"), "pallas_gpu: needs a GPU, and the device in use is a cpu"),
        ("pallas_gpu", Call("gpu", 7.5), "this one has 7.5"),
        ("pallas_gpu", Call("gpu", 8.0, 320), "a head has 320 channels; this kernel holds at most 256"),
        ("mosaic_gpu", Call("cpu"), "mosaic_gpu: needs a GPU, and the device in use is a cpu"),
        ("mosaic_gpu", Call("gpu", 8.0), "compute capability 9.0 (Hopper) to 11, and this one has 8.0"),
        ("mosaic_gpu", Call("gpu"), "9.0 (Hopper) to 11, and that of the one in use is not known"),
        ("mosaic_gpu", Call("gpu", 12.0), "this one has 12.0"),
        ("mosaic_gpu", Call("gpu", 9.0, 320), "a head has 320 channels; this kernel holds at most 256"),
        ("mosaic_gpu", Call("gpu", 9.0, 64, 64, "float64"), "float32, and an input is float64"),
        ("triton", Call("cpu"), "triton: needs a GPU, and the device in use is a cpu"),
        (
            "triton",
            Call("gpu", 7.5),
            "triton: needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later; this one has 7.5",
        ),
        ("triton", Call("gpu", 8.0, 64, 64, "float64"), "triton: holds the state in float32, and an input is float64"),
        ("pallas_tpu", Call("gpu", 8.0), "pallas_tpu: needs a TPU, and the device in use is a gpu"),
        ("pallas_tpu", Call("tpu", None, 64, 64, "float64"), "bfloat16 or float32, and an input is float64"),
        ("pallas_tpu_interpreted", Call("cpu", None, 512), "512 channels"),
    ],
)
def test_a_backend_that_cannot_is_refused_with_every_reason(name, call, reason):
    with pytest.raises(ValueError, match="cannot be used") as error:
        dispatch.choose("wkv7", BACKENDS, name, call)
    assert reason in str(error.value)
    assert all(other in str(error.value) for other in BACKENDS)


@pytest.mark.parametrize(
    ("installed", "jax_version", "reason"),
    [
        (None, "0.10.2", "needs jax-triton, which is not installed: pip install 'rwkv-jax[triton]'"),
        ("0.4.1", "0.10.2", "jax-triton 0.4.1 and JAX 0.10.2 do not fit"),
        ("0.4.1", "0.12.0.1", "0.3.1 takes JAX 0.10 to 0.12"),
        ("0.3.1", "0.13.0", "jax-triton 0.3.1 and JAX 0.13.0 do not fit"),
        ("0.2.0", "0.10.2", "jax-triton 0.2.0 and JAX 0.10.2 do not fit"),
        ("0.3.1", "0.10.2", "cannot be imported with JAX 0.10.2: no GPU build"),
        ("0.4.1", "0.11.2", "cannot be imported with JAX 0.11.2: no GPU build"),
        ("0.5.0", "0.13.0", "cannot be imported with JAX 0.13.0: no GPU build"),
    ],
)
def test_triton_says_which_jax_triton_and_jax_fit(monkeypatch, installed, jax_version, reason):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    def import_module(name):
        raise ImportError("no GPU build")

    monkeypatch.setattr(triton_gpu.importlib.metadata, "version", version)
    monkeypatch.setattr(triton_gpu.importlib, "import_module", import_module)
    monkeypatch.setattr(triton_gpu.jax, "__version__", jax_version)
    assert reason in BACKENDS["triton"].why_not(Call("gpu", 9.0, 64))


def test_other_kernels_take_over_where_pallas_has_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.setattr(triton_gpu, "_cannot_call", lambda: "needs jax-triton")
    assert chosen(Call("gpu", 9.0, 64, 4096)) == "mosaic_gpu"
    assert chosen(Call("gpu", 8.0, 64, 4096)) == "parallel"
    monkeypatch.setattr(triton_gpu, "_cannot_call", lambda: None)
    assert chosen(Call("gpu", 8.0, 64, 4096)) == "triton"
    assert chosen(Call("gpu", 8.0, 64, 1)) == "parallel"
    assert "257 channels" in BACKENDS["triton"].why_not(Call("gpu", 8.0, 257))


def test_a_named_kernel_takes_a_single_token():
    assert dispatch.choose("wkv7", BACKENDS, "pallas_gpu", Call("gpu", 8.0, 64, 1)) is BACKENDS["pallas_gpu"]


@pytest.mark.parametrize(("platform", "expected"), [("cuda", "gpu"), ("tpu", "tpu")])
def test_what_is_compiled_for_counts_and_not_what_is_here(platform, expected):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    device = jax.sharding.AbstractDevice("some device", 1, platform)
    abstract = jax.sharding.AbstractMesh((1,), ("x",), axis_types=mesh.axis_types, abstract_device=device)
    assert dispatch.here().platform == "cpu"
    with jax.sharding.use_abstract_mesh(abstract):
        assert dispatch.here(64, 32) == Call(expected, None, 64, 32)


def test_a_float64_state_of_float32_tokens_is_refused_by_name_where_it_cannot_be_held(x64):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    tpu = jax.sharding.AbstractDevice("some device", 1, "tpu")
    tokens, state = jax.ShapeDtypeStruct((1, 32, 1, 16), "float32"), jax.ShapeDtypeStruct((1, 1, 16, 16), "float64")
    abstract = jax.sharding.AbstractMesh((1,), ("x",), axis_types=mesh.axis_types, abstract_device=tpu)
    with jax.sharding.use_abstract_mesh(abstract), pytest.raises(ValueError, match="and an input is float64"):
        jax.eval_shape(partial(wkv7, backend="pallas_tpu"), *[tokens] * 6, state)


def test_explain_says_what_runs_and_why_the_rest_does_not():
    said = explain_wkv7("gpu")
    assert "pallas_gpu: runs here; for fewer than 16 tokens the next one is chosen" in said
    assert "pallas_tpu: needs a TPU" in said
    assert "pallas_gpu_interpreted: runs here, if named" in said
