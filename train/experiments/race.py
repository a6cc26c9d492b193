"""The race: seconds of training until ResNet-18 has 92% on CIFAR-10, and what it has after 20 epochs.

Everything is the original recipe but for bfloat16 in the network, which is how an accelerator is used today.
What is timed are the steps: compilation and evaluations are left out, and cells run one after another.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from train.experiments import evidence
from train.experiments.cell import Cell, Experiment, Result, Results, Verdict
from train.experiments.columns import MINUTES, accuracies
from train.experiments.published import FINAL, REPLICATED, REPLICATION
from train.experiments.tables import mean_range, table

MARK, GOAL = 0.92, 0.7  # of the seconds that batch norm takes
CONDITIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "batch": ("batch norm", "batch", {}),
    "fast": ("`WhiteningSpec.fast()`", "deconv", {"whitening.preset": "fast"}),
    "mixed": ("`WhiteningSpec.mixed()`, the paper's", "deconv", {"whitening.preset": "mixed"}),
}
LONGEST = 20  # epochs, as published
EPOCHS = (LONGEST, 10)
_NEVER = "never published"
_SHOWN = {"batch": "batch", "deconv": "mixed"}

CELLS = tuple(
    Cell(
        f"{name}-epochs{epochs}",
        epochs * MINUTES["resnet18"][norm != "batch"],
        f"configs/cifar10.py:resnet18,{norm}",
        {"epochs": epochs, "dtype": "bfloat16", "model.layout": "original", **changes},
    )
    for epochs in EPOCHS
    for name, (_, norm, changes) in CONDITIONS.items()
)


def seconds_to_mark(run: Result) -> float | None:
    """Return the seconds of steps until the first epoch at whose end `MARK` is reached; None for never."""
    if run["status"] != "done":
        return None
    seconds, before = 0.0, 0
    for row in run["epochs"]:
        seconds, before = seconds + row["step_seconds"] * (row["step"] - before), row["step"]
        if row["test_accuracy"] >= MARK:
            return seconds
    return None


def _done(runs: Sequence[Result]) -> list[Result]:
    return [run for run in runs if run["status"] == "done"]


def _seconds_of_all(runs: Sequence[Result]) -> list[float] | None:
    """The seconds to the mark of every seed; None if there is none, or if one never gets there."""
    seconds = [value for run in runs if (value := seconds_to_mark(run)) is not None]
    return seconds if seconds and len(seconds) == len(runs) else None


def _soonest(results: Results, name: str) -> tuple[float, int, int] | None:
    """Of a condition the least mean seconds to the mark over the lengths of a run, that length, and seeds."""
    found = []
    for epochs in EPOCHS:
        seconds = _seconds_of_all(results.get(f"{name}-epochs{epochs}", ()))
        if seconds is not None:
            found.append((statistics.fmean(seconds), epochs, len(seconds)))
    return min(found, default=None)


def _judge(results: Results) -> list[Verdict]:
    return [_seconds(results), _accuracy(results)]


def _accuracy(results: Results) -> Verdict:
    """Of the paper's whitening, as `mixed()` has it, after 20 epochs: the claim of Table 1."""
    claim = f"Table 1, ResNet-18 in bfloat16, {LONGEST} epochs: deconvolution beats batch norm"
    found = [accuracies(results.get(f"{name}-epochs{LONGEST}", ())) for name in ("mixed", "batch")]
    theirs = FINAL["resnet18"][LONGEST]
    if not all(found):
        return Verdict(claim, "not run", f"{theirs['deconv']:.2f}% against {theirs['batch']:.2f}%")
    ours, batch = map(statistics.fmean, found)
    gain, their = ours - batch, theirs["deconv"] - theirs["batch"]
    noise, borrowed = evidence.noise(found), ""
    if noise is None or noise.freedom < evidence.ENOUGH:
        noise = evidence.of_ranges(REPLICATED["resnet18"].values())
        borrowed = f" How much seeds differ is taken from {REPLICATION}."
    return Verdict(
        claim,
        evidence.better(found[0], found[1], noise),
        f"{theirs['deconv']:.2f}% against {theirs['batch']:.2f}%",
        f"{ours:.2f}% against {batch:.2f}%",
        f"{gain - their:+.2f}",
        f"{len(found[0])} and {len(found[1])}",
        f"Whitening is the paper's, in cheaper products.{borrowed}",
    )


def _seconds(results: Results) -> Verdict:
    claim = f"Ours: {MARK:.0%} on CIFAR-10 in at most {GOAL} of the seconds that batch norm takes"
    longest = {name: results.get(f"{name}-epochs{LONGEST}", ()) for name in CONDITIONS}
    theirs = longest["batch"]
    ours = {name: runs for name, runs in longest.items() if name != "batch" and runs}
    devices = {run["device"] for runs in longest.values() for run in runs}
    if not theirs or not ours or len(devices) > 1:  # seconds of different devices are no race
        return Verdict(claim, "not run", _NEVER, own=True)
    there = sorted((found, name) for name in ours if (found := _soonest(results, name)))
    if not there:
        return Verdict(claim, "no", _NEVER, f"not {MARK:.0%} in all seeds", own=True)
    (best, length, count), name = there[0]
    batch = _soonest(results, "batch")
    if batch is None:
        reached = sum(seconds_to_mark(run) is not None for run in theirs)
        return Verdict(
            claim,
            "in part" if reached else "yes",
            _NEVER,
            f"{best:.0f} s",
            "",
            f"{count} and {len(theirs)}",
            f"With batch norm {reached} of {len(theirs)} seeds get there.",
            own=True,
        )
    ratio = best / batch[0]
    return Verdict(
        claim,
        "yes" if ratio <= GOAL else "in part" if ratio < 1 else "no",
        _NEVER,
        f"{best:.0f} s against {batch[0]:.0f} s",
        f"{ratio:.2f} of batch norm's",
        f"{count} and {batch[2]}",
        f"{CONDITIONS[name][0]} in a run of {length} epochs, batch norm in one of {batch[1]}: of each the "
        "length that is there soonest. Both have the recipe of the original, tuned for neither.",
        own=True,
    )


def _picture(results: Results, draw: Any) -> list[str]:
    """Accuracy by epoch in the longest runs, batch norm and the paper's whitening."""
    done = {
        norm: _done(results.get(f"{name}-epochs{LONGEST}", ())) for norm, name in _SHOWN.items()
    }
    if not all(done.values()):
        return []
    curves = {
        norm: [
            [100 * row["test_accuracy"] for row in rows]
            for rows in zip(*(run["epochs"] for run in found), strict=True)
        ]
        for norm, found in done.items()
    }
    count = min(len(found) for found in done.values())
    devices = sorted({run["device"] for found in done.values() for run in found})
    return [
        draw.accuracies(
            "race",
            curves,
            title="ResNet-18 on CIFAR-10, batch norm against network deconvolution",
            caption=f"ResNet-18 on CIFAR-10, the original recipe in bfloat16; {count} "
            f"{'seed' if count == 1 else 'seeds'}; {', '.join(devices)}",
        ),
        "",
    ]


def _tell(results: Results, draw: Any) -> list[str]:
    rows = []
    for cell in CELLS:
        runs = results.get(cell.name, ())
        done = _done(runs)
        if not runs:
            continue
        name, epochs = cell.name.split("-epochs")
        seconds = _seconds_of_all(done)
        steps = [
            1e3 * row["step_seconds"] for run in done for row in run["epochs"][1:] or run["epochs"]
        ]
        lost = len(runs) - len(done)
        rows.append(
            [
                CONDITIONS[name][0],
                epochs,
                mean_range(accuracies(done), "{:.2f}") if done else "",
                f"{statistics.median(steps):.2f}" if steps else "",
                "" if not done else mean_range(seconds, "{:.0f}") if seconds else "not reached",
                str(len(done)) + (f", {lost} diverged" if lost else ""),
                ", ".join(sorted({run["device"] for run in runs})),
            ]
        )
    heads = ["", "epochs", "test accuracy", "ms a step", f"seconds to {MARK:.0%}", "n", "device"]
    if not rows:
        return ["Not run."]
    told = (
        "A step here has the host's loop in it, which is slower than batch norm's step itself; steps by "
        "themselves are in [performance.md](performance.md)."
    )
    return [*_picture(results, draw), *table(heads, rows), "", told]


RACE = Experiment(
    "race",
    "seconds to 92% on CIFAR-10, ResNet-18 in bfloat16, for one accelerator",
    CELLS,
    _judge,
    _tell,
    seeds_last=True,
)
