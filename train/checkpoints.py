"""Checkpoints of a run: atomic, checked when they are read, kept until there are better ones.

Of many processes the first alone has them: the state is the same on all, and none waits for another's disk.

Orbax writes them in the background. It cannot tell a checkpoint that a failing disk has changed from a good
one, so each carries a checksum of every array; one that is not whole is set aside, and the one before serves.
"""

import json
import logging
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from train import metrics

Meta = dict[str, Any]

FORMAT = 2  # of what a checkpoint holds besides arrays
# Without this Orbax makes all processes meet at every turn.
ALONE = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="netdeconv_jax"
)
EVALUATIONS = "evaluations.json"  # accuracies by step, of checkpoints that were written before them

# What goes wrong is said here, in a line; Orbax' threads would add a page to each.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def _without_echoes(then: Any) -> Any:
    """Return an unraisablehook without what comes of a failed write or read after it has been told of.

    The other arrays' reads and writes report to an event loop that is closed by then, a page for each.
    """

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            then(unraisable)

    return hook


sys.unraisablehook = _without_echoes(sys.unraisablehook)


class _Best(policies.PreservationPolicy):
    """Keeps the newest of the best ones. Orbax' own would know no accuracy of a run that is resumed."""

    def __init__(self, accuracies: dict[int, float]):
        self._accuracies = accuracies

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        known = [c.step for c in checkpoints if c.step in self._accuracies]
        best = max(known, key=lambda step: (self._accuracies[step], step), default=None)
        return [c.step == best for c in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Never asks whether to stop: JAX counts who asks and when, and the loop does."""

    def reached_preemption(self, step: int) -> bool:
        return False


class DamagedError(Exception):
    """No checkpoint of a run can be read."""


class _MachineError(OSError):
    """The machine does not give what a checkpoint holds."""


class OtherRunError(ValueError):
    """The checkpoints are of another program, or of a run on other data."""


class Checkpoints:
    """The checkpoints `<folder>/<step>/` of one run, in process 0. Arrays are NumPy's.

    Args:
      folder: made if it is not there.
      keep: the newest so many are kept, and the one with the best accuracy.
      warn: called with one line for whatever goes wrong without stopping the run.
    """

    def __init__(self, folder: Path, keep: int, warn: Callable[[str], None]):
        self._folder, self._warn = folder.absolute(), warn
        self._aside = self._folder.parent / "damaged"
        self._newest = 0
        self._accuracies: dict[int, float] = {}
        self._late = _late_evaluations(self._folder)
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(self._accuracies)])
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manager = _Manager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=kept,
                cleanup_tmp_directories=True,
                create=False,
                multiprocessing_options=ALONE,
            ),
        )
        for step in self.steps():
            self._accuracies |= self._recorded(step)

    def steps(self) -> list[int]:
        """Return the steps that there are checkpoints of, the newest last."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: Meta, test_accuracy: float | None = None) -> None:
        """Begin to write a checkpoint; a failure is a warning, and the run goes on.

        Args:
          step: if there is a checkpoint of it, that of a run which was stopped in its evaluation, a
            `test_accuracy` that is new is noted beside it; else nothing happens.
          state: a tree of NumPy arrays, not changed afterwards.
          meta: what JSON can hold; `owed` tells whether the evaluation of that step is still to be done.
          test_accuracy: by which the best one is told; without, it is never the best.
        """
        self.wait()
        if step in self._manager.all_steps():
            if test_accuracy is None or step in self._accuracies:
                return
            self._accuracies[step] = self._late[step] = test_accuracy
            text = json.dumps({str(one): value for one, value in self._late.items()})
            file = self._folder / EVALUATIONS
            self._tolerate(lambda: metrics.replace(file, text.encode()))
            return
        if test_accuracy is not None:
            self._accuracies[step] = test_accuracy
        meta = meta | {
            "arrays": _arrays(state),
            "checksums": _checksums(state),
            "test_accuracy": test_accuracy,
            "format": FORMAT,
        }
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._newest = step
        self._tolerate(lambda: self._manager.save(step, args=args, force=True))

    def restore(self, like: Any) -> tuple[Any, Meta] | None:
        """Return state and meta of the newest checkpoint that is whole, None if there are none at all.

        Args:
          like: the shapes and dtypes of the state.
        Raises:
          OtherRunError: the newest one holds other arrays than `like`.
          OSError: the disk does not answer or memory is short, which says nothing of the checkpoints.
          DamagedError: there are checkpoints, and not one can be read; or all were set aside before: a
            scheduler that tries again must not make the run begin anew, over what the old one left.
        """
        steps = self.steps()
        wanted = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(wanted), meta=ocp.args.JsonRestore()
        )
        for step in reversed(steps):
            try:
                meta = self._meta(step)
            except _MachineError:
                raise
            except Exception as error:  # whatever a broken file makes of its reader
                self._set_aside(step, _reason(error))
                continue
            if meta.get("format") != FORMAT:
                raise OtherRunError(
                    f"The checkpoints in {self._folder} were written by another version of this program."
                )
            if meta["arrays"] != _arrays(wanted):
                differ = sorted({*map(str, meta["arrays"])} ^ {*map(str, _arrays(wanted))})
                raise OtherRunError(
                    f"The checkpoints in {self._folder} hold other arrays than this program's state, such as "
                    f"{differ[0]}: they were written by another version of it or of a package."
                )
            try:
                restored = self._read(step, args)
                state, meta = restored["state"], restored["meta"]
                if meta["checksums"] != _checksums(state):
                    raise ValueError("an array is not what was saved")
                return state, meta | ({"owed": False} if step in self._late else {})
            except _MachineError:
                raise
            except Exception as error:
                self._set_aside(step, _reason(error))
        if steps or self._aside.is_dir():
            raise DamagedError(
                f"No checkpoint in {self._folder} can be read; they were moved to {self._aside}. To start "
                "anew, use another workdir."
            )
        return None

    def _meta(self, step: int) -> Meta:
        only_meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._read(step, only_meta)["meta"]

    def _read(self, step: int, args: Any) -> Any:
        """Read a checkpoint, a second time if the first fails: what was in the way may have passed."""
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:
            self._raise_if_of_the_machine(step, error)
        return self._manager.restore(step, args=args)

    def _recorded(self, step: int) -> dict[int, float]:
        """The accuracy of a checkpoint by its step, where it can be read and there is one."""
        if step in self._late:
            return {step: self._late[step]}
        try:
            accuracy = self._meta(step)["test_accuracy"]
        except Exception:  # `restore` will tell, if it is read at all
            return {}
        return {} if accuracy is None else {step: accuracy}

    def wait(self) -> None:
        """Wait until everything is on disk; a failure is a warning."""
        self._tolerate(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait, and release threads."""
        self.wait()
        self._tolerate(self._manager.close)

    def _tolerate(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a full disk shows itself as one of several
            self._warn(
                f"the checkpoint of step {self._newest} could not be written ({_reason(error)}); training "
                "goes on without it."
            )
            for half in self._folder.glob("*.orbax-checkpoint-tmp"):  # would make the disk fuller
                shutil.rmtree(half, ignore_errors=True)

    def _raise_if_of_the_machine(self, step: int, error: Exception) -> None:
        """Raise what another try may not meet: good checkpoints must not be set aside for it.

        What reads arrays has errors of its own for whatever happens; whether a disk answers shows by asking.
        """
        if isinstance(error, MemoryError):
            raise _MachineError(None, "The checkpoints do not fit into the memory.") from error
        try:
            for path in (self._folder / str(step)).rglob("*"):
                if not path.is_dir():
                    with path.open("rb") as file:
                        while file.read(2**24):
                            pass
        except OSError as found:
            raise _MachineError(
                found.errno,
                f"The checkpoints cannot be read now: {found.strerror}: {found.filename}",
            ) from error

    def _set_aside(self, step: int, reason: str) -> None:
        self._warn(
            f"the checkpoint of step {step} is damaged ({reason}); moved to {self._aside}, taking the "
            "one before."
        )
        self._aside.mkdir(exist_ok=True)
        target = self._aside / str(step)
        shutil.rmtree(target, ignore_errors=True)
        (self._folder / str(step)).rename(target)
        self._manager.reload()


def _late_evaluations(folder: Path) -> dict[int, float]:
    try:
        return {
            int(step): value
            for step, value in json.loads((folder / EVALUATIONS).read_text()).items()
        }
    except (OSError, ValueError):  # none, or no longer readable: they are made again
        return {}


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _arrays(tree: Any) -> list[list[Any]]:
    """Return name, shape and dtype of every array, as JSON has them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        [jax.tree_util.keystr(path), list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves
    ]


def _checksums(tree: Any) -> list[int]:
    # The bytes of a contiguous array as they lie there: no copy of a large state.
    return [
        zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        for leaf in jax.tree.leaves(tree)
    ]


def check_space(workdir: Path, state: Any, keep: int) -> None:
    """Raise OSError if the disk has no room for the checkpoints that a run keeps, and one in the making.

    Those that are there already count: a run that has its checkpoints needs room for one.
    """
    size = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    folder = workdir / "checkpoints"
    there = sum(1 for path in folder.glob("[0-9]*") if path.name.isdecimal())
    needed, free = (max(keep + 1 - there, 0) + 1) * size, shutil.disk_usage(workdir).free
    if free < needed:
        raise OSError(
            f"`workdir` {workdir} has {free / 2**20:.3g} MiB left; the checkpoints of this run need "
            f"{needed / 2**20:.3g} MiB more."
        )
