"""Section 3.3 on the whole training set: with whitened inputs one step of gradient descent is the solution.

Least squares with one-hot targets, 1/2 E|(x - mu) D w + b - y|^2, at learning rate 1. Everything follows from
second moments, in float64; the roots are the library's. A step is exact in `b` in any case, since the inputs
are centred, so that only `w` is followed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from netdeconv_jax import ops
from train.data.sources import Dataset, Examples

STEPS = 20
EPS = 1e-5  # as the layers have it


def measure(
    load: Callable[[str], Dataset], seed: int, dataset: str = "fashion_mnist"
) -> dict[str, Any]:
    """Return the optimum, and the loss above it after each of `STEPS` steps by kind of whitening."""
    del seed
    data = load(dataset)
    x, y = _vectors(data.train, data), np.eye(data.num_classes)[data.train.labels]
    limits = _largest_rates(x, data)
    mean, target = x.mean(0), y.mean(0)
    x -= mean
    cov, cross = x.T @ x / len(x), x.T @ (y - target) / len(x)
    constant = 0.5 * np.square(y - target).sum(1).mean()

    def loss(weights: np.ndarray) -> float:
        return float(0.5 * (weights * (cov @ weights)).sum() - (weights * cross).sum() + constant)

    best = np.linalg.solve(cov, cross)
    start = np.zeros(cross.shape)  # the same loss whatever whitens
    curves = {}
    for name, (whitener, rate) in _whiteners(cov).items():
        w, above = start, []
        for _ in range(STEPS + 1):
            above.append(loss(whitener @ w) - loss(best))
            gradient = whitener.T @ (cov @ (whitener @ w) - cross)
            w = w - rate * gradient
        curves[name] = {"rate": rate, "loss_above_optimum": above}
    test = _vectors(data.test, data) - mean
    outputs = test @ best + target
    return {
        "dataset": dataset,
        "optimum": {
            "train_loss": loss(best),
            "test_loss": float(
                0.5 * np.square(outputs - np.eye(data.num_classes)[data.test.labels]).sum(1).mean()
            ),
            "test_accuracy": float((outputs.argmax(1) == data.test.labels).mean()),
        },
        "condition": float(np.linalg.cond(cov)),
        "largest_rates": limits,
        "curves": curves,
    }


def _largest_rates(x: np.ndarray, data: Dataset) -> dict[str, float]:
    """Return from which rate on plain gradient descent diverges, by the scale of pixels and loss.

    It is 2 / (the largest eigenvalue of the Hessian), which is E x x' with a 1 behind each x for the bias.
    "mean squared error" has pixels from 0 to 1 and the mean over the outputs of the squared distance, not
    half of its sum: what a user of PyTorch has who changes nothing.
    """
    pixels = (x * data.deviation[0] + data.mean[0]) / 255
    return {
        "standardized, half squared": 2 / _largest(x),
        "mean squared error": 2 / (2 / data.num_classes * _largest(pixels)),
    }


def _largest(x: np.ndarray) -> float:
    second, mean = x.T @ x / len(x), x.mean(0)
    hessian = np.block([[second, mean[:, None]], [mean[None], np.ones((1, 1))]])
    return float(np.linalg.eigvalsh(hessian)[-1])


def _vectors(examples: Examples, data: Dataset) -> np.ndarray:
    images = np.asarray(examples.images, np.float64)
    scaled = (images - np.asarray(data.mean)) / np.asarray(data.deviation)
    return scaled.reshape(len(images), -1)


def _whiteners(cov: np.ndarray) -> dict[str, tuple[np.ndarray, float]]:
    """Return D and the learning rate by name; without D the largest rate that every direction can bear."""
    with jax.enable_x64():
        exact = jnp.asarray(cov)
        ridged = exact + EPS * jnp.eye(len(cov))
        roots = {
            "exact root": ops.eigh(exact),
            "5 iterations": ops.newton_schulz(ridged, num_iters=5),
            "15 iterations": ops.newton_schulz(ridged, num_iters=15),
        }
        roots = {name: (np.asarray(root), 1.0) for name, root in roots.items()}
    return roots | {"none": (np.eye(len(cov)), 1.0 / float(np.linalg.eigvalsh(cov)[-1]))}
