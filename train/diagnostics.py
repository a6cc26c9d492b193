"""What whitening does to each layer's covariance, in numbers, on the host in float64.

With X the patches of a batch, Cov their covariance and D the whitener, a layer passes on (X - mu) D, whose
covariance is D' Cov D: the identity if D is the inverse square root, far from it if the truncated iteration
leaves directions unwhitened. `moments` are those that the library stores on request:

  _, updates = model.apply(variables, x, train=True, mutable=["moments", "batch_stats"])
  figures = layer_diagnostics(updates["moments"], updates["batch_stats"])

The share of *time* of a layer cannot be measured from inside one compiled program, whose operations XLA
merges and reorders; its share of the whitening's arithmetic follows from shapes and is reported instead.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

SOFT_RIDGE = 1e-2  # of ||Cov||_F: what five iterations leave less than half whitened

_COLUMNS = {
    "dim": ("d", "{:d}"),
    "groups": ("groups", "{:d}"),
    "rows": ("rows", "{:,.0f}"),
    "condition_before": ("cond before", "{:.1e}"),
    "condition_after": ("cond after", "{:.1e}"),
    "whitener_norm": ("||D||_2", "{:.3g}"),
    "soft_share": ("under ridge", "{:.0%}"),
    "flops_share": ("flops", "{:.1%}"),
}


def layer_diagnostics(
    moments: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    eps: float = 1e-5,
    root_products: int = 12,
) -> dict[str, dict[str, Any]]:
    """Return figures of every whitened layer by its path, `layer1/Conv_0`.

    `condition_before` is that of A = Cov + eps I, `condition_after` that of D' A D; with several groups that
    have a whitener each, the worst. D is the one in `batch_stats`, the running average that evaluation uses,
    while Cov is of one batch. `soft_share` is the share of eigenvalues of A below 1e-2 ||A||_F, which the
    default of five iterations leaves mostly as they are; `whitener_norm` the spectral norm of D; `rows` the
    samples that the covariance saw (of the group that saw fewest); `flops_share` the layer's part of the
    products that all layers' covariances and roots take. Where something is not finite, `finite` is False
    and what depends on it is None.

    Args:
      moments: by layer `count` [*stat_shape] or [], `mean` [*stat_shape, d], `cov` [*stat_shape, d, d].
      batch_stats: by layer, at the same place, `whitener` [*stat_shape, d, d]. Layers without moments, such
        as batch norm's, are left out.
      eps: ridge of the layers.
      root_products: matrix products of an inverse root: 12 for five Newton-Schulz iterations.
    Raises:
      ValueError: a layer of `moments` has no whitener of its shape in `batch_stats`.
    """
    whiteners = {path: leaves.get("whitener") for path, leaves in layers_of(batch_stats)}
    figures, flops = {}, {}
    for path, leaves in layers_of(moments):
        if "cov" not in leaves:
            continue
        cov, count = np.asarray(leaves["cov"], np.float64), np.asarray(leaves["count"], np.float64)
        whitener = whiteners.get(path)
        if whitener is None or np.shape(whitener) != cov.shape:
            have = None if whitener is None else np.shape(whitener)
            raise ValueError(
                f"`batch_stats` must hold a whitener of shape {cov.shape} at {path!r}, got {have}."
            )
        figures[path] = _diagnose(cov, np.asarray(whitener, np.float64), count, eps)
        dim, groups, rows = cov.shape[-1], figures[path]["groups"], figures[path]["rows"] or 0.0
        flops[path] = 2.0 * groups * (rows * dim**2 + root_products * dim**3)
    total = sum(flops.values())
    for path, share in flops.items():
        figures[path]["flops_share"] = share / total
    return figures


def layer_names(batch_stats: Mapping[str, Any]) -> list[str]:
    """Return the paths of the layers that have running statistics."""
    return [path for path, _ in layers_of(batch_stats)]


def diagnostic_rows(
    step: int, figures: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of `diagnostics.jsonl`: one a layer."""
    for path, values in figures.items():
        yield {"step": step, "layer": path, **values}


def diagnostic_scalars(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return TensorBoard's scalars: conditions as powers of ten, since its axis is linear."""
    scalars = {}
    for path, values in figures.items():
        for name in ("condition_before", "condition_after"):
            if values[name] is not None:
                scalars[f"whitening/log10_{name}/{path}"] = math.log10(values[name])
        for name in ("whitener_norm", "soft_share", "finite"):
            if values[name] is not None:
                scalars[f"whitening/{name}/{path}"] = float(values[name])
    return scalars


def format_table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one line a layer under a line of headings; `-` stands for what is not finite."""
    lines = [["layer", *(heading for heading, _ in _COLUMNS.values())]]
    for path, values in figures.items():
        cells = (
            "-" if values[name] is None else form.format(values[name])
            for name, (_, form) in _COLUMNS.items()
        )
        lines.append([path, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _diagnose(
    cov: np.ndarray, whitener: np.ndarray, count: np.ndarray, eps: float
) -> dict[str, Any]:
    dim = cov.shape[-1]
    figures: dict[str, Any] = {"dim": dim, "groups": math.prod(cov.shape[:-2])}
    figures["rows"] = float(count.min()) if np.isfinite(count).all() else None
    sound, applied = np.isfinite(cov).all(), np.isfinite(whitener).all()
    figures["finite"] = bool(sound and applied and figures["rows"] is not None)
    figures |= dict.fromkeys(("condition_before", "condition_after", "soft_share", "whitener_norm"))
    if applied:
        # By the eigenvalues of D' D: several times as fast as by singular values.
        squares = np.linalg.eigvalsh(np.swapaxes(whitener, -1, -2) @ whitener)
        figures["whitener_norm"] = float(np.sqrt(max(squares.max(), 0.0)))
    if sound:
        ridged = (cov + np.swapaxes(cov, -1, -2)) / 2 + eps * np.eye(dim)
        values = np.linalg.eigvalsh(ridged)
        norm = np.sqrt(np.square(values).sum(-1, keepdims=True))
        figures["soft_share"] = float((values < SOFT_RIDGE * norm).mean())
        figures["condition_before"] = _condition(values)
        if applied:
            after = np.swapaxes(whitener, -1, -2) @ ridged @ whitener
            values = np.linalg.eigvalsh((after + np.swapaxes(after, -1, -2)) / 2)
            figures["condition_after"] = _condition(values)
    return figures


def _condition(values: np.ndarray) -> float | None:
    """Largest by smallest eigenvalue, [..., d] in rising order; at most 1e16, what float64 can tell apart."""
    largest, smallest = values[..., -1], values[..., 0]
    if (largest <= 0).any():
        return None
    return float((largest / np.maximum(smallest, 1e-16 * largest)).max())


def layers_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each dict that holds arrays, with its path; "" for a lone layer."""
    leaves = {name: leaf for name, leaf in tree.items() if not isinstance(leaf, Mapping)}
    if leaves:
        yield prefix, leaves
    for name, inner in tree.items():
        if isinstance(inner, Mapping):
            yield from layers_of(inner, f"{prefix}/{name}" if prefix else name)
