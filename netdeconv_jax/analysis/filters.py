"""Whiteners seen as filters: every column of D is a small image that is slid over the input."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from netdeconv_jax import ops
from netdeconv_jax.ops.arguments import check_floating


def whitening_filters(
    whitener: Any, kernel_size: tuple[int, int], channels: int, groups: ops.ColumnGroups
) -> np.ndarray:
    """Return the filters whose responses are the whitened input: the columns of D, laid out as images.

    Args:
      whitener: D of a layer, shape [*groups.stat_shape, width, width].
      kernel_size: of the layer.
      channels: of its input.
      groups: of its columns, as `ops.column_groups` divides them.
    Returns:
      float64 [*kernel_size, channels, channels, *kernel_size]: the filter [*kernel_size, channels] of every
      channel and tap.
    Raises:
      ValueError: `groups` are those of several feature groups or of other columns, or `whitener` has another
        shape than theirs.

    Source: ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> from netdeconv_jax.analysis import whitening_filters
      >>> groups = ops.column_groups(channels=1, taps=9, block_size=1)
      >>> filters = whitening_filters(jnp.eye(9), (3, 3), 1, groups)
      >>> filters[:, :, 0, 0, 1, 1].tolist()
      [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    taps = math.prod(kernel_size)
    if groups.feature_groups > 1:
        raise ValueError(f"`groups` must have one feature group, got {groups.feature_groups}.")
    _check_columns(groups, channels, taps)
    whitener = jnp.asarray(whitener)
    # One output for each column: the identity, which folding turns into the columns of D.
    outputs = jnp.eye(channels * taps, dtype=whitener.dtype)
    kernel = outputs.reshape(channels, *kernel_size, -1).transpose(1, 2, 0, 3)
    mean = jnp.zeros(groups.mean_shape, whitener.dtype)
    folded, _ = ops.fold(kernel, None, mean, whitener, groups)
    return np.asarray(folded, np.float64).reshape(*kernel_size, channels, channels, *kernel_size)


def deconvolved(
    x: Any, mean: Any, whitener: Any, geometry: ops.Window, groups: ops.ColumnGroups
) -> jax.Array:
    """Return an input as the layer's kernel sees it, (X - mu) D at the middle tap: an image for each channel.

    Args:
      x: [batch, height, width, channels].
      mean, whitener: of the layer, shapes `groups.mean_shape` and [*groups.mean_shape, width].
      geometry: of the layer; its kernel has a middle.
      groups: of its columns.
    Returns:
      [batch, *out, channels].
    Raises:
      ValueError: a side of the kernel is even, `x` has another rank than `geometry` asks for, `groups` are of
        other columns than those of its channels, or `mean` or `whitener` has another shape than theirs.
      TypeError: `x` is not floating point.

    Source: Ye et al. 2020, figures 3 and 9.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> from netdeconv_jax.analysis import deconvolved
      >>> groups, window = ops.column_groups(channels=2, taps=9, block_size=2), ops.window((3, 3))
      >>> x = jnp.ones((1, 4, 4, 2))
      >>> bool((deconvolved(x, jnp.zeros(18), jnp.eye(18), window, groups) == x).all())
      True
    """
    if any(side % 2 == 0 for side in geometry.kernel_size):
        raise ValueError(
            f"`geometry` must have a kernel with a middle, got {geometry.kernel_size}."
        )
    x, whitener = check_floating("x", x), jnp.asarray(whitener)
    if x.ndim != geometry.ndim + 2:
        raise ValueError(
            f"`x` must be [batch, *spatial, channels] with {geometry.ndim} spatial axes, got shape {x.shape}."
        )
    channels = x.shape[-1]
    _check_columns(groups, channels, geometry.taps)
    middle = tuple(side // 2 for side in geometry.kernel_size)
    kernel = jnp.zeros(
        (*geometry.kernel_size, channels // groups.feature_groups, channels), whitener.dtype
    )
    kernel = kernel.at[middle].set(jnp.tile(jnp.eye(kernel.shape[-2]), groups.feature_groups))
    kernel, bias = ops.fold(kernel, None, jnp.asarray(mean), whitener, groups)
    y = geometry.convolve(x, kernel, feature_group_count=groups.feature_groups)
    return y + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _check_columns(groups: ops.ColumnGroups, channels: int, taps: int) -> None:
    """Raise unless `groups` divide the columns of a layer's patches, or its channels alone."""
    columns = groups.feature_groups * groups.sets * groups.groups * groups.width
    if columns not in (channels, channels * taps):
        raise ValueError(
            f"`groups` must divide the {channels * taps} columns of {channels} channels and {taps} taps, or "
            f"the channels alone, got {groups} of {columns}."
        )


@dataclasses.dataclass(frozen=True)
class CentreSurround:
    """Whether filters have a centre of one sign and a surround of the other.

    Attributes:
      share: of the filters whose largest weight by magnitude is the middle one, while the rest sums to the
        other sign. For random normal 3x3 filters it is 1/18.
      balance: the median over all filters of -(sum of the surround) / centre: 1 is blind to flat regions, 0
        has no surround, below 0 both have one sign.

    Source: ours, for the claim of the paper's later abstract.

    Example:
      >>> import numpy as np
      >>> from netdeconv_jax.analysis import centre_surround
      >>> on = np.full((3, 3, 1), -1.0)
      >>> on[1, 1] = 8.0
      >>> centre_surround(on)
      CentreSurround(share=1.0, balance=1.0)
    """

    share: float
    balance: float


def centre_surround(filters: Any) -> CentreSurround:
    """Measure filters [height, width, n] with a middle; either sign of the centre counts.

    Args:
      filters: odd height and width.
    Raises:
      ValueError: other axes, or no middle.

    Source: ours.

    Example:
      >>> import numpy as np
      >>> from netdeconv_jax.analysis import centre_surround
      >>> centre_surround(np.ones((3, 3, 2)))
      CentreSurround(share=0.0, balance=-8.0)
    """
    filters = np.asarray(filters, np.float64)
    if filters.ndim != 3 or filters.shape[0] % 2 == 0 or filters.shape[1] % 2 == 0:
        raise ValueError(f"`filters` must be [odd, odd, n], got shape {filters.shape}.")
    height, width, count = filters.shape
    centre = filters[height // 2, width // 2]
    flat = filters.reshape(-1, count)
    surround = flat.sum(0) - centre
    largest = np.abs(flat).argmax(0) == height * width // 2
    opposed = centre * surround < 0
    balance = -surround / np.where(centre == 0, np.finfo(np.float64).tiny, centre)
    return CentreSurround(
        share=float((largest & opposed).mean()), balance=float(np.median(balance))
    )
