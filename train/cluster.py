"""Many hosts: one process each, the same command on all of them."""

import collections
import importlib.util
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Result = TypeVar("Result")

PATIENCE = 10.0  # seconds until one that waits for others says so


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Make this process one of many, if it is; to be called before anything touches a device.

    A slice of TPUs and a SLURM step of several tasks tell by themselves. Elsewhere the flags do.

    Args:
      coordinator: `host:port` of process 0, None to find out.
      num_processes, process_id: with a coordinator.
    Raises:
      ValueError: some of the three are given and some are not, or one is no host:port or out of range; a
        SLURM job has several tasks, and this process is none of them; or processes differ in their devices.
      OSError: JAX cannot connect them. Where one does not come JAX ends the others, after five minutes.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError(
                "`--coordinator`, `--num_processes` and `--process_id` go together, got "
                f"{coordinator}, {num_processes} and {process_id}."
            )
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"`--coordinator` must be host:port, got {coordinator!r}.")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"`--process_id` must be in [0, {num_processes}), got {process_id}.")
        _initialize(coordinator, num_processes, process_id, slurm_gpus(os.environ))
    elif (tasks := _slurm_tasks()) > 1 or _on_tpu():
        if tasks > 1 and "SLURM_STEP_NODELIST" not in os.environ:
            raise ValueError(f"This SLURM job has {tasks} tasks: start the command with `srun`.")
        _initialize(local_device_ids=slurm_gpus(os.environ))


class AgreedError(Exception):
    """What went wrong on one process or several, in a line, on all of them.

    Attributes:
      status: to exit with.
    """

    def __init__(self, line: str, status: int):
        super().__init__(line)
        self.status = status


def together(
    do: Callable[[], Result],
    foreseen: tuple[type[Exception], ...] = (),
    status: Callable[[Exception], int] = lambda error: 1,
    facts: Callable[[Result], Mapping[str, Any]] = lambda result: {},
) -> Result:
    """Return what `do` returns here, once it is done on all processes and went wrong on none.

    Without this, processes that were given different configs would train different networks together, and
    what goes wrong on one of them would leave the others waiting.

    Args:
      do: waits for no other process.
      foreseen: errors that say all in their first line; others, of one process alone, are raised as they are.
      status: to exit with after an error.
      facts: what must be equal on all processes, as JSON has it.
    Raises:
      AgreedError: on all processes.
    """
    mistake, code, given, cause = "", 2, {}, None
    result: Any = None
    try:
        result = do()
        given = facts(result)
    except Exception as error:
        mistake, code, cause = first_line(error), status(error), error
        if not isinstance(error, foreseen):
            if jax.process_count() == 1:
                raise
            traceback.print_exc()
            mistake = f"{type(error).__name__}: {mistake}"
    everyone = [json.loads(text) for text in _gather(json.dumps([mistake, code, given]))]
    line, code = disagreement(everyone, jax.process_index())
    if line:
        raise AgreedError(line, code) from cause
    return result


def disagreement(
    everyone: Sequence[tuple[str, int, Mapping[str, Any]]], own: int
) -> tuple[str, int]:
    """Return the line of an `AgreedError` for process `own`, "" for none, and the status.

    Args:
      everyone: of each process its mistake or "", the status to exit with for it, and its facts.
      own: says its own mistake rather than another one's.

    Example:
      >>> line, _ = disagreement([("", 2, {"epochs": 2}), ("", 2, {"epochs": 3})], own=0)
      >>> line
      'processes must be given the same: process 1 has epochs=3, process 0 has epochs=2.'
    """
    for i in sorted(range(len(everyone)), key=lambda i: (i != own, i)):
        mistake, status, _ = everyone[i]
        if mistake:
            return mistake if i == own else f"process {i}: {mistake}", status
    first = everyone[0][2]
    for i, (_, _, facts) in enumerate(everyone):
        names = [name for name in {**first, **facts} if facts.get(name) != first.get(name)]
        if names:
            have, should = (
                ", ".join(f"{name}={json.dumps(each.get(name))}" for name in names)
                for each in (facts, first)
            )
            given = f"process {i} has {have}, process 0 has {should}."
            return f"processes must be given the same: {given}", 2
    return "", 0


def first_line(error: object) -> str:
    """Return the first line of a message; the error's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def from_first(result: tuple[Any, Any] | None, like: Any) -> tuple[Any, Any] | None:
    """Return on every process what process 0 has: a tree of arrays, bit by bit, and what JSON can hold.

    Args:
      result: of process 0; what another one gives is not looked at.
      like: a tree of the arrays' shapes and dtypes.
    """
    if jax.process_count() == 1:
        return result
    more = json.loads(_gather(json.dumps(result and result[1]))[0])
    if more is None:
        return None
    tree = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like) if result is None else result[0]
    # As bytes: a sum, by which they are sent, would lose the sign of a zero.
    sent = jax.tree.map(lambda x: np.atleast_1d(np.ascontiguousarray(x)).view(np.uint8), tree)
    sent = multihost_utils.broadcast_one_to_all(sent)
    return jax.tree.map(lambda x, y: np.array(y).view(x.dtype).reshape(x.shape), like, sent), more


def _gather(text: str) -> list[str]:
    """Return what each process says, in their order."""
    if jax.process_count() == 1:
        return [text]
    said = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(said), np.int32))
    rows = multihost_utils.process_allgather(np.pad(said, (0, int(sizes.max()) - len(said))))
    pairs = zip(np.asarray(rows), sizes, strict=True)
    return [row[:size].tobytes().decode() for row, size in pairs]


def _initialize(*arguments: Any, **options: Any) -> None:
    line = "train: waiting for the other processes, at most five minutes ..."
    patience = threading.Timer(PATIENCE, print, [line], {"file": sys.stderr, "flush": True})
    patience.start()
    try:
        jax.distributed.initialize(*arguments, **options)
        devices = jax.devices()  # now, as what fails before would leave the others waiting for ours
    except RuntimeError as error:
        raise OSError(f"The processes cannot be connected: {error}") from error
    finally:
        patience.cancel()
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        listed = ", ".join(str(counts[i]) for i in sorted(counts))
        raise ValueError(f"All processes must have as many devices, got {listed}.")


def slurm_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Return which of the GPUs that it sees a SLURM task should use, None where JAX knows better.

    Of itself JAX gives each task one. Here the tasks of a node share what all of them see; what SLURM has
    bound to a task is that task's.

    Example:
      >>> slurm = {"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"}
      >>> slurm_gpus(slurm | {"SLURM_GPUS_ON_NODE": "8"})
      [4, 5, 6, 7]
    """
    given = environment.get("JAX_LOCAL_DEVICE_IDS")
    if given or not {"SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"} <= set(environment):
        return None
    on_node = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    seen = environment.get("CUDA_VISIBLE_DEVICES")
    count = on_node if seen is None else len([name for name in seen.split(",") if name])
    if not count:
        return None
    tasks, task = _tasks_of_node(environment), int(environment["SLURM_LOCALID"])
    if count < on_node:  # bound to this task
        tasks, task = 1, 0
    if count % tasks:
        return None
    each = count // tasks
    return list(range(task * each, (task + 1) * each))


def _tasks_of_node(environment: Mapping[str, str]) -> int:
    """Of `2(x3),1`, three nodes with two tasks and one with one, the entry of this node."""
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, nodes = part.removesuffix(")").partition("(x")
        counts += [int(tasks)] * int(nodes or 1)
    return counts[int(environment.get("SLURM_NODEID") or 0)]


def _slurm_tasks() -> int:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)


def _on_tpu() -> bool:
    devices = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    return importlib.util.find_spec("libtpu") is not None and bool(devices)
