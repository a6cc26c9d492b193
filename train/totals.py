"""Means over the steps of an epoch, or since the last row of the log."""

import time
from collections.abc import Mapping
from typing import Any

MEANS = ("train_loss", "train_accuracy")


class Totals:
    """Sums of what the steps of a span measured; times are of this process only.

    Args:
      batch_size: images a step, over all devices.

    Attributes:
      steps: how many there were.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self.steps = 0
        self._sums = dict.fromkeys(MEANS, 0.0)
        self._learning_rate = 0.0
        self._seconds, self._waited = 0.0, 0.0
        self._clock = time.perf_counter()

    def add(self, row: Mapping[str, float], waited: float) -> None:
        """Count a step, from its figures and the seconds that it waited for data."""
        now = time.perf_counter()
        self._seconds += now - self._clock
        self._clock = now
        self.steps += 1
        self._waited += waited
        self._learning_rate = row["learning_rate"]
        for name in MEANS:
            self._sums[name] += row[name]

    def restart_clock(self) -> None:
        """Leave out the time since the last step: it went into something else."""
        self._clock = time.perf_counter()

    def row(self) -> dict[str, Any]:
        """Return the means and the rates."""
        seconds = max(self._seconds, 1e-9)
        steps = max(self.steps, 1)
        return {name: value / self.steps for name, value in self._sums.items()} | {
            "learning_rate": self._learning_rate,
            "step_seconds": seconds / steps,
            "images_per_second": self.steps * self._batch_size / seconds,
            "input_wait_share": min(1.0, self._waited / seconds),
        }

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, so that a resumed epoch has the means of the whole of it."""
        return {
            "steps": self.steps,
            "sums": dict(self._sums),  # which is written while we go on
            "learning_rate": self._learning_rate,
            "seconds": self._seconds,
            "waited": self._waited,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `saved` returned."""
        self.steps, self._sums = saved["steps"], dict(saved["sums"])
        self._learning_rate = saved["learning_rate"]
        self._seconds, self._waited = saved["seconds"], saved["waited"]
