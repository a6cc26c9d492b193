"""How far a run is, while it runs: a bar in a terminal, a line an epoch everywhere.

Nothing here asks the device for anything: it is given numbers that the host has already.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

RECENT_SECONDS = 20.0  # of training, over which throughput and waiting are averaged
FIELDS = "{desc} {percentage:3.0f}%|{bar}| {figures}"


class _Bar(tqdm):
    monitor_interval = 0  # no thread beside those that load data
    figures = ""

    @property
    def format_dict(self) -> dict[str, Any]:
        """What `bar_format` may name."""
        return {**super().format_dict, "figures": self.figures}


class Progress:
    """Progress of a run in steps: time left, images a second, loss, accuracy, rate, waiting for data.

    Time left follows from the steps of this session alone, from its first update on: neither steps that an
    earlier session took nor the compilation count. Throughput and waiting are those of the last seconds and
    leave out what happens between epochs: evaluation, checkpoints.

    Args:
      total_steps: of the whole run.
      first_step: steps taken before this session.
      steps_per_epoch: int >= 1.
      images_per_step: of all devices together.
      active: False in all processes but one: nothing is shown.
      stream: where the bar is drawn if it is a terminal; default stderr.
      say: takes each line of text; default `print`.
      clock: seconds, for tests.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        steps_per_epoch: int,
        images_per_step: int,
        *,
        active: bool = True,
        stream: TextIO | None = None,
        say: Callable[[str], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._steps_per_epoch = total_steps, steps_per_epoch
        self._images_per_step = images_per_step
        self._active, self._say, self._clock = active, say or _print, clock
        self._step = first_step
        self._start: tuple[float, int] | None = None  # time and step of the first update
        # (time, step, seconds waited so far) of the updates of the last seconds.
        self._recent: deque[tuple[float, int, float]] = deque()
        self._waited = 0.0
        stream = stream or sys.stderr  # None without a console
        self._bar = None
        if active and stream is not None and stream.isatty():
            self._bar = _Bar(
                total=total_steps,
                initial=first_step,
                file=stream,
                bar_format=FIELDS,
                dynamic_ncols=True,
                mininterval=0.2,
                miniters=1,
                leave=False,
            )
            self._bar.set_description_str(self._epoch_of(first_step), refresh=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        accuracy: float | None = None,
        learning_rate: float | None = None,
        waited_seconds: float = 0.0,
    ) -> None:
        """Say that `step` steps are done.

        Args:
          step: of the whole run, so far.
          loss, accuracy, learning_rate: to be shown; the accuracy as a share of 1.
          waited_seconds: how long the loop has waited for data since the last update.
        """
        now = self._clock()
        self._start = self._start or (now, step)
        self._waited += waited_seconds
        self._recent.append((now, step, self._waited))
        while len(self._recent) > 2 and now - self._recent[1][0] >= RECENT_SECONDS:
            self._recent.popleft()
        done, self._step = step - self._step, step
        if self._bar is not None:
            self._bar.set_description_str(self._epoch_of(step), refresh=False)
            self._bar.figures = self._figures(loss, accuracy, learning_rate)
            self._bar.update(done)

    def line(self, row: Mapping[str, Any]) -> None:
        """Print the summary of an epoch, above the bar if there is one.

        Args:
          row: of metrics.jsonl; what is missing in it is left out.
        """
        self.note(epoch_line(row, math.ceil(self._total / self._steps_per_epoch)))
        # What passed since the last step was evaluation, and says nothing about the next ones.
        self._recent.clear()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.clear()
        self._say(text)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Take the bar away; the lines stay."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step at the mean pace of this session; None before there is one."""
        if self._start is None or self._step <= self._start[1]:
            return None
        pace = (self._clock() - self._start[0]) / (self._step - self._start[1])
        return (self._total - self._step) * pace

    @property
    def images_per_second(self) -> float | None:
        """Throughput of the last seconds of training; None before there is one."""
        if len(self._recent) < 2 or self._recent[-1][0] <= self._recent[0][0]:
            return None
        (then, first, _), (now, last, _) = self._recent[0], self._recent[-1]
        return (last - first) * self._images_per_step / (now - then)

    @property
    def input_wait_share(self) -> float | None:
        """Share of the last seconds of training spent waiting for data; None before there is one."""
        if len(self._recent) < 2 or self._recent[-1][0] <= self._recent[0][0]:
            return None
        (then, _, before), (now, _, waited) = self._recent[0], self._recent[-1]
        return min(1.0, (waited - before) / (now - then))

    def _epoch_of(self, step: int) -> str:
        epochs = math.ceil(self._total / self._steps_per_epoch)
        return f"epoch {min(step // self._steps_per_epoch + 1, epochs)}/{epochs}"

    def _figures(
        self, loss: float | None, accuracy: float | None, learning_rate: float | None
    ) -> str:
        left, speed, wait = self.seconds_left, self.images_per_second, self.input_wait_share
        parts = [
            None if left is None else f"{duration(left)} left",
            None if speed is None else f"{speed:,.0f} img/s",
            None if loss is None else f"loss {loss:.3f}",
            None if accuracy is None else f"acc {100 * accuracy:.1f}%",
            None if learning_rate is None else f"lr {learning_rate:.2g}",
            None if wait is None else f"data {100 * wait:.0f}%",
        ]
        return " · ".join(part for part in parts if part)


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """Return the line that tells a reader how an epoch went, without what is missing in `row`."""
    formats = {
        "epoch": lambda v: f"epoch {v:{len(str(epochs))}g}/{epochs}",
        "train_loss": lambda v: f"train loss {v:.4f}",
        "train_accuracy": lambda v: f"train accuracy {100 * v:5.2f}%",
        "test_loss": lambda v: f"test loss {v:.4f}",
        "test_accuracy": lambda v: f"test accuracy {100 * v:5.2f}%",
        "learning_rate": lambda v: f"lr {v:.3g}",
        "images_per_second": lambda v: f"{v:,.0f} img/s",
        "step_seconds": lambda v: f"{1e3 * v:.1f} ms a step",
        "input_wait_share": lambda v: f"data {100 * v:.0f}%",
    }
    return "   ".join(show(row[n]) for n, show in formats.items() if row.get(n) is not None)


def duration(seconds: float) -> str:
    """Return `seconds` as a person says them.

    Example:
      >>> duration(7.4), duration(75), duration(5400), duration(200_000)
      ('7 s', '1 min 15 s', '1 h 30 min', '2 d 7 h')
    """
    left = round(seconds)
    for size, unit, below, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if left >= size:
            return f"{left // size} {unit} {left % size // below} {small}"
    return f"{left} s"


def _print(text: str) -> None:
    print(text, flush=True)
