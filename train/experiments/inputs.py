"""Measurements of images: their patches' covariance and their sparsity, before and after whitening."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from netdeconv_jax import analysis, ops
from train.data.sources import Dataset
from train.experiments import images

EPS = 1e-5
WINDOW = ops.window((3, 3), padding="VALID")
PIXELS = (
    4_000_000  # at most, of the images that are measured: beyond, the third digit does not change
)
Load = Callable[[str], Dataset]


def whiteners(cov: Any) -> dict[str, np.ndarray]:
    """Return D by its root: five iterations as in most layers, fifteen as in stems, and the exact one."""
    ridged = jnp.asarray(cov) + EPS * jnp.eye(len(cov), dtype=cov.dtype)
    return {
        "5 iterations": np.asarray(ops.newton_schulz(ridged, num_iters=5)),
        "15 iterations": np.asarray(ops.newton_schulz(ridged, num_iters=15)),
        "exact root": np.asarray(ops.eigh(ridged)),
    }


def covariance(load: Load, seed: int, dataset: str) -> dict[str, Any]:
    """Return the covariance of the 3x3 patches that a first layer sees, and what whitening leaves of it."""
    del seed
    x = _images(load, dataset)
    with jax.enable_x64():
        cov = np.asarray(_moments(x).cov, np.float64)
        roots = whiteners(cov)
    figures: dict[str, Any] = {"dataset": dataset, "images": len(x), "channels": x.shape[-1]}
    states = {"before": cov} | {
        name: analysis.whitened_covariance(cov, root) for name, root in roots.items()
    }
    figures["states"] = {name: _state(state, x.shape[-1]) for name, state in states.items()}
    return figures


def _state(cov: np.ndarray, channels: int) -> dict[str, Any]:
    blocks = analysis.block_correlation(cov, channels)
    off = ~np.eye(len(cov), dtype=bool)
    return {
        "covariance": rounded(cov),
        "spectrum": rounded(analysis.spectrum(cov)),
        "condition": analysis.condition(cov),
        "correlation": float(np.abs(analysis.correlation(cov))[off].mean()),
        "pixels": blocks.pixels,
        "channels": blocks.channels,
        "across": blocks.across,
    }


def rows(load: Load, seed: int, dataset: str) -> dict[str, Any]:
    """Return the rows of D that belong to the middle pixel of each channel, for kernels of three sizes."""
    del seed
    x = _images(load, dataset)
    channels, found = x.shape[-1], {}
    for size in (3, 5, 7):
        window = ops.window((size, size), padding="VALID")
        groups = ops.column_groups(channels, window.taps, channels)
        with jax.enable_x64():
            few = jnp.asarray(x[: max(1, len(x) * 9 // window.taps)], jnp.float64)
            cov = np.asarray(ops.patch_moments(few, window, groups, sampling_stride=2).cov)
            roots = whiteners(cov)
        for name, root in roots.items():
            filters = analysis.whitening_filters(root, (size, size), channels, groups)
            middle = filters[..., size // 2, size // 2]
            own = np.stack([middle[:, :, c, c] for c in range(channels)], -1)
            measured = analysis.centre_surround(own)
            found[f"{size}x{size}, {name}"] = {
                "share": measured.share,
                "balance": measured.balance,
                "planes": rounded(np.moveaxis(own, -1, 0)),
            }
    return {"dataset": dataset, "images": len(x), "rows": found}


def sparsity(load: Load, seed: int, dataset: str) -> dict[str, Any]:
    """Return how sparse the images of a dataset are, centred and deconvolved."""
    del seed
    x = _images(load, dataset)
    return {"dataset": dataset, "images": len(x)} | _sparsity(x)


def photo(load: Load, seed: int) -> dict[str, Any]:
    """Return the same of a single photo that may be shown, and the four pictures of figure 3."""
    del load, seed
    pixels = images.photo()
    x = (pixels[None] / 255.0 - pixels.mean((0, 1)) / 255.0) / pixels.std((0, 1)) * 255
    x = x.astype(np.float32)
    moments = _moments(x)
    root = whiteners(np.asarray(moments.cov))["15 iterations"]
    sharp = np.asarray(_deconvolved(x, moments.mean, root))[0]
    pictures = {
        "input": pixels / 255,
        "|centred input|": images.stretched(np.abs(x[0])),
        "deconvolved": images.stretched(sharp),
        "|deconvolved|": images.stretched(np.abs(sharp)),
    }
    packed = {name: images.pack(picture) for name, picture in pictures.items()}
    return {"photo": images.PHOTO, "pictures": packed} | _sparsity(x)


def _sparsity(x: np.ndarray) -> dict[str, Any]:
    moments = _moments(x)
    centred = x - x.mean((0, 1, 2))
    states = {"centred": centred} | {
        name: np.asarray(_deconvolved(x, moments.mean, root))
        for name, root in whiteners(np.asarray(moments.cov)).items()
    }
    return {"states": {name: describe(state) for name, state in states.items()}}


def describe(x: Any) -> dict[str, Any]:
    """Return how sparse values are: kurtosis, Hoyer's sparseness and a histogram."""
    density, edges = analysis.standardized_histogram(x)
    return {
        "kurtosis": analysis.kurtosis(x),
        "hoyer": analysis.hoyer(x),
        "density": rounded(density),
        "edges": rounded(edges),
    }


def _images(load: Load, dataset: str) -> np.ndarray:
    data = load(dataset)
    height, width = data.train.images.shape[1:3]
    return images.normalized(data.train, data, max(1, PIXELS // (height * width)))


def _groups(channels: int) -> ops.ColumnGroups:
    return ops.column_groups(channels, WINDOW.taps, channels)


def _moments(x: np.ndarray) -> ops.Moments:
    x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    columns = jnp.asarray(x, jnp.float64 if x64 else jnp.float32)
    return ops.patch_moments(columns, WINDOW, _groups(x.shape[-1]))


def _deconvolved(x: np.ndarray, mean: Any, root: np.ndarray) -> jax.Array:
    return analysis.deconvolved(x, mean, root, WINDOW, _groups(x.shape[-1]))


def rounded(values: Any) -> Any:
    """Return nested lists with five digits, which is more than a picture shows."""
    values = np.asarray(values, np.float64)
    return (
        [float(f"{v:.5g}") for v in values]
        if values.ndim == 1
        else [rounded(row) for row in values]
    )
