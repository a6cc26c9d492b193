"""Watches one run of a cell: keeps its rows, and its state where losing it would cost minutes."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train import checkpoints
from train.output import Output
from train.stopping import Stop

SAVE_EVERY = 120.0  # seconds


class Watch(Output):
    """Rows and checkpoints of one run, and when to stop it.

    Args:
      folder: of the checkpoints; None keeps none, and a run that is stopped begins anew.
      stop: signals that this process has got.
      deadline: by `time.monotonic`, when the run has to make room; infinite for never.
      keep_steps: keep the loss of every step.
      say: called with one line for the user.

    Attributes:
      rows: of the epochs.
      steps: `[step, loss]` of every step, if wanted.
      seconds: before this session.
    """

    def __init__(
        self,
        folder: Path | None,
        stop: Stop,
        deadline: float,
        keep_steps: bool,
        say: Callable[[str], None],
    ):
        self._folder, self._stop, self._deadline, self._say = folder, stop, deadline, say
        self._keep_steps = keep_steps
        self.saves = folder is not None
        self.rows: list[dict[str, Any]] = []
        self.steps: list[list[float]] = []
        self.seconds = 0.0
        self._start = self._saved = time.monotonic()
        self._checkpoints: checkpoints.Checkpoints | None = None

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """See `Output`."""
        if self._folder is None:
            return None
        self._checkpoints = checkpoints.Checkpoints(self._folder / "checkpoints", 2, self._say)
        restored = self._checkpoints.restore(like)
        if restored is not None:
            meta = restored[1]
            self.rows, self.steps, self.seconds = meta["rows"], meta["steps"], meta["seconds"]
            self._say(f"resumes at step {int(restored[0].step)}")
        return restored

    def stop_requested(self, step: int) -> int | None:
        """See `Output`."""
        late = time.monotonic() > self._deadline
        return self._stop.requested(step) or (signal.SIGTERM if late else None)

    def interrupted(self) -> int | None:
        """See `Output`: an evaluation is short, so that only a signal breaks it off."""
        return self._stop.noted()

    def checkpoint_due(self, step: int) -> bool:
        """See `Output`."""
        del step
        return self.saves and time.monotonic() - self._saved > SAVE_EVERY

    def step(self, step: int, row: dict[str, float], waited: float) -> None:
        """See `Output`."""
        del waited
        if self._keep_steps:
            self.steps.append([step, float(f"{row['train_loss']:.5g}")])

    def epoch(self, row: dict[str, Any]) -> None:
        """See `Output`."""
        self.rows.append(row)
        self._say(
            f"epoch {row['epoch']}: train loss {row['train_loss']:.4f}, test loss {row['test_loss']:.4f}, "
            f"test accuracy {100 * row['test_accuracy']:.2f}%"
        )

    def save(self, step: int, state: Any, meta: dict[str, Any], row: dict[str, Any] | None) -> None:
        """See `Output`."""
        assert self._checkpoints is not None
        ours = {"rows": self.rows, "steps": self.steps, "seconds": self.total_seconds()}
        self._checkpoints.save(
            step, state, meta | ours, None if row is None else row["test_accuracy"]
        )
        self._saved = time.monotonic()

    def total_seconds(self) -> float:
        """Return the seconds of all sessions of this run."""
        return self.seconds + time.monotonic() - self._start

    def close(self, *, done: bool) -> None:
        """Wait for the disk; of a run that is done throw its checkpoints away."""
        if self._checkpoints is not None:
            self._checkpoints.close()
        if done and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
