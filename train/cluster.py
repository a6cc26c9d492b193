"""Many hosts: one process each, the same command on all of them."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import jax


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Make this process one of many, if it is; to be called before anything touches a device.

    A slice of TPUs and a SLURM step of several tasks tell by themselves. Elsewhere the flags do.

    Args:
      coordinator: `host:port` of process 0, None to find out.
      num_processes, process_id: with a coordinator.
    Raises:
      ValueError: some of the three are given and some are not, or one is no host:port or out of range; or a
        SLURM job has several tasks, and this process is none of them.
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
        devices = slurm_gpus(os.environ)
        jax.distributed.initialize(coordinator, num_processes, process_id, devices)
    elif (tasks := _slurm_tasks()) > 1 or _on_tpu():
        if tasks > 1 and "SLURM_STEP_NODELIST" not in os.environ:
            raise ValueError(f"This SLURM job has {tasks} tasks: start the command with `srun`.")
        jax.distributed.initialize(local_device_ids=slurm_gpus(os.environ))


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
