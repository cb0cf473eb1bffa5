"""Other libraries' kernels beside ours in the benchmark: what is said of absent ones, and that they compute what ours do."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rwkv_kernels import benchmark, numerics, peers

ROOT = Path(__file__).parents[2]


def known(op, name):
    return next(peer for peer in peers.PEERS[op] if peer.name == name)


@pytest.fixture
def installed(monkeypatch):
    """Pretends that of the peers' modules only those named are installed."""

    def pretend(*names):
        all_peers, find = {name for needed in peers.PACKAGES.values() for name in needed}, importlib.util.find_spec
        found = lambda name, *rest: (name in names or None) if name in all_peers else find(name, *rest)
        monkeypatch.setattr(importlib.util, "find_spec", found)

    return pretend


def test_the_benchmark_names_what_cannot_run_with_the_reason_and_the_way_out(monkeypatch, installed, capsys, tmp_path):
    installed("setuptools", "torch", "rwkv")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setitem(benchmark.SHAPES, "tiny", benchmark.Shape(1, 4, 8))
    monkeypatch.setattr(benchmark, "measure_bandwidth", lambda: 1.0)
    monkeypatch.setattr(benchmark, "measure_flops", lambda: 1.0)
    file = tmp_path / "rows.json"
    command = ["benchmark", "--ops", "wkv4", "--backends", "scan", "--dtypes", "float32", "--seconds", "0", "--json"]
    monkeypatch.setattr(sys, "argv", [*command, str(file)])
    benchmark.main()
    reasons = {
        "fla": "triton, fla not installed; pip install triton flash-linear-attention",
        "rwkv": "JAX runs on a cpu here; JAX and torch must share an NVIDIA GPU",
    }
    said, report = capsys.readouterr().out.splitlines(), json.loads(file.read_text())
    for package, reason in reasons.items():
        assert f"{package}: {reason}" in said
    assert report["left_out"] == [{"backend": package, "left_out": reason} for package, reason in reasons.items()]
    assert [row["direction"] for row in report["rows"]] == ["forward", "both"]
    assert all(row["error"] < numerics.FLOAT32_TOLERANCE and row["ms"] > 0 for row in report["rows"])


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "reason"),
    [
        ("wkv4", "small", "bfloat16", "takes tokens in float32"),
        ("wkv6", "small", "bfloat16", "takes one row (B = 1) of heads of 64, and this is B = 8 of 64"),
        ("wkv7", "large", "float32", "takes one row (B = 1) of heads of 64, and this is B = 8 of 64"),
    ],
)
def test_a_workload_that_a_peer_does_not_take_is_left_out_with_the_reason(op, shape, dtype, reason):
    rows = benchmark.measure_peer(op, known(op, "rwkv"), benchmark.SHAPES[shape], dtype, 0.0)
    assert rows == [{"direction": direction, "left_out": reason} for direction in ("forward", "both")]


def test_a_row_of_its_size_is_taken():
    assert known("wkv4", "rwkv").refuses(8, 64, "float32") is None
    assert known("wkv7", "rwkv").refuses(1, 64, "bfloat16") is None


@pytest.fixture(scope="module")
def interpreted():
    """What fla's kernels give in Triton's interpreter."""
    if missing := [name for name in peers.PACKAGES["fla"] if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: pip install torch triton flash-linear-attention")
    # Triton reads the variable when it is imported, so this is a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, str(ROOT / "tests" / "peers_interpreter.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = map(json.loads, done.stdout.splitlines())
    return {(row["op"], row["peer"], row["dtype"]): row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "peer", "dtype", "gradients"),
    [
        ("wkv4", "fla.recurrent", "float32", 7),
        ("wkv4", "fla.recurrent", "bfloat16", 7),
        ("wkv6", "fla.chunk", "float32", 6),
        ("wkv6", "fla.recurrent", "float32", 0),
        ("wkv6", "fla.recurrent", "bfloat16", 0),
        ("wkv7", "fla.chunk", "float32", 7),
        ("wkv7", "fla.recurrent", "float32", 0),
        ("wkv7", "fla.recurrent", "bfloat16", 0),
    ],
)
def test_flas_kernels_give_our_outputs_states_and_gradients(interpreted, op, peer, dtype, gradients):
    got = interpreted[op, peer, dtype]
    most = 1e-4 if dtype == "float32" else 1e-2  # A wrong layout or decay errs by about 1.
    assert len(got["outputs"]) == (4 if op == "wkv4" else 2)
    assert len(got["gradients"]) == gradients
    assert max(got["outputs"] + got["gradients"]) < most
    forward, both = got["rows"]
    assert (forward["direction"], both["direction"]) == ("forward", "both")
    assert all(row["ms"] > 0 and row["error"] < most for row in (forward, both) if "left_out" not in row)
    assert ("left_out" in both) == (gradients == 0)


# The recurrences of the `rwkv` package's kernels, transcribed from its `cuda` folder.
def wkv4(B, T, C, w, u, k, v, y, aa, bb, pp):
    for t in range(T):
        p = np.maximum(pp, u + k[:, t])
        e1, e2 = np.exp(pp - p), np.exp(u + k[:, t] - p)
        y[:, t] = (e1 * aa + e2 * v[:, t]) / (e1 * bb + e2)
        p = np.maximum(w + pp, k[:, t])
        e1, e2 = np.exp(w + pp - p), np.exp(k[:, t] - p)
        aa[:], bb[:], pp[:] = e1 * aa + e2 * v[:, t], e1 * bb + e2, p


def heads(T, C, H, state, *tokens):
    """A state [H, value, key] as memory has it, and tokens [T, H, K]."""
    N = C // H
    return state.reshape(H, N, N), *(x.reshape(T, H, N) for x in tokens)


def wkv6(B, T, C, H, state, r, k, v, w, u, y):
    s, r, k, v, w, y = heads(T, C, H, state, r, k, v, w, y)
    for t in range(T):
        kv = v[t, :, :, None] * k[t, :, None]
        y[t] = ((s + u[:, None] * kv) * r[t, :, None]).sum(-1)
        s[:] = s * w[t, :, None] + kv


def wkv7(B, T, C, H, state, r, w, k, v, a, b, y):
    s, r, w, k, v, a, b, y = heads(T, C, H, state, r, w, k, v, a, b, y)
    for t in range(T):
        removed = (s * a[t, :, None]).sum(-1, keepdims=True)
        s[:] = s * np.exp(-np.exp(w[t, :, None])) + v[t, :, :, None] * k[t, :, None] + removed * b[t, :, None]
        y[t] = (s * r[t, :, None]).sum(-1)


RECURRENCES = {"wkv4": ("wkv_forward", 0, wkv4), "wkv6": ("forward_fp32", 1, wkv6), "wkv7": ("forward_fp32", 1, wkv7)}


@pytest.mark.slow
@pytest.mark.parametrize("op", RECURRENCES)
def test_the_rwkv_packages_recurrences_give_our_outputs_from_what_the_adapter_passes(monkeypatch, op):
    """The kernels themselves have not run: this checks the order, decays, layouts and dtypes of their arguments."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch: pip install torch")
    function, num_heads, recurrence = RECURRENCES[op]

    def run(*arguments):
        sizes, rest = arguments[: 3 + num_heads], arguments[3 + num_heads :]
        assert all(x.is_contiguous() and str(x.dtype) == "torch.float32" for x in rest)
        recurrence(*sizes, *(x.numpy() for x in rest))

    monkeypatch.setattr(peers, "_built", lambda library, sources: SimpleNamespace(**{function: run}))
    inputs = benchmark.make(op, benchmark.Shape(2 if op == "wkv4" else 1, 12, 32, 16), "float32")
    before = [np.array(x) for x in jax.tree.leaves(inputs)]
    peer = known(op, "rwkv")
    outputs, gradients = peers.results(peer, inputs, "cpu")
    exact = jax.tree.leaves(benchmark.OPS[op][0](*inputs, backend="scan"))
    assert [numerics.relative_error(*pair) < 1e-5 for pair in zip(outputs, exact, strict=True)] == [True] * len(exact)
    assert gradients == []
    calls = peers.calls(peer, inputs, "cpu")
    first, second = calls["forward"](), calls["forward"]()  # Each starts from the state that was given.
    assert [*calls] == ["forward"]
    assert all(np.array_equal(x.numpy(), y.numpy()) for x, y in zip(first, second, strict=True))
    assert all(np.array_equal(x, y) for x, y in zip(before, jax.tree.leaves(inputs), strict=True))
