"""SIGTERM and Ctrl-C: a request to stop after the step that is running, on all processes at once."""

import contextlib
import os
import signal
import types
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """A run was asked to stop, and stopped after `step` with its state on disk."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"Stopped after step {step}.")
        self.step, self.signal = step, signal_number

    @property
    def exit_status(self) -> int:
        """What a shell and every scheduler know as ended by that signal: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.signal


class Stop:
    """While it is entered, the first signal is noted and the second one ends the process at once."""

    def __init__(self):
        self._got: int | None = None

    def __enter__(self) -> "Stop":
        # Of many processes each leaves SIGTERM to JAX, which tells the others.
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self._got is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._got = number

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While it is entered, the first signal ends the process, for work that keeps nothing on disk.

        Not by an exception, which would be raised in the middle of whatever runs.

        Raises:
          Stopped: a signal had come before.
        """
        noting = {number: signal.signal(number, signal.SIG_DFL) for number in self._before}
        try:
            if self._got is not None:
                raise Stopped(0, self._got)
            yield
        finally:
            for number, handler in noting.items():
                signal.signal(number, handler)

    def noted(self) -> int | None:
        """Return the signal that this process has noted; of many processes each leaves that to JAX."""
        return self._got

    def requested(self, step: int) -> int | None:
        """Return the signal to stop for after `step`; of many processes all get the same answer."""
        if jax.process_count() == 1:
            return self._got
        # One that got the signal tells the others by way of JAX's coordinator, which names the step.
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
