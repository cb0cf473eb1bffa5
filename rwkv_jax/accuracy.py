"""How well accuracies are known: intervals of a share, and of the change of one on the same questions."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95


class Share(NamedTuple):
    """A share of right answers."""

    value: float
    low: float
    """Of the confidence interval."""
    high: float


class Gain(NamedTuple):
    """A change of the share of right answers on the same questions."""

    value: float
    low: float
    """Of the confidence interval."""
    high: float
    p_value: float
    """Of a difference at least so large where neither is better."""
    gained: int
    """Questions that were wrong and are right."""
    lost: int
    """Questions that were right and are wrong."""

    @property
    def resolved(self) -> bool:
        """Whether the interval has zero on one side."""
        return self.low > 0 or self.high < 0


def share(right: Sequence[bool]) -> Share:
    """Returns the share of right answers with Wilson's interval.

    Source: Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    count, z = len(right), _z()
    value = sum(right) / count
    centre = (value + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(value * (1 - value) / count + z**2 / (4 * count**2))
    return Share(value, min(value, max(0.0, centre - half)), max(value, min(1.0, centre + half)))


def gain(before: Sequence[bool], after: Sequence[bool]) -> Gain:
    """Returns the change of the share of right answers, with Bonett and Price's interval and McNemar's exact test.

    Source: Bonett and Price, Journal of Educational and Behavioral Statistics 37 (2012), 479-488: Wald's interval after a question
    more of either kind of change.
    """
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    up, down = (gained + 1) / (len(before) + 2), (lost + 1) / (len(before) + 2)
    half = _z() * math.sqrt((up + down - (up - down) ** 2) / (len(before) + 2))
    changed = gained + lost
    tail = sum(math.comb(changed, i) for i in range(min(gained, lost) + 1))
    # A quotient of whole numbers: neither overflows as a float would.
    p_value = min(1.0, 2 * tail / 2**changed)
    return Gain((gained - lost) / len(before), up - down - half, up - down + half, p_value, gained, lost)


def _z() -> float:
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
