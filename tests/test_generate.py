"""Generation: what is drawn, against numpy; what is shown, against a script of tokens."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SMALL

from rwkv_jax import RWKV4Config, forward, generate, init, init_state, unstack
from rwkv_jax.generate import Sampling, decode, prefill, sample, stream
from rwkv_jax.text import get_tokenizer

MODEL = RWKV4Config(vocab_size=256, num_layers=2, embed_dim=16, ffn_dim=16, remat="none")
BYTES = get_tokenizer("bytes")
scan_forward = jax.jit(partial(forward, backend="scan"), static_argnums=1)


@cache
def random_params(config=MODEL):
    """Parameters all away from zero, with logits that are far apart."""
    rng = np.random.default_rng(0)
    params = init(jax.random.key(0), config)
    return jax.tree.map(lambda x: x + jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), params)


def random_ids(number, seed=0):
    return np.random.default_rng(seed).integers(1, MODEL.vocab_size, number).astype(np.int32)


def probabilities(logits, counts, sampling):
    """What `sample` documents, in float64: penalties, temperature, top_k, top_p."""
    logits = (
        np.asarray(logits, np.float64) - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts
    )
    if sampling.temperature == 0:
        return np.eye(logits.size)[logits.argmax()]
    p = np.exp((logits - logits.max()) / sampling.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: sampling.top_k or None]
    p = np.where(np.isin(np.arange(p.size), kept), p, 0)
    p /= p.sum()
    needed = np.searchsorted(np.cumsum(p[order]), sampling.top_p) + 1 if sampling.top_p < 1 else p.size
    p = np.where(np.isin(np.arange(p.size), order[:needed]), p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(), 20),
        (Sampling(temperature=0.0, top_k=5, top_p=0.5), 1),
        (Sampling(temperature=0.5), 20),
        (Sampling(temperature=3.0), 20),
        (Sampling(top_k=1), 1),
        (Sampling(top_k=4), 4),
        (Sampling(top_k=1000), 20),
        (Sampling(top_p=1e-6), 1),
        (Sampling(top_p=0.6), None),
        (Sampling(top_p=0.9, temperature=2.0), None),
        (Sampling(top_k=6, top_p=0.7, temperature=1.5), None),
        (Sampling(presence_penalty=1.5), 20),
        (Sampling(frequency_penalty=0.7), 20),
        (Sampling(presence_penalty=0.5, frequency_penalty=0.4, top_p=0.8, top_k=10, temperature=0.8), None),
        (Sampling(presence_penalty=-2.0), 20),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_documented_distribution(sampling, support):
    rng = np.random.default_rng(3)
    draws, vocab_size = 4000, 20
    logits = rng.normal(size=vocab_size).astype(np.float32)
    counts = rng.choice([0.0, 0.0, 0.3, 1.0, 2.5], vocab_size).astype(np.float32)
    tile = partial(jnp.tile, reps=(draws, 1))
    tokens = np.asarray(sample(jax.random.key(0), tile(logits), tile(counts), sampling))
    expected = draws * probabilities(logits, counts, sampling)
    seen = np.bincount(tokens, minlength=vocab_size)
    allowed = expected > 0
    if support is not None:
        assert allowed.sum() == support
    else:
        assert 1 < allowed.sum() < vocab_size
    assert seen[~allowed].sum() == 0
    # Chi-squared has mean f and deviation sqrt(2 f), f being the free cells; five of them are rare.
    chi2, free = (((seen - expected)[allowed] ** 2) / expected[allowed]).sum(), allowed.sum() - 1
    assert chi2 <= free + 5 * np.sqrt(2 * free)


def test_rows_are_drawn_independently_each_from_its_own_logits():
    logits = jnp.where(jnp.eye(8, dtype=bool), 50.0, 0.0)
    assert sample(jax.random.key(0), logits, jnp.zeros_like(logits), Sampling()).tolist() == list(range(8))
    flat = sample(jax.random.key(0), jnp.zeros((64, 8)), jnp.zeros((64, 8)), Sampling())
    assert len(set(flat.tolist())) > 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("penalty_decay", 1.5),
        ("penalty_decay", -0.1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Sampling(**{name: value})


@cache
def long_prompt():
    """2100 ids, and the scan's logits after each."""
    ids = random_ids(2100)
    return ids, np.asarray(scan_forward(random_params(), MODEL, jnp.asarray(ids)[None])[0][0])


OTHER_LENGTHS = [2, 3, 4, 7, 8, 9, 31, 1023, 1024, 1028, 2048]


@pytest.mark.parametrize(
    "length", [1, 5, 33, 1025, 2100, *(pytest.param(length, marks=pytest.mark.slow) for length in OTHER_LENGTHS)]
)
def test_prefill_of_any_length_gives_the_logits_after_the_prompt(length):
    ids, exact = long_prompt()
    logits, _ = prefill(random_params(), MODEL, ids[:length])
    error = np.linalg.norm(logits[0] - exact[length - 1]) / np.linalg.norm(exact[length - 1])
    assert error < 1e-5


@pytest.mark.parametrize("cut", [1, 6, 8])
def test_prefill_goes_on_from_a_state(cut):
    ids, exact = long_prompt()
    _, state = prefill(random_params(), MODEL, ids[:cut])
    logits, _ = prefill(random_params(), MODEL, ids[cut:9], state)
    assert np.linalg.norm(logits[0] - exact[8]) / np.linalg.norm(exact[8]) < 1e-5


@pytest.mark.parametrize("ids", [[3, 256], [-1, 4], [1000]])
def test_a_token_outside_the_vocabulary_is_named(ids):
    wrong = next(i for i in ids if not 0 <= i < 256)
    with pytest.raises(ValueError, match=f"token {wrong}, outside the model's vocab_size=256"):
        prefill(random_params(), MODEL, ids)


def test_an_empty_prefill_says_what_to_begin_with():
    with pytest.raises(ValueError, match="no tokens; begin with the tokenizer's end_of_text"):
        prefill(random_params(), MODEL, [])


def drawn(prompt, sampling, num_tokens=24, calls=1, seed=0):
    """Tokens of one row from `calls` calls of decode, and the counts at the end."""
    logits, state = prefill(random_params(), MODEL, prompt)
    counts, key = jnp.zeros_like(logits), jax.random.key(seed)
    tokens = []
    for _ in range(calls):
        own, (logits, state, counts, key) = decode(
            random_params(),
            MODEL,
            logits,
            state,
            counts,
            key,
            sampling=sampling,
            num_tokens=num_tokens // calls,
        )
        tokens += own[0].tolist()
    return np.array(tokens), np.asarray(counts[0])


def test_greedy_decoding_is_the_argmax_of_the_full_forward_each_time():
    prompt = random_ids(5)
    tokens, _ = drawn(prompt, Sampling(temperature=0.0))
    # Past logits do not depend on later tokens, so one forward over all stands for one over each prefix.
    everything = np.concatenate([prompt, tokens])
    logits, _ = scan_forward(random_params(), MODEL, jnp.asarray(everything)[None])
    assert np.argmax(logits[0, 4:-1], axis=-1).tolist() == tokens.tolist()


def test_decoding_in_pieces_draws_what_decoding_at_once_draws():
    sampling = Sampling(temperature=2.0, frequency_penalty=0.3, penalty_decay=0.9)
    whole, whole_counts = drawn(random_ids(5), sampling)
    pieces, piece_counts = drawn(random_ids(5), sampling, calls=3)
    assert whole.tolist() == pieces.tolist()
    np.testing.assert_allclose(whole_counts, piece_counts, rtol=1e-5)


@pytest.mark.parametrize("penalty_decay", [1.0, 0.9, 0.0])
def test_counts_shrink_by_the_decay_with_every_token(penalty_decay):
    tokens, counts = drawn(random_ids(5), Sampling(penalty_decay=penalty_decay, top_k=3))
    expected = np.zeros(256)
    for token in tokens:
        expected *= penalty_decay
        expected[token] += 1
    assert len(set(tokens.tolist())) < len(tokens)  # some token came twice, or this would prove little
    np.testing.assert_allclose(counts, expected, rtol=1e-5, atol=1e-7)


def test_penalties_hold_while_decoding():
    greedy, _ = drawn(random_ids(5), Sampling(temperature=0.0), num_tokens=80)
    assert len(set(greedy.tolist())) < 80
    never_again, _ = drawn(random_ids(5), Sampling(temperature=0.0, presence_penalty=1e4), num_tokens=80)
    assert len(set(never_again.tolist())) == 80
    not_twice_running, _ = drawn(
        random_ids(5), Sampling(temperature=0.0, presence_penalty=1e4, penalty_decay=0.0), num_tokens=80
    )
    assert (not_twice_running[1:] != not_twice_running[:-1]).all()
    assert len(set(not_twice_running.tolist())) < 80


def text_of(seed=0, prompt="def ", max_tokens=40, **sampling):
    pieces = stream(
        random_params(), MODEL, BYTES, prompt, max_tokens=max_tokens, seed=seed, sampling=Sampling(**sampling)
    )
    return "".join(pieces)


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    assert text_of(seed=1) == text_of(seed=1)
    assert text_of(seed=1) != text_of(seed=2)


def test_streamed_text_is_what_decode_draws():
    logits, state = prefill(random_params(), MODEL, BYTES.encode("def "))
    tokens, _ = decode(
        random_params(), MODEL, logits, state, jnp.zeros_like(logits), jax.random.key(0),
        sampling=Sampling(temperature=0.0), num_tokens=48,
    )  # fmt: skip
    expected = bytes(tokens[0].tolist()).partition(b"\0")[0].decode(errors="replace")
    assert len(expected) > 4
    assert text_of(max_tokens=48, temperature=0.0).startswith(expected[:-4])


def test_layers_that_are_apart_draw_the_same_text():
    drawn = (
        stream(params, MODEL, BYTES, "def ", max_tokens=40) for params in (random_params(), unstack(random_params()))
    )
    assert "".join(next(drawn)) == "".join(next(drawn))


def test_an_empty_prompt_stands_for_the_start_of_a_document(monkeypatch):
    read = []
    monkeypatch.setattr(
        generate,
        "prefill",
        lambda params, config, ids, state: read.append(list(ids)) or prefill(params, config, ids, state),
    )
    text_of(prompt="", max_tokens=1)
    assert read == [[BYTES.end_of_text]]


def test_a_prompt_outside_the_vocabulary_is_refused():
    small = RWKV4Config(vocab_size=100, num_layers=1, embed_dim=8)
    with pytest.raises(ValueError, match="token 122, outside the model's vocab_size=100"):
        next(stream(init(jax.random.key(0), small), small, BYTES, "fuzz", max_tokens=1))


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop string is empty"):
        next(stream(random_params(), MODEL, BYTES, "a", max_tokens=1, stop=["\n", ""]))


@pytest.fixture
def scripted(monkeypatch):
    """A function from a text to the pieces shown when the model says that text, `then`, and x without end."""

    def pieces(text, *, max_tokens=1000, then=b"x" * 1000, stop=()):
        raw = text.encode() + then
        said = iter(raw + b"x" * 2000)

        def say(params, config, logits, state, counts, key, *, sampling, num_tokens, vocab_size):
            return jnp.asarray([[next(said) for _ in range(num_tokens)]]), (logits, state, counts, key)

        monkeypatch.setattr(generate, "prefill", lambda *_: (jnp.zeros((1, 256)), None))
        monkeypatch.setattr(generate, "decode", say)
        return list(stream(random_params(), MODEL, BYTES, "p", max_tokens=max_tokens, stop=stop))

    return pieces


@pytest.mark.parametrize("max_tokens", [0, 1, 15, 16, 17, 40])
def test_no_more_than_max_tokens_are_shown(scripted, max_tokens):
    assert "".join(scripted("", max_tokens=max_tokens)) == "x" * max_tokens


@pytest.mark.parametrize("before", [0, 1, 15, 16, 17, 32])
def test_text_ends_at_end_of_text(scripted, before):
    assert "".join(scripted("a" * before, then=b"\0" + b"b" * 100)) == "a" * before


@pytest.mark.parametrize("before", range(9, 26))
@pytest.mark.parametrize("stop", [["\n\nUser:"], ["zzz", "\n\nUser:", "\n\nUser: and more"], ["r:", "\n\nUser:"]])
def test_a_stop_string_is_never_shown_wherever_it_is_split(scripted, before, stop):
    pieces = scripted("a" * before + "\n\nUser: hello", stop=stop)
    assert "".join(pieces) == "a" * before
    assert not any("\n" in piece for piece in pieces)


@pytest.mark.parametrize("before", range(10, 20))
def test_what_only_begins_like_a_stop_string_is_shown_in_full(scripted, before):
    text = "a" * before + "\n\nUse\n\nUs" + "b" * 20 + "\n\nUser"
    assert "".join(scripted(text, then=b"\0", stop=["\n\nUser:"])) == text


def test_the_earliest_of_several_stop_strings_counts(scripted):
    assert "".join(scripted("one two three", stop=["three", "two", "wo"])) == "one "


@pytest.mark.parametrize("character", ["é", "日", "🎉"])
@pytest.mark.parametrize("shift", range(4))
def test_characters_of_several_bytes_are_never_cut(scripted, character, shift):
    text = "a" * shift + character * 20
    pieces = scripted(text, then=b"\0")
    assert len(pieces) > 1
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("max_tokens", range(14, 22))
def test_a_character_that_max_tokens_cuts_is_left_out(scripted, max_tokens):
    shown = "".join(scripted("🎉" * 10, max_tokens=max_tokens))
    assert shown == "🎉" * (max_tokens // 4)


@pytest.mark.parametrize("shift", range(4))
def test_a_stop_string_of_multibyte_characters_is_never_shown(scripted, shift):
    assert "".join(scripted("a" * (12 + shift) + "日本語🎉終 more", stop=["本語🎉終"])) == "a" * (12 + shift) + "日"


def test_ties_do_not_let_more_tokens_in_than_asked_for():
    equal = jnp.zeros((500, 8))
    assert len(set(sample(jax.random.key(0), equal, equal, Sampling(top_k=1)).tolist())) == 1
    assert len(set(sample(jax.random.key(0), equal, equal, Sampling(top_k=3)).tolist())) == 3
    assert len(set(sample(jax.random.key(0), equal, equal, Sampling(top_p=0.5)).tolist())) == 4


@pytest.mark.slow
def test_rows_of_the_head_that_the_tokenizer_has_no_id_for_are_never_drawn():
    config = RWKV4Config(vocab_size=300, num_layers=1, embed_dim=8)
    params = random_params(config)
    params = params._replace(head=params.head.at[:, 256:].set(0.0).at[0, 256:].set(1e4))
    assert isinstance("".join(stream(params, config, BYTES, "a", max_tokens=40)), str)


@pytest.mark.parametrize("name", SMALL)
def test_the_first_state_can_be_donated_as_decode_does(name):
    state = init_state(SMALL[name], 2)
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
