"""Every backend of wkv7 against the float64 scan, which is itself held against numpy's recurrence."""

from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import rwkv_kernels
from kernel_backends import (
    SLOWEST,
    beside_the_oracle,
    each_case,
    hold_against_the_scan,
    holding,
    marked,
    on_this_device,
)
from rwkv_kernels import explain_wkv7
from rwkv_kernels.wkv7 import cases
from rwkv_kernels.wkv7.api import BACKENDS
from rwkv_kernels.wkv7.parallel import LONGEST_CHUNK, chunk_length

wkv7 = jax.jit(rwkv_kernels.wkv7, static_argnames="backend")
HERE = marked(BACKENDS, on_this_device(BACKENDS))
IN_FLOAT64 = on_this_device(BACKENDS, jnp.float64)
TOKENS = ("r", "w", "k", "v", "a", "b")


@partial(jax.jit, static_argnames="backend")
def outputs_and_gradients(tokens, state, reset, length, cotangents, backend):
    outputs, pullback = jax.vjp(lambda *x: wkv7(*x, reset=reset, length=length, backend=backend), *tokens, state)
    return outputs, pullback(jax.tree.map(lambda g, x: g.astype(x.dtype), cotangents, outputs))


def run(inputs, dtype, backend):
    """(outputs, gradients of all float inputs for fixed random cotangents)."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    tokens = tuple(jnp.asarray(getattr(inputs, name), wide if name == "w" else dtype) for name in TOKENS)
    rng = np.random.default_rng(7)
    cotangents = tuple(
        jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16).astype(wide) for x in (inputs.v, inputs.state)
    )
    return outputs_and_gradients(
        tokens, jnp.asarray(inputs.state, wide), inputs.reset, inputs.length, cotangents, backend
    )


def bfloat16_exact(inputs):
    """The same problem with tokens rounded to bfloat16, w and state to float32, so that every dtype solves the same."""
    low = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    single = lambda x: np.asarray(x, np.float32).astype(np.float64)
    rounded = {name: low(getattr(inputs, name)) for name in TOKENS if name != "w"}
    return inputs._replace(w=single(inputs.w), state=single(inputs.state), **rounded)


def check(case, backend, dtypes):
    hold_against_the_scan(run, bfloat16_exact(cases.make(case)), backend, dtypes)


def as_float32(inputs):
    return jax.tree.map(lambda x: jnp.asarray(x, None if x.dtype in (bool, np.int32) else jnp.float32), inputs)


@pytest.mark.parametrize(("name", "backend", "dtypes"), each_case(BACKENDS, cases.CASES))
def test_backend_equals_scan_in_outputs_and_all_gradients(name, backend, dtypes, x64):
    check(cases.CASES[name], backend, dtypes)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("backend", holding(BACKENDS, 256))
def test_backend_equals_scan_with_wide_heads(backend, head_dim, x64):
    case = cases.Case(2, 37, 1, key_dim=head_dim, value_dim=head_dim, reset="random")
    if backend == SLOWEST:
        case = case._replace(batch_size=1, num_tokens=19, value_dim=48, reset="edges")
    check(case, backend, [*([jnp.float64] if backend in IN_FLOAT64 else []), jnp.float32, jnp.bfloat16])


@pytest.mark.slow
@pytest.mark.parametrize("backend", [backend for backend in beside_the_oracle(BACKENDS) if backend != SLOWEST])
def test_backend_equals_scan_over_4096_tokens(backend, x64):
    check(cases.LONG, backend, [jnp.float32])


@pytest.mark.slow
def test_mosaic_gpu_equals_scan_over_two_chunks(x64):
    check(cases.Case(num_tokens=19, reset="random", ragged=True), SLOWEST, [jnp.float64])


@pytest.mark.parametrize("backend", marked(BACKENDS, IN_FLOAT64))
def test_output_and_state_follow_the_recurrence(backend, x64):
    x = cases.make(cases.Case(batch_size=1, num_tokens=20, num_heads=1, key_dim=3, value_dim=2))
    state, expected = x.state[0, 0], []
    for t in range(20):
        r, w, k, v, a, b = (getattr(x, name)[0, t, 0] for name in TOKENS)
        state = state @ np.diag(np.exp(w)) + np.outer(state @ a, b) + np.outer(v, k)
        expected.append(state @ r)
    y, final = wkv7(*map(jnp.asarray, x[:7]), backend=backend)
    np.testing.assert_allclose(y[0, :, 0], expected, rtol=1e-11)
    np.testing.assert_allclose(final[0, 0], state, rtol=1e-11)


@pytest.mark.parametrize("backend", HERE)
def test_without_resets_and_lengths_nothing_changes(backend):
    inputs = as_float32(cases.make(cases.Case(num_tokens=37)))
    op = lambda **masks: wkv7(*inputs[:7], backend=backend, **masks)
    plain, masked = op(), op(reset=inputs.reset, length=inputs.length)
    for a, b in zip(plain, masked, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", HERE)
def test_a_row_with_a_length_equals_the_shorter_row(backend):
    inputs = as_float32(cases.make(cases.CASES["lengths_and_resets"]))
    y, state = wkv7(*inputs[:7], reset=inputs.reset, length=inputs.length, backend=backend)
    for row, length in enumerate(inputs.length.tolist()):
        assert not np.any(y[row, length:])
        if length == 0:
            np.testing.assert_array_equal(state[row], inputs.state[row])
            continue
        short = [x[row : row + 1, :length] for x in inputs[:6]]
        own, end = wkv7(
            *short, inputs.state[row : row + 1], reset=inputs.reset[row : row + 1, :length], backend=backend
        )
        np.testing.assert_allclose(y[row, :length], own[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state[row], end[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("at", [0, 5, 16, 39])
def test_nothing_before_a_reset_reaches_what_comes_after(at, backend):
    inputs = as_float32(cases.make(cases.Case(num_tokens=40)))
    reset = jnp.zeros((2, 40), bool).at[:, at].set(True)

    def after(tokens, state):
        y, final = wkv7(*tokens, state, reset=reset, backend=backend)
        return jnp.sum(y[:, at:] ** 2) + jnp.sum(final**2)

    gtokens, gstate = jax.grad(after, argnums=(0, 1))(inputs[:6], inputs.state)
    assert not np.any(gstate)
    for name, g in zip(TOKENS, gtokens, strict=True):
        np.testing.assert_allclose(g[:, :at], 0, atol=1e-4 if name == "w" else 0)


@pytest.mark.parametrize("backend", HERE)
def test_future_tokens_do_not_change_past_outputs(backend):
    inputs = as_float32(cases.make(cases.Case(num_tokens=40)))
    y, _ = wkv7(*inputs[:7], backend=backend)
    r, _, *rest = (x.at[:, 25:].add(0.3) for x in inputs[:6])
    changed, _ = wkv7(r, inputs.w.at[:, 25:].add(-0.3), *rest, inputs.state, backend=backend)
    np.testing.assert_array_equal(y[:, :25], changed[:, :25])
    assert not np.allclose(y[:, 25:], changed[:, 25:])


@pytest.mark.parametrize("backend", HERE)
def test_padding_past_length_has_no_effect_and_no_gradient(backend):
    inputs = as_float32(cases.make(cases.Case(num_tokens=30)))
    length = jnp.array([13, 30])
    bad = jnp.arange(30)[None, :, None, None] >= length[:, None, None, None]

    def loss(tokens):
        y, state = wkv7(*tokens, inputs.state, length=length, backend=backend)
        return jnp.sum(y**2) + jnp.sum(state)

    clean = jax.grad(loss)(inputs[:6])
    dirty = jax.grad(loss)(
        tuple(jnp.where(bad, fill, x) for x, fill in zip(inputs[:6], [jnp.inf, jnp.nan] * 3, strict=True))
    )
    for a, b in zip(dirty, clean, strict=True):
        assert not np.any(np.where(bad, a, 0))
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("backend", HERE)
def test_vmap_over_every_argument_equals_a_loop(backend):
    problems = [as_float32(cases.make(cases.CASES["lengths_and_resets"], seed)) for seed in range(3)]

    def op(inputs):
        return wkv7(*inputs[:7], reset=inputs.reset, length=inputs.length, backend=backend)

    def loss(inputs):
        y, state = op(inputs)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))

    def both(inputs):
        return op(inputs), jax.grad(loss, allow_int=True)(inputs)[:7]

    batched, one = jax.jit(jax.vmap(both))(jax.tree.map(lambda *x: jnp.stack(x), *problems)), jax.jit(both)
    for i, problem in enumerate(problems):
        for a, b in zip(jax.tree.leaves(batched), jax.tree.leaves(one(problem)), strict=True):
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
    x = jnp.ones((1, num_tokens, 1, 2))
    op = lambda x, backend: wkv7(x, -x, x, x, x, x, backend=backend)[0].sum()
    assert num_tokens in list(loops(jax.make_jaxpr(lambda x: op(x, "scan"))(x).jaxpr))
    lengths = list(loops(jax.make_jaxpr(jax.grad(lambda x: op(x, "parallel")))(x).jaxpr))
    assert lengths
    assert all(n is not None and n <= num_tokens / chunk_length(num_tokens) + 1 for n in lengths)
    assert chunk_length(num_tokens) == min(num_tokens, LONGEST_CHUNK)


def test_scan_has_no_custom_vjp_and_takes_forward_mode_and_hessians():
    inputs = as_float32(cases.make(cases.Case(batch_size=1, num_tokens=6, num_heads=1, key_dim=2, value_dim=2)))
    r, _, *rest = inputs[:7]
    loss = lambda w: jnp.sum(jnp.square(wkv7(r, jnp.broadcast_to(w, r.shape), *rest, backend="scan")[0]))
    w = jnp.array([-0.5, -0.1])
    assert "custom_vjp" not in str(jax.make_jaxpr(loss)(w))
    hessian, step = jax.hessian(loss)(w), 1e-2
    for i in range(2):
        e = jnp.zeros(2).at[i].set(step)
        difference = (jax.grad(loss)(w + e) - jax.grad(loss)(w - e)) / (2 * step)
        np.testing.assert_allclose(hessian[i], difference, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("backend", HERE)
def test_outputs_have_the_inputs_dtype_and_the_state_is_float32(backend):
    x = jnp.ones((2, 5, 1, 4), jnp.bfloat16)
    y, state = rwkv_kernels.wkv7(x, -x.astype(jnp.float32), x, x, x, x, backend=backend)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32


X = jnp.ones((2, 5, 3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": jnp.ones((2, 5, 4))}, r"r has shape \(2, 5, 4\)"),
        ({"v": jnp.ones((2, 6, 3, 4))}, r"v has shape \(2, 6, 3, 4\)"),
        ({"w": jnp.ones(4)}, r"w has shape \(4,\)"),
        ({"b": jnp.ones((2, 5, 3, 5))}, r"b has shape \(2, 5, 3, 5\)"),
        ({"state": jnp.ones((2, 3, 5, 4))}, r"state has shape \(2, 3, 5, 4\).*\(2, 3, 4, 4\)"),
        ({"reset": jnp.zeros((2, 4), bool)}, r"reset has shape \(2, 4\)"),
        ({"length": jnp.zeros(3, jnp.int32)}, r"length has shape \(3,\)"),
        ({"reset": jnp.zeros((2, 5), jnp.int32)}, "reset is int32"),
        ({"length": jnp.zeros(2)}, "length is float32"),
        ({"v": X.astype(jnp.bfloat16)}, "r is float32 and v is bfloat16"),
        ({"k": X.astype(jnp.int32)}, "k is int32"),
        ({"backend": "cuda"}, "(?s)'cuda' cannot be used.*parallel: runs here.*scan: runs here"),
    ],
)
def test_bad_input_is_refused_with_value_and_rule(unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        rwkv_kernels.wkv7(**({"r": X, "w": -X, "k": X, "v": X, "a": X, "b": X} | change))


def test_explain_lists_every_backend():
    assert all(name in explain_wkv7("cpu") for name in BACKENDS)
