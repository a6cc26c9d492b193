"""The same training with several norms and seeds, an epoch of each in turn, and what came of it.

All runs advance together, so that a comparison that is interrupted is a comparison still.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train import loop, metrics
from train.curves import NORMS, draw_curves

EPOCHS_OF_INTEREST = (1, 5)


@dataclasses.dataclass
class Comparison:
    """What was measured so far.

    Attributes:
      trainers: by norm, compiled; they share their data and number of epochs.
      seeds: one run of each norm for each.
      curves: by norm, for each seed the rows of its epochs.
      seconds: since the first step.
    """

    trainers: Mapping[str, loop.Trainer]
    seeds: Sequence[int]
    curves: dict[str, list[list[dict[str, Any]]]] = dataclasses.field(init=False)
    seconds: float = 0.0

    def __post_init__(self):
        self.curves = {norm: [[] for _ in self.seeds] for norm in self.trainers}

    @property
    def epochs(self) -> int:
        """The number of epochs that every run has finished."""
        return min(len(rows) for curves in self.curves.values() for rows in curves)

    def accuracies(self, norm: str, epoch: int) -> list[float]:
        """Return the test accuracy of each seed after `epoch`, in percent."""
        return [100 * rows[epoch - 1]["test_accuracy"] for rows in self.curves[norm]]

    def step_seconds(self, norm: str) -> float:
        """Return the median over epochs and seeds of the mean time of a step."""
        return statistics.median(row["step_seconds"] for rows in self.curves[norm] for row in rows)


def train(comparison: Comparison, workdir: Path) -> Iterator[str]:
    """Train every norm with every seed, an epoch of each in turn; yield a progress line after it.

    Args:
      comparison: filled in.
      workdir: `<norm>/seed<n>/metrics.jsonl` is written below it.
    Raises:
      NonFiniteLossError: naming the run.
    """
    start = time.perf_counter()
    epochs = next(iter(comparison.trainers.values())).config.epochs
    runs, logs = {}, {}
    for norm, trainer in comparison.trainers.items():
        for i, seed in enumerate(comparison.seeds):
            runs[norm, i] = trainer.run(seed)
            logs[norm, i] = metrics.JsonLines(workdir / norm / f"seed{seed}" / "metrics.jsonl")
    for epoch in range(1, epochs + 1):
        for (norm, i), run in runs.items():
            try:
                row = next(run)
            except loop.NonFiniteLossError as error:
                name = f"{NORMS[norm]}, seed {comparison.seeds[i]}"
                raise loop.NonFiniteLossError(error.step, error.loss, error.layers, name) from error
            logs[norm, i].write(row)
            comparison.curves[norm][i].append(row)
            comparison.seconds = time.perf_counter() - start
        yield _progress(comparison, epoch, epochs)


def _progress(comparison, epoch, epochs):
    parts = [f"epoch {epoch:{len(str(epochs))}}/{epochs}"]
    for norm in comparison.trainers:
        mean = statistics.fmean(comparison.accuracies(norm, epoch))
        parts.append(f"{NORMS[norm]} {mean:5.2f}%")
    return "   ".join([*parts, f"{comparison.seconds:4.0f} s"])


def summary(comparison: Comparison) -> dict[str, Any]:
    """Return every figure of a comparison as plain data: environment, table, curves."""
    table = {}
    for norm in comparison.trainers:
        table[norm] = {
            "learning_rate": comparison.trainers[norm].config.optimizer.learning_rate,
            "step_milliseconds": 1e3 * comparison.step_seconds(norm) if comparison.epochs else None,
            "test_accuracy_percent": {
                str(epoch): _mean_and_deviation(comparison.accuracies(norm, epoch))
                for epoch in _columns(comparison.epochs)
            },
        }
    return {
        "command": " ".join(["python -m train.main", *sys.argv[1:]]),
        "environment": metrics.environment(),
        "seeds": list(comparison.seeds),
        "epochs_finished": comparison.epochs,
        "seconds": comparison.seconds,
        "configs": {
            norm: trainer.config.to_dict() for norm, trainer in comparison.trainers.items()
        },
        "table": table,
        "curves": comparison.curves,
    }


def write(comparison: Comparison, workdir: Path) -> str:
    """Write the figures and the picture of the curves; return the table and where the rest is.

    Args:
      comparison: with at least one finished epoch.
      workdir: `comparison.json` and `curves.png` are written there.
    """
    figures = summary(comparison)
    (workdir / "comparison.json").write_text(json.dumps(figures, indent=1) + "\n")
    curves = {
        norm: [comparison.accuracies(norm, epoch) for epoch in range(1, comparison.epochs + 1)]
        for norm in comparison.trainers
    }
    draw_curves(curves, workdir / "curves.png", caption=_caption(comparison))
    return "\n".join(
        [
            "",
            *_table(comparison, figures["table"]),
            "",
            f"Training and evaluation took {comparison.seconds:.0f} s on {metrics.processor()}.",
            f"Curves: {workdir / 'curves.png'}",
            f"All figures: {workdir / 'comparison.json'}",
        ]
    )


def _columns(epochs: int) -> list[int]:
    return sorted({epoch for epoch in (*EPOCHS_OF_INTEREST, epochs) if 1 <= epoch <= epochs})


def _mean_and_deviation(values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation}


def _table(comparison, table):
    columns = _columns(comparison.epochs)
    yield f"Test accuracy in %, mean ± standard deviation over {len(comparison.seeds)} seeds"
    heads = [f"epoch {epoch}" for epoch in columns]
    yield "".join([f"{'':22}", *(f"{head:>15}" for head in heads), f"{'step':>12}"])
    for norm, row in table.items():
        cells = [
            f"{cell['mean']:.2f} ± {cell['deviation']:4.2f}"
            for cell in row["test_accuracy_percent"].values()
        ]
        step = f"{row['step_milliseconds']:.1f} ms"
        yield "".join([f"{NORMS[norm]:22}", *(f"{cell:>15}" for cell in cells), f"{step:>12}"])


def _caption(comparison):
    configs = {norm: trainer.config for norm, trainer in comparison.trainers.items()}
    config = next(iter(configs.values()))
    rates = {norm: f"{c.optimizer.learning_rate:g}" for norm, c in configs.items()}
    if len(set(rates.values())) == 1:
        named = rates.popitem()[1]
    else:
        named = ", ".join(f"{rate} ({NORMS[norm]})" for norm, rate in rates.items())
    return (
        f"{config.dataset}, network {config.network}; mean and range of {len(comparison.seeds)} seeds; "
        f"learning rate {named}; batch size {config.batch_size}"
    )
