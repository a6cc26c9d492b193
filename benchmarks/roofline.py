"""The time that a training step must take at least: its flops and bytes against what a device can do.

Counted per layer, and the larger of the two times taken. Bytes are those of activations that are read and
written once for each use that cannot be fused with another. No launch of a kernel costs anything here, so
that chains of small products (the root) come out too cheap.
"""

import dataclasses
import math
from typing import Any

from netdeconv_jax.models.summary import LayerRow

PARTS = ("convolution", "statistics", "root", "fold", "batch_norm")
PASSES = 3  # a product costs one of its size forward and two backward


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device does in a second: flops of products, by what is multiplied, and bytes."""

    bfloat16: float
    tf32: float
    float32: float
    bytes: float


# Data sheets give 989e12, 495e12 (dense, tensor cores), 67e12 (outside of them) and 4.8e12 for an H200; these
# are what large products are assumed to reach.
H200 = Rates(bfloat16=400e12, tf32=200e12, float32=50e12, bytes=4e12)


def least_seconds(rows: list[LayerRow], rates: Rates, *, itemsize: int = 2) -> dict[str, float]:
    """Return the least seconds of a step's parts: convolution, statistics, root, fold, batch norm.

    Convolutions are those of a network in bfloat16; statistics and roots are as their spec says.

    Args:
      rows: of `models.summary.layer_table`, which holds the batch.
      rates: of the device.
      itemsize: bytes of an activation.
    """
    total: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for row in rows:
        for part, (flops, moved) in work(row, itemsize).items():
            total[part] += max(flops / _rate(part, row, rates), moved / rates.bytes)
    return total


def _rate(part: str, row: LayerRow, rates: Rates) -> float:
    if part == "convolution":
        return rates.bfloat16
    if row.spec is None:
        return rates.float32
    if part == "statistics" and row.spec.sample_dtype is not None:
        return rates.bfloat16
    if part == "root" and getattr(row.spec.root, "precision", "highest") != "highest":
        return rates.tf32
    return rates.float32


def work(row: LayerRow, itemsize: int = 2) -> dict[str, tuple[float, float]]:
    """Return the (flops, bytes) of each part of a layer in a step, forward and backward."""
    read, written = math.prod(row.in_shape) * itemsize, math.prod(row.out_shape) * itemsize
    if row.kind == "batch_norm":
        # Forward: x for the moments, x again, y. Backward: x and dy for two sums, both again, dx.
        return {"batch_norm": (0.0, 8.0 * read)}
    if not row.multiply_adds:
        return {}
    # x and y forward; x and dy for the kernel's gradient; dy and dx for the input's.
    parts = {"convolution": (2.0 * PASSES * row.multiply_adds, 3.0 * (read + written))}
    if row.spec is not None:
        width = (
            row.block * max(1, row.kernel_size) ** 2 if row.spec.whiten == "patches" else row.block
        )
        # The rows that the covariance sees, read forward and backward, and their gradient written.
        sampled = 3.0 * itemsize * row.covariance / width
        parts |= {
            "statistics": (2.0 * 2 * row.covariance, sampled),  # `ops.gram`: one product each way
            "root": (2.0 * PASSES * row.root, 0.0),
            "fold": (2.0 * PASSES * row.fold, 0.0),
        }
    return parts


def table(found: dict[str, Any]) -> str:
    """Return the parts and their sum in milliseconds, in one line."""
    cells = [f"{part} {1e3 * seconds:.1f}" for part, seconds in found.items()]
    return ", ".join(cells) + f": {1e3 * sum(found.values()):.1f} ms"
