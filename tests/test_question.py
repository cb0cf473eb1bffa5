"""Questions with choices: scores against one plain forward pass a choice, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import forward

import rwkv_jax
from rwkv_jax.question import Question, answer_all, right
from rwkv_jax.text import get_tokenizer
from rwkv_jax.text.prompt import encode_context, encode_pair
from rwkv_jax.text.questions import Completion, Item

BYTES = get_tokenizer("bytes")
MODEL = rwkv_jax.RWKV4Config(vocab_size=256, num_layers=1, embed_dim=16, tokenizer="bytes", remat="none")
CHOICES = ["cat", "brontosaurus", "é"]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    fresh = rwkv_jax.init(jax.random.key(0), MODEL)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), fresh)


def log_likelihood(params, before, after):
    """Of the bytes `after` the bytes `before`, in one forward pass of a fixed length."""
    ids = np.zeros((1, 64), np.int32)
    ids[0, : len(before + after)] = list(before + after)
    logits = np.asarray(forward(params, MODEL, jnp.asarray(ids))[0][0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(log_p[len(before) + i - 1, token] for i, token in enumerate(after))


@pytest.mark.parametrize("normalise", ["none", "tokens", "bytes", "unconditional"])
def test_the_scores_of_choices_after_a_text(params, normalise):
    expected = []
    for choice in CHOICES:
        own = f" {choice}".encode()
        value = log_likelihood(params, b"\nWho sat?", own)
        expected.append(
            {
                "none": value,
                "tokens": value / len(own),
                "bytes": value / (len(own) - 1),
                "unconditional": value - log_likelihood(params, b"\n", own),
            }[normalise]
        )
    index, scores = rwkv_jax.answer(params, MODEL, BYTES, "Who sat?", CHOICES, normalise=normalise)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert index == int(np.argmax(expected))


@pytest.mark.parametrize("normalise", ["none", "bytes"])
def test_the_rest_after_a_blank_counts(params, normalise):
    values = [log_likelihood(params, b"\0The", f" {choice} sat.".encode()) for choice in CHOICES]
    if normalise == "bytes":
        values = [value / len(f"{choice} sat.".encode()) for value, choice in zip(values, CHOICES, strict=True)]
    index, scores = rwkv_jax.fill_blank(
        params, MODEL, BYTES, "The _ sat.", CHOICES, normalise=normalise, first_token="zero"
    )
    np.testing.assert_allclose(scores, values, atol=1e-4)
    assert index == int(np.argmax(values))


def test_many_questions_are_answered_as_each_alone(params):
    questions = [
        Question("Who?", CHOICES),
        Question("a ___ b", ["x", "yy"], blank="___"),
        Question("Who?", ["he", "she"]),
    ]
    alone = [answer_all(params, MODEL, BYTES, [question])[0] for question in questions]
    for one, other in zip(answer_all(params, MODEL, BYTES, questions, batch_size=4), alone, strict=True):
        assert one.index == other.index
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choices": []}, r"choices is \[\]; give at least two"),
        ({"choices": ["a"]}, r"choices is \['a'\]; give at least two"),
        ({"choices": ["a", ""]}, "choice 1 is empty"),
        ({"choices": ["a", "b", "a"]}, "choices 0 and 2 are both 'a'"),
        ({"gold": 2}, "gold is 2; with 2 choices it must be 0 to 1"),
        ({"gold": -1}, "gold is -1"),
        ({"blank": "_"}, "the text has no blank '_'; it must have one"),
        ({"blank": "_", "text": "_ and _"}, "the text has 2 blanks '_'"),
        ({"blank": ""}, "blank is empty"),
    ],
)
def test_a_question_that_has_no_answer_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Question(**{"text": "a", "choices": ["a", "b"], **fields})


def test_a_tokenizer_that_is_not_the_models_is_refused(params):
    other = rwkv_jax.RWKV4Config(vocab_size=256, num_layers=1, embed_dim=16, tokenizer="20b")
    with pytest.raises(ValueError, match="the tokenizer is 'bytes', but the model was trained with '20b'"):
        rwkv_jax.answer(params, other, BYTES, "a", ["b", "c"])
    small = rwkv_jax.RWKV4Config(vocab_size=100, num_layers=1, embed_dim=16)
    with pytest.raises(ValueError, match="ids up to 255, but the model's vocab_size is 100"):
        rwkv_jax.answer(params, small, BYTES, "a", ["b", "c"])


def test_an_unknown_way_to_normalise_or_begin_is_refused(params, unchecked):
    with pytest.raises(ValueError, match="normalise is 'words'"):
        rwkv_jax.answer(params, MODEL, BYTES, "a", ["b", "c"], normalise="words")
    with pytest.raises(ValueError, match="first_token is 'bos'; it must be newline, zero or none"):
        rwkv_jax.answer(params, MODEL, BYTES, "a", ["b", "c"], first_token="bos")


PAIRS = [
    ("Answer:", " Paris"),
    ("Answer: ", "Paris"),
    ("Ans", "wer: Paris"),
    ("", "Paris"),
    ("a\n\n", "\nb"),
    ("e", "\u0301t"),
]


@pytest.mark.parametrize("name", ["bytes", "world", "20b"])
def test_context_and_continuation_are_together_the_tokens_of_the_text(shared, name):
    files = {"world": "rwkv_vocab_v20230424.txt", "20b": "20B_tokenizer.json"}
    tokenizer = get_tokenizer(name, shared / "data" / files[name] if name in files else None)
    for convention, before in {"newline": [*tokenizer.encode("\n")], "zero": [0], "none": []}.items():
        for context, continuation in PAIRS:
            head, tail = encode_pair(tokenizer, context, continuation, convention)
            whole = [*before, *tokenizer.encode(context + continuation)]
            assert head.size and tail.size
            assert [*head, *tail] in (whole, [tokenizer.end_of_text, *whole])
            # What ends the context as white space is scored; of the rest, no more than a token joins to the continuation.
            alone = [*before, *tokenizer.encode(context.rstrip())]
            assert head.tolist() in (alone[: len(head)], [tokenizer.end_of_text])
        assert encode_context(tokenizer, "", convention).tolist() == (before or [tokenizer.end_of_text])


@pytest.mark.parametrize(("context", "continuation"), [("Answer:", " Paris"), ("Answer: ", "Paris"), ("a\n\n", " b")])
def test_white_space_at_the_end_of_a_context_is_scored_with_what_follows(context, continuation):
    head, tail = encode_pair(BYTES, context, continuation, "none")
    assert bytes(tail.tolist()).decode() == context[len(context.rstrip()) :] + continuation
    assert bytes(head.tolist()) == context.rstrip().encode()


def test_an_empty_continuation_is_refused():
    with pytest.raises(ValueError, match="the continuation of 'a' is empty"):
        encode_pair(BYTES, "a", "")


@pytest.mark.slow
def test_items_are_right_by_their_choice_or_by_every_token_of_the_answer(params):
    question = Question("Who sat?", CHOICES, gold=0)
    best = answer_all(params, MODEL, BYTES, [question])[0].index
    greedy = list(b"\nThe")
    for _ in range(3):
        logits = forward(params, MODEL, np.array([greedy]))[0][0, -1]
        greedy.append(int(np.argmax(logits[:128])))
    ends = bytes(greedy[4:]).decode()
    likely = [int(np.argmax(forward(params, MODEL, np.array([greedy[:n]]))[0][0, -1])) for n in (4, 5, 6)]
    items = [
        Item("a", Question("Who sat?", CHOICES, gold=best)),
        Item("b", Completion("The", ends)),
        Item("c", Question("Who sat?", CHOICES, gold=(best + 1) % 3)),
        Item("d", Completion("The", "~~~" if ends != "~~~" else "!!!")),
    ]
    assert right(params, MODEL, BYTES, items) == [True, likely == greedy[4:], False, False]
