"""When a difference between runs counts: one rule for all claims that compare two conditions.

Seeds of all conditions of an experiment tell how much runs differ by chance: their variance is pooled. A
difference of two means counts if Student's t is above what chance alone exceeds in one of twenty cases, so
that a large gap may be decided by one seed where other conditions have several, and a small one needs them.
Without any condition of two seeds nothing is decided.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

CHANCE = 0.05  # of a difference that counts where there is none, both directions together
UNDECIDED = "Not more than chance makes of so few runs"


class Noise(NamedTuple):
    """How much runs of one condition differ.

    Attributes:
      deviation: standard deviation of one run.
      freedom: degrees of freedom behind it.
    """

    deviation: float
    freedom: int


def noise(conditions: Iterable[Sequence[float]]) -> Noise | None:
    """Return the pooled deviation of the runs of several conditions, or None where none has two.

    Example:
      >>> noise([[1.0, 3.0], [7.0, 9.0], [5.0]])
      Noise(deviation=1.4142135623730951, freedom=2)
    """
    several = [values for values in conditions if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    if not freedom:
        return None
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in several)
    return Noise(math.sqrt(squares / freedom), freedom)


def least(found: Noise | None, one: int, other: int) -> float:
    """Return the least difference of means of `one` and `other` runs that counts; infinity without noise.

    Example:
      >>> round(least(Noise(1.0, 4), 3, 3), 2)
      2.27
    """
    from scipy import special  # here: `list` does without

    if found is None:
        return math.inf
    quantile = float(special.stdtrit(found.freedom, 1 - CHANCE / 2))
    return quantile * found.deviation * math.sqrt(1 / one + 1 / other)


def better(one: Sequence[float], other: Sequence[float], found: Noise | None) -> str:
    """Return whether `one` is larger than `other` on average: "yes", "no" or "undecided"."""
    gap = statistics.fmean(one) - statistics.fmean(other)
    if abs(gap) <= least(found, len(one), len(other)):
        return "undecided"
    return "yes" if gap > 0 else "no"
