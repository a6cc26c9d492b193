"""What `ops.convolution` saves on a CPU: layers and whole training steps, beside `lax.conv_general_dilated`.

  python -m benchmarks.convolution [--rounds=5] [--networks=resnet18,mobilenetv2] [--batch=128] [--name=mine]

Both ways take turns in one process, and processor time counts all threads. Images are random: this is timing.
Needs jax, flax and optax, and one CPU device: anywhere else both ways are the same. Writes
benchmarks/results/convolution.json, or under the name that is given.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
from jax import lax

from benchmarks import contenders
from benchmarks.stages import value_and_pullback
from benchmarks.step_time import ROOT, say, spread
from netdeconv_jax import ops
from train import metrics

MODULE = importlib.import_module(
    "netdeconv_jax.ops.convolution"
)  # `ops.convolution` is the function
# Image without its batch, side of the kernel, strides, features, groups: layers of ResNet-18, ResNet-50,
# MobileNetV2, EfficientNet-B0, PNASNet-A, DPN-92 and ResNeXt-29 at CIFAR's size.
LAYERS = (
    ((32, 32, 64), 3, 1, 64, 1),
    ((16, 16, 128), 3, 1, 128, 1),
    ((8, 8, 256), 3, 1, 256, 1),
    ((4, 4, 512), 3, 1, 512, 1),
    ((32, 32, 64), 3, 2, 128, 1),
    ((32, 32, 64), 1, 1, 256, 1),
    ((16, 16, 192), 3, 1, 192, 192),
    ((32, 32, 96), 3, 2, 96, 96),
    ((8, 8, 240), 5, 1, 240, 240),
    ((32, 32, 44), 7, 1, 44, 44),
    ((8, 8, 88), 7, 2, 176, 88),
    ((16, 16, 96), 3, 1, 96, 32),
    ((16, 16, 256), 3, 1, 256, 32),
    ((16, 16, 256), 3, 2, 256, 32),
    ((8, 8, 512), 3, 1, 512, 32),
)
NETWORKS = "resnet18,mobilenetv2,efficientnet_b0"


def main(argv: list[str]) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolution")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--networks", type=lambda text: [n for n in text.split(",") if n], default=NETWORKS
    )
    parser.add_argument("--name", default="convolution", help="of the result")
    options = parser.parse_args(argv)
    if jax.default_backend() != "cpu" or jax.device_count() != 1:
        raise SystemExit(f"`ops.convolution` is `lax`'s on {jax.devices()}: nothing to compare.")
    load = [os.getloadavg()]
    layers = [layer(options, *row) for row in LAYERS]
    networks = {name: network(options, name) for name in options.networks}
    result = {
        "command": " ".join(["python -m benchmarks.convolution", *argv]),
        "environment": metrics.environment(),
        "data": "random images and labels: timing only",
        "load_average": [*load, os.getloadavg()],
        "batch": options.batch,
        "layers": layers,
        "networks": networks,
    }
    path = ROOT / "benchmarks" / "results" / f"{options.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"Written to {path}.")


def layer(
    options: argparse.Namespace,
    image: tuple[int, ...],
    side: int,
    strides: int,
    features: int,
    groups: int,
) -> dict[str, Any]:
    """Return milliseconds and temporary bytes of one layer, value and both gradients, either way."""
    x = jax.random.normal(jax.random.key(0), (options.batch, *image))
    kernel = jax.random.normal(jax.random.key(1), (side, side, image[-1] // groups, features))
    ways = {"lax": lax.conv_general_dilated, "ours": ops.convolution}
    programs, compiling = {}, {}
    for name, convolve in ways.items():

        def both(x: jax.Array, kernel: jax.Array, convolve: Any = convolve) -> jax.Array:
            return convolve(
                x,
                kernel,
                (strides, strides),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )

        lowered = jax.jit(value_and_pullback(both)).lower(x, kernel)
        start = time.process_time()
        programs[name] = lowered.compile()
        compiling[name] = time.process_time() - start

    def turn(program: Any) -> float:
        start = time.process_time()
        jax.block_until_ready(program(x, kernel))
        return time.process_time() - start

    found = in_turns({name: lambda p=p: turn(p) for name, p in programs.items()}, options.rounds)
    for name, program in programs.items():
        found[name]["temporary_bytes"] = program.memory_analysis().temp_size_in_bytes
        found[name]["compile_processor_seconds"] = compiling[name]
    say(
        f"{image}, {side}x{side}, stride {strides}, {features} features, {groups} groups: {_ratio(found)}"
    )
    head = {"image": image, "kernel": side, "strides": strides, "features": features}
    return {**head, "groups": groups, **found}


def network(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the processor seconds of a step of a network with batch norm, either way."""
    images = jax.random.normal(jax.random.key(0), (options.batch, 32, 32, 3))
    labels = jax.random.randint(jax.random.key(1), (options.batch,), 0, 10)
    (contender,) = contenders.parse("batch")
    steps, compiling = {}, {}
    as_lax = mock.patch.object(MODULE, "_on_one_cpu", return_value=False)
    for way, patched in (("lax", as_lax), ("ours", contextlib.nullcontext())):
        jax.clear_caches()  # of traces the other way
        with patched:
            start = time.process_time()
            steps[way] = contenders.Step(contender, name, images, labels)
            compiling[way] = time.process_time() - start
    found = in_turns(
        {way: lambda step=step: step(images, labels)[1] for way, step in steps.items()},
        options.rounds,
    )
    for way, step in steps.items():
        found[way]["peak_bytes"] = step.resources()["peak_bytes"]
        found[way]["trace_and_compile_processor_seconds"] = compiling[way]
    say(f"{name}: {_ratio(found)}")
    return found


def in_turns(racers: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, Any]]:
    """Return the processor seconds of each and their ratio to `lax`'s of the round; the first is left out."""
    taken: dict[str, list[float]] = {name: [] for name in racers}
    for number in range(-1, rounds):
        for name, race in racers.items():
            seconds = race()
            if number >= 0:
                taken[name].append(seconds)
    return {
        name: {
            "processor_seconds": spread(values),
            "ratio_to_lax": spread([v / o for v, o in zip(values, taken["lax"], strict=True)]),
        }
        for name, values in taken.items()
    }


def _ratio(found: dict[str, dict[str, Any]]) -> str:
    lax_, ours = (1e3 * found[way]["processor_seconds"]["median"] for way in ("lax", "ours"))
    ratio = found["ours"]["ratio_to_lax"]
    return f"{lax_:.0f} to {ours:.0f} ms, {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


if __name__ == "__main__":
    main(sys.argv[1:])
