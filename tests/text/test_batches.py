"""Batches: every token once, the same for the same seed, and exact resumption."""

import numpy as np
import pytest

from rwkv_jax.text import TokenStream, train_batches, validation_batches


@pytest.fixture
def stream():
    """Tokens that name their own position; documents start at 0, 7, 50 and 51."""
    return TokenStream(np.arange(203, dtype=np.int32), np.array([0, 7, 50, 51]), num_bytes=199)


def draw(stream, **changes):
    return train_batches(stream, **({"context_length": 10, "batch_size": 3, "seed": 0} | changes))


def test_targets_follow_inputs_and_an_epoch_visits_every_window_once(stream):
    batches, starts = draw(stream, batch_size=4), []
    for _ in range(5):
        batch = next(batches)
        assert batch.inputs.shape == (4, 10) and batch.inputs.dtype == np.int32
        np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
        starts += batch.inputs[:, 0].tolist()
    assert sorted(starts) == list(range(0, 200, 10)) != starts


def test_epochs_differ_in_order(stream):
    batches = draw(stream, batch_size=20)
    first, second = next(batches).inputs[:, 0], next(batches).inputs[:, 0]
    assert sorted(first) == sorted(second) and list(first) != list(second)


def test_one_seed_gives_one_order_and_another_seed_another(stream):
    a, b, c = (draw(stream, seed=seed) for seed in (5, 5, 6))
    same = [(next(a), next(b), next(c)) for _ in range(10)]
    assert all(np.array_equal(x.inputs, y.inputs) for x, y, _ in same)
    assert not all(np.array_equal(x.inputs, z.inputs) for x, _, z in same)


@pytest.mark.parametrize("taken", [0, 1, 6, 13])
def test_a_restored_iterator_continues_with_the_very_next_batch(stream, taken):
    batches = draw(stream, documents="packed")
    for _ in range(taken):
        next(batches)
    state, expected = batches.get_state(), [next(batches) for _ in range(9)]
    again = draw(stream, documents="packed")
    again.set_state(state)
    for batch in expected:
        for x, y in zip(batch, next(again), strict=True):
            np.testing.assert_array_equal(x, y)


def test_packed_resets_where_a_document_starts_and_stream_nowhere(stream):
    for documents, expected in [("packed", {0, 7, 50, 51}), ("stream", set())]:
        batch = next(draw(stream, batch_size=20, documents=documents))
        assert set(batch.inputs[batch.reset].tolist()) == expected


def test_a_text_too_short_for_a_batch_is_refused(stream):
    with pytest.raises(ValueError, match=r"203 tokens; data.batch_size=3 windows of data.context_length=100 need 301"):
        draw(stream, context_length=100)


@pytest.mark.parametrize(("rows", "context"), [(1, 7), (3, 10), (4, 64), (203, 5), (500, 1), (8, 500)])
def test_a_walk_predicts_every_token_once_from_the_one_before(stream, rows, context):
    targets = []
    previous = None
    for batch in validation_batches(stream, context_length=context, batch_size=rows):
        assert batch.inputs.shape[1] == context
        if previous is not None:  # rows go on where they stopped
            np.testing.assert_array_equal(batch.inputs[:, 0][batch.valid[:, 0]], previous[batch.valid[:, 0]])
        previous = batch.targets[:, -1]
        assert not (~batch.valid[:, :-1] & batch.valid[:, 1:]).any()  # padding only at the end
        targets += batch.targets[batch.valid].tolist()
        inputs = batch.inputs[batch.valid]
        np.testing.assert_array_equal(
            inputs, np.where(batch.targets[batch.valid] == 0, 202, batch.targets[batch.valid] - 1)
        )
    assert sorted(targets) == list(range(203))


def test_a_limit_uses_the_first_tokens_only(stream):
    batches = list(validation_batches(stream, context_length=10, batch_size=3, limit=50))
    assert sorted(np.concatenate([batch.targets[batch.valid] for batch in batches])) == list(range(50))


def test_validation_marks_the_starts_of_documents_where_they_are_inputs(stream):
    batches = list(validation_batches(stream, context_length=10, batch_size=2))
    for batch in batches:
        starts = np.isin(batch.inputs, stream.document_starts) & batch.valid
        starts[:, 0] &= batch.inputs[:, 0] != stream.tokens[-1]
        np.testing.assert_array_equal(batch.reset & batch.valid, starts)
    assert sum(int(batch.reset.sum()) for batch in batches) == len(stream.document_starts)


def test_rows_have_every_token_but_a_documents_first_as_a_target_once(stream):
    batches = draw(stream, batch_size=1, documents="rows")
    targets, starts = [], []
    for _ in range(22):  # documents of 7, 43, 1 and 152 tokens in rows of at most 10 targets
        batch = next(batches)
        length = batch.length[0]
        np.testing.assert_array_equal(batch.targets[0, :length], batch.inputs[0, :length] + 1)
        assert batch.inputs.shape == (1, 10) and not batch.targets[0, length:].any() and not batch.reset.any()
        targets += batch.targets[0, :length].tolist()
        starts.append(batch.inputs[0, 0])
    assert sorted(targets) == sorted(set(range(203)) - {0, 7, 50, 51})
    assert sorted(starts) == [0, *range(7, 49, 10), *range(51, 202, 10)]


def test_a_text_of_fewer_rows_than_a_batch_is_refused(stream):
    with pytest.raises(ValueError, match=r"makes 22 rows of at most data.context_length=10; data.batch_size=23"):
        draw(stream, batch_size=23, documents="rows")


@pytest.mark.parametrize(("rows", "context"), [(1, 7), (2, 10), (3, 200), (9, 16)])
def test_a_walk_over_rows_goes_through_each_document_from_its_first_token(stream, rows, context):
    targets, last = [], np.full(rows, -1)
    for batch in validation_batches(stream, context_length=context, batch_size=rows, documents="rows"):
        assert batch.inputs.shape == (rows, context)
        for row in np.flatnonzero(batch.valid[:, 0]):
            first = batch.inputs[row, 0]
            assert first in (0, 7, 51) if batch.fresh else first == last[row]
        last = batch.targets[:, -1]
        assert not (~batch.valid[:, :-1] & batch.valid[:, 1:]).any()
        np.testing.assert_array_equal(batch.targets[batch.valid], batch.inputs[batch.valid] + 1)
        targets += batch.targets[batch.valid].tolist()
    assert sorted(targets) == sorted(set(range(203)) - {0, 7, 50, 51})


def test_a_limit_cuts_a_walk_over_rows(stream):
    batches = validation_batches(stream, context_length=10, batch_size=3, limit=20, documents="rows")
    targets = np.concatenate([batch.targets[batch.valid] for batch in batches])
    assert sorted(targets) == [*range(1, 7), *range(8, 22)]
