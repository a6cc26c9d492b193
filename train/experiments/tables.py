"""Figures as Markdown."""

import re
import statistics
from collections.abc import Iterable, Sequence


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


def counted(number: int, what: str) -> str:
    """Return `1 set`, `2 sets`."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def listed(names: Iterable[str]) -> str:
    """Return `one, two and three`, sorted."""
    *head, last = sorted(names)
    return f"{', '.join(head)} and {last}" if head else last


def device(name: str) -> str:
    """Return a record's device as a reader would write it.

    Example:
      >>> device("Intel(R) Xeon(R) Processor, 1 cores")
      'Intel Xeon Processor (1 core)'
    """
    found = re.fullmatch(r"(.*), (\d+) cores", name.replace("(R)", ""))
    return f"{found[1]} ({counted(int(found[2]), 'core')})" if found else name
