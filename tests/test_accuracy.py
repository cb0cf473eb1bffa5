"""Intervals and tests of accuracies, against published figures, scipy's and simulation."""

import numpy as np
import pytest

from rwkv_jax.accuracy import gain, share


def answers(right, count):
    return [i < right for i in range(count)]


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_the_published_one(right, count, low, high):
    found = share(answers(right, count))
    assert found.value == right / count
    np.testing.assert_allclose((found.low, found.high), (low, high), atol=6e-5)


def pairs(both, lost, gained, neither):
    before = [True] * (both + lost) + [False] * (gained + neither)
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return before, after


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 12), (12, 3), (7, 7), (900, 1000)])
def test_the_p_value_of_a_gain_is_the_binomial_tests(lost, gained):
    found = gain(*pairs(40, lost, gained, 30))
    # Of the changed answers half are gains where neither is better.
    log_factorial = np.cumsum(np.log(np.arange(1, lost + gained + 1), dtype=np.float64))
    log_factorial = np.insert(log_factorial, 0, 0.0)
    k = np.arange(lost + gained + 1)
    density = np.exp(log_factorial[-1] - log_factorial[k] - log_factorial[k[::-1]] - k[-1] * np.log(2))
    expected = density[density <= density[gained] * (1 + 1e-9)].sum()
    assert found.p_value == pytest.approx(min(expected, 1.0), rel=1e-9)
    assert (found.gained, found.lost) == (gained, lost)


def test_the_interval_of_a_gain_has_the_true_one_in_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        before = rng.random(100) < 0.5
        after = np.where(before, rng.random(100) < 0.9, rng.random(100) < 0.2)
        found = gain(before.tolist(), after.tolist())
        inside += found.low <= 0.5 * 0.2 - 0.5 * 0.1 <= found.high
    assert abs(inside / 1000 - 0.95) < 4 * (0.95 * 0.05 / 1000) ** 0.5


def test_a_gain_is_resolved_where_its_interval_has_no_zero():
    assert gain(*pairs(40, 3, 20, 37)).resolved
    assert gain(*pairs(40, 20, 3, 37)).resolved
    assert not gain(*pairs(40, 6, 9, 45)).resolved
