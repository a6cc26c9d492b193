"""Error and time of every inverse square root, by condition number, precision and size.

  python -m benchmarks.inverse_sqrt [--sizes=27,144,576] [--rounds=5]

The error is that of the whole matrix in the Frobenius norm, against the scalar recursion on the eigenvalues
in float64: the truncated iteration is another function than the exact root, and so is what imitates it.
`eigh` alone is compared with the exact root. Precisions below HIGHEST are emulated by splitting the operands
of every product, since a CPU has none of them: `bf16x3` is a product of two-part bfloat16 numbers, `tf32`
keeps ten bits of mantissa, `bf16` seven; sums are float32. Methods take turns when they are timed.

Writes benchmarks/results/inverse_sqrt.json and docs/images/inverse_sqrt.png.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stages import value_and_pullback
from netdeconv_jax import ops
from netdeconv_jax.ops import roots
from train import metrics

ROOT = Path(__file__).parent.parent
CONDITIONS = (1e1, 1e2, 1e3, 1e4, 1e5)
METHODS: dict[str, tuple[Callable[[jax.Array], jax.Array], int | None]] = {
    "newton_schulz 5": (lambda a: ops.newton_schulz(a, num_iters=5), 5),
    "newton_schulz 15": (lambda a: ops.newton_schulz(a, num_iters=15), 15),
    "chebyshev 1e-4": (lambda a: ops.chebyshev(a, tol=1e-4), 5),
    "chebyshev 2e-3": (lambda a: ops.chebyshev(a, tol=2e-3), 5),
    "eigh": (ops.eigh, None),
}


def exact(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply in float32."""
    return jnp.matmul(a, b, precision="highest")


def tf32(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply operands rounded to ten bits of mantissa."""
    return exact(jax.lax.reduce_precision(a, 8, 10), jax.lax.reduce_precision(b, 8, 10))


def bf16(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply operands rounded to seven bits of mantissa."""
    return exact(jax.lax.reduce_precision(a, 8, 7), jax.lax.reduce_precision(b, 8, 7))


def bf16x3(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply operands split into two bfloat16 numbers each, without the product of the small parts."""
    high_a, high_b = (jax.lax.reduce_precision(m, 8, 7) for m in (a, b))
    low_a, low_b = a - high_a, b - high_b
    return exact(high_a, high_b) + (bf16(high_a, low_b) + bf16(low_a, high_b))


PRODUCTS = {"highest": exact, "bf16x3": bf16x3, "tf32": tf32, "bf16": bf16}


def main(argv: list[str]) -> None:
    """Measure, and write JSON and picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inverse_sqrt")
    parser.add_argument("--sizes", default="27,144,576")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    sizes = [int(size) for size in options.sizes.split(",")]
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.inverse_sqrt", *argv]),
        "environment": metrics.environment(),
        "load_average": [os.getloadavg()],
        "errors": [row for size in sizes for row in errors(size)],
        "milliseconds": [row for size in sizes for row in times(size, options.rounds)],
    }
    result["load_average"].append(os.getloadavg())
    path = ROOT / "benchmarks" / "results" / "inverse_sqrt.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, max(sizes), ROOT / "docs" / "images" / "inverse_sqrt.png")


def spectrum(size: int, condition: float) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues from 1 to 1 / condition, and random eigenvectors."""
    vectors = np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))[0]
    return np.geomspace(1, 1 / condition, size), vectors


def expected(values: np.ndarray, num_iters: int | None) -> np.ndarray:
    """Return what becomes of eigenvalues: by the paper's recursion, or by the exact root."""
    if num_iters is None:
        return values**-0.5
    norm = np.linalg.norm(values)
    y, z = values / norm, np.ones_like(values)
    for _ in range(num_iters):
        t = (3 - z * y) / 2
        y, z = y * t, t * z
    return z / np.sqrt(norm)


def errors(size: int) -> list[dict[str, Any]]:
    """Return the relative error of every method at every condition and precision."""
    rows = []
    for precision, product in PRODUCTS.items():
        jax.clear_caches()  # of traces with another product
        with mock.patch.object(roots, "multiply", lambda a, b, *_, product=product: product(a, b)):
            for name, (method, num_iters) in METHODS.items():
                if name == "eigh" and precision != "highest":
                    continue  # its products are the least of it
                compiled = jax.jit(lambda a, method=method: method(a))
                for condition in CONDITIONS:
                    values, vectors = spectrum(size, condition)
                    a = (vectors * values) @ vectors.T
                    found = np.asarray(compiled(jnp.asarray((a + a.T) / 2, jnp.float32)), float)
                    wanted = (vectors * expected(values, num_iters)) @ vectors.T
                    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
                    rows.append(
                        {
                            "method": name,
                            "precision": precision,
                            "size": size,
                            "condition": condition,
                            "error": error if np.isfinite(error) else None,
                        }
                    )
        say(f"size {size}, {precision}: errors done")
    return rows


def times(size: int, rounds: int) -> list[dict[str, Any]]:
    """Return milliseconds of value, and of value and gradient; one matrix, and where they are small eight."""
    rows = []
    values, vectors = spectrum(size, 1e4)
    one = jnp.asarray((vectors * values) @ vectors.T, jnp.float32)
    for batch in (1,) if size > 300 else (1, 8):
        a = jnp.broadcast_to(one, (batch, size, size))
        programs = {}
        for name, (method, _) in METHODS.items():
            for what, function in (("value", method), ("both", value_and_pullback(method))):
                compiled = jax.jit(function).lower(a).compile()
                jax.block_until_ready(compiled(a))
                programs[name, what] = compiled
        turns: dict[Any, list[tuple[float, float]]] = {key: [] for key in programs}
        for _ in range(rounds):
            for key, compiled in programs.items():
                start, processor = time.perf_counter(), time.process_time()
                jax.block_until_ready(compiled(a))
                turns[key].append(
                    (1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - processor))
                )
        for (name, what), taken in turns.items():
            wall, processor = zip(*taken, strict=True)
            rows.append(
                {
                    "method": name,
                    "what": {"value": "value", "both": "value and gradient"}[what],
                    "size": size,
                    "batch": batch,
                    "median": statistics.median(wall),
                    "least": min(wall),
                    "most": max(wall),
                    "processor_median": statistics.median(processor),
                    "temporary_bytes": programs[name, what].memory_analysis().temp_size_in_bytes,
                }
            )
        say(f"size {size}, batch {batch}: timed")
    return rows


def draw(result: dict[str, Any], size: int, path: Path) -> None:
    """Draw error against condition at one size, if matplotlib is there: a panel for each precision."""
    if importlib.util.find_spec("matplotlib") is None:
        say("No picture: matplotlib is not installed.")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from train.curves import FAINT, INK

    colours = dict(zip(METHODS, ("#14639e", "#2b8a5b", "#c4622d", "#b08900", FAINT), strict=True))
    figure = Figure(figsize=(10, 4.2), dpi=160)
    panels = figure.subplots(1, len(PRODUCTS), sharex=True, sharey=True)
    figure.subplots_adjust(0.07, 0.14, 0.985, 0.76, wspace=0.08)
    for axes, precision in zip(panels, PRODUCTS, strict=True):
        for name, colour in colours.items():
            points = [
                (row["condition"], row["error"])
                for row in result["errors"]
                if (row["method"], row["precision"], row["size"]) == (name, precision, size)
                and row["error"] is not None
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=colour, lw=2, marker="o", ms=3.5, label=name
                )
        axes.set(xscale="log", yscale="log", ylim=(1e-7, 1e2))
        axes.set_title(precision, fontsize=11, color=INK, loc="left")
        axes.set_xlabel("condition number", fontsize=9.5, color=INK)
        axes.grid(color="#e6e6e6", lw=0.8)
        axes.tick_params(length=0, colors=INK, labelsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc=(0.06, 0.845), ncol=5, frameon=False, fontsize=9.5)
    title = f"Relative error of the inverse square root, {size}x{size}, float32, products as said"
    figure.text(0.02, 0.935, title, fontsize=13, weight="bold", color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
