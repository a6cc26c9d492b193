"""Figures of a run as lines of JSON, and what they were measured on."""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class JsonLines:
    """A file with one JSON object a line, each on disk when `write` returns.

    Args:
      path: made anew; so are the folders above it.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        path.write_text("")

    def write(self, row: dict[str, Any]) -> None:
        """Append one object."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def progress(row: dict[str, Any], epochs: int) -> str:
    """Return the line that tells a reader how an epoch went."""
    return (
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}   train loss {row['train_loss']:.4f}   "
        f"test loss {row['test_loss']:.4f}   test accuracy {100 * row['test_accuracy']:5.2f}%   "
        f"{1e3 * row['step_seconds']:.1f} ms a step"
    )


def environment() -> dict[str, Any]:
    """Return the date, the device and the versions that figures depend on."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "platform": device.platform,
        "device_count": jax.device_count(),
        "processor": processor(),
        "python": platform.python_version(),
    } | {name: version(name) for name in PACKAGES}


def processor() -> str:
    """Return the name of the processor and the number of cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {cores} cores"
