"""Figures of a run as lines of JSON, and what they were measured on."""

import datetime
import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class JsonLines:
    """A file with one JSON object a line, each with the operating system when `write` returns.

    A run is worth more than the record of it: a disk that is full or a folder that may not be written to is
    told of once, training goes on, and the rows that are missing are written as soon as it is possible.

    Args:
      path: so are the folders above it, made where they are missing.
      resume_step: None begins anew. Otherwise rows of a larger `step` are dropped, those that a run wrote
        after the checkpoint it now resumes from, and so is a line that a kill cut in half.
      owed: the evaluation at `resume_step` is still to be done: its row is dropped too.
      active: False in all processes but one: nothing is read or written.
    Raises:
      OSError: the file of a run that is resumed cannot be read. (Going on would replace it.)
    """

    def __init__(
        self, path: Path, resume_step: int | None = None, *, owed: bool = False, active: bool = True
    ):
        self._path, self._active = path, active
        self._size = 0  # bytes of whole lines in the file
        self._waiting: list[bytes] = []
        self._silent = False
        # The content to begin with; None once it is in the file.
        self._beginning: bytes | None = b""
        if active:
            if resume_step is not None:
                kept = [row for row in read_rows(path) if not _after(row, resume_step, owed)]
                self._beginning = b"".join(map(_line, kept))
            self._flush()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object; what is not finite in it is written as null, which every reader takes."""
        if self._active:
            self._waiting.append(_line(row))
            self._flush()

    def _flush(self) -> None:
        try:
            if self._beginning is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                replace(self._path, self._beginning)
                self._size, self._beginning = len(self._beginning), None
            if self._waiting:
                with self._path.open("ab") as file:
                    if file.tell() > self._size:  # part of a line, from when the disk was full
                        file.truncate(self._size)
                    file.write(b"".join(self._waiting))
                    file.flush()
                    self._size = file.tell()
                self._waiting.clear()
        except OSError as error:
            if not self._silent:
                logging.error(
                    "%s cannot be written: %s. Training goes on; its rows are kept and tried again.",
                    self._path,
                    error.strerror or error,
                )
            self._silent = True
        else:
            if self._silent:
                logging.warning("%s can be written again; no row is missing.", self._path)
            self._silent = False


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, without what a kill left of a line; none if it is missing.

    Raises:
      OSError: it is there and cannot be read.
    """
    rows = []
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return rows
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            logging.warning("Line %d of %s is not a JSON object: left out.", number, path)
    return rows


def replace(path: Path, content: bytes) -> None:
    """Give a file new content so that a reader, or a kill, finds the old one or the new one, whole.

    Raises:
      OSError: with the old content in place.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _after(row: Mapping[str, Any], step: int, owed: bool) -> bool:
    at = row.get("step")
    return isinstance(at, (int, float)) and (
        at > step or (owed and at == step and "test_loss" in row)
    )


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(plain(row), allow_nan=False).encode() + b"\n"


def plain(value: Any) -> Any:
    """Return `value` as what JSON knows: NumPy's numbers as Python's, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
