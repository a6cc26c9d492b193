"""Many hosts: one process each, the same command on all of them."""

import importlib.util
import os
from pathlib import Path

import jax


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Make this process one of many, if it is; to be called before anything touches a device.

    A slice of TPUs and a SLURM step of several tasks tell by themselves. Elsewhere the flags do.

    Args:
      coordinator: `host:port` of process 0, None to find out.
      num_processes, process_id: with a coordinator.
    Raises:
      ValueError: some of the three are given and some are not, or one is no host:port or out of range.
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
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif _slurm_tasks() > 1 or _on_tpu():
        jax.distributed.initialize()


def _slurm_tasks() -> int:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)


def _on_tpu() -> bool:
    devices = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    return importlib.util.find_spec("libtpu") is not None and bool(devices)
