"""The race on a CPU: seconds of training until a narrow ResNet-18 has 80% on CIFAR-10.

For those without an accelerator, and a race in which each norm has a learning rate of its own: runs of two
epochs look for it, longer ones are run with it. All else is the original recipe, and the network is the
ablation's. What is timed are the steps.
These runs share their machine with others, so that a step counts as what it takes in turns with the other's.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from train.experiments import race
from train.experiments.cell import Cell, Experiment, Result, Results, Verdict
from train.experiments.columns import accuracies
from train.experiments.tables import device, listed

MARK = 0.8
STEPS = (
    Path(__file__).parents[2]
    / "benchmarks"
    / "results"
    / "step_time_resnet18_width0.25_cpu_batch128_32px_float32.json"
)
CONDITIONS: race.Conditions = {
    "batch": race.CONDITIONS["batch"],
    "fast": race.CONDITIONS["fast"],
    "every4": (
        "`WhiteningSpec.fast()`, every fourth step computes",
        "deconv",
        {"whitening.preset": "fast", "whitening.update_every": 4},
    ),
}
RUNS: dict[str, dict[int, tuple[float, ...]]] = {  # by epochs, the learning rates
    "batch": {2: (0.01, 0.03, 0.1), 4: (0.03,), 5: (0.03,), 6: (0.03, 0.1)},
    "fast": {2: (0.03, 0.1, 0.3, 1.0), 3: (0.3,), 4: (0.3,)},
    "every4": {2: (0.03,)},  # at 0.1 it diverges too, see the ablation
}
MINUTES = {"batch": 1.3, "fast": 1.6, "every4": 1.5}  # of an epoch
_SHOWN = ("batch", "fast")  # in the picture


def _cell(name: str, epochs: int, rate: float) -> Cell:
    _, norm, changes = CONDITIONS[name]
    return Cell(
        race.cell_name(name, epochs, rate),
        epochs * MINUTES[name],
        f"configs/cifar10.py:resnet18,{norm}",
        {"epochs": epochs, "model.width": 0.25, "optimizer.learning_rate": rate, **changes},
    )


CELLS = tuple(
    _cell(name, epochs, rate)
    for name, lengths in RUNS.items()
    for epochs, rates in lengths.items()
    for rate in rates
)


def _in_turns(device: str) -> dict[str, float]:
    """Seconds of a step by condition, timed in turns on `device` (`STEPS`); nothing if on another one."""
    found = json.loads(STEPS.read_text()) if STEPS.exists() else None
    if found is None or found["environment"]["processor"] != device:
        return {}
    return {
        name: statistics.median(found["contenders"][contender]["step_seconds"])
        for name, contender in (("batch", "batch"), ("fast", "deconv:fast"))
    }


def _epochs(results: Results) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step in every epoch, by device and condition."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for cell, runs in results.items():
        for run in runs:
            found = seconds.setdefault(run["device"], {}).setdefault(race.settings(cell)[0], [])
            found += [row["step_seconds"] for row in run["epochs"]]
    return seconds


def _timed(results: Results) -> Results:
    """The same records, but every step of a norm on a device takes what it takes there in turns.

    Unless all that ran there have been timed in turns, it is the median of all its epochs.
    """
    each: dict[str, dict[str, float]] = {}
    for where, names in _epochs(results).items():
        medians = {name: statistics.median(found or [0.0]) for name, found in names.items()}
        turns = _in_turns(where)
        whole = all(name in turns for name, found in names.items() if found)
        each[where] = medians | turns if whole else medians

    def timed(cell: str, run: Result) -> Result:
        seconds = each[run["device"]][race.settings(cell)[0]]
        return run | {"epochs": [row | {"step_seconds": seconds} for row in run["epochs"]]}

    return {cell: [timed(cell, run) for run in runs] for cell, runs in results.items()}


def _judge(results: Results) -> list[Verdict]:
    claim = (
        f"Ours: {MARK:.0%} on CIFAR-10, ResNet-18 of width 16 on a CPU, in at most {race.GOAL} of the "
        "seconds that batch norm takes, each at its own rate"
    )
    return [race.judge_seconds(_timed(results), CONDITIONS, claim, MARK)]


def _tell(results: Results, draw: Any) -> list[str]:
    timed = _timed(results)
    spread = [
        f"{CONDITIONS[name][0]} {1e3 * min(found):.0f} to {1e3 * max(found):.0f}"
        for names in _epochs(results).values()
        for name, found in names.items()
        if found
    ]
    told = (
        "Milliseconds of a step are those of `python -m benchmarks.step_time --network=resnet18 --width=0.25 "
        "--batch=128`, in turns, on one core of the same processor, where there are such. The runs "
        f"themselves shared their machine with others: least to most {', '.join(spread)}."
    )
    return [*_picture(timed, draw), *race.tell_rows(timed, CONDITIONS, MARK), "", told]


def _picture(results: Results, draw: Any) -> list[str]:
    """Of each length of a run its best rate."""
    ends: dict[str, dict[int, tuple[float, list[float]]]] = {}
    for name in _SHOWN:
        lengths = ends.setdefault(CONDITIONS[name][1], {})
        for cell, runs in race.of(results, name).items():
            epochs, done = race.settings(cell)[1], [r for r in runs if r["status"] == "done"]
            if not done:
                continue
            last, found = done[0]["epochs"][-1], accuracies(done)
            best = lengths.get(epochs)
            if best is None or statistics.fmean(found) > statistics.fmean(best[1]):
                lengths[epochs] = last["step"] * last["step_seconds"] / 60, found
    if not all(ends.values()):
        return []
    lines = {norm: [of[epochs] for epochs in sorted(of)] for norm, of in ends.items()}
    where = listed({device(run["device"]) for runs in results.values() for run in runs})
    title = f"ResNet-18 of width 16 on CIFAR-10, {where}"
    return [draw.ends("race_cpu", lines, title=title, mark=100 * MARK), ""]


RACE_CPU = Experiment(
    "race_cpu",
    "seconds to 80% on CIFAR-10, ResNet-18 of width 16, for one core of a CPU",
    CELLS,
    _judge,
    _tell,
    seeds_last=True,
)
