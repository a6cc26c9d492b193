"""`docs/reproduction.md`, from the records alone: verdicts first, those that do not hold on top."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.curves import INK
from train.experiments import sweeps
from train.experiments.cell import Experiment, Results, Verdict
from train.experiments.columns import accuracies
from train.experiments.pictures import Pictures, draw_dots, draw_losses
from train.experiments.published import FINAL, WITHOUT
from train.experiments.tables import counted, device, listed, table

# A claim that does not hold is said first.
ORDER = ("no", "in part", "undecided", "yes", "not run")
MARKS = {
    "no": "**does not hold**",
    "in part": "in part",
    "undecided": "undecided",
    "yes": "holds",
    "not run": "not run",
}
RULE = """A difference between two conditions counts if chance alone would exceed it in one of twenty cases:
Student's t with the variance of seeds, pooled over the conditions of an experiment
(`train/experiments/evidence.py`), or borrowed where it has too few, which is then said; each comparison by
itself, so that of twenty without any difference one may count. *In part*: true of a part of what is claimed,
or in part of the networks. *Undecided*: too few runs, or nothing to compare with. n: seeds.
*Difference*: ours from the published figure, or our gap between two conditions from the published gap; where
nothing is published, the gap itself. Why each verdict is what it is stands in its section below."""

HEAD = """# The paper, reproduced

Figures and tables of [Network Deconvolution](https://openreview.net/forum?id=rkeu30EtvS), computed anew
and put beside what was published. `python -m train.reproduce report` makes this page from the records in
`benchmarks/results/`, each of which holds its command, its figures by epoch, device and versions.
"""
TAIL = """## How to run it

```
python -m train.reproduce list                               # experiments, and what is missing
python -m train.reproduce NAME --data_dir=DIR                # runs what is missing, resumes what was stopped
python -m train.reproduce all --data_dir=DIR --budget=30m    # as much as fits, the rest the next time
python -m train.reproduce NAME/CELL --data_dir=DIR --seed=7  # one cell with another seed
python -m train.reproduce report                             # this page
```

`DIR` holds datasets that `python -m train.prepare` has made, or `<dataset>.npz` files.
"""


def write_page(
    page: Path, experiments: Mapping[str, Experiment], found: Mapping[str, Results]
) -> None:
    """Write the page and its pictures.

    Args:
      page: of the Markdown file.
      experiments: by name.
      found: the records of each, see `train.experiments.results.read`.
    """
    draw = Pictures(page)
    verdicts = {name: one.judge(found[name]) for name, one in experiments.items()}
    lines = [HEAD]
    if summary := _picture(page, found):
        lines += [summary, ""]
    lines += [*_verdicts([v for group in verdicts.values() for v in group]), ""]
    for name, one in experiments.items():
        if not found[name]:
            continue
        lines += [
            f"## {name}",
            "",
            f"{one.shows[0].upper()}{one.shows[1:]}. {_state(one, found[name])}",
            "",
        ]
        lines += [*one.tell(found[name], draw), "", *_notes(found[name])]
        lines += [
            f"- {v.claim}: {_sentences(MARKS[v.holds], v.ours, v.why)}" for v in verdicts[name]
        ]
        lines += [""]
    missing = [
        f"- `{name}`: {one.shows} ({counted(len(verdicts[name]), 'claim')})"
        for name, one in experiments.items()
        if not found[name]
    ]
    if missing:
        lines += ["## Not run yet", "", *missing, ""]
    lines += ["## What of the paper has no experiment here", "", *_without(), ""]
    page.write_text("\n".join([*lines, TAIL]))


def _verdicts(verdicts: list[Verdict]) -> list[str]:
    lines = []
    for title, own in (
        ("What the paper claims", False),
        ("What has never been published: ablations, and goals of ours", True),
    ):
        group = [v for v in verdicts if v.own == own]
        shown = sorted(
            (v for v in group if v.holds != "not run"), key=lambda v: ORDER.index(v.holds)
        )
        counts = [
            f"{MARKS[kind].strip('*')} {number}"
            for kind in ORDER[:-1]
            if (number := sum(v.holds == kind for v in shown))
        ]
        left = len(group) - len(shown)
        tested = f"Of {len(shown)} that were tested: {', '.join(counts)}." if shown else ""
        waiting = f"Not run yet: {left}, see the sections below." if left else ""
        rows = [
            [v.claim, MARKS[v.holds], v.published, v.ours, v.difference, v.seeds] for v in shown
        ]
        heads = ["claim", "verdict", "published", "ours", "difference", "n"]
        lines += [f"**{title}.** {tested} {waiting}".strip(), ""]
        lines += [*table(heads, rows), ""] if rows else []
    return [*lines, RULE]


def _notes(found: Results) -> list[str]:
    """What was written into records afterwards, each note once."""
    notes: dict[str, list[str]] = {}
    for cell, runs in found.items():
        for run in runs:
            if "note" in run and cell not in notes.setdefault(run["note"], []):
                notes[run["note"]].append(cell)
    lines = [
        f"- {', '.join(f'`{cell}`' for cell in cells)}: {note}" for note, cells in notes.items()
    ]
    return ["Notes in the records:", "", *lines, ""] if lines else []


def _without() -> list[str]:
    return table(["", "published", "instead"], WITHOUT)


def _sentences(*parts: str) -> str:
    first, *rest = (part.removesuffix(".") for part in parts if part)
    return " ".join((f"{first}.", *(f"{part[0].upper()}{part[1:]}." for part in rest)))


def _state(experiment: Experiment, found: Results) -> str:
    """Return how much there is and what it was measured on."""
    records = [record for runs in found.values() for record in runs]
    devices, dates = {r["device"] for r in records}, {r["date"] for r in records}
    versions = {r["versions"]["jax"] for r in records}
    hours = sum(r["seconds"] for r in records) / 3600
    cost = f"{hours:.1f} hours" if hours >= 1 else counted(math.ceil(60 * hours), "minute")
    planned = {(run.cell.name, run.seed) for run in experiment.runs()}
    have = {(r["cell"], r["seed"]) for r in records}
    more = len(have - planned)
    others = f" and {more} with other seeds" if more else ""
    where = listed(map(device, devices))
    return (
        f"{len(have & planned)} of {len(planned)} runs{others}, {cost} on {where}, "
        f"jax {', '.join(sorted(versions))}, {max(dates)}."
    )


def _picture(page: Path, found: Mapping[str, Results]) -> str | None:
    """Draw what tells most: the losses of figure 4(a), and ResNets after one epoch once there are any."""
    regression = sweeps.best(found.get("figure4a", {}))
    dots = [dot for network in FINAL if (dot := _dot(found.get("table1_epoch1", {}), network))]
    panels = bool(regression) + bool(dots)
    if not panels:
        return None
    figure = Figure(figsize=(4.9 * panels + 1.5, 3.6), dpi=150, layout="constrained")
    axes = list(np.ravel(figure.subplots(1, panels)))
    if regression:
        runs = found["figure4a"]
        if "deconv-lr1" in runs:  # the published rate, not the best one
            regression = {**regression, "deconv": runs["deconv-lr1"]}
        curves: Any = {
            f"{sweeps.NORMS[n]}, rate {sweeps.rate(r)}": (n, [one["steps"] for one in r])
            for n, r in regression.items()
        }
        line = None
        if "optimum" in runs:
            optimum = runs["optimum"][0]["figures"]["optimum"]
            line = ("closed-form optimum", optimum["train_loss"])
        draw_losses(axes[0], curves, line=line, ceiling=0.8)
        axes[0].set_title(
            "Least squares on Fashion-MNIST, one layer", fontsize=10, color=INK, loc="left"
        )
    if dots:
        draw_dots(axes[-1], dots, "test accuracy, %")
        title = "CIFAR-10 after one epoch"
        axes[-1].set_title(title, fontsize=10, color=INK, loc="left", pad=20)
    path = page.parent / "images" / "reproduction" / "summary.png"
    FigureCanvasAgg(figure).print_png(path)
    what = "What tells most: losses of one layer by iteration, accuracies after an epoch"
    return f"![{what}](images/reproduction/summary.png)"


def _dot(results: Results, network: str) -> dict[str, Any] | None:
    cells = {norm: accuracies(results.get(f"{network}-{norm}", ())) for norm in ("batch", "deconv")}
    dot = {
        norm: {"ours": values, "published": FINAL[network][1][norm]}
        for norm, values in cells.items()
        if values
    }
    return {"label": network, **dot} if dot else None
