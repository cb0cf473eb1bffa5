"""Fine-tuning: what each method trains, that it starts from the model tuned, and what is refused."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import SMALL, forward

import rwkv_jax
from rwkv_jax import config, finetune, train
from rwkv_jax.config import ConfigError
from rwkv_jax.finetune import FinetuneConfig
from rwkv_jax.optim import OptimConfig, make_optimizer
from rwkv_jax.text import EvalBatch

ALL, LORA, STATE = (
    FinetuneConfig(init_from="base", method=method, lora_rank=2, lora_alpha=3.0) for method in ("all", "lora", "state")
)
LENGTH = np.array([5, 1, 6, 3])


@pytest.fixture(params=["rwkv4", pytest.param("rwkv7", marks=pytest.mark.slow)])
def model(request):
    return SMALL[request.param]


@pytest.fixture
def base(model, x64):
    """float64 parameters away from the initialisation, where many gradients are 0."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape)), fresh(model))


@cache
def fresh(model):
    return jax.device_get(rwkv_jax.init(jax.random.key(0), model))


def trained(method, model, base, scale=0.1):
    """What a method trains, moved away from its start."""
    rng = np.random.default_rng(1)
    start = jax.device_get(finetune.init(jax.random.key(1), method, model, base))
    return jax.tree.map(lambda x: jnp.asarray(x + scale * rng.normal(size=x.shape)), start)


def tokens(model, shape=(4, 7), seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, model.vocab_size, shape), jnp.int32)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, tolerance=1e-9):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * (np.linalg.norm(y) + 1e-3))


PLAIN = optax.sgd(1.0)


@cache
def compiled_step(method, model, accumulate):
    return jax.jit(
        partial(
            train.train_step, config=model, optimizer=PLAIN, l2wrap=1e-2, accumulate=accumulate,
            assemble=finetune.assembler(method, model),
        )
    )  # fmt: skip


def update(method, model, base, start, accumulate=1, padding=0):
    """What is trained after one step of plain descent on rows of unequal length, and the loss before it."""
    ids = np.asarray(tokens(model))
    inputs, targets = (np.where(np.arange(6) < LENGTH[:, None], x, padding) for x in (ids[:, :-1], ids[:, 1:]))
    state = train.TrainState(jnp.zeros((), jnp.int32), start, PLAIN.init(start), jax.random.key(0))
    frozen = None if method.method == "all" else base
    step = compiled_step(method, model, accumulate)
    state, metrics = step(state, inputs.astype(np.int32), targets.astype(np.int32), None, LENGTH, frozen)
    return state.params, metrics.total_loss


def loss(params, model, state=None):
    """The mean over the tokens that count: of whole rows, since what follows a token does not change what comes before."""
    ids = tokens(model)
    rows = None if state is None else jax.tree.map(lambda x: jnp.repeat(x, len(ids), axis=1), state)
    logits, _ = forward(params, model, ids[:, :-1], rows, backend="scan")
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)[..., 0]
    costs = -picked + 0.5 * 1e-2 * logits.max(-1) ** 2
    return jnp.where(np.arange(6) < LENGTH[:, None], costs, 0).sum() / LENGTH.sum()


@pytest.mark.parametrize("method", [ALL, LORA])
def test_the_start_is_the_model_tuned(model, base, method):
    start = finetune.init(jax.random.key(1), method, model, base)
    params, state = finetune.assembler(method, model)(start, base)
    equal(params, base)
    assert state is None


def test_state_tuning_starts_from_what_the_zero_state_gives(model, base):
    start = finetune.init(jax.random.key(1), STATE, model, base)
    params, state = finetune.assembler(STATE, model)(start, base)
    equal(params, base)
    expected, _ = forward(base, model, tokens(model, (1, 7)))
    logits, _ = forward(base, model, tokens(model, (1, 7)), state)
    close(logits, expected)


def test_adapters_change_their_matrices_by_the_scaled_product_and_nothing_else(model, base):
    adapters = trained(LORA, model, base)
    params, _ = finetune.assembler(LORA, model)(adapters, base)
    changed = {}
    for mix, own in adapters.items():
        matrices = getattr(base.blocks, mix)
        changed[mix] = {}
        for name, (a, b) in own.items():
            product = np.einsum("ldr,lrf->ldf", a, b)
            expected = np.asarray(getattr(matrices, name)) + 3.0 / 2 * product
            np.testing.assert_allclose(getattr(getattr(params.blocks, mix), name), expected, rtol=0, atol=1e-12)
            changed[mix][name] = getattr(matrices, name)
    mixes = {mix: getattr(params.blocks, mix)._replace(**changed[mix]) for mix in changed}
    equal(params._replace(blocks=params.blocks._replace(**mixes)), base)


def test_all_linear_layers_of_both_mixes_are_adapted_by_default(model):
    declared = finetune.declare(LORA, model)
    assert {"key", "value", "receptance", "output"} <= declared["att"].keys()
    assert {"key", "value"} <= declared["ffn"].keys()


def test_targets_name_a_matrix_in_both_mixes_or_in_one(model):
    declared = finetune.declare(replace(LORA, lora_targets=("key", "att.output")), model)
    assert {mix: set(own) for mix, own in declared.items()} == {"att": {"key", "output"}, "ffn": {"key"}}
    assert finetune.declare(replace(LORA, lora_targets=("att.key",)), model).keys() == {"att"}


def test_an_unknown_target_is_refused_with_those_there_are(model):
    with pytest.raises(
        ValueError, match=r"finetune.lora_targets has query; the matrices of .* are .*key, .*receptance"
    ):
        finetune.declare(replace(LORA, lora_targets=("key", "query")), model)


@pytest.mark.slow
@pytest.mark.parametrize("method", [LORA, STATE], ids=["lora", "state"])
def test_a_step_moves_what_is_trained_by_its_own_gradient(model, base, method):
    start, assemble = trained(method, model, base), finetune.assembler(method, model)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(assemble(x, base)[0], model, assemble(x, base)[1])))(
        start
    )
    moved, measured = update(method, model, base, start)
    np.testing.assert_allclose(measured, value, rtol=1e-9)
    close(jax.tree.map(lambda x, y: x - y, start, moved), gradient)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize("method", [ALL, LORA, STATE], ids=["all", "lora", "state"])
def test_accumulated_parts_give_the_step_of_the_whole_and_padding_does_not_matter(model, base, method):
    start = trained(method, model, base)
    whole, whole_loss = update(method, model, base, start)
    parts, parts_loss = update(method, model, base, start, accumulate=2, padding=3)
    close(parts, whole)
    np.testing.assert_allclose(parts_loss, whole_loss, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_is_the_mean_over_the_targets_that_count(model, base, accumulate):
    ids, lengths = tokens(model), jnp.array([5, 2, 6, 4])
    counts = jnp.array([[0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 1]], bool)
    state = train.TrainState(jnp.zeros((), jnp.int32), base, PLAIN.init(base), jax.random.key(0))
    state, metrics = jax.jit(
        lambda state: train.train_step(
            state, ids[:, :-1], ids[:, 1:], None, lengths, counts=counts, config=model, optimizer=PLAIN, l2wrap=0.0,
            accumulate=accumulate,
        )
    )(state)  # fmt: skip

    def answers(params):
        log_p = jax.nn.log_softmax(forward(params, model, ids, backend="scan")[0][:, :-1])
        picked = jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]
        answer = counts & (jnp.arange(6) < lengths[:, None])
        return -picked.sum(where=answer) / answer.sum()

    expected, grads = jax.jit(jax.value_and_grad(answers))(base)
    close(metrics.loss, expected)
    close(jax.tree.map(jnp.subtract, base, state.params), grads)


@pytest.mark.slow
@pytest.mark.parametrize("method", [ALL, LORA, STATE], ids=["all", "lora", "state"])
def test_weight_decay_shrinks_what_its_declaration_says(model, base, method):
    start = jax.tree.map(jnp.ones_like, trained(method, model, base))
    declaration = finetune.declare(method, model)
    optimizer = make_optimizer(OptimConfig(weight_decay=0.1), declaration, 10)
    gradient = jax.tree.map(jnp.zeros_like, start)
    updates, _ = jax.jit(lambda start: optimizer.update(gradient, optimizer.init(start), start))(start)
    for param, leaf in zip(jax.tree.leaves(declaration), jax.tree.leaves(updates), strict=True):
        assert bool((leaf < 0).all()) == param.decays
    assert all(param.decays for param in jax.tree.leaves(finetune.declare(LORA, model)))


@pytest.mark.slow
def test_an_evaluation_starts_each_document_from_the_learned_state(model, base):
    learned = trained(STATE, model, base)
    params, start = finetune.assembler(STATE, model)(learned, base)
    ids = tokens(model, (2, 9))
    batches = [
        EvalBatch(
            ids[:, first : first + 4],
            ids[:, first + 1 : first + 5],
            np.ones((2, 4), bool),
            np.zeros((2, 4), bool),
            fresh,
        )
        for first, fresh in [(0, True), (4, False), (0, True)]
    ]
    cost = train.evaluate(params, model, batches, start=start)
    rows = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), start)
    logits, _ = forward(params, model, ids[:, :-1], rows, backend="scan")
    nats = -np.take_along_axis(jax.nn.log_softmax(logits), np.asarray(ids[:, 1:, None]), -1)[..., 0]
    np.testing.assert_allclose(cost.nats, nats.sum() + nats[:, :4].sum(), rtol=1e-6)
    assert cost.num_tokens == 24


def test_fields_that_are_not_given_come_from_the_model_and_compute_fields_may_differ(model):
    wanted = replace(type(model)(), dtype="bfloat16", remat="none")
    assert finetune.resolve_model(wanted, {"run.steps"}, model, "base") == model
    resolved = finetune.resolve_model(wanted, {"model.dtype", "model.remat"}, model, "base")
    assert resolved == replace(model, dtype="bfloat16", remat="none")
    assert finetune.resolve_model(model, {"model.num_layers", "model.architecture"}, model, "base") == model


def test_fields_that_disagree_are_refused_and_listed(model):
    wanted = replace(model, num_layers=5, embed_dim=24)
    with pytest.raises(ValueError, match=r"(?s)base is another model.*model.embed_dim: 24, in base 12.*num_layers: 5"):
        finetune.resolve_model(wanted, {"model.num_layers", "model.embed_dim"}, replace(model, embed_dim=12), "base")


def test_a_tokenizer_that_is_not_the_models_is_refused(model):
    finetune.check_tokenizer("bytes", model, "base")
    finetune.check_tokenizer("bytes", replace(model, tokenizer="bytes"), "base")
    with pytest.raises(ValueError, match="data.tokenizer is 'bytes', but base was trained with 'world'"):
        finetune.check_tokenizer("bytes", replace(model, tokenizer="world"), "base")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--finetune.method", "lora"], "needs finetune.init_from"),
        (["--finetune.method", "state", "--finetune.init_from", "x"], "set data.documents to 'rows'"),
        (
            ["--finetune.method", "state", "--finetune.init_from", "x", "--data.documents", "packed"],
            "data.documents is 'packed'",
        ),
        (["--finetune.lora_rank", "0"], "finetune.lora_rank is 0"),
        (["--finetune.lora_alpha", "-1"], "finetune.lora_alpha is -1.0"),
        (["--finetune.lora_targets", "[]"], "finetune.lora_targets is empty"),
        (["--finetune.compare_source", "text"], "needs finetune.compare_path"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        config.parse(arguments)
    assert message in str(error.value)


def test_lora_targets_come_from_file_or_command_line_and_load_equal(tmp_path):
    file = tmp_path / "some.toml"
    file.write_text('[finetune]\ninit_from = "x"\nmethod = "lora"\nlora_targets = ["key", "att.output"]\n')
    settings = config.parse(["--cfg", str(file)])
    assert settings.finetune.lora_targets == ("key", "att.output")
    arguments = ["--finetune.init_from=x", "--finetune.method=lora", '--finetune.lora_targets=["key", "att.output"]']
    assert config.parse(arguments) == settings
    file.write_text(config.to_toml(settings))
    assert config.load(file) == settings == config.from_dict(config.to_dict(settings), "test")
    file.write_text('[finetune]\nlora_targets = ["key", 3]\n')
    with pytest.raises(ConfigError, match=r"finetune.lora_targets is .* it must be a list, each a string"):
        config.parse(["--cfg", str(file)])


def test_given_fields_are_those_of_the_file_and_the_command_line(tmp_path):
    file = tmp_path / "some.toml"
    file.write_text("[model]\nnum_layers = 12\n[run]\nsteps = 3\n")
    arguments = ["--cfg", str(file), "--model.dtype=bfloat16", "--optim.lr", "0.1"]
    assert config.given_fields(arguments) == {"model.num_layers", "run.steps", "model.dtype", "optim.lr"}
