"""A training step of ResNet-18 beside the original's, in PyTorch: seconds, by the clock and of the processor.

  python -m benchmarks.original_step --original=CLONE --torch_python=PYTHON

CLONE is a copy of the original repository, which is not part of this project, and PYTHON an interpreter with
torch. Both run float32 on the CPU, on the same number of threads, in processes that take turns: while one
computes the other waits. The network is the original's, layer for layer. Images are random: this is timing.

Needs jax, flax and optax. Writes benchmarks/results/original_step.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks import contenders
from benchmarks.step_time import ROOT, say, spread
from train import metrics

OURS = "batch,deconv,deconv:method=chebyshev,deconv:fast"
WARM = 2  # steps before the first that counts


class Original:
    """The original, in a process of its own.

    Attributes:
      version: of torch.
    """

    def __init__(self, clone: Path, python: str, batch: int):
        worker = Path(__file__).with_name("original_worker.py")
        command = [python, worker, clone, str(batch), str(os.cpu_count())]
        # Threads that wait must not spin: the other side has its turn.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        self.version = self._read()

    def step(self, norm: str) -> tuple[float, float]:
        """Return the seconds of a step, and its processor seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(norm + "\n")
        self._process.stdin.flush()
        seconds, processor = self._read().split()
        return float(seconds), float(processor)

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The original ended with status {self._process.wait()}.")
        return line.strip()


def main(argv: list[str]) -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.original_step")
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--torch_python", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--contenders", type=contenders.parse, default=OURS)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    load = [os.getloadavg()]
    original = Original(options.original, options.torch_python, options.batch)
    shape = (options.batch, 32, 32, 3)
    images = jax.random.normal(jax.random.key(0), shape)
    labels = jax.random.randint(jax.random.key(1), shape[:1], 0, 10)
    racers: dict[str, Any] = {
        f"original:{norm}": (lambda norm=norm: original.step(norm)) for norm in ("batch", "deconv")
    }
    for contender in options.contenders:
        step = contenders.Step(contender, "resnet18", images, labels, layout="original")
        racers[contender.text] = lambda step=step: step(images, labels)
        say(f"{contender.text}: compiled in {sum(step.seconds.values()):.1f} s")
    found: dict[str, Any] = {name: {"step_seconds": [], "processor_seconds": []} for name in racers}
    order = list(racers)
    for number in range(-WARM, options.rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            seconds, processor = racers[name]()
            if number >= 0:
                found[name]["step_seconds"].append(seconds)
                found[name]["processor_seconds"].append(processor)
        if number >= 0:
            say("  ".join(f"{name} {found[name]['processor_seconds'][-1]:.3g}" for name in order))
    for row in found.values():
        for kind in ("step", "processor"):
            theirs = found["original:deconv"][f"{kind}_seconds"]
            row[kind] = spread(row[f"{kind}_seconds"])
            row[f"{kind}_original_over_it"] = spread(
                [their / own for their, own in zip(theirs, row[f"{kind}_seconds"], strict=True)]
            )
    result = {
        "command": "python -m benchmarks.original_step --original=CLONE --torch_python=PYTHON "
        + " ".join(each for each in argv if not each.startswith(("--original", "--torch_python"))),
        "environment": metrics.environment() | {"torch": original.version},
        "data": "random images and labels: timing only",
        "load_average": [*load, os.getloadavg()],
        "contenders": found,
    }
    path = ROOT / "benchmarks" / "results" / "original_step.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"Written to {path}.")


if __name__ == "__main__":
    main(sys.argv[1:])
