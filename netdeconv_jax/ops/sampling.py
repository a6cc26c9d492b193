"""Which patches are samples: a grid of windows, or every n-th pixel of a flattened batch.

Pixels are taken without ever merging the batch axis.

The original thins the rows of a flattened [batch * pixels, channels] matrix. Merging the batch axis with
another is not possible where it is sharded over an explicit mesh, and strides of a sharded axis move data
between devices; and a device that holds a part of the batch must know where in the whole its rows begin.
So every image is thinned by itself, from the phase at which the flat count reaches it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from netdeconv_jax.ops.grouping import check_count
from netdeconv_jax.ops.patches import Window


def every_nth(
    x: jax.Array, step: int, phase: np.ndarray | jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Return the pixels whose place in a flat count is a multiple of `step`.

    Args:
      x: [batch, pixels, *rest].
      step: static int >= 1.
      phase: int, a scalar or of a shape broadcastable to [batch, *rest]: the place of each image's first
        pixel, of any size or modulo `step`.
    Returns:
      The pixels, [batch, ceil(pixels / step), *rest], zero where an image has one fewer than another; and
      float weights broadcastable to them, 1 for a pixel and 0 for a hole, or None if there is no hole.

    Raises:
      ValueError: `step` < 1.
      TypeError: `step` is not an int.

    Source: the row sampling of the original FastDeconv (1x1 kernels) and ChannelDeconv.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from netdeconv_jax import ops
      >>> x = jnp.arange(10.0).reshape(2, 5)  # two images of five pixels; every third of all ten
      >>> pixels, weights = ops.every_nth(x, 3, np.array([0, 5]))
      >>> pixels.tolist(), weights
      ([[0.0, 3.0], [6.0, 9.0]], None)
    """
    check_count("step", step)
    if step == 1:
        return x, None
    if np.ndim(phase) == 0:
        phase = (phase if isinstance(phase, jax.Array) else np.asarray(phase)).reshape(
            (1,) * (x.ndim - 1)
        )
    offset = (-phase) % step
    if isinstance(offset, np.ndarray) and not offset.any():
        return x[:, ::step], None
    pixels = x.shape[1]
    length = -(-pixels // step)
    place = np.arange(length).reshape(1, length, *[1] * (x.ndim - 2)) * step + offset[:, None]
    picked = jnp.take_along_axis(x, jnp.asarray(place), axis=1, mode="fill", fill_value=0)
    present = place < pixels
    if isinstance(present, np.ndarray) and present.all():
        return picked, None
    return picked, jnp.asarray(present, jnp.promote_types(jnp.float32, x.dtype))


class Grid(NamedTuple):
    """Which patches are samples: `patch_moments`."""

    stride: int
    centred: bool

    def of_windows(
        self, geometry: Window, spatial: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return how many pixels apart samples are, and how far the first is from the corner."""
        counts = geometry.out_shape(spatial, geometry.strides)
        strides = tuple(s * self.stride for s in geometry.strides)
        return strides, self._first(counts, geometry.strides)

    def of_pixels(self, geometry: Window, spatial: tuple[int, ...]) -> tuple[int, int]:
        """Return the same of the flattened pixels; of another rank than the kernel's none is centred."""
        step, first = math.prod(s * self.stride for s in geometry.strides), 0
        if len(spatial) == geometry.ndim and math.prod(spatial):
            counts = [-(-n // s) for n, s in zip(spatial, geometry.strides, strict=True)]
            first = int(np.ravel_multi_index(self._first(counts, geometry.strides), spatial))
        return step, first % step

    def _first(self, counts, strides) -> tuple[int, ...]:
        if not self.centred:
            return (0,) * len(counts)
        halves = (min(self.stride // 2, (n - 1) // 2) for n in counts)  # of a small map its middle
        return tuple(half * s for half, s in zip(halves, strides, strict=True))
