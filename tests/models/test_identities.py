"""What every model must satisfy with each of its backends, in float64.

Texts are as few shapes as the identities allow, since a shape costs a second of compiling for each model and backend.
"""

import dataclasses
from functools import partial
from itertools import pairwise

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import EVERY_RWKV, forward

import rwkv_jax
from rwkv_jax.models import module_of

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)


OF_WKV = pytest.mark.parametrize("config", EVERY_RWKV, indirect=True)
"""What is said of the backends of the WKV operator."""


def trees_close(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        close(a, e)


def draw(config, batch_size, num_tokens, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch_size, num_tokens), np.int32)


@pytest.fixture
def run(params, config, backend):
    """forward of a model in numpy's arrays, whose slices need no compiling, and one program for each shape of tokens.

    What is not given is given as what it means. That this changes nothing is a test of its own.
    """

    def run(tokens, state=None, reset=None, length=None, positions="all"):
        rows, num_tokens = tokens.shape
        state = rwkv_jax.init_state(config, rows, jnp.float64) if state is None else state
        reset = np.zeros(tokens.shape, bool) if reset is None else reset
        length = np.asarray([num_tokens] * rows if length is None else length, np.int32)
        return jax.device_get(forward(params, config, tokens, state, reset, length, backend, positions=positions))

    return run


@pytest.fixture
def carried(run, config):
    """A state that has seen something."""
    return run(draw(config, 3, 9, seed=5))[1]


def test_what_is_not_given_is_the_empty_state_no_reset_and_the_whole_length(run, params, config, backend):
    tokens = draw(config, 3, 9)
    logits, final = forward(params, config, tokens, backend=backend)
    expected, end = run(tokens)
    close(logits, expected)
    trees_close(final, end)


@pytest.mark.parametrize(
    "cut", [pytest.param(1, marks=pytest.mark.slow), 7, 26, 16, 17, pytest.param(32, marks=pytest.mark.slow)]
)
def test_prefix_then_suffix_equals_whole(run, config, carried, cut):
    tokens = draw(config, 3, 33)
    whole, final = run(tokens, carried)
    head, state = run(tokens[:, :cut], carried)
    tail, end = run(tokens[:, cut:], state)
    close(np.concatenate([head, tail], 1), whole)
    trees_close(end, final)


def test_token_by_token_equals_whole(run, config):
    tokens = draw(config, 3, 9)
    whole, final = run(tokens)
    state, steps = None, []
    for t in range(9):
        logits, state = run(tokens[:, t : t + 1], state)
        steps.append(logits)
    close(np.concatenate(steps, 1), whole)
    trees_close(state, final)


def test_reset_equals_separate_sequences_whatever_the_state(run, config, carried):
    tokens = draw(config, 3, 33)
    starts = [(0, 16, 17), (7,), ()]
    reset = np.zeros((3, 33), bool)
    for row, at in enumerate(starts):
        reset[row, list(at)] = True
    logits, final = run(tokens, carried, reset)
    for row, at in enumerate(starts):
        edges = sorted({0, *at, 33})
        state = carried
        for begin, end in pairwise(edges):
            state = None if reset[row, begin] else state
            part, state = run(tokens[:, begin:end], state)
            close(part[row], logits[row, begin:end])
        trees_close(*(jax.tree.map(lambda x, row=row: x[:, row], ends) for ends in (state, final)))


def test_length_equals_the_shorter_sequence_and_leaves_its_state(run, config, carried):
    tokens, length = draw(config, 3, 33), np.array([0, 7, 33])
    logits, final = run(tokens, carried, None, length)
    for row, n in enumerate([0, 7, 33]):
        state = carried
        if n:
            part, state = run(tokens[:, :n], state)
            close(part[row], logits[row, :n])
        trees_close(*(jax.tree.map(lambda x, row=row: x[:, row], ends) for ends in (final, state)))


def test_length_zero_leaves_the_empty_state_empty(run, config):
    _, state = run(draw(config, 3, 33), None, None, np.array([0, 0, 0]))
    trees_close(state, rwkv_jax.init_state(config, 3, jnp.float64))


def test_last_position_equals_the_last_of_all(run, config):
    tokens, length = draw(config, 3, 33), np.array([1, 9, 33])
    everything, _ = run(tokens, None, None, length)
    last, _ = run(tokens, None, None, length, positions="last")
    close(last[:, 0], everything[np.arange(3), length - 1])
    close(run(tokens, positions="last")[0], run(tokens)[0][:, -1:])


def test_last_position_computes_no_other_logits(params, config, backend):
    jaxpr = jax.make_jaxpr(lambda p: forward(p, config, draw(config, 3, 23), positions="last", backend=backend))(params)
    assert f"3,1,{config.vocab_size}]" in str(jaxpr).replace(" ", "")
    assert not any(f"{n},{config.vocab_size}]" in str(jaxpr).replace(" ", "") for n in ("3,23", "69"))


def test_future_tokens_do_not_change_past_logits(run, config, params):
    tokens = draw(config, 3, 33)
    changed = np.concatenate([tokens[:, :17], (tokens[:, 17:] + 1) % config.vocab_size], 1)
    before, after = run(tokens)[0], run(changed)[0]
    np.testing.assert_array_equal(before[:, :17], after[:, :17])
    assert not np.allclose(before[:, 17:], after[:, 17:])


def test_past_tokens_and_the_state_change_all_later_logits(run, config, carried):
    tokens = draw(config, 3, 9)
    logits = run(tokens, carried)[0]
    assert np.all(np.abs(logits - run(tokens)[0]).max(-1) > 0)


def outputs_and_gradients(params, state, config, tokens, reset, length, backend):
    """(logits, final state), and the gradients of every parameter and the initial state through both."""

    def loss(params, state):
        logits, final = forward(params, config, tokens, state, reset, length, backend)
        valid = jnp.arange(tokens.shape[1]) < length[:, None]
        score = jnp.where(valid[..., None], jax.nn.log_softmax(logits) * jnp.cos(jnp.arange(config.vocab_size)), 0)
        through_state = sum(jnp.sum(jnp.sin(1 + jnp.arange(x.size)) * x.ravel()) for x in final)
        return score.mean() + through_state, (logits, final)

    gradients, outputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, state)
    return outputs, gradients


compiled = jax.jit(outputs_and_gradients, static_argnames=("config", "backend"))


def problem(config, hard=True):
    """Tokens, resets and lengths, of one shape for all tests of gradients."""
    rng = np.random.default_rng(1)
    length = [0, 8, 21] if hard else [21] * 3
    return draw(config, 3, 21), rng.random((3, 21)) < 0.2 * hard, np.array(length, np.int32)


@OF_WKV
@pytest.mark.parametrize("hard", [False, True], ids=["plain", "resets_and_lengths"])
def test_gradients_of_parameters_and_states_equal_autodiff_of_the_scan(params, config, hard):
    state = forward(params, config, draw(config, 3, 9, seed=5))[1]
    (_, actual), (_, expected) = (
        compiled(params, state, config, *problem(config, hard), backend) for backend in ("parallel", "scan")
    )
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - e) <= 1e-10 * np.linalg.norm(e) + 1e-300


@pytest.mark.slow
def test_remat_changes_no_gradient(params, config, backend, carried):
    plain, *others = (
        compiled(params, carried, dataclasses.replace(config, remat=remat), *problem(config), backend)
        for remat in ("none", "block", "elementwise")
    )
    for other in others:
        trees_close(other, plain)


@pytest.mark.slow
def test_vmap_over_stacked_parameters_equals_a_loop(params, config, backend, carried):
    params = jax.device_get(params)
    each = [jax.tree.map(lambda x, scale=scale: scale * x - 0.1 * (scale > 1), params) for scale in (1, 1.1, 1.2)]
    one = lambda params: outputs_and_gradients(params, carried, config, *problem(config), backend)
    batched = jax.device_get(jax.jit(jax.vmap(one))(jax.tree.map(lambda *x: np.stack(x), *each)))
    for i, params in enumerate(each):
        expected = compiled(params, carried, config, *problem(config), backend)
        trees_close(jax.tree.map(lambda x, i=i: x[i], batched), expected)


def test_vmap_over_states_equals_a_loop(run, params, config, backend):
    tokens = draw(config, 3, 7)
    states = [run(draw(config, 3, 9, seed=s))[1] for s in range(3)]
    one = lambda state: forward(params, config, tokens, state, backend=backend)
    batched = jax.device_get(jax.vmap(one)(jax.tree.map(lambda *x: np.stack(x), *states)))
    for i, state in enumerate(states):
        trees_close(jax.tree.map(lambda x, i=i: x[i], batched), run(tokens, state))


def test_one_token_and_one_row(run, config):
    logits, state = run(draw(config, 1, 1))
    assert logits.shape == (1, 1, config.vocab_size)
    assert np.isfinite(logits).all()
    trees_close(jax.tree.map(jnp.shape, state), jax.tree.map(jnp.shape, rwkv_jax.init_state(config, 1)))


def test_state_size_does_not_grow_with_length(run, params, config, backend):
    short = run(draw(config, 3, 9))[1]
    long = jax.eval_shape(lambda p: forward(p, config, draw(config, 3, 200), backend=backend)[1], params)
    assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)


@pytest.mark.slow
@OF_WKV
def test_scan_takes_jvp_and_hessian_products(params, config):
    tokens = draw(config, 1, 7)
    loss = lambda p: forward(p, config, tokens, backend="scan")[0].var()
    assert "custom_vjp" not in str(jax.make_jaxpr(loss)(params))
    params = jax.device_get(params)
    tangent = jax.tree.map(lambda x: np.cos(np.arange(x.size)).reshape(x.shape), params)
    product = jax.device_get(jax.jit(lambda p, t: jax.jvp(jax.grad(loss), (p,), (t,))[1])(params, tangent))
    step, gradient = 1e-5, jax.jit(jax.grad(loss))
    grad = lambda params: jax.device_get(gradient(params))
    ahead, behind = (grad(jax.tree.map(lambda x, t, s=s: x + s * t, params, tangent)) for s in (step, -step))
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(product)))
    for a, b, p in zip(*map(jax.tree.leaves, (ahead, behind, product)), strict=True):
        assert np.linalg.norm((a - b) / (2 * step) - p) <= 1e-6 * norm


def lengths_of_loops(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("scan", "while"):
            yield equation.params.get("length")
        for sub in jax.extend.core.jaxprs_in_params(equation.params):
            yield from lengths_of_loops(sub)


def axes_summed(jaxpr):
    """(shape, axes) of every sum in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "reduce_sum":
            yield equation.invars[0].aval.shape, equation.params["axes"]
        for sub in jax.extend.core.jaxprs_in_params(equation.params):
            yield from axes_summed(sub)


def test_no_gradient_sums_over_tokens_or_channels_beside_an_axis_of_one_row(config, fresh):
    """Such sums of XLA's CPU backend are slow: over the tokens of one row alone fifty times."""
    loss = lambda p: forward(p, config, draw(config, 1, 33))[0].var()
    sums = list(axes_summed(jax.make_jaxpr(jax.grad(loss))(fresh).jaxpr))
    assert any(shape[:2] == (1, 33) and axes == (0, 1) for shape, axes in sums)
    assert not [shape for shape, axes in sums if shape[:2] == (1, 33) and axes == (1,)]
    assert not [
        shape for shape, axes in sums if shape[:2] == (1, 33) and axes == (len(shape) - 1,)
    ]  # Of norms: tenfold.


@OF_WKV
def test_parallel_has_no_loop_over_time_forward_or_backward(params, config):
    loss = lambda p, backend: forward(p, config, draw(config, 1, 121), backend=backend)[0].sum()
    assert 121 in list(lengths_of_loops(jax.make_jaxpr(jax.grad(partial(loss, backend="scan")))(params).jaxpr))
    lengths = list(lengths_of_loops(jax.make_jaxpr(jax.grad(partial(loss, backend="parallel")))(params).jaxpr))
    assert all(n is not None and n <= 24 for n in lengths)


def test_float32_parameters_give_float32_logits_and_bfloat16_compute_keeps_the_state_float32(config, fresh):
    for dtype in ("float32", "bfloat16"):
        logits, state = forward(fresh, dataclasses.replace(config, dtype=dtype), draw(config, 2, 5))
        assert logits.dtype == jnp.float32
        assert {x.dtype for x in state} == {jnp.dtype(jnp.float32)}


def test_layers_compose_into_the_model(params, config, backend):
    """A researcher's own loop over public layers gives forward's numbers."""
    from rwkv_jax.nn.layer_norm import layer_norm

    model, tokens = module_of(config), jnp.asarray(draw(config, 3, 9))
    block = jax.jit(model.block, static_argnames=("config", "backend"))
    x, states = model.embed_tokens(params, tokens, jnp.float64), []
    depth = model.init_depth(config, x)
    for layer in range(config.num_layers):
        own = jax.tree.map(
            lambda leaf, layer=layer: leaf[layer], (params.blocks, rwkv_jax.init_state(config, 3, jnp.float64))
        )
        (x, depth), state = block(own[0], config, (x, depth), own[1], backend=backend)
        states.append(state)
    logits, final = forward(params, config, tokens, backend=backend)
    close(layer_norm(params.ln_out, x) @ params.head, logits)
    trees_close(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), final)


def test_layers_that_are_apart_give_the_stacks_numbers(params, config):
    apart = rwkv_jax.unstack(params)
    assert len(apart.blocks) == config.num_layers and not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    first, second = draw(config, 2, 3, seed=1), draw(config, 2, 3, seed=2)
    state = rwkv_jax.init_state(config, 2, jnp.float64)
    expected = forward(params, config, second, forward(params, config, first, state)[1])
    trees_close(forward(apart, config, second, forward(apart, config, first, state)[1]), expected)


def test_unstacking_may_delete_the_stack(config, fresh):
    given = jax.tree.map(jnp.copy, fresh)
    apart = jax.device_get(rwkv_jax.unstack(given, donate=True))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.blocks))
    assert not any(leaf.is_deleted() for leaf in (given.emb, given.head))
    for layer, block in enumerate(apart.blocks):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], fresh.blocks)
        assert jax.tree.structure(block) == jax.tree.structure(own)
        trees_close(block, own)
    assert rwkv_jax.unstack(apart, donate=True) is apart
    with pytest.raises(ValueError, match=f"params have {config.num_layers - 1} layers"):
        forward(apart._replace(blocks=apart.blocks[1:]), config, draw(config, 1, 2))
    narrow = jax.tree.map(lambda leaf: leaf[..., :-1], apart.blocks[-1])
    key = rf"blocks.{config.num_layers - 1}.att.*, the config asks for"
    with pytest.raises(ValueError, match=key):
        forward(apart._replace(blocks=(*apart.blocks[:-1], narrow)), config, draw(config, 1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": jnp.zeros(5, jnp.int32)}, r"shape \(5,\)"),
        ({"tokens": jnp.zeros((2, 0), jnp.int32)}, r"shape \(2, 0\)"),
        ({"tokens": jnp.zeros((2, 5))}, "tokens are float32"),
        ({"tokens": jnp.full((2, 5), 29)}, "vocab_size=29 they must be 0 to 28"),
        ({"tokens": jnp.full((2, 5), -1)}, "from -1"),
        ({"reset": jnp.zeros((2, 4), bool)}, r"reset is bool \(2, 4\)"),
        ({"length": jnp.array([1, 6])}, "length runs from 1 to 6"),
        ({"length": jnp.array([1])}, r"length is int32 \(1,\)"),
        ({"positions": "first"}, "'first'"),
    ],
)
def test_bad_input_is_refused_with_value_and_rule(config, fresh, unchecked, change, message):
    arguments = {"tokens": jnp.zeros((2, 5), jnp.int32)} | change
    with pytest.raises((ValueError, TypeError), match=message):
        rwkv_jax.forward(fresh, config, **arguments)


@OF_WKV
def test_a_backend_that_is_not_there_is_refused_with_those_that_are(config, fresh):
    with pytest.raises(ValueError, match="(?s)parallel: runs here.*scan: runs here"):
        rwkv_jax.forward(fresh, config, jnp.zeros((2, 5), jnp.int32), backend="cuda")


def test_state_of_another_batch_and_params_of_another_config_are_refused(config, fresh):
    tokens = jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match="2 rows of this model need"):
        rwkv_jax.forward(fresh, config, tokens, rwkv_jax.init_state(config, 3))
    with pytest.raises(ValueError, match=r"emb.weight: shape \(29, 12\), the config asks for \(30, 12\)"):
        rwkv_jax.forward(fresh, dataclasses.replace(config, vocab_size=30), tokens)


def test_a_traced_token_outside_the_vocabulary_gives_nan_and_not_another_row(config, fresh):
    tokens = np.array([[1, 2], [1, config.vocab_size], [1, -1]], np.int32)
    logits = np.asarray(forward(fresh, config, tokens)[0])
    assert np.isfinite(logits[0]).all() and np.isfinite(logits[:, 0]).all()
    assert np.isnan(logits[1:, 1]).all()
