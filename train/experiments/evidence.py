"""When a difference between runs counts: one rule for all claims that compare two conditions.

Seeds of all conditions of an experiment tell how much runs differ by chance: their variance is pooled. A
difference of two means counts if Student's t is above what chance alone exceeds in one of twenty cases, so
that a large gap may be decided by one seed where other conditions have several, and a small one needs them.
Without any condition of two seeds nothing is decided, unless the deviation is borrowed, which is then said.
Each comparison stands for itself: of twenty where there is no difference one may count.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

CHANCE = 0.05  # of a difference that counts where there is none, both directions together
ENOUGH = 4  # degrees of freedom: with fewer the deviation is borrowed where it can be
RANGE = 1.693  # expected range of three normal deviates, in standard deviations


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
    # Of equal accuracies alone nothing can be told.
    return Noise(math.sqrt(squares / freedom), freedom) if squares else None


def of_ranges(ranges: Iterable[tuple[float, float]]) -> Noise | None:
    """Return the deviation that stands behind (least, most) of three seeds each.

    Example:
      >>> of_ranges([(1.0, 2.693)])
      Noise(deviation=1.0, freedom=2)
    """
    squares = [((most - least) / RANGE) ** 2 for least, most in ranges]
    if not any(squares):
        return None
    return Noise(round(math.sqrt(statistics.fmean(squares)), 6), 2 * len(squares))


def unsure(found: Noise | None, one: int, other: int) -> str:
    """Say why a comparison of `one` and `other` runs is undecided."""
    if found is None:
        return "No condition has two seeds, so that nothing tells how much they differ."
    return f"Chance may make as much of so few runs: {least(found, one, other):.1f} points would count."


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
