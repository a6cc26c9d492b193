"""The race: seconds of training until ResNet-18 has 92% on CIFAR-10, and what it has after 20 epochs.

Everything is the original recipe but for the length of a run, the learning rate, of which each norm has one
of its own besides, and bfloat16 in the network, which is how an accelerator is used today. What is timed are
the steps: compilation and evaluations are left out, and cells run one after another.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from train.experiments import evidence
from train.experiments.cell import Cell, Experiment, Result, Results, Verdict
from train.experiments.columns import MINUTES, accuracies
from train.experiments.published import FINAL, REPLICATED, REPLICATION
from train.experiments.tables import counted, device, listed, mean_range, table

MARK, GOAL = 0.92, 0.7  # of the seconds that batch norm takes
RATE = 0.1  # the original recipe's
LONGEST = 20  # epochs, as published
NEVER = "never published"
Conditions = Mapping[str, tuple[str, str, dict[str, Any]]]  # what it is, norm, changes
CONDITIONS: Conditions = {
    "batch": ("batch norm", "batch", {}),
    "fast": ("`WhiteningSpec.fast()`", "deconv", {"whitening.preset": "fast"}),
    "fast_mixed": (
        "`WhiteningSpec.fast()` in the products of `mixed()`",
        "deconv",
        {
            "whitening.preset": "fast",
            "whitening.precision": "high",
            "whitening.sample_dtype": "bfloat16",
        },
    ),
    "mixed": ("`WhiteningSpec.mixed()`, the paper's", "deconv", {"whitening.preset": "mixed"}),
}
EPOCHS = (LONGEST, 15, 12, 10)
RATES = {"batch": (RATE, 0.03), "deconv": (RATE, 0.3)}
_SHOWN = {"batch": "batch", "deconv": "mixed"}


def cell_name(name: str, epochs: int, rate: float) -> str:
    """Return the name of a cell, which `settings` takes apart; the recipe's own rate is not said."""
    return f"{name}-epochs{epochs}" + ("" if rate == RATE else f"-rate{rate:g}")


def settings(cell: str) -> tuple[str, int, float]:
    """Return condition, epochs and learning rate of a cell."""
    name, epochs, *rate = cell.split("-")
    return (
        name,
        int(epochs.removeprefix("epochs")),
        float(rate[0].removeprefix("rate")) if rate else RATE,
    )


CELLS = tuple(
    Cell(
        cell_name(name, epochs, rate),
        epochs * MINUTES["resnet18"][norm != "batch"],
        f"configs/cifar10.py:resnet18,{norm}",
        {
            "epochs": epochs,
            "dtype": "bfloat16",
            "model.layout": "original",
            **changes,
            **({} if rate == RATE else {"optimizer.learning_rate": rate}),
        },
    )
    for epochs in EPOCHS
    for name, (_, norm, changes) in CONDITIONS.items()
    for rate in RATES[norm]
)


def of(results: Results, name: str) -> dict[str, Sequence[Result]]:
    """Return the runs of a condition by cell, the longest first, and among these by rate."""
    found = [cell for cell, runs in results.items() if runs and settings(cell)[0] == name]
    found.sort(key=lambda cell: (-settings(cell)[1], settings(cell)[2]))
    return {cell: results[cell] for cell in found}


def _seconds(run: Result) -> list[float]:
    """Of the steps until the end of each epoch."""
    seconds, before, found = 0.0, 0, []
    for row in run["epochs"]:
        seconds, before = seconds + row["step_seconds"] * (row["step"] - before), row["step"]
        found.append(seconds)
    return found


def seconds_to_mark(run: Result, mark: float = MARK) -> float | None:
    """Return the seconds of steps until the first epoch at whose end `mark` is reached; None for never."""
    if run["status"] != "done":
        return None
    rows = zip(_seconds(run), run["epochs"], strict=True)
    return next((seconds for seconds, row in rows if row["test_accuracy"] >= mark), None)


def _to_mark(runs: Sequence[Result], mark: float) -> float | None:
    """The seconds to the first epoch at whose end the seeds have the mark on average; None for never."""
    if not runs or any(run["status"] != "done" for run in runs):
        return None
    epochs = zip(*(zip(_seconds(run), run["epochs"], strict=True) for run in runs), strict=True)
    for seeds in epochs:
        if statistics.fmean(row["test_accuracy"] for _, row in seeds) >= mark:
            return statistics.fmean(seconds for seconds, _ in seeds)
    return None


def _soonest(results: Results, names: Sequence[str], mark: float) -> tuple[float, str] | None:
    """Of some conditions the least seconds to the mark, and the cell that has them."""
    found = [
        (seconds, cell)
        for name in names
        for cell, runs in of(results, name).items()
        if (seconds := _to_mark(runs, mark)) is not None
    ]
    return min(found, default=None)


def _longest(results: Results, names: Sequence[str]) -> float:
    """The seconds of the longest run that came to its end."""
    runs = [run for name in names for found in of(results, name).values() for run in found]
    return max((s for run in runs if run["status"] == "done" for s in _seconds(run)), default=0.0)


def judge_seconds(results: Results, conditions: Conditions, claim: str, mark: float) -> Verdict:
    """Return who is at the mark sooner, of batch norm and deconvolution the soonest cell each.

    Seeds count by their mean, and one seed of either proves nothing. Who is there in no cell needs more than
    its longest run.

    Args:
      results: of the race.
      conditions: who runs in it.
      claim: in words.
      mark: accuracy.
    """
    names = [name for name in conditions if name != "batch"]
    # Seconds of different devices are no race.
    devices = {(run["device"], run["device_count"]) for runs in results.values() for run in runs}
    if not _longest(results, names) or not _longest(results, ["batch"]) or len(devices) > 1:
        return Verdict(claim, "not run", NEVER, own=True)
    ours, batch = _soonest(results, names, mark), _soonest(results, ["batch"], mark)
    why = " ".join((_chosen(conditions, ours, batch), _tried(results, conditions))).strip()
    told, ratio, count = f"not {mark:.0%} on average in any run", "", ""
    if ours and batch:
        counts = [len(results[cell]) for _, cell in (ours, batch)]
        told = f"{ours[0]:.0f} s against {batch[0]:.0f} s"
        ratio, count = f"{ours[0] / batch[0]:.2f} of batch norm's", "{} and {}".format(*counts)
        soon = "yes" if min(counts) > 1 else "undecided"
        holds = soon if ours[0] <= GOAL * batch[0] else "in part" if ours[0] < batch[0] else "no"
    elif ours:
        runs = [run for found in of(results, "batch").values() for run in found]
        some = [seconds for run in runs if (seconds := seconds_to_mark(run, mark)) is not None]
        bound = min([_longest(results, ["batch"]), *some])
        told = f"{ours[0]:.0f} s, batch norm more than {bound:.0f} s"
        soon = "yes" if len(results[ours[1]]) > 1 else "undecided"
        holds = soon if ours[0] <= GOAL * bound else "undecided"
    elif batch:
        longest = _longest(results, names)
        told = f"deconvolution more than {longest:.0f} s, batch norm {batch[0]:.0f} s"
        holds = "no" if longest >= batch[0] else "undecided"
    else:
        holds = "undecided"
    return Verdict(claim, holds, NEVER, told, ratio, count, why, own=True)


def _chosen(conditions: Conditions, *best: tuple[float, str] | None) -> str:
    runs = []
    for found in best:
        if found is not None:
            name, epochs, rate = settings(found[1])
            runs.append(f"{conditions[name][0]} in a run of {epochs} epochs at rate {rate:g}")
    return f"{', '.join(runs)}: of each the soonest in the test set." if runs else ""


def _tried(results: Results, conditions: Conditions) -> str:
    """Among how many it was the soonest, and at which rates."""
    told = []
    for what, names in (
        ("batch norm", ["batch"]),
        ("deconvolution", [name for name in conditions if name != "batch"]),
    ):
        cells = [cell for name in names for cell in of(results, name)]
        rates = sorted({settings(cell)[2] for cell in cells})
        told.append(f"{what} {counted(len(cells), 'cell')} at {listed(f'{r:g}' for r in rates)}")
    return f"Run were of {' and of '.join(told)}. Seconds count at the ends of epochs."


def tell_rows(results: Results, conditions: Conditions, mark: float) -> list[str]:
    """Return the table of a race."""
    rows = []
    for name, (label, _, _) in conditions.items():
        for cell, runs in of(results, name).items():
            _, epochs, rate = settings(cell)
            done = [run for run in runs if run["status"] == "done"]
            to_mark, lost = _to_mark(runs, mark), len(runs) - len(done)
            each = _step_seconds(done)
            rows.append(
                [
                    label,
                    str(epochs),
                    f"{rate:g}",
                    mean_range(accuracies(done), "{:.2f}") if done else "",
                    f"{1e3 * each:.3g}" if each else "",
                    f"{to_mark:.0f}" if to_mark else "not reached" if done else "",
                    str(len(done)) + (f", {lost} diverged" if lost else ""),
                    listed({device(run["device"]) for run in runs}),
                ]
            )
    heads = ["", "epochs", "rate", "test accuracy", "ms a step", f"seconds to {mark:.0%}", "n"]
    return table([*heads, "device"], rows) if rows else ["Not run."]


def _judge(results: Results) -> list[Verdict]:
    claim = f"Ours: {MARK:.0%} on CIFAR-10 in at most {GOAL} of the seconds that batch norm takes"
    return [judge_seconds(results, CONDITIONS, claim, MARK), _accuracy(results)]


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


def _picture(results: Results, draw: Any) -> list[str]:
    """Accuracy by epoch in the longest runs, batch norm and the paper's whitening."""
    done = {
        norm: [r for r in results.get(f"{name}-epochs{LONGEST}", ()) if r["status"] == "done"]
        for norm, name in _SHOWN.items()
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


def _step_seconds(done: Sequence[Result]) -> float:
    rows = [row["step_seconds"] for run in done for row in run["epochs"][1:] or run["epochs"]]
    return statistics.median(rows or [0.0])


def _tell(results: Results, draw: Any) -> list[str]:
    told = (
        "A step here has the host's loop in it, which is slower than batch norm's step itself; steps by "
        "themselves are in [performance.md](performance.md)."
    )
    return [*_picture(results, draw), *tell_rows(results, CONDITIONS, MARK), "", told]


RACE = Experiment(
    "race",
    "seconds to 92% on CIFAR-10, ResNet-18 in bfloat16, for one accelerator",
    CELLS,
    _judge,
    _tell,
    seeds_last=True,
)
