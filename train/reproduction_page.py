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
from train.experiments.cifar import accuracies
from train.experiments.pictures import Pictures, draw_dots, draw_losses
from train.experiments.published import FINAL
from train.experiments.tables import table

# A claim that does not hold is said first.
ORDER = ("no", "in part", "yes", "not run")
MARKS = {"no": "**does not hold**", "in part": "in part", "yes": "holds", "not run": "not run"}

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
        lines += [*one.tell(found[name], draw), ""]
        lines += [
            f"- {v.claim}: {_sentences(MARKS[v.holds], v.ours, v.why)}" for v in verdicts[name]
        ]
        lines += [""]
    missing = [f"- `{name}`: {one.shows}" for name, one in experiments.items() if not found[name]]
    if missing:
        lines += ["## Not run yet", "", *missing, ""]
    page.write_text("\n".join([*lines, TAIL]))


def _verdicts(verdicts: list[Verdict]) -> list[str]:
    shown = sorted(
        (v for v in verdicts if v.holds != "not run"), key=lambda v: ORDER.index(v.holds)
    )
    counts = [
        f"{MARKS[kind].strip('*')} {sum(v.holds == kind for v in shown)}" for kind in ORDER[:-1]
    ]
    heads = ["claim", "", "published", "ours", "difference", "seeds"]
    rows = [[v.claim, MARKS[v.holds], v.published, v.ours, v.difference, v.seeds] for v in shown]
    left = len(verdicts) - len(shown)
    return [
        f"Of {len(shown)} claims that were tested: {', '.join(counts)}."
        + (f" Not tested yet: {left}." if left else ""),
        "",
        *table(heads, rows),
    ]


def _sentences(*parts: str) -> str:
    return " ".join(f"{part.removesuffix('.')}." for part in parts if part)


def _state(experiment: Experiment, found: Results) -> str:
    """Return how much there is and what it was measured on."""
    records = [record for runs in found.values() for record in runs]
    devices, dates = {r["device"] for r in records}, {r["date"] for r in records}
    versions = {r["versions"]["jax"] for r in records}
    hours = sum(r["seconds"] for r in records) / 3600
    cost = f"{hours:.1f} hours" if hours >= 1 else f"{math.ceil(60 * hours)} minutes"
    return (
        f"{len(records)} of {len(experiment.runs())} runs, {cost} on {' and '.join(sorted(devices))}, "
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
        axes[-1].set_title("CIFAR-10 after one epoch", fontsize=10, color=INK, loc="left")
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
