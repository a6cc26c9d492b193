"""The race on a CPU: seconds of training until a narrow ResNet-18 has 80% on CIFAR-10.

For those without an accelerator, and a race in which each norm has the learning rate that is best for it:
runs of two epochs look for it, longer ones are run with it. All else is the original recipe. What is timed
are the steps. These runs share their machine with others, so that a step counts as the median over all runs
of its norm.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from train.experiments.cell import Cell, Experiment, Result, Results, Verdict
from train.experiments.cifar import accuracies
from train.experiments.race import GOAL
from train.experiments.tables import device, mean_range, table

MARK = 0.8
CONDITIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "batch": ("batch norm", "batch", {}),
    "fast": ("`WhiteningSpec.fast()`", "deconv", {"whitening.preset": "fast"}),
}
SEARCHED = {"batch": (0.01, 0.03, 0.1), "fast": (0.03, 0.1, 0.3)}  # rates, in runs of two epochs
CHOSEN = {"batch": 0.03, "fast": 0.1}  # the best of these
LENGTHS = {"batch": (4, 6), "fast": (3, 4)}  # epochs of the runs at that rate
MINUTES = {"batch": 1.3, "fast": 1.6}  # of an epoch
_SEARCH = 2  # epochs


def _cell(name: str, epochs: int, rate: float) -> Cell:
    _, norm, changes = CONDITIONS[name]
    return Cell(
        f"{name}-epochs{epochs}-rate{rate:g}",
        epochs * MINUTES[name],
        f"configs/cifar10.py:resnet18,{norm}",
        {"epochs": epochs, "model.width": 0.25, "optimizer.learning_rate": rate, **changes},
    )


CELLS = tuple(
    _cell(name, epochs, rate)
    for name in CONDITIONS
    for epochs, rate in (
        *((_SEARCH, rate) for rate in SEARCHED[name]),
        *((epochs, CHOSEN[name]) for epochs in LENGTHS[name]),
    )
)


def _settings(cell: str) -> tuple[str, int, float]:
    name, epochs, rate = cell.split("-")
    return name, int(epochs.removeprefix("epochs")), float(rate.removeprefix("rate"))


def _of(results: Results, name: str) -> dict[str, Sequence[Result]]:
    """The cells of a norm, those of one rate after another, by length."""
    found = [cell for cell, runs in results.items() if runs and _settings(cell)[0] == name]
    return {cell: results[cell] for cell in sorted(found, key=lambda c: _settings(c)[::-1])}


def _step_seconds(results: Results, name: str) -> float:
    runs = [run for found in _of(results, name).values() for run in found]
    return statistics.median(row["step_seconds"] for run in runs for row in run["epochs"])


def _steps_to_mark(runs: Sequence[Result]) -> list[int] | None:
    """Steps to the end of the first epoch at the mark, of every seed; None if one never gets there."""
    found = []
    for run in runs:
        at = [row["step"] for row in run["epochs"] if row["test_accuracy"] >= MARK]
        if run["status"] != "done" or not at:
            return None
        found.append(at[0])
    return found or None


def _judge(results: Results) -> list[Verdict]:
    claim = (
        f"Ours: {MARK:.0%} on CIFAR-10, ResNet-18 of width 16 on a CPU, in at most {GOAL} of the seconds "
        "that batch norm takes, each at its own rate"
    )
    cells = {name: _of(results, name) for name in CONDITIONS}
    devices = {run["device"] for found in cells.values() for runs in found.values() for run in runs}
    if not all(cells.values()) or len(devices) > 1:  # seconds of different devices are no race
        return [Verdict(claim, "not run", "never published", own=True)]
    best = {}
    for name, found in cells.items():
        there = [
            (statistics.fmean(steps), cell, len(runs))
            for cell, runs in found.items()
            if (steps := _steps_to_mark(runs))
        ]
        if not there:
            text = f"{CONDITIONS[name][0]} has not {MARK:.0%} in any length"
            return [Verdict(claim, "undecided", "never published", text, own=True)]
        best[name] = min(there)
    seconds = {name: steps * _step_seconds(results, name) for name, (steps, _, _) in best.items()}
    ratio = seconds["fast"] / seconds["batch"]
    told = " and ".join(
        f"{CONDITIONS[name][0]} in {steps / 390:.3g} epochs of a run of {_settings(cell)[1]} at rate "
        f"{_settings(cell)[2]:g}"
        for name, (steps, cell, _) in best.items()
    )
    return [
        Verdict(
            claim,
            "yes" if ratio <= GOAL else "in part" if ratio < 1 else "no",
            "never published",
            f"{seconds['fast']:.0f} s against {seconds['batch']:.0f} s",
            f"{ratio:.2f} of batch norm's",
            f"{best['fast'][2]} and {best['batch'][2]}",
            f"{told}: of each the run that is there soonest.",
            own=True,
        )
    ]


def _tell(results: Results, draw: Any) -> list[str]:
    rows, ends = [], {}
    for name, (label, _, _) in CONDITIONS.items():
        for cell, runs in _of(results, name).items():
            _, epochs, rate = _settings(cell)
            done = [run for run in runs if run["status"] == "done"]
            steps, each = _steps_to_mark(runs), _step_seconds(results, name)
            lost = len(runs) - len(done)
            if done and rate == CHOSEN[name]:
                minutes = done[0]["epochs"][-1]["step"] * each / 60
                ends.setdefault(CONDITIONS[name][1], []).append((minutes, accuracies(done)))
            rows.append(
                [
                    label,
                    f"{rate:g}",
                    str(epochs),
                    mean_range(accuracies(done), "{:.2f}") if done else "",
                    f"{1e3 * each:.0f}" if done else "",
                    mean_range([each * s for s in steps], "{:.0f}") if steps else "not reached",
                    str(len(done)) + (f", {lost} diverged" if lost else ""),
                    ", ".join(sorted({device(run["device"]) for run in runs})),
                ]
            )
    heads = [
        "",
        "rate",
        "epochs",
        "test accuracy",
        "ms a step",
        f"seconds to {MARK:.0%}",
        "n",
        "device",
    ]
    if not rows:
        return ["Not run."]
    picture = []
    if len(ends) == len(CONDITIONS):
        title = "A narrow ResNet-18 on CIFAR-10 on a CPU: what runs of different lengths end with"
        picture = [draw.ends("race_cpu", ends, title=title, mark=100 * MARK), ""]
    return [*picture, *table(heads, rows)]


RACE_CPU = Experiment(
    "race_cpu",
    "seconds to 80% on CIFAR-10, ResNet-18 of width 16, for one core of a CPU",
    CELLS,
    _judge,
    _tell,
    seeds_last=True,
)
