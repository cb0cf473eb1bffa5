"""Every backend of wkv4 against the float64 scan, which is itself held against numpy's direct sum."""

from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import rwkv_kernels
from kernel_backends import (
    QUICK,
    SLOWEST,
    beside_the_oracle,
    each_case,
    hold_against_the_scan,
    marked,
    on_this_device,
)
from rwkv_kernels import WKV4State, explain_wkv4, numerics
from rwkv_kernels.wkv4 import bounded, cases
from rwkv_kernels.wkv4.api import BACKENDS
from rwkv_kernels.wkv4.cutting import chunk_length
from rwkv_kernels.wkv4.reference import EMPTY

wkv4 = jax.jit(rwkv_kernels.wkv4, static_argnames="backend")
HERE = marked(BACKENDS, on_this_device(BACKENDS))
BESIDE_THE_SCAN = marked(BACKENDS, beside_the_oracle(BACKENDS))
IN_FLOAT64 = on_this_device(BACKENDS, jnp.float64)


@partial(jax.jit, static_argnames="backend")
def outputs_and_gradients(k, v, w, u, state, reset, length, cotangents, backend):
    outputs, pullback = jax.vjp(
        lambda *x: wkv4(*x, reset=reset, length=length, backend=backend), k, v, w, u, WKV4State(*state)
    )
    return outputs, pullback(jax.tree.map(lambda g, x: g.astype(x.dtype), cotangents, outputs))


def run(inputs, dtype, backend):
    """(outputs, gradients of all float inputs for fixed random cotangents)."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    k, v = jnp.asarray(inputs.k, dtype), jnp.asarray(inputs.v, dtype)
    w, u, state = jax.tree.map(lambda x: jnp.asarray(x, wide), (inputs.w, inputs.u, inputs.state))
    rng = np.random.default_rng(7)
    cotangents = jax.tree.map(lambda x: rng.normal(size=x.shape), (inputs.v, WKV4State(*inputs.state)))
    cotangents = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(wide), cotangents)
    return outputs_and_gradients(k, v, w, u, state, inputs.reset, inputs.length, cotangents, backend)


def bfloat16_exact(inputs):
    """The same problem with k, v rounded to bfloat16 and the rest to float32, so that every dtype solves the same."""
    low = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    single = lambda x: np.asarray(x, np.float32).astype(np.float64)
    w, u, state = single(inputs.w), single(inputs.u), tuple(map(single, inputs.state))
    return inputs._replace(k=low(inputs.k), v=low(inputs.v), w=w, u=u, state=state)


def check(case, backend, dtypes):
    hold_against_the_scan(run, bfloat16_exact(cases.make(case)), backend, dtypes)


@pytest.mark.parametrize(("name", "backend", "dtypes"), each_case(BACKENDS, cases.CASES))
def test_backend_equals_scan_in_outputs_and_all_gradients(name, backend, dtypes, x64):
    check(cases.CASES[name], backend, dtypes)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BESIDE_THE_SCAN)
def test_extreme_keys_stay_finite_and_no_less_exact_than_the_scan(backend, x64):
    inputs = bfloat16_exact(cases.make(cases.EXTREME_KEYS))
    if backend in IN_FLOAT64:
        check(cases.EXTREME_KEYS, backend, [jnp.float64])
    exact, scan, actual = (
        run(inputs, d, b) for d, b in ((jnp.float64, "scan"), (jnp.float32, "scan"), (jnp.float32, backend))
    )
    for a, s, e in zip(*map(jax.tree.leaves, (actual, scan, exact)), strict=True):
        assert np.isfinite(a).all()
        assert numerics.relative_error(a, e) <= max(numerics.FLOAT32_TOLERANCE, numerics.relative_error(s, e))


def fits(inputs):
    k, w, u, state = jax.tree.map(jnp.asarray, (inputs.k, inputs.w, inputs.u, WKV4State(*inputs.state)))
    return bool(bounded_fits(k, w, u, state))


bounded_fits = jax.jit(bounded.fits)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in cases.CASES]
)
def test_parallel_equals_the_scan_where_one_channels_keys_need_a_running_maximum(name, x64):
    inputs = cases.make(cases.CASES[name])
    assert fits(inputs)
    higher = np.where(np.arange(inputs.k.shape[2]) == 1, bounded.BOUND + 8, 0)
    aa, bb, pp = inputs.state
    inputs = bfloat16_exact(inputs._replace(k=inputs.k + higher, state=(aa, bb, np.where(pp > EMPTY, pp + higher, pp))))
    assert not fits(inputs)
    hold_against_the_scan(run, inputs, "parallel", [jnp.float64, jnp.float32, jnp.bfloat16])


def test_parallel_equals_the_scan_just_within_the_bound(x64):
    inputs = bfloat16_exact(cases.make(cases.Case(num_tokens=101, key_scale=26.0, reset="random", ragged=True)))
    assert fits(inputs)
    hold_against_the_scan(run, inputs, "parallel", [jnp.float64, jnp.float32])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 31.0),
        ("k", -31.0),
        ("k", np.nan),
        ("u", 31.0),
        ("w", 0.1),
        ("w", -np.inf),
        ("pp", 31.0),
        ("pp", -31.0),
        ("pp", np.nan),
    ],
)
def test_what_no_plain_sum_is_for_does_not_fit(name, value):
    inputs = cases.make(cases.Case(num_tokens=3, time_decay=(-1, 1)))
    arrays = {"k": inputs.k, "u": inputs.u, "w": inputs.w, "pp": inputs.state[2]}
    assert fits(inputs)
    arrays[name][..., -1] = value
    assert not fits(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [backend for backend in beside_the_oracle(BACKENDS) if backend != SLOWEST])
def test_backend_equals_scan_over_4096_tokens(backend, x64):
    check(cases.LONG, backend, [jnp.float32])


@pytest.mark.slow
def test_mosaic_gpu_equals_scan_over_two_chunks(x64):
    check(cases.Case(num_tokens=11, reset="random", ragged=True), SLOWEST, [jnp.float64])


@pytest.mark.parametrize("backend", marked(BACKENDS, IN_FLOAT64))
def test_output_is_the_papers_weighted_mean(backend, x64):
    inputs = cases.make(cases.Case(batch_size=1, num_tokens=20, embed_dim=4, time_decay=(-3, 1), carried=False))
    k, v, w, u = inputs.k[0], inputs.v[0], inputs.w, inputs.u
    expected = np.zeros_like(v)
    for t in range(len(k)):
        weights = np.stack([np.exp((t - 1 - i) * w + k[i]) if i < t else np.exp(u + k[t]) for i in range(t + 1)])
        expected[t] = (weights * v[: t + 1]).sum(0) / weights.sum(0)
    y, _ = wkv4(*map(jnp.asarray, (inputs.k, inputs.v, w, u)), backend=backend)
    np.testing.assert_allclose(y[0], expected, rtol=1e-12)


@pytest.mark.parametrize("backend", HERE)
def test_future_tokens_do_not_change_past_outputs(backend):
    inputs = cases.make(cases.Case(num_tokens=40))
    k, v, w, u = (np.asarray(x, np.float32) for x in (inputs.k, inputs.v, inputs.w, inputs.u))
    state = WKV4State(*(np.asarray(x, np.float32) for x in inputs.state))
    later = 3 * (np.arange(40) >= 25)[:, None].astype(np.float32)
    y, _ = wkv4(k, v, w, u, state, backend=backend)
    changed, _ = wkv4(k + later, v + later, w, u, state, backend=backend)
    np.testing.assert_array_equal(y[:, :25], changed[:, :25])
    assert not np.allclose(y[:, 25:], changed[:, 25:])


@pytest.mark.parametrize("backend", HERE)
def test_padding_past_length_has_no_effect_and_no_gradient(backend):
    inputs = cases.make(cases.Case(batch_size=2, num_tokens=30))
    k, v, w, u = (np.asarray(x, np.float32) for x in (inputs.k, inputs.v, inputs.w, inputs.u))
    length = np.array([13, 30], np.int32)
    bad = np.arange(30)[None, :, None] >= length[:, None, None]

    def loss(k, v, reset):
        y, state = wkv4(k, v, w, u, reset=reset, length=length, backend=backend)
        cost = jnp.sqrt(jnp.abs(y))  # Its gradient at the zeros past the end is not finite.
        return jnp.sum(jnp.where(bad, 0, cost)) + sum(jnp.sum(x) for x in state)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    gk, gv = gradients(np.where(bad, np.float32(np.inf), k), np.where(bad, np.float32(np.nan), v), bad[..., 0])
    clean_k, clean_v = gradients(k, v, np.zeros((2, 30), bool))
    assert not np.any(np.where(bad, gk, 0)) and not np.any(np.where(bad, gv, 0))
    np.testing.assert_array_equal(gk, clean_k)
    np.testing.assert_array_equal(gv, clean_v)


@pytest.mark.slow
@pytest.mark.parametrize("backend", HERE)
def test_vmap_over_every_argument_equals_a_loop(backend):
    problems = [cases.make(cases.CASES["lengths_and_resets"], seed) for seed in range(3)]

    def op(inputs):
        k, v, w, u, state, reset, length = inputs
        return wkv4(k, v, w, u, WKV4State(*state), reset=reset, length=length, backend=backend)

    def loss(inputs):
        y, state = op(inputs)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state.aa))

    as_float32 = [
        jax.tree.map(lambda x: np.asarray(x, None if x.dtype in (bool, np.int32) else np.float32), p) for p in problems
    ]
    one = lambda inputs: (op(inputs), jax.grad(loss, allow_int=True)(inputs).k)
    batched, single = jax.jit(jax.vmap(one))(jax.tree.map(lambda *x: np.stack(x), *as_float32)), jax.jit(one)
    for i, problem in enumerate(as_float32):
        for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(single(problem)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-6)


def loops(jaxpr):
    """Lengths of all loops in a jaxpr; None for one whose length is not fixed."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["length"]
        elif equation.primitive.name == "while":
            yield None
        for sub in jax.extend.core.jaxprs_in_params(equation.params):
            yield from loops(sub)


@pytest.mark.parametrize("num_tokens", [4, 16, 64, 100, 1024])
def test_parallel_has_no_loop_over_time(num_tokens):
    k = jnp.ones((1, num_tokens, 2))
    op = lambda k, backend: wkv4(k, k, -jnp.ones(2), jnp.ones(2), backend=backend)[0].sum()
    assert num_tokens in list(loops(jax.make_jaxpr(lambda k: op(k, "scan"))(k).jaxpr))
    lengths = list(loops(jax.make_jaxpr(jax.grad(lambda k: op(k, "parallel")))(k).jaxpr))
    assert lengths
    assert all(n is not None and n <= 2 * num_tokens**0.5 + 1 for n in lengths)
    assert chunk_length(num_tokens) ** 2 <= num_tokens


def test_scan_has_no_custom_vjp_and_takes_forward_mode_and_hessians():
    inputs = cases.make(cases.Case(batch_size=1, num_tokens=6, embed_dim=2, time_decay=(-1, 0)))
    k, v, w, u = (jnp.asarray(x, jnp.float32) for x in (inputs.k, inputs.v, inputs.w, inputs.u))
    loss = lambda w: jnp.sum(jnp.square(wkv4(k, v, w, u, backend="scan")[0]))
    assert "custom_vjp" not in str(jax.make_jaxpr(loss)(w))
    hessian = jax.hessian(loss)(w)
    step = 1e-2
    for i in range(2):
        e = jnp.zeros(2).at[i].set(step)
        difference = (jax.grad(loss)(w + e) - jax.grad(loss)(w - e)) / (2 * step)
        np.testing.assert_allclose(hessian[i], difference, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("backend", HERE)
def test_outputs_have_the_inputs_dtype_and_the_state_is_float32(backend):
    k = jnp.ones((2, 5, 4), jnp.bfloat16)
    y, state = rwkv_kernels.wkv4(k, k, -jnp.ones(4), jnp.ones(4), backend=backend)
    assert y.dtype == jnp.bfloat16
    assert {x.dtype for x in state} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.ones((2, 5))}, r"k has shape \(2, 5\)"),
        ({"v": jnp.ones((2, 6, 4))}, r"v has shape \(2, 6, 4\)"),
        ({"w": jnp.ones(3)}, r"w has shape \(3,\)"),
        ({"reset": jnp.zeros((2, 4), bool)}, r"reset has shape \(2, 4\)"),
        ({"length": jnp.zeros(3, jnp.int32)}, r"length has shape \(3,\)"),
        ({"reset": jnp.zeros((2, 5), jnp.int32)}, "reset is int32"),
        ({"length": jnp.zeros(2)}, "length is float32"),
        ({"v": jnp.ones((2, 5, 4), jnp.bfloat16)}, "k is float32 and v is bfloat16"),
        ({"k": jnp.ones((2, 5, 4), jnp.int32)}, "k is int32"),
        ({"backend": "cuda"}, "(?s)'cuda' cannot be used.*parallel: runs here.*scan: runs here"),
    ],
)
def test_bad_input_is_refused_with_value_and_rule(unchecked, change, message):
    arguments = {"k": jnp.ones((2, 5, 4)), "v": jnp.ones((2, 5, 4)), "w": -jnp.ones(4), "u": jnp.ones(4)}
    with pytest.raises(ValueError, match=message):
        rwkv_kernels.wkv4(**(arguments | change))


def test_explain_lists_every_backend():
    assert all(name in explain_wkv4("cpu") for name in BACKENDS)


@pytest.mark.parametrize("backend", BESIDE_THE_SCAN)
def test_infinite_decays_and_an_empty_scale_of_minus_infinity_equal_the_scan(backend):
    inputs = cases.make(cases.Case(num_tokens=40))
    k, v, w, u = (np.array(x, np.float32) for x in (inputs.k, inputs.v, inputs.w, inputs.u))
    w[3], zeros = -np.inf, np.zeros((2, 16), np.float32)
    arguments = k, v, w, u, WKV4State(zeros, zeros, np.full_like(zeros, -np.inf))
    actual, expected = (wkv4(*arguments, backend=name) for name in (backend, "scan"))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
