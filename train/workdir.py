"""The workdir of a run: everything that it leaves, and what it resumes from.

config.json           what was asked for; another config is refused
checkpoints/<step>/   the newest ones and the best, see train/checkpoints.py
metrics.jsonl         a row every so many steps, and one an epoch with `test_loss` and `test_accuracy`
tensorboard/          the same as events
diagnostics.jsonl     with `log.diagnostics_every_steps`: a row for each whitened layer
model.safetensors     at the end: variables, with the config as metadata
report.html           at the end: curves and figures, one file
"""

import collections
import fcntl
import json
import math
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jax

from netdeconv_jax.interop.weights import save_weights
from train import checkpoints, cluster, diagnostics, metrics
from train import config as configs
from train.curves import NORMS
from train.output import Output
from train.progress import Progress
from train.report import write_report
from train.stopping import Stop
from train.tensorboard import Events

if TYPE_CHECKING:
    from train.loop import Trainer


class Workdir(Output):
    """Watches one run and keeps it; of many processes, the first one writes.

    Args:
      path: made if it is not there.
      trainer: of the run; not compiled yet, so that what is wrong with the folder is found before.
      stop: asked after every step.
      started: by `time.monotonic`; tells how long it took to the first step.
    Raises:
      ValueError: the folder holds a run with another config; the message says what differs.
      OSError: the folder cannot be written to, or has no room for the checkpoints of the run.
    """

    # What a finished run should have left and did not, by name.
    lost: tuple[str, ...] = ()

    def __init__(self, path: Path, trainer: "Trainer", stop: Stop, started: float | None = None):
        self.path, self._trainer, self._stop = path, trainer, stop
        self._config = trainer.config
        self.active = self.saves = jax.process_index() == 0
        self._checkpoints: checkpoints.Checkpoints | None = None
        self._progress: Progress | None = None
        self._notes: list[str] = []
        self._skipped: collections.Counter[str] = collections.Counter()  # before this session
        self._started: float | None = started
        self._locked: IO[str] | None = None
        if not self.active:
            return
        path.mkdir(parents=True, exist_ok=True)
        checkpoints.check_space(path, trainer.state_shapes, self._config.checkpoint.keep)
        self._locked = self._lock()
        try:
            self._check_config()
        except BaseException:
            self.close()
            raise

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """See `Output`."""
        restored = cluster.together(
            lambda: self._read(like),
            foreseen=(checkpoints.DamagedError, checkpoints.OtherRunError, OSError),
            status=lambda error: 2 if isinstance(error, checkpoints.OtherRunError) else 1,
        )
        restored = cluster.from_first(restored, like)
        if restored is not None:
            self._notes = [*restored[1]["notes"], *self._notes]
            self._skipped = collections.Counter(restored[1]["skipped"])
        step = 0 if restored is None else int(restored[0].step)
        resume, owed = (None, False) if restored is None else (step, restored[1]["owed"])
        self._log = metrics.JsonLines(
            self.path / "metrics.jsonl", resume, owed=owed, active=self.active
        )
        if self._config.log.diagnostics_every_steps:
            file = self.path / "diagnostics.jsonl"
            self._diagnostics = metrics.JsonLines(file, resume, active=self.active)
        # A run that was killed before its first checkpoint has left events too, all of no more account.
        self._events = Events(self.path / "tensorboard", step, active=self.active)
        steps = self._trainer.total_steps, step, self._trainer.steps_per_epoch
        self._progress = Progress(*steps, self._config.batch_size, active=self.active)
        self._clock = time.monotonic()
        if restored is not None:
            self._clock -= restored[1]["wall_seconds"]
            self.say(f"Resuming at step {step} of {self._trainer.total_steps}.")
        return restored

    def _read(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        if not self.active:
            return None
        self._checkpoints = checkpoints.Checkpoints(
            self.path / "checkpoints", self._config.checkpoint.keep, self.warn
        )
        restored = self._checkpoints.restore(like)
        if restored is not None:
            self._check_data(restored[1]["data"])
        return restored

    def stop_requested(self, step: int) -> int | None:
        """See `Output`."""
        return self._stop.requested(step)

    def interrupted(self) -> int | None:
        """See `Output`; many processes must evaluate together, and stop after the next step."""
        return self._stop.noted()

    def checkpoint_due(self, step: int) -> bool:
        """See `Output`."""
        every = self._config.checkpoint.every_steps
        return bool(every) and step % every == 0

    def step(self, step: int, row: dict[str, float], waited: float) -> None:
        """See `Output`."""
        assert self._progress is not None
        if self._started is not None:
            self.say(f"First step done {time.monotonic() - self._started:.1f} s after the start.")
            self._started = None
        self._progress.update(
            step,
            loss=row["train_loss"],
            accuracy=row["train_accuracy"],
            learning_rate=row["learning_rate"],
            waited_seconds=waited,
        )

    def log(self, row: dict[str, Any]) -> None:
        """See `Output`."""
        self._log.write(row)
        self._events.scalars(row["step"], row)

    def diagnose(self, step: int, figures: dict[str, dict[str, Any]]) -> None:
        """See `Output`."""
        for row in diagnostics.diagnostic_rows(step, figures):
            self._diagnostics.write(row)
        self._events.scalars(step, diagnostics.diagnostic_scalars(figures))

    def epoch(self, row: dict[str, Any]) -> None:
        """See `Output`."""
        skipped = sum(self._all_skipped().values())
        more = {"wall_seconds": self._wall_seconds()} | (
            {"skipped_images": skipped} if skipped else {}
        )
        self.log(row | more)
        if self._progress is not None:
            self._progress.line(row)
        if not math.isfinite(row["test_loss"]):
            self.warn(f"the test loss after epoch {row['epoch']} is {row['test_loss']}.")

    def save(self, step: int, state: Any, meta: dict[str, Any], row: dict[str, Any] | None) -> None:
        """See `Output`."""
        if self._checkpoints is None:  # those of process 0
            return
        meta = meta | {
            "wall_seconds": self._wall_seconds(),
            "data": self._trainer.data.sizes(),
            "notes": list(self._notes),
            "skipped": dict(self._all_skipped()),
        }
        self._checkpoints.save(step, state, meta, None if row is None else row["test_accuracy"])

    def _wall_seconds(self) -> float:
        """Seconds since the start of the run, pauses between its sessions left out."""
        return time.monotonic() - self._clock

    def finish(self, variables: Any) -> None:
        """See `Output`."""
        if not self.active:
            return
        if skipped := self._all_skipped():
            self.warn(
                f"{len(skipped)} images could not be decoded and were passed over {sum(skipped.values())} "
                f"times: {', '.join(sorted(skipped)[:5])}{' ...' if len(skipped) > 5 else ''}."
            )
        metadata = {
            "network": self._config.network,
            "norm": self._config.norm,
            "num_classes": str(self._trainer.data.num_classes),
            "input_shape": json.dumps(self._trainer.data.image_shape),
            "config": json.dumps(configs.flat(self._config)),
        }
        self._try("model.safetensors", lambda path: save_weights(path, variables, metadata))
        self._try(
            "report.html",
            lambda path: write_report(
                path,
                config=self._config.to_dict(),
                rows=metrics.read_rows(self.path / "metrics.jsonl"),
                environment=metrics.environment(),
                title=f"{self._config.network} with {NORMS[self._config.norm]}",
                notes=self._notes,
                command=" ".join(["python -m train.main", *sys.argv[1:]]),
            ),
        )

    def check_lost(self) -> None:
        """Raise OSError if the run should have left something that it could not write."""
        if self.lost:
            lost = " and ".join(self.lost)
            raise OSError(f"{lost} could not be written; the same command tries again.")

    def close(self) -> None:
        """Wait until everything is on disk, and give the folder free."""
        if self._checkpoints is not None:
            self._checkpoints.close()
        if self._progress is not None:
            self._progress.close()
            self._events.close()
        if self._locked is not None:
            self._locked.close()

    def say(self, text: str) -> None:
        """Tell the user something."""
        if self._progress is not None:
            self._progress.note(text)
        elif self.active:
            print(text, flush=True)

    def leave(self, name: str, content: Any) -> None:
        """Write a file of JSON into the workdir."""
        if self.active:
            self._try(name, lambda path: metrics.replace(path, _json(content)))

    def warn(self, message: str) -> None:
        """Tell of something that went wrong without stopping the run; the report will too."""
        self._notes.append(message)
        if self.active:
            print(f"\ntrain: WARNING: {message}", file=sys.stderr, flush=True)

    def _try(self, name: str, write: Any) -> None:
        try:
            write(self.path / name)
        except OSError as error:
            self.lost = (*self.lost, name)
            self.warn(f"{name} could not be written ({error.strerror or error}).")

    def _all_skipped(self) -> collections.Counter[str]:
        """How often each image was passed over since the run began, by this process."""
        return self._skipped + collections.Counter(self._trainer.data.skipped)

    def _check_data(self, old: dict[str, Any]) -> None:
        """Refuse other data than the checkpoints' run had; where it lies may change."""
        if different := configs.differences(old, self._trainer.data.sizes()):
            raise checkpoints.OtherRunError(
                f"`workdir` {self.path} holds a run on other data; use another workdir, or a `data_dir` with "
                f"that: {'; '.join(different)}"
            )

    def _check_config(self) -> None:
        """Refuse another config than that of the checkpoints which are there."""
        file, new = self.path / "config.json", configs.flat(self._config)
        begun = any((self.path / name).is_dir() for name in ("damaged", "checkpoints"))
        if begun and file.is_file():
            try:
                old = json.loads(file.read_text())
            except ValueError:
                raise ValueError(
                    f"`workdir` {self.path} holds a config.json that is not JSON."
                ) from None
            different = configs.differences(old, json.loads(json.dumps(new)))
            if different:
                raise ValueError(
                    f"`workdir` {self.path} holds a run with another config; use another workdir, or set "
                    f"these back: {'; '.join(different)}"
                )
        metrics.replace(file, _json(new))
        (self.path / "nonfinite.json").unlink(missing_ok=True)

    def _lock(self) -> IO[str]:
        """Keep the folder for this process until it closes the file or ends, however it ends."""
        file = (self.path / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"`workdir` {self.path} is in use by another run.") from None
        except OSError:  # a file system that knows no locks
            pass
        return file


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
