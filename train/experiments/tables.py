"""Figures as Markdown."""

import statistics
from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def mean_range(values: Sequence[float], form: str) -> str:
    """Return the mean, and the least and the largest value where there are several."""
    mean = form.format(statistics.fmean(values))
    if len(values) < 2:
        return mean
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def bars(values: Sequence[float], form: str) -> str:
    """Return several figures beside each other."""
    return ", ".join(form.format(value) for value in values)


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return statistics.fmean(values)
