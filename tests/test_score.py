"""Scores of continuations, against float64 programs that share no code, and against themselves in other batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import ORACLES
from small_models import SMALL

import rwkv_jax
from rwkv_jax import score as scoring
from rwkv_jax.models import module_of
from rwkv_jax.params import to_official
from rwkv_jax.score import Request, score
from rwkv_jax.text import get_tokenizer
from rwkv_jax.text.prompt import encode_pair

TOLERANCE = 1e-4
BYTES = get_tokenizer("bytes")
NAMES = ["tiny-4v0", "synthetic-7v0"]
MORE = ["tiny-5v1", "synthetic-5v2", "synthetic-6v0", "tiny-7v0"]
EVERY = [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
# One token; the same context again; the ends of pieces; a context of two pieces, and of all.
SPANS = [(1, 2), (100, 101), (100, 130), (15, 17), (16, 18), (17, 40), (256, 258), (257, 275), (300, 330), (481, 512)]


def load_reference(shared, name, dtype="float32"):
    kind, version = name.split("-")
    expected = np.load(shared / f"reference/expected-{name.removeprefix('tiny-')}.npz")
    params, config = rwkv_jax.load(shared / f"reference/{kind}-rwkv-{version}.safetensors", dtype=dtype)
    if hasattr(config, "ln_x_eps"):
        config = dataclasses.replace(config, ln_x_eps=float(expected["ln_x_eps"]))
    return params, config, expected


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def random_model(name):
    config = SMALL[name]
    rng = np.random.default_rng(0)
    fresh = rwkv_jax.init(jax.random.key(0), config)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), fresh), config


def random_requests(vocab_size, number=13, longest=60):
    """Contexts of all lengths, every third one twice."""
    rng = np.random.default_rng(1)
    contexts = [rng.integers(0, vocab_size, rng.integers(1, longest)) for _ in range(number)]
    contexts += contexts[::3]
    return [Request(context, rng.integers(0, vocab_size, rng.integers(1, 25))) for context in contexts]


@pytest.mark.parametrize("name", EVERY)
def test_log_likelihoods_equal_the_float64_reference(shared, name):
    params, config, expected = load_reference(shared, name)
    tokens, logits = expected["tokens"], expected["logits"]
    requests = [Request(tokens[:begin], tokens[begin:end]) for begin, end in SPANS]
    likely = logits.argmax(-1)
    requests += [Request(tokens[:50], likely[49:50]), Request(tokens[:50], [int(logits[49].argmin())])]
    found = score(params, config, requests, batch_size=5)
    own = expected["token_logprobs"]
    for (begin, end), one in zip(SPANS, found, strict=False):
        assert abs(one.log_likelihood - own[begin - 1 : end - 1].sum()) < TOLERANCE
        assert one.is_greedy == (likely[begin - 1 : end - 1] == tokens[begin:end]).all()
    best, worst = found[-2:]
    assert best.is_greedy and abs(best.log_likelihood - log_softmax(logits[49]).max()) < TOLERANCE
    assert not worst.is_greedy and abs(worst.log_likelihood - log_softmax(logits[49]).min()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_text_is_scored_across_pieces(shared, name, x64):
    # In float64: the rounding of 511 float32 logits adds up to about 1e-4, more or less of it by machine.
    params, config, expected = load_reference(shared, name, dtype="float64")
    tokens = expected["tokens"]
    (one,) = score(params, config, [Request(tokens[:1], tokens[1:])])
    assert abs(one.log_likelihood - expected["token_logprobs"].sum()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_token_of_a_text_is_scored_in_float32(shared, name):
    params, config, expected = load_reference(shared, name)
    tokens, own = expected["tokens"], expected["token_logprobs"]
    begins = [1, 128, 256, 384]
    found = score(
        params, config, [Request(tokens[:i], tokens[i:j]) for i, j in zip(begins, [*begins[1:], 512], strict=True)]
    )
    for one, exact in zip(found, np.split(own, [i - 1 for i in begins[1:]]), strict=True):
        assert abs(one.log_likelihood - exact.sum()) < TOLERANCE


@pytest.mark.parametrize(("convention", "before"), [("newline", [10]), ("zero", [0]), ("none", [0])])
def test_an_empty_context_is_the_first_token_alone(shared, convention, before):
    params, config, _ = load_reference(shared, "tiny-4v0")
    weights = to_official(params, module_of(config).declare(config), config.num_layers)
    ids = np.array([*before, *b"if x:"])
    logits, _ = ORACLES["rwkv4"](weights, ids[:-1])
    exact = log_softmax(logits)[np.arange(5), ids[1:]].sum()
    (one,) = score(params, config, [Request(*encode_pair(BYTES, "", "if x:", convention))])
    assert abs(one.log_likelihood - exact) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch_size"), [("rwkv4", 7), ("rwkv7", 1)])
def test_neither_the_batch_size_nor_the_order_changes_a_score(name, batch_size, monkeypatch):
    monkeypatch.setattr(scoring, "LONGEST_PIECE", 16)  # Fewer shapes to compile.
    params, config = random_model(name)
    requests = random_requests(config.vocab_size)
    expected = score(params, config, requests)
    order = np.random.default_rng(2).permutation(len(requests))
    found = score(params, config, [requests[i] for i in order], batch_size=batch_size)
    for i, one in zip(order, found, strict=True):
        assert abs(one.log_likelihood - expected[i].log_likelihood) < TOLERANCE
        assert one.is_greedy == expected[i].is_greedy
    assert score(params, config, requests) == expected


@pytest.mark.slow
def test_what_comes_before_may_be_given_as_a_state(x64):
    params, config = random_model("rwkv4")
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    context, continuation = np.arange(1, 20), [3, 1, 4]
    _, start = rwkv_jax.forward(params, config, jnp.asarray(context[None, :8]))
    (whole,) = score(params, config, [Request(context, continuation)])
    (after,) = score(params, config, [Request(context[8:], continuation)], start=start)
    assert after.log_likelihood == pytest.approx(whole.log_likelihood, abs=1e-9)


@pytest.fixture
def calls(monkeypatch):
    """The shapes and lengths of what is read as context and as continuation, nothing being computed."""
    seen = {"contexts": [], "continuations": []}

    def advance(params, config, tokens, length, state, backend):
        seen["contexts"].append((tokens.shape, int(length.sum())))
        return state

    def predict(params, config, tokens, targets, length, state, backend):
        seen["continuations"].append((tokens.shape, int(length.sum())))
        return np.zeros(tokens.shape), np.ones(tokens.shape, bool), state

    monkeypatch.setattr(scoring, "_advance", advance)
    monkeypatch.setattr(scoring, "_predict", predict)
    return seen


def test_a_shared_context_is_read_once(calls):
    params, config = random_model("rwkv4")
    requests = [Request([1] * 40, [i] * 3) for i in range(9)] + [Request([2] * 30, [5])]
    score(params, config, requests)
    assert sum(length for _, length in calls["contexts"]) == 39 + 29
    assert sum(length for _, length in calls["continuations"]) == 9 * 3 + 1


def test_a_run_compiles_a_handful_of_shapes_and_reads_every_token_once(calls):
    params, config = random_model("rwkv4")
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(0, 9, rng.integers(1, 900)), [1] * rng.integers(1, 40)) for _ in range(200)]
    score(params, config, requests)
    assert len({shape for shape, _ in calls["contexts"]}) <= 5
    assert len({shape for shape, _ in calls["continuations"]}) <= 5
    assert sum(length for _, length in calls["contexts"]) == sum(len(context) - 1 for context, _ in requests)
    assert sum(length for _, length in calls["continuations"]) == sum(len(own) for _, own in requests)


def test_a_large_vocabulary_is_predicted_in_shorter_pieces(calls):
    config = rwkv_jax.RWKV4Config(vocab_size=65536, num_layers=1, embed_dim=8)
    params = rwkv_jax.init(jax.random.key(0), config)
    score(params, config, [Request([i], [1] * 300) for i in range(64)])
    assert {shape for shape, _ in calls["continuations"]} == {(64, 16)}


@pytest.fixture
def small_memory(monkeypatch):
    """A device with memory for a number of rows, which the test sets."""
    predict, memory = scoring._predict, {"rows": 4}

    def bounded(params, config, tokens, *others):
        if tokens.shape[0] > memory["rows"]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")
        return predict(params, config, tokens, *others)

    monkeypatch.setattr(scoring, "_predict", bounded)
    return memory


@pytest.mark.slow
def test_auto_halves_the_batch_until_it_fits(small_memory, monkeypatch):
    monkeypatch.setattr(scoring, "LONGEST_PIECE", 16)
    params, config = random_model("rwkv4")
    requests = random_requests(config.vocab_size)
    found = score(params, config, requests)
    small_memory["rows"] = 64
    for one, other in zip(found, score(params, config, requests), strict=True):
        assert abs(one.log_likelihood - other.log_likelihood) < TOLERANCE


def test_a_batch_that_does_not_fit_says_which_to_try(small_memory):
    params, config = random_model("rwkv4")
    requests = [Request([1], [i]) for i in range(20)]
    with pytest.raises(MemoryError, match="batch_size=16 does not fit in the device's memory; try 8"):
        score(params, config, requests, batch_size=16)
    small_memory["rows"] = 0
    with pytest.raises(MemoryError, match="a batch of one row does not fit"):
        score(params, config, requests)


def test_errors_other_than_memory_are_not_taken_for_it(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(scoring, "_predict", fail)
    params, config = random_model("rwkv4")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        score(params, config, [Request([1], [2])])


@pytest.mark.parametrize(
    ("request_", "batch_size", "message"),
    [
        (Request([], [1]), 4, "request 0 has an empty context"),
        (Request([1], []), 4, "request 0 has an empty continuation"),
        (Request([1, 29], [1]), 4, "the context of request 0 has token 29, outside the model's vocab_size=29"),
        (Request([1], [-1]), 4, "the continuation of request 0 has token -1"),
        (Request([1], [1]), 0, "batch_size is 0; it must be at least 1, or 'auto'"),
    ],
)
def test_a_request_that_cannot_be_scored_is_refused(request_, batch_size, message):
    params, config = random_model("rwkv4")
    with pytest.raises(ValueError, match=message):
        score(params, config, [request_], batch_size=batch_size)


def test_no_requests_have_no_scores():
    params, config = random_model("rwkv4")
    assert score(params, config, []) == []
