"""Seconds, memory and compilation of one training step, for any network, norm and spec, side by side.

  python -m benchmarks.step_time --network=resnet18 --batch=128 --size=32 --dtype=float32 \
      --contenders=batch,deconv,deconv:fast,deconv:method=chebyshev

The images are random: this is timing, nothing is learnt. A step is SGD with momentum under jit with donated
state. All contenders are compiled in one process and take turns, each warm before the first round; a turn is
as many steps as last half a second. Where other work shares a processor the seconds of processor time, of
all threads together, are the steadier figure; both are kept.

Where the time goes is told twice. `--stages=batch,deconv` times the parts of every layer of those contenders,
each compiled by itself. And the contenders `none` and `deconv:no_root` divide the step by differences:
`deconv:no_root` less `none` is statistics and folding, `deconv` less `deconv:no_root` the products of the
root, backward passes included.

Needs jax, flax and optax, and matplotlib for the picture. Writes benchmarks/results/step_time_<name>.json and
docs/images/step_time_<name>.png.
"""

import argparse
import collections
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import bars, contenders, roofline, stages
from netdeconv_jax import models
from netdeconv_jax.models.summary import layer_table
from train import metrics

ROOT = Path(__file__).parent.parent
TURN_SECONDS = 0.5


def arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time", description="Seconds of one training step."
    )
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, help="of the images; default: the network's")
    parser.add_argument("--width", type=float, default=1.0, help="multiplies all features")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--contenders", type=contenders.parse, default="batch,deconv,deconv:fast")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--stages", type=contenders.parse, default=[], help="whose layers' parts are timed too"
    )
    parser.add_argument("--name", help="of the result; default: from network, device and sizes")
    options = parser.parse_args(argv)
    if options.rounds < 5:
        parser.error(f"--rounds must be at least 5, got {options.rounds}.")
    options.size = options.size or models.list()[options.network].size
    width = "" if options.width == 1 else f"_width{options.width:g}"
    options.name = options.name or (
        f"{options.network}{width}_{jax.devices()[0].platform}_batch{options.batch}_{options.size}px_"
        f"{options.dtype}"
    )
    return options


def main(argv: list[str]) -> None:
    """Measure, and write JSON and picture."""
    options = arguments(argv)
    shape = (options.batch, options.size, options.size, 3)
    dtype = jnp.dtype(options.dtype)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.step_time", *argv]),
        "environment": metrics.environment(),
        "data": "random images and labels: timing only",
        "load_average": [os.getloadavg()],
    }
    result["contenders"] = race(options, shape, dtype)
    if options.stages:
        result["stages"] = parts(options, shape, dtype)
    result["least_on_an_h200"] = reckoned(options, shape)
    result["load_average"].append(os.getloadavg())
    path = ROOT / "benchmarks" / "results" / f"step_time_{options.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    picture(options, result)
    say(f"Written to {path}.")


def race(options: argparse.Namespace, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    """Return what each contender takes; they take turns, in an order that rotates."""
    images = jax.random.normal(jax.random.key(0), shape, dtype)
    labels = jax.random.randint(jax.random.key(1), shape[:1], 0, 10)
    racers, found = {}, {}
    for contender in options.contenders:
        step = contenders.Step(
            contender, options.network, images, labels, width=options.width, dtype=dtype
        )
        first, _ = step(images, labels)
        racers[contender.text] = step
        found[contender.text] = {
            "norm": contender.norm,
            "spec": repr(contender.spec) if contender.norm in ("deconv", "channel") else None,
            "compilation_seconds": step.seconds,
            "first_step_seconds": sum(step.seconds.values()) + first,
            **step.resources(),
            "kept_for_backward": _largest(
                contenders.kept(step.model, contender, step.state, images, labels)
            ),
            "step_seconds": [],
            "processor_seconds": [],
        }
        say(f"{contender.text}: compiled in {sum(step.seconds.values()):.1f} s")
    order = list(racers)
    for name, step in racers.items():
        found[name]["steps_a_turn"] = max(1, round(TURN_SECONDS / step(images, labels)[0]))
    for number in range(options.rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            row = found[name]
            seconds, processor = racers[name](images, labels, row["steps_a_turn"])
            row["step_seconds"].append(seconds)
            row["processor_seconds"].append(processor)
        say("  ".join(f"{name} {found[name]['step_seconds'][-1]:.4g}" for name in order))
    return summarized(found, order[0])


def _largest(kept: collections.Counter[str]) -> dict[str, int]:
    return {"bytes": kept.total(), **dict(kept.most_common(12))}


def summarized(found: dict[str, Any], first: str) -> dict[str, Any]:
    """Add medians and spreads, and the ratio to the first contender in the same round."""
    for row in found.values():
        row["seconds"] = spread(row["step_seconds"])
        row["processor"] = spread(row["processor_seconds"])
        for ratio, seconds in (("ratio", "step_seconds"), ("processor_ratio", "processor_seconds")):
            pairs = zip(row[seconds], found[first][seconds], strict=True)
            row[ratio] = spread([own / other for own, other in pairs])
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def parts(options: argparse.Namespace, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    """Return the seconds of the parts of each layer, by contender; `batch` has its batch norms."""
    found = {}
    for contender in options.stages:
        start = time.perf_counter()
        rows = stages.layers(network(options, contender), shape, dtype)
        found[contender.text] = {"total": stages.totals(rows), "layers": rows}
        say(f"{contender.text}: parts timed in {time.perf_counter() - start:.0f} s")
    return found


def reckoned(options: argparse.Namespace, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the least seconds on an H200, by contender: convolutions in bfloat16, the rest by its spec."""
    return {
        contender.text: roofline.least_seconds(
            layer_table(network(options, contender), shape), roofline.H200
        )
        for contender in options.contenders
    }


def network(options: argparse.Namespace, contender: contenders.Contender) -> models.Network:
    return models.create(options.network, contender.norm, spec=contender.spec, width=options.width)


def picture(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Draw the steps as bars, if matplotlib is there: on a CPU, which others may share, processor time."""
    if importlib.util.find_spec("matplotlib") is None:
        say("No picture: matplotlib is not installed.")
        return
    rows, environment = result["contenders"], result["environment"]
    on_cpu = environment["platform"] == "cpu"
    seconds, ratio = ("processor", "processor_ratio") if on_cpu else ("seconds", "ratio")
    width = "" if options.width == 1 else f", width {options.width:g}"
    bars.draw(
        {
            name: tuple(1e3 * row[seconds][key] for key in ("median", "least", "most"))
            for name, row in rows.items()
        },
        ROOT / "docs" / "images" / f"step_time_{options.name}.png",
        title="One training step" + (", processor time" if on_cpu else ""),
        caption=f"{options.network}{width}, batch {options.batch}, {options.size}x{options.size}, "
        f"{options.dtype}; {environment['processor' if on_cpu else 'device']}, "
        f"jax {environment['jax']}, {options.rounds} rounds, {environment['date']}",
        notes={
            name: f"{_three_digits(1e3 * row[seconds]['median'])} ms, x {row[ratio]['median']:.2f}, "
            f"{row['peak_bytes'] / 2**20:,.0f} MiB"
            for name, row in rows.items()
        },
        unit="milliseconds: median, least to most",
    )


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
