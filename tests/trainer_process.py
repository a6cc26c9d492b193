"""The trainer as a process of its own, as users run it, on digits with a network that compiles in seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMALL = {
    "epochs": 5,
    "batch_size": 64,
    "eval_batch_size": 300,
    "whitening.block_size": 4,
    "optimizer.learning_rate": 0.05,
    "checkpoint.every_steps": 7,
    "log.every_steps": 4,
}
STEPS_PER_EPOCH = 18


def interruptible(command: list[str]) -> list[str]:
    """Return a command that heeds Ctrl-C: what a shell starts in the background inherits deafness to it."""
    listen = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", listen, *command]


class TrainerProcess:
    """`python -m train.main`, on the digits with LeNet unless told otherwise.

    Args:
      workdir: of the run.
      cache: folder of compiled programs that runs share.
      environment: variables on top of this process's.
      wrap: a command to run Python under.
      network: file of a config, and the network.
      config: overrides on top of `SMALL`.
    """

    def __init__(
        self,
        workdir: Path,
        cache: Path,
        norm: str = "deconv",
        environment: dict[str, str] | None = None,
        flags: tuple[str, ...] = (),
        wrap: tuple[str, ...] = (),
        network: str = "configs/digits.py:lenet",
        **config: Any,
    ):
        self.workdir = workdir
        settings = SMALL | {name.replace("__", "."): value for name, value in config.items()}
        command = [*wrap, sys.executable, "-m", "train.main", f"--workdir={workdir}", *flags]
        command += [f"--config={ROOT}/{network},{norm}"]
        command += [f"--compilation_cache={cache}"]
        command += [f"--config.{name}={value}" for name, value in settings.items()]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, seconds: float = 300) -> tuple[int, str, str]:
        """Return exit status, standard output and standard error."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    def succeed(self) -> str:
        """Return what was printed by a run that ends well."""
        status, out, err = self.finish()
        assert status == 0, err
        return out + err

    def signal_after(self, step: int, number: signal.Signals) -> None:
        """Send a signal as soon as the metrics show that `step` is done."""
        deadline = time.monotonic() + 240
        while last_step(self.workdir) < step:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        self.process.send_signal(number)


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of the metrics that are whole."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(workdir: Path) -> int:
    return max((row["step"] for row in rows(workdir)), default=0)


def checkpoints(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


FIGURES = ("step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")


def figures(workdir: Path, between: bool = False) -> list[dict[str, Any]]:
    """What does not depend on the clock, of the rows of evaluations or of those between them."""
    return [
        {name: row[name] for name in FIGURES if name in row}
        for row in rows(workdir)
        if ("test_loss" in row) != between
    ]
