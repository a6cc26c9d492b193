"""Time, memory and compilation of `ops.patch_moments`, value and gradient; and what cheaper products cost.

  python -m benchmarks.patch_moments [--rounds=9]

Ways of taking them take turns. The errors of `WhiteningSpec.mixed()` and of its parts are those of
covariance, whitener and its gradient against the default's, on crops of two photos and behind a convolution
with random weights and a ReLU; TF32 is emulated, since a CPU has none. Needs scikit-learn for the photos.
Writes benchmarks/results/patch_moments.json; runs without TFDS, on a CPU or an accelerator. Processor time
counts all threads; on an accelerator it is the clock that tells.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.inverse_sqrt import tf32
from benchmarks.stages import value_and_pullback
from benchmarks.step_time import spread
from netdeconv_jax import WhiteningSpec, ops
from netdeconv_jax.ops import roots
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
CHEAPER = {
    "samples in bfloat16": WhiteningSpec(sample_dtype="bfloat16"),
    "root as a polynomial": WhiteningSpec(method="chebyshev"),
    "the same, in TF32": WhiteningSpec(method="chebyshev", precision="high"),
    "mixed": WhiteningSpec.mixed(),
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
        "errors": errors(),
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
        wall, processor = map(list, zip(*taken, strict=True))
        for kind, values in (("wall", wall), ("processor", processor)):
            found[name][f"{kind}_milliseconds"] = spread(values)
    layer = {
        "input": shape,
        "kernel": kernel,
        "strides": strides,
        "block_size": block,
        "sampling_stride": stride,
    }
    say(layer, found)
    return {**layer, "ways": found}


def errors() -> list[dict[str, Any]]:
    """Return the relative errors, in the Frobenius norm, of every cheaper spec on every input."""
    rows = []
    for name, images in inputs().items():
        for dtype in ("float32", "bfloat16"):
            x = images.astype(dtype)
            exact = figures(x, WhiteningSpec())
            jax.clear_caches()  # of traces with another product
            with mock.patch.object(roots, "multiply", _as_on_a_gpu):
                found = {spec_name: figures(x, spec) for spec_name, spec in CHEAPER.items()}
            jax.clear_caches()
            for spec_name, arrays in found.items():
                off = {
                    key: float(np.linalg.norm(arrays[key] - wanted) / np.linalg.norm(wanted))
                    for key, wanted in exact.items()
                }
                print(name, dtype, spec_name, *(f"{error:.1e}" for error in off.values()), sep=", ")
                rows.append({"input": name, "dtype": dtype, "spec": spec_name, **off})
    return rows


def figures(x: jax.Array, spec: WhiteningSpec) -> dict[str, np.ndarray]:
    """Return covariance and whitener of 3x3 patches, every third, and a gradient of the whitener."""
    groups = ops.column_groups(channels=x.shape[-1], taps=9, block_size=64)
    cotangent = jax.random.normal(jax.random.key(2), (groups.width, groups.width))

    def value(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        found = ops.patch_moments(
            x, ops.window((3, 3)), groups, sampling_stride=3, sample_dtype=spec.sample_dtype
        )
        whitener = spec.root(found.cov + spec.eps * jnp.eye(groups.width))
        return (whitener * cotangent).sum(), (found.cov, whitener)

    (_, (cov, whitener)), gradient = jax.value_and_grad(value, has_aux=True)(x)
    found = {"covariance": cov, "whitener": whitener, "gradient": gradient}
    return {key: np.asarray(array, float) for key, array in found.items()}


def inputs() -> dict[str, jax.Array]:
    """Return crops of two photos, standardized, and the same behind a layer."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    crops = []
    for photo in load_sample_images().images:
        for top, left in rng.integers(0, np.array(photo.shape[:2]) - 32, (64, 2)):
            crops.append(photo[top : top + 32, left : left + 32] / 255)
    pixels = np.stack(crops)
    x = jnp.asarray((pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2)), jnp.float32)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 64)) / 5
    return {"pixels": x, "behind a ReLU": jax.nn.relu(ops.window((3, 3)).convolve(x, kernel))}


def _as_on_a_gpu(a: jax.Array, b: jax.Array, precision: str = "highest") -> jax.Array:
    return jnp.matmul(a, b, precision="highest") if precision == "highest" else tf32(a, b)


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
