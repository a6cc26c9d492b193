"""What the loop costs beside the bare compiled step: seconds of an epoch of either, in turns.

  python -m benchmarks.loop_overhead --config=configs/fashion_mnist.py:lenet,deconv --config.data_dir=DIR

The bare form calls the compiled step once for every batch, on a dataset that is on the device, and waits at
the end. The loop does the same and besides reads every loss, counts, logs and draws its progress; evaluation
and checkpoints are in neither.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

from train import config as configs
from train import data, loop, metrics, stopping
from train.workdir import Workdir

RESULT = Path(__file__).parent / "results" / "loop_overhead.json"
ROUNDS = 9


class Timed(Workdir):
    """All that a workdir does at each step, and the time from the first step to the last."""

    def restore(self, like):
        result = super().restore(like)
        self._begun = time.perf_counter(), time.process_time()
        return result

    def step(self, step, row, waited):
        super().step(step, row, waited)
        if step == self._trainer.total_steps:
            self.seconds = _since(self._begun, step)

    def save(self, step, state, meta, row):
        pass


def main(argv: list[str]) -> None:
    """Measure in turns and write `RESULT`."""
    (source,) = (arg.removeprefix("--config=") for arg in argv if arg.startswith("--config="))
    changes = configs.overrides([arg for arg in argv if configs.is_override(arg)])
    config = configs.load(source, changes | {"epochs": 1})
    trainer = loop.Trainer(config, data.create(config))
    trainer.compile()
    rounds = []
    for number in range(ROUNDS + 1):
        pair = {"bare": bare(trainer), "loop": watched(trainer)}
        shown = (f"{name} {1e3 * wall:.2f} ms" for name, (wall, _) in pair.items())
        print(f"{number}: {'  '.join(shown)}", flush=True)
        rounds.append(pair)
    rounds = rounds[1:]  # the first one warms up
    ratios = {
        name: _spread([pair["loop"][i] / pair["bare"][i] for pair in rounds])
        for i, name in enumerate(("wall", "processor"))
    }
    figures = {
        "command": " ".join(["python -m benchmarks.loop_overhead", *argv]),
        "environment": metrics.environment(),
        "steps": trainer.steps_per_epoch,
        "load_average": os.getloadavg(),
        "step_seconds_wall_and_processor": rounds,
        "ratio": ratios,
    }
    RESULT.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"The loop takes {figures['ratio']} of the bare step. Written to {RESULT}.")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def bare(trainer: loop.Trainer) -> tuple[float, float]:
    """Return the seconds of a step without the loop, on the wall and of this process's threads."""
    state = trainer.init(0)
    feeds = trainer.placed_feeds(0, 0)
    feed = next(feeds)
    jax.block_until_ready((state, feed))
    start = time.perf_counter(), time.process_time()
    for _ in range(trainer.steps_per_epoch):
        state, _ = trainer.step(state, feed)
    jax.block_until_ready(state)
    return _since(start, trainer.steps_per_epoch)


def _since(start: tuple[float, float], steps: int) -> tuple[float, float]:
    return (time.perf_counter() - start[0]) / steps, (time.process_time() - start[1]) / steps


def watched(trainer: loop.Trainer) -> tuple[float, float]:
    """Return the seconds of a step in the loop, likewise."""
    with tempfile.TemporaryDirectory() as folder:
        output = Timed(Path(folder), trainer, stopping.Stop())
        for _ in trainer.run(0, output):
            pass
        output.close()
        return output.seconds


if __name__ == "__main__":
    main(sys.argv[1:])
