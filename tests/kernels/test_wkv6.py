"""Every backend of wkv6 against the float64 scan, which is itself held against numpy's direct sum."""

from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import rwkv_kernels
from kernel_backends import beside_the_oracle, each_case, hold_against_the_scan, holding, marked, on_this_device
from rwkv_kernels import explain_wkv6, numerics
from rwkv_kernels.wkv6 import cases
from rwkv_kernels.wkv6.api import BACKENDS
from rwkv_kernels.wkv6.parallel import MAX_CHUNK, chunk_length

wkv6 = jax.jit(rwkv_kernels.wkv6, static_argnames="backend")
HERE = marked(BACKENDS, on_this_device(BACKENDS))
BESIDE_THE_SCAN = marked(BACKENDS, beside_the_oracle(BACKENDS))


@partial(jax.jit, static_argnames="backend")
def outputs_and_gradients(floats, reset, length, cotangents, backend):
    outputs, pullback = jax.vjp(lambda *x: wkv6(*x, reset=reset, length=length, backend=backend), *floats)
    return outputs, pullback(jax.tree.map(lambda g, x: g.astype(x.dtype), cotangents, outputs))


def run(inputs, dtype, backend):
    """(outputs, gradients of all float inputs for fixed random cotangents)."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    tokens = [jnp.asarray(x, dtype) for x in (inputs.r, inputs.k, inputs.v)]
    others = [jnp.asarray(x, wide) for x in (inputs.w, inputs.u, inputs.state)]
    rng = np.random.default_rng(7)
    cotangents = [jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16).astype(wide) for x in (inputs.v, inputs.state)]
    return outputs_and_gradients((*tokens, *others), inputs.reset, inputs.length, tuple(cotangents), backend)


def bfloat16_exact(inputs):
    """The same problem with r, k, v rounded to bfloat16 and the rest to float32, so that every dtype solves the same."""
    low = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    single = lambda x: np.asarray(x, np.float32).astype(np.float64)
    w, u, state = single(inputs.w), single(inputs.u), single(inputs.state)
    return inputs._replace(r=low(inputs.r), k=low(inputs.k), v=low(inputs.v), w=w, u=u, state=state)


def check(case, backend, dtypes):
    hold_against_the_scan(run, bfloat16_exact(cases.make(case)), backend, dtypes)


def as_float32(inputs):
    return [np.asarray(x, np.float32) for x in (inputs.r, inputs.k, inputs.v, inputs.w, inputs.u)]


@pytest.mark.parametrize(("name", "backend", "dtypes"), each_case(BACKENDS, cases.CASES))
def test_backend_equals_scan_in_outputs_and_all_gradients(name, backend, dtypes, x64):
    check(cases.CASES[name], backend, dtypes)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("backend", holding(BACKENDS, 256))
def test_backend_equals_scan_with_wide_heads(backend, head_dim, x64):
    case = cases.Case(1, 37, 1, key_dim=head_dim, value_dim=head_dim, reset="random")
    check(case, backend, [jnp.float64, jnp.float32, jnp.bfloat16])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BESIDE_THE_SCAN)
def test_backend_equals_scan_over_4096_tokens(backend, x64):
    check(cases.LONG, backend, [jnp.float32])


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("constant", [False, True], ids=["decay_of_each_token", "constant_decay"])
def test_output_is_the_sum_over_earlier_tokens(constant, backend, x64):
    case = cases.Case(batch_size=1, num_tokens=20, num_heads=1, time_decay=(-3, 1), constant=constant, carried=False)
    inputs = cases.make(case)
    r, k, v = (x[0, :, 0] for x in (inputs.r, inputs.k, inputs.v))
    w = np.broadcast_to(inputs.w if constant else inputs.w[0, :, 0], k.shape)
    expected = np.zeros_like(v)
    for t in range(20):
        for i in range(t):
            expected[t] += r[t] @ (np.exp(w[i + 1 : t].sum(0)) * k[i]) * v[i]
        expected[t] += r[t] @ (inputs.u[0] * k[t]) * v[t]
    y, _ = wkv6(*map(jnp.asarray, (inputs.r, inputs.k, inputs.v, inputs.w, inputs.u)), backend=backend)
    np.testing.assert_allclose(y[0, :, 0], expected, rtol=1e-10)


@partial(jax.jit, static_argnames="backend")
def sum_and_gradient(w, r, k, v, u, backend):
    return jax.value_and_grad(lambda w: wkv6(r, k, v, w, u, backend=backend)[0].sum())(w)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("w", [-1e5, -np.inf, -1e-30])
def test_decays_past_any_exponent_stay_finite(w, backend):
    r, k, v, _, u = as_float32(cases.make(cases.Case(num_tokens=40)))
    for shape in (k.shape, u.shape):
        value, gradient = sum_and_gradient(np.full(shape, w, np.float32), r, k, v, u, backend)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("backend", HERE)
def test_a_weak_decay_after_a_strong_one_keeps_its_digits(backend, x64):
    # Differences of running sums would leave the weak decays, 0.001 each, to what float32 resolves near 600: 6e-5.
    inputs = cases.make(cases.Case(num_tokens=64, time_decay=(-7, -7)))
    w = inputs.w.copy()
    w[:, ::8] = -200
    exact = wkv6(*(jnp.asarray(x) for x in (inputs.r, inputs.k, inputs.v, w, inputs.u)), backend="scan")[0]
    actual = wkv6(*as_float32(inputs._replace(w=w)), backend=backend)[0]
    exact, actual = np.asarray(exact), np.asarray(actual)
    for i in range(7):  # Outputs between two strong decays, each on its own: no larger one hides its error.
        part = slice(8 * i + 1, 8 * i + 9)
        error = numerics.relative_error(actual[:, part], exact[:, part])
        assert error <= 1e-6


@pytest.mark.parametrize("backend", HERE)
def test_future_tokens_do_not_change_past_outputs(backend):
    r, k, v, w, u = as_float32(cases.make(cases.Case(num_tokens=40)))
    y, _ = wkv6(r, k, v, w, u, backend=backend)
    late = lambda x, change: x + np.float32(change) * (np.arange(40) >= 25)[:, None, None].astype(np.float32)
    changed, _ = wkv6(late(r, 3), late(k, 3), late(v, 3), late(w, -3), u, backend=backend)
    np.testing.assert_array_equal(y[:, :25], changed[:, :25])
    assert not np.allclose(y[:, 25:], changed[:, 25:])


@pytest.mark.parametrize("backend", HERE)
def test_a_tokens_own_decay_touches_only_later_outputs(backend):
    r, k, v, w, u = as_float32(cases.make(cases.Case(num_tokens=40)))
    jacobian = jax.jacrev(lambda w: wkv6(r, k, v, w, u, backend=backend)[0].sum((0, 2, 3)))(w)
    touched = np.abs(jacobian).sum((1, 3, 4)) > 0
    np.testing.assert_array_equal(touched, np.tri(40, k=-1, dtype=bool) & (np.arange(40) > 0))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_token_that_is_not_finite_spoils_no_earlier_token_and_none_after_a_reset(value, backend):
    r, k, v, w, u = as_float32(cases.make(cases.Case(num_tokens=40)))
    reset = np.broadcast_to(np.arange(40) == 30, (2, 40))
    clean, final = jax.device_get(wkv6(r, k, v, w, u, reset=reset, backend=backend))
    v = v.copy()
    v[0, 25] = value
    y, state = jax.device_get(wkv6(r, k, v, w, u, reset=reset, backend=backend))
    outside = np.ones((2, 40), bool)
    outside[0, 25:30] = False
    np.testing.assert_array_equal(y[outside], clean[outside])
    np.testing.assert_array_equal(state, final)
    assert not np.isfinite(y[0, 25:30]).any()


@pytest.mark.parametrize("backend", HERE)
def test_padding_past_length_has_no_effect_and_no_gradient(backend):
    *tokens, u = as_float32(cases.make(cases.Case(batch_size=2, num_tokens=30)))
    length = np.array([13, 30], np.int32)
    bad = (np.arange(30) >= length[:, None])[..., None, None]

    def loss(*tokens):
        y, state = wkv6(*tokens, u, length=length, backend=backend)
        return jnp.sum(y**2) + jnp.sum(state)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    padding = np.float32([np.nan, np.inf, np.nan, -np.inf])
    dirty = gradient(*(np.where(bad, x, token) for x, token in zip(padding, tokens, strict=True)))
    for actual, clean in zip(dirty, gradient(*tokens), strict=True):
        assert not np.any(np.where(bad, actual, 0))
        np.testing.assert_array_equal(actual, clean)


@pytest.mark.slow
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", ["lengths_and_resets", "lengths_and_resets_constant_decay"])
def test_vmap_over_every_argument_equals_a_loop(name, backend):
    def op(inputs):
        *floats, reset, length = inputs
        return wkv6(*floats, reset=reset, length=length, backend=backend)

    def loss(inputs):
        y, state = op(inputs)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))

    problems = [
        jax.tree.map(lambda x: np.asarray(x, None if x.dtype in (bool, np.int32) else np.float32), inputs)
        for inputs in (cases.make(cases.CASES[name], seed) for seed in range(3))
    ]
    grad = jax.grad(loss, allow_int=True)
    one = lambda x: (op(x), grad(x)[:6])
    batched, single = jax.jit(jax.vmap(one))(jax.tree.map(lambda *x: np.stack(x), *problems)), jax.jit(one)
    for i, problem in enumerate(problems):
        for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(single(problem)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-5)


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
    k = jnp.ones((1, num_tokens, 1, 2))
    op = lambda k, backend: wkv6(k, k, k, -k, k[0, 0], backend=backend)[0].sum()
    assert num_tokens in list(loops(jax.make_jaxpr(lambda k: op(k, "scan"))(k).jaxpr))
    lengths = list(loops(jax.make_jaxpr(jax.grad(lambda k: op(k, "parallel")))(k).jaxpr))
    assert lengths
    assert all(n is not None and n <= -(-num_tokens // chunk_length(num_tokens)) for n in lengths)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 15, 16, 17, 5000])
def test_chunks_are_powers_of_two_no_longer_than_the_sequence(num_tokens):
    chunk = chunk_length(num_tokens)
    assert chunk <= min(num_tokens, MAX_CHUNK) < 2 * chunk or chunk == MAX_CHUNK
    assert chunk & (chunk - 1) == 0


def test_backward_stores_one_state_a_chunk_and_nothing_of_a_chunk():
    num_tokens, dim = 256, 8
    k = jnp.ones((1, num_tokens, 1, dim))
    _, pullback = jax.vjp(lambda *x: wkv6(*x, backend="parallel")[0], k, k, k, -k, k[0, 0])
    stored = sum(x.nbytes for x in jax.tree.leaves(pullback))
    masks = (
        2 * k.size + 4 * num_tokens + dim * dim
    )  # a byte each; one more array of the size of k selects among outputs
    assert stored <= 4 * (5 * k.size + num_tokens // MAX_CHUNK * dim * dim + 2 * dim * dim) + masks


def test_scan_has_no_custom_vjp_and_takes_forward_mode_and_hessians():
    case = cases.Case(batch_size=1, num_tokens=6, num_heads=1, key_dim=2, time_decay=(-1, 0), constant=True)
    r, k, v, w, u = as_float32(cases.make(case))
    loss = lambda w: jnp.sum(jnp.square(wkv6(r, k, v, w, u, backend="scan")[0]))
    assert "custom_vjp" not in str(jax.make_jaxpr(loss)(w))
    hessian = jax.hessian(loss)(w)
    step = 1e-2
    for i in range(2):
        e = jnp.zeros((1, 2)).at[0, i].set(step)
        difference = (jax.grad(loss)(w + e) - jax.grad(loss)(w - e)) / (2 * step)
        np.testing.assert_allclose(hessian[0, i], difference, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("backend", HERE)
def test_outputs_have_the_inputs_dtype_and_the_state_is_float32(backend, x64):
    k = jnp.ones((2, 5, 1, 4), jnp.bfloat16)
    w = -jnp.ones((1, 4), jnp.float32)
    y, state = rwkv_kernels.wkv6(k, k, k, w, -w, backend=backend)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    assert rwkv_kernels.wkv6(k, k, k, w, -w, state.astype(jnp.float64), backend=backend)[1].dtype == jnp.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.ones((2, 5))}, r"k has shape \(2, 5\)"),
        ({"r": jnp.ones((2, 5, 3, 5))}, r"r has shape \(2, 5, 3, 5\)"),
        ({"v": jnp.ones((2, 6, 3, 4))}, r"v has shape \(2, 6, 3, 4\)"),
        ({"w": -jnp.ones(3)}, r"w has shape \(3,\)"),
        ({"w": -jnp.ones((4, 3))}, r"w has shape \(4, 3\).*must be \(3, 4\)"),
        ({"u": jnp.ones(4)}, r"u has shape \(4,\)"),
        ({"state": jnp.ones((2, 3, 4, 5))}, r"state has shape \(2, 3, 4, 5\)"),
        ({"reset": jnp.zeros((2, 4), bool)}, r"reset has shape \(2, 4\)"),
        ({"length": jnp.zeros(3, jnp.int32)}, r"length has shape \(3,\)"),
        ({"reset": jnp.zeros((2, 5), jnp.int32)}, "reset is int32"),
        ({"length": jnp.zeros(2)}, "length is float32"),
        ({"v": jnp.ones((2, 5, 3, 4), jnp.bfloat16)}, "k is float32 and v is bfloat16"),
        ({"k": jnp.ones((2, 5, 3, 4), jnp.int32)}, "k is int32"),
        ({"backend": "cuda"}, "(?s)'cuda' cannot be used.*parallel: runs here.*scan: runs here"),
    ],
)
def test_bad_input_is_refused_with_value_and_rule(unchecked, change, message):
    k = jnp.ones((2, 5, 3, 4))
    arguments = {"r": k, "k": k, "v": k, "w": -k[0, 0], "u": k[0, 0]}
    with pytest.raises(ValueError, match=message):
        rwkv_kernels.wkv6(**(arguments | change))


def test_explain_lists_every_backend():
    assert all(name in explain_wkv6("cpu") for name in BACKENDS)


@pytest.mark.parametrize("backend", BESIDE_THE_SCAN)
def test_one_decay_for_all_tokens_may_be_given_in_low_precision(backend):
    inputs = as_float32(cases.make(cases.Case(num_tokens=32, constant=True)))
    low = [x.astype(jnp.bfloat16) for x in inputs]
    loss = lambda backend: lambda *x: jnp.sum(jnp.sin(wkv6(*x, backend=backend)[0].astype(jnp.float32)))
    actual, expected = (jax.value_and_grad(loss(name), argnums=range(5))(*low) for name in (backend, "scan"))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        assert numerics.relative_error(a, e) <= 2**-7
