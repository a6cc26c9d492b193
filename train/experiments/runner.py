"""Runs cells one after another, within a budget, and records each as it finishes."""

import functools
import importlib
import json
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from train import config as configs
from train import data, loop, whitening
from train.data import Dataset, Input, Resident
from train.experiments import results
from train.experiments.cell import Result, Run
from train.experiments.images import load_images
from train.experiments.watch import Watch
from train.stopping import Stop, Stopped


class DataError(Exception):
    """A dataset that an experiment needs cannot be had, or does not fit it; the message says why."""


SHORT = 20.0  # seconds: a cell that takes less is begun anew when it was stopped
LEAST = 5.0  # seconds of a budget that are worth beginning something for


class Runner:
    """Runs and records.

    Args:
      folder: of the records.
      workdir: of checkpoints.
      data_dir: as `train.data.sources.load_dataset` takes it.
      say: called with one line for the user.
      known: records that tell how long cells take here.

    Attributes:
      passed_over: why cells were, each reason once.
    """

    def __init__(
        self,
        folder: Path,
        workdir: Path,
        data_dir: str,
        say: Callable[[str], None],
        known: Iterable[Result] = (),
    ):
        self._folder, self._workdir, self._data_dir, self._say = folder, workdir, data_dir, say
        here = results.machine()["device"]
        known = [r for r in known if r["device"] == here and r["status"] == "done"]
        self._times = [
            (f"{r['experiment']}/{r['cell']}", r["experiment"], r["seconds"], r["minutes"])
            for r in known
        ]
        self._compiling = [s for r in known if (s := r.get("compile_seconds", 0.0))]
        self._trainer: tuple[str, loop.Trainer] | None = None
        self._read = functools.lru_cache(maxsize=2)(lambda name: load_images(name, data_dir))
        self._missing: dict[str, str] = {}  # by dataset, why it cannot be had
        self.passed_over: list[str] = []

    def run(self, runs: Sequence[Run], budget: float = math.inf) -> int:
        """Run those cells in turn, first those that fit into what is left; return how many are finished.

        When nothing that is left fits, the first one is begun and stopped with its state on disk, so that the
        next call goes on with it; but not if it would hardly be compiled by then, nor a measurement, which
        begins anew each time.

        Args:
          runs: in order.
          budget: seconds.
        Raises:
          Stopped: a signal came; all is on disk.
        """
        with Stop() as stop:
            try:
                return self._all(list(runs), time.monotonic() + budget, stop)
            finally:
                self._release()

    def _all(self, waiting: list[Run], deadline: float, stop: Stop) -> int:
        done = 0
        while waiting and (left := deadline - time.monotonic()) > LEAST:
            fits = (run for run in waiting if (self.estimate(run) or 0.0) <= left)
            run = next(fits, None)
            if run is None and left < 2 * statistics.median(self._compiling or [0.0]):
                break
            run = run or next((run for run in waiting if not run.cell.measure), None)
            if run is None:
                break
            waiting.remove(run)
            try:
                self._one(run, stop, deadline)
                done += 1
            except DataError as error:
                self._say(f"{run}: {error}")
                if str(error) not in self.passed_over:
                    self.passed_over.append(str(error))
            except Stopped:
                if (signal := stop.noted()) is not None:
                    raise Stopped(0, signal) from None
                self._say(f"{run}: the budget is spent; the same command goes on")
            if (signal := stop.noted()) is not None:
                raise Stopped(0, signal)
        return done

    def estimate(self, run: Run) -> float | None:
        """Return the seconds that `run` takes here, from its other seeds or from other cells, or None."""
        key = f"{run.experiment}/{run.cell.name}"
        same = [seconds for cell, _, seconds, _ in self._times if cell == key]
        if same:
            return statistics.median(same)
        for experiment in (run.experiment, None):
            rates = [s / m for _, e, s, m in self._times if experiment in (e, None)]
            if rates:
                return statistics.median(rates) * run.cell.minutes
        return None

    def _load(self, name: str) -> Dataset:
        if name not in self._missing:
            try:
                return self._read(name)
            except (ValueError, OSError) as error:  # once: looking for a dataset may take minutes
                self._missing[name] = str(error).splitlines()[0]
        raise DataError(self._missing[name])

    def _release(self) -> None:
        """Give the memory and the threads of the last trainer free."""
        if self._trainer is not None:
            self._trainer[1].data.close()
        self._trainer = None

    def _input(self, config: Any) -> Input:
        try:
            if config.dataset in data.STREAMED:
                return data.create(config)
            return Resident(self._load(config.dataset), config)
        except (ValueError, OSError, ImportError) as error:
            raise DataError(str(error).splitlines()[0]) from error

    def _one(self, run: Run, stop: Stop, deadline: float) -> None:
        start = time.monotonic()
        record = (self._measure if run.cell.measure else self._train)(run, stop, deadline)
        record.setdefault("seconds", time.monotonic() - start)
        record["minutes"] = run.cell.minutes
        key = f"{run.experiment}/{run.cell.name}"
        self._times.append((key, run.experiment, record["seconds"], run.cell.minutes))
        file = results.write(self._folder, run, record)
        self._say(f"{run}: {record['status']} in {record['seconds']:.0f} s, {file}")

    def _measure(self, run: Run, stop: Stop, deadline: float) -> dict[str, Any]:
        del deadline
        self._say(f"{run} ...")
        module, _, function = run.cell.measure.partition(":")
        measure = getattr(importlib.import_module(module), function)
        with stop.at_once():
            figures = measure(self._load, run.seed, **run.cell.changes)
        return {"status": "done", "config": dict(run.cell.changes), "figures": figures}

    def _train(self, run: Run, stop: Stop, deadline: float) -> dict[str, Any]:
        changes = {"data_dir": self._data_dir, **run.cell.changes}
        config = configs.load(run.cell.config, changes)
        settings = {k: v for k, v in configs.flat(config).items() if k != "data_dir"}
        text = json.dumps(settings, sort_keys=True)
        expected = self.estimate(run)
        short = expected is not None and expected < SHORT
        folder = self._workdir / run.experiment / f"{run.name}-{zlib.crc32(text.encode()):08x}"
        watch = Watch(
            None if short else folder,
            stop,
            deadline,
            run.cell.steps,
            lambda line: self._say(f"{run}: {line}"),
        )
        done, status, note = False, "done", {}
        self._say(f"{run} ...")
        try:
            trainer, compiling = self._compiled(text, config)
            for _ in trainer.run(run.seed, watch):
                pass
            done = True
        except data.DataError as error:  # an image, once training has begun
            raise DataError(str(error).splitlines()[0]) from error
        except loop.NonFiniteLossError as error:
            self._say(f"{run}: {error}")
            status, done, note = "diverged", True, {"note": str(error)}
        finally:
            watch.close(done=done)
        return {
            "status": status,
            "seconds": watch.total_seconds(),
            "compile_seconds": compiling,
            "config": settings | {"seed": run.seed},
            "epochs": watch.rows,
            **(
                {"spec": repr(whitening.create(config.whitening))}
                if config.norm == "deconv"
                else {}
            ),
            **({"steps": watch.steps} if run.cell.steps else {}),
            **note,
        }

    def _compiled(self, text: str, config: Any) -> tuple[loop.Trainer, float]:
        """Return a trainer that is compiled, the last one where only the seed is another."""
        if self._trainer is not None and self._trainer[0] == text:
            return self._trainer[1], 0.0
        self._release()
        examples = self._input(config)
        try:
            trainer = loop.Trainer(config, examples)
            seconds = trainer.compile()
        except (
            ValueError
        ) as error:  # fewer images than a batch, one that cannot be read, and the like
            examples.close()
            raise DataError(str(error).splitlines()[0]) from error
        except BaseException:
            examples.close()
            raise
        self._compiling.append(seconds)
        self._trainer = (text, trainer)
        return trainer, seconds


def use_device(platform: str | None) -> None:
    """Compute on `platform`, cpu, gpu or tpu; None leaves the choice to JAX.

    Raises:
      ValueError: there is no such device.
    """
    if platform is None:
        return
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(platform, platform))
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without jax's plugin for it
        raise ValueError(
            f"`--device` {platform} is not there: {str(error).splitlines()[0]}"
        ) from error
