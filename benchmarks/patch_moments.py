"""Time, memory and compilation of `ops.patch_moments`, value and gradient, by layer and way of taking them.

  python -m benchmarks.patch_moments [--rounds=9]

Ways take turns. Writes benchmarks/results/patch_moments.json; runs without TFDS, on a CPU or an accelerator.
Processor time counts all threads; on an accelerator it is the clock that tells.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.stages import value_and_pullback
from netdeconv_jax import ops
from train import metrics

RESULT = Path(__file__).parent / "results" / "patch_moments.json"
# Input, kernel, strides, block, sampling stride: layers of a ResNet-18 at CIFAR's size, and their statistics
# as the default takes them, then as `WhiteningSpec.fast()` does in its first and in its last stage.
LAYERS = (
    ((128, 32, 32, 64), 3, 1, 64, 3),
    ((128, 16, 16, 128), 3, 1, 64, 3),
    ((128, 8, 8, 256), 3, 1, 64, 3),
    ((128, 32, 32, 64), 3, 2, 64, 3),
    ((128, 32, 32, 64), 1, 2, 64, 3),
    ((128, 32, 32, 64), 3, 1, 16, 16),
    ((128, 4, 4, 512), 3, 1, 16, 1),
)
WAYS: dict[str, dict[str, Any]] = {
    "two passes": {},
    "one pass": {"shift": True},
    "bfloat16 samples": {"sample_dtype": "bfloat16"},
}


def main(argv: list[str]) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patch_moments")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.patch_moments", *argv]),
        "environment": metrics.environment(),
        "load_average": [os.getloadavg()],
        "layers": [measured(*layer, rounds=options.rounds) for layer in LAYERS],
    }
    result["load_average"].append(os.getloadavg())
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def measured(
    shape: tuple[int, ...], kernel: int, strides: int, block: int, stride: int, *, rounds: int
) -> dict[str, Any]:
    """Return milliseconds, temporary bytes and seconds of compilation of each way, for one layer."""
    x = jax.random.normal(jax.random.key(0), shape)
    geometry = ops.window((kernel, kernel), strides)
    groups = ops.column_groups(channels=shape[-1], taps=geometry.taps, block_size=block)
    programs, found = {}, {}
    for name, given in WAYS.items():
        keywords = dict(given)
        if keywords.pop("shift", False):
            keywords["shift"] = jnp.zeros((*groups.stat_shape, groups.width))

        def moments(x: jax.Array, keywords: dict[str, Any] = keywords) -> ops.Moments:
            return ops.patch_moments(x, geometry, groups, sampling_stride=stride, **keywords)

        lowered = jax.jit(value_and_pullback(moments)).lower(x)
        start = time.process_time()
        programs[name] = lowered.compile()
        found[name] = {
            "compile_processor_seconds": time.process_time() - start,
            "temporary_bytes": programs[name].memory_analysis().temp_size_in_bytes,
        }
        jax.block_until_ready(programs[name](x))
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            start, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(x))
            taken = time.perf_counter() - start, time.process_time() - processor
            turns[name].append((1e3 * taken[0], 1e3 * taken[1]))
    for name, taken in turns.items():
        wall, processor = zip(*taken, strict=True)
        for kind, values in (("wall", wall), ("processor", processor)):
            found[name][f"{kind}_milliseconds"] = {
                "median": statistics.median(values),
                "least": min(values),
                "most": max(values),
            }
    layer = {
        "input": shape,
        "kernel": kernel,
        "strides": strides,
        "block_size": block,
        "sampling_stride": stride,
    }
    say(layer, found)
    return {**layer, "ways": found}


def say(layer: dict[str, Any], found: dict[str, Any]) -> None:
    """Print the medians of a layer."""
    cells = [
        f"{name} {ways['processor_milliseconds']['median']:.1f} ms, "
        f"{ways['temporary_bytes'] / 2**20:.0f} MiB, {ways['compile_processor_seconds']:.2f} s to compile"
        for name, ways in found.items()
    ]
    print(", ".join(str(value) for value in layer.values()), *cells, sep="\n  ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
