"""What a sweep of learning rates tells: cells are `<norm>-lr<rate>`, and keep the loss of every step."""

import math
import statistics
from collections.abc import Sequence

from train.experiments.cell import Result, Results

NORMS = {
    "none": "plain SGD",
    "batch": "batch norm",
    "channel": "channel deconvolution",
    "deconv": "deconvolution",
}


def best(results: Results) -> dict[str, Sequence[Result]]:
    """Return by norm the runs at the rate with the least training loss in the last epoch."""
    chosen: dict[str, tuple[float, Sequence[Result]]] = {}
    for cell, runs in results.items():
        norm, _, rate = cell.partition("-lr")
        if not rate or any(run["status"] != "done" for run in runs):
            continue
        loss = statistics.fmean(run["epochs"][-1]["train_loss"] for run in runs)
        if norm not in chosen or loss < chosen[norm][0]:
            chosen[norm] = (loss, runs)
    return {norm: chosen[norm][1] for norm in NORMS if norm in chosen}


def rate(runs: Sequence[Result]) -> float:
    """Return the learning rate of a cell's runs."""
    return runs[0]["config"]["optimizer.learning_rate"]


def loss_at(runs: Sequence[Result], step: int) -> float:
    """Return the mean over seeds of the training loss that step number `step` saw."""
    return statistics.fmean(run["steps"][step - 1][1] for run in runs)


def first_below(runs: Sequence[Result], loss: float) -> int | None:
    """Return the first step whose loss, averaged over seeds, is at most `loss`."""
    steps = range(1, min(len(run["steps"]) for run in runs) + 1)
    return next((step for step in steps if loss_at(runs, step) <= loss), None)


def largest_tried(results: Results) -> dict[str, float]:
    """Return by norm the largest rate of the sweep that was run."""
    found = dict.fromkeys(NORMS, 0.0)
    for cell in results:
        norm, _, tried = cell.partition("-lr")
        if tried:
            found[norm] = max(found[norm], float(tried))
    return found


def stable(results: Results) -> dict[str, float]:
    """Return by norm the largest rate of the sweep at which no run diverged and the loss fell."""
    largest: dict[str, float] = {}
    for cell, runs in results.items():
        norm, _, tried = cell.partition("-lr")
        if not tried:
            continue
        fell = all(
            r["status"] == "done" and r["epochs"][-1]["train_loss"] < r["steps"][0][1] for r in runs
        )
        if fell:
            largest[norm] = max(largest.get(norm, 0.0), float(tried))
    return {norm: largest.get(norm, math.nan) for norm in NORMS}
