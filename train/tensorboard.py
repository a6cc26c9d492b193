"""Scalars as TensorBoard reads them."""

import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging
from tensorboardX import RecordWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

# Made when it is imported, so that a checker of types finds nothing in it.
_proto: Any = event_pb2

_numbers = itertools.count()


class Events:
    """Event files in a folder, each scalar on disk when `scalars` returns.

    tensorboardX's `SummaryWriter` is not used: its thread dies of a full disk, after which its bounded queue
    blocks the training for ever. Its writer of records is. After a failure the run goes on, and what is
    missing is written to a new file as soon as it is possible.

    Args:
      folder: made where it is missing.
      resume_step: of the checkpoint a run resumes from: TensorBoard hides what was written after it.
      active: False in all processes but one: nothing is written.
    """

    def __init__(self, folder: Path, resume_step: int | None = None, *, active: bool = True):
        self._folder, self._active = folder, active
        self._writer: RecordWriter | None = None
        self._waiting: list[Any] = []
        self._silent = False
        if resume_step is not None:
            # Everything from this step on is of no more account.
            restart = _proto.SessionLog(status=_proto.SessionLog.START)
            self._add(
                _proto.Event(step=resume_step + 1, session_log=restart, wall_time=time.time())
            )

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers by tag; what is None is left out."""
        now = time.time()
        for name, value in values.items():
            if value is not None:
                self._add(_proto.Event(step=int(step), summary=scalar(name, value), wall_time=now))
        self._flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self._flush()
        self._abandon()

    def _add(self, event: Any) -> None:
        if self._active:
            self._waiting.append(event)

    def _flush(self) -> None:
        if not self._waiting:
            return
        try:
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._writer = RecordWriter(str(self._folder / _file_name()))
                version = _proto.Event(file_version="brain.Event:2", wall_time=time.time())
                self._writer.write(version.SerializeToString())
            for event in self._waiting:
                self._writer.write(event.SerializeToString())
            self._writer.flush()
            self._waiting.clear()
        except OSError as error:
            # Half an event may be in the file, behind which nothing would be read: it gets no more.
            self._abandon()
            if not self._silent:
                logging.error(
                    "TensorBoard's events cannot be written to %s: %s. Training goes on; they are kept and "
                    "tried again.",
                    self._folder,
                    error.strerror or error,
                )
            self._silent = True
        else:
            if self._silent:
                logging.warning("TensorBoard's events can be written again; none is missing.")
            self._silent = False

    def _abandon(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError:
            pass  # told of already
        self._writer = None


def _file_name() -> str:
    # TensorBoard reads files by the order of their names, so by the time; two may be of one second.
    seconds, host = int(time.time()), socket.gethostname()
    return f"events.out.tfevents.{seconds}.{host}.{os.getpid()}.{next(_numbers)}"
