"""What of the method matters: ResNet-18 of width 16 on CIFAR-10, everything else the original recipe.

Few of these comparisons have been published. At this width only the last stage has more than 64 channels, so
that groupings are compared in blocks of 16. What a step costs is not told here: these runs share their
machine with others, see `docs/performance.md`.
"""

import itertools
import statistics
from collections.abc import Mapping
from typing import Any

from train.experiments import evidence
from train.experiments.ablation_conditions import (
    CLAIMS,
    CONDITIONS,
    LONG,
    LONG_CLAIMS,
    SERIES,
    SHOWN,
    Claim,
)
from train.experiments.cell import Cell, Experiment, Results, Verdict
from train.experiments.columns import accuracies
from train.experiments.tables import mean_range, table

_EXPENSIVE = {
    "batch": 1.3,
    "channel": 1.6,
    "block16": 1.7,
    "fast": 1.6,
    "fast_iterated": 1.7,
    "fast5": 1.7,
    "fast_every4": 1.5,
    "fast_detached": 1.4,
    "fast_every4_last": 1.5,
    "fast_every4_later": 1.5,
    "fast_every4_momentum5": 1.5,
    "fast_every2": 1.5,
    "block32": 2.2,
    "stride1": 4.5,
}
_EXACT = 4.0  # polynomials of 9 and 13 products


def _cell(name: str, epochs: int) -> Cell:
    changes = {f"whitening.{key}": value for key, value in CONDITIONS[name][1].items()}
    norm = name if name in ("batch", "channel") else "deconv"
    minutes = _EXPENSIVE.get(
        name, 1.7 if name.endswith("16") else _EXACT if "exact" in name else 2.8
    )
    return Cell(
        name,
        epochs * minutes,
        f"configs/cifar10.py:resnet18,{norm}",
        {"epochs": epochs, "model.width": 0.25, **changes},
    )


def _means(results: Results) -> dict[str, list[float]]:
    found = {name: accuracies(results.get(name, ())) for name in CONDITIONS}
    return {name: values for name, values in found.items() if values}


def _judge(results: Results, claims: Mapping[str, Claim]) -> list[Verdict]:
    """Say of each claim whether the first condition beats the second one, see `evidence`."""
    found = _means(results)
    noise = evidence.noise(found.values())
    verdicts = []
    for text, claim in claims.items():
        if claim.better not in found or claim.than not in found:
            verdicts.append(Verdict(text, "not run", claim.published, own=claim.own))
            continue
        one, other = found[claim.better], found[claim.than]
        holds = evidence.better(one, other, noise)
        why = [claim.why]
        if holds == "undecided":
            why.insert(0, evidence.unsure(noise, len(one), len(other)))
        verdicts.append(
            Verdict(
                text,
                holds,
                claim.published,
                f"{statistics.fmean(one):.2f}% against {statistics.fmean(other):.2f}%",
                f"{statistics.fmean(one) - statistics.fmean(other):+.2f}",
                f"{len(one)} and {len(other)}",
                " ".join(part for part in why if part),
                own=claim.own,
            )
        )
    return verdicts


def _shown(found: Mapping[str, list[float]]) -> bool:
    """Whether the records say what `SHOWN` says."""
    falling = (
        ("iterations3", "full", "iterations10"),
        ("stride5", "full", "stride1"),
        ("block16", "full"),
    )
    means = {name: statistics.fmean(values) for name, values in found.items()}
    return all(
        name in means and other in means and means[name] > means[other]
        for names in falling
        for name, other in itertools.pairwise(names)
    )


def _series(found: Mapping[str, list[float]]) -> list[str]:
    rows = []
    for setting, cells in SERIES.items():
        told = [
            f"{value}: {statistics.fmean(found[name]):.2f}"
            for value, name in cells.items()
            if name in found
        ]
        if len(told) > 1:
            rows.append([setting, "; ".join(told)])
    return (
        ["", "By one setting at a time, means:", "", *table(["", "test accuracy"], rows)]
        if rows
        else []
    )


def _tell(
    results: Results, draw: Any, *, name: str, title: str, between: tuple[int, ...] = ()
) -> list[str]:
    """Tell the accuracies at the end, and those after the epochs of `between`."""
    found = _means(results)
    if not found:
        return ["Not run."]
    order = sorted(found, key=lambda n: -statistics.fmean(found[n]))
    dots = [
        {
            "label": CONDITIONS[n][0].replace("`", ""),
            (n if n in ("batch", "channel") else "deconv"): {"ours": found[n]},
        }
        for n in order
    ]
    base = statistics.fmean(found["full"]) if "full" in found else None
    rows = [
        [
            f"`{n}`",
            CONDITIONS[n][0],
            *(mean_range(accuracies(results[n], epoch), "{:.2f}") for epoch in between),
            mean_range(found[n], "{:.2f}"),
            "" if base is None else f"{statistics.fmean(found[n]) - base:+.2f}",
            str(len(found[n])),
        ]
        for n in order
    ]
    lost = [n for n in CONDITIONS if n not in found and results.get(n)]
    rows += [
        [f"`{n}`", CONDITIONS[n][0], *("" for _ in between), "diverged", "", str(len(results[n]))]
        for n in lost
    ]
    after = [f"after {epoch}" for epoch in between]
    heads = ["", "", *after, "test accuracy", "against `full`", "n"]
    lines = [draw.dots(name, dots, title=title, what="test accuracy, %"), "", *table(heads, rows)]
    if not between:
        lines += [*_series(found), *(["", SHOWN] if _shown(found) else [])]
    if between:
        lines += [
            "",
            "The rate falls to zero over all epochs, so that what stands after two of them is no run of two.",
        ]
    return lines


ABLATION = Experiment(
    "ablation",
    "what of the method matters: ResNet-18 of width 16, CIFAR-10, 2 epochs",
    tuple(_cell(name, 2) for name in CONDITIONS),
    lambda results: _judge(results, CLAIMS),
    lambda results, draw: _tell(
        results, draw, name="ablation", title="ResNet-18 of width 16, CIFAR-10, 2 epochs"
    ),
    seeds_last=True,
)
ABLATION10 = Experiment(
    "ablation10",
    "the same for 10 epochs, a few conditions",
    tuple(_cell(name, 10) for name in LONG),
    lambda results: _judge(results, LONG_CLAIMS),
    lambda results, draw: _tell(
        results,
        draw,
        name="ablation10",
        title="ResNet-18 of width 16, CIFAR-10, 10 epochs",
        between=(1, 2, 5),
    ),
    seeds_last=True,
)
