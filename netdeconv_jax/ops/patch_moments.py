"""Moments of the patches of a convolution's input: the seam between patches and statistics.

What a layer needs is the moments, never the patch matrix; whoever can get them cheaper replaces this. It is
one file because every way of getting them must count the same samples.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from netdeconv_jax.ops.arguments import check_float_dtype, check_floating
from netdeconv_jax.ops.devices import on_explicit_mesh, on_one_device
from netdeconv_jax.ops.gram import gram
from netdeconv_jax.ops.grouping import ColumnGroups, check_count
from netdeconv_jax.ops.moments import (
    AxisName,
    Moments,
    at_least_one_sample,
    centre,
    check_sample_dtype,
    moments,
)
from netdeconv_jax.ops.patches import Window, cut, cut_by_tap
from netdeconv_jax.ops.sampling import Grid, every_nth
from netdeconv_jax.ops.shifted import moments_of_sums, shifted_sums


def patch_moments(
    x: jax.Array,
    geometry: Window,
    groups: ColumnGroups,
    *,
    sampling_stride: int = 1,
    centred: bool = False,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Any = None,
    dtype: Any = None,
    shift: jax.Array | None = None,
    sample_dtype: str | None = None,
) -> Moments:
    """Return the moments of the grouped columns of im2col(x), thinned and pooled over devices.

    Patches lie on a grid of stride `sampling_stride * strides`, padding zeros included. Where only
    channels are whitened (`groups` has no columns per tap, as always with 1x1 kernels), every
    `prod(sampling_stride * strides)`-th pixel of the flattened, unpadded input is a sample, of any rank.
    A grid begins in the corner, so that a coarse one sees the border, and zeros beyond it, in up to every
    patch. One that is `centred` begins half of `sampling_stride` windows from it along each axis, or as far
    as the middle; of pixels only the first is moved there, modulo the step.

    Args:
      x: [batch, *spatial, channels], floating point.
      geometry: of the convolution.
      groups: division of its columns; of `channels * taps` columns or of `channels`.
      sampling_stride: static int >= 1.
      centred: static bool, see above.
      mask: weights >= 0, broadcastable to [batch, *spatial, 1]. A patch weighs as much as the least of the
        pixels that it touches, padding aside.
      axis_name, axis_index_groups: pool over the devices of a mapped axis, as `lax.psum`. The result is
        then exactly that of the whole batch on one device.
      dtype: of the statistics; default `promote_types(float32, x.dtype)`.
      shift: [*stat_shape, width], a constant near the mean, such as a running mean. With it count, mean and
        covariance come of one product and one reduction over devices, not of two each: the same function,
        rounded differently. Where `shift` misses the mean by m deviations the covariance loses m^2 of its
        relative accuracy, in float32 1e-7; 1e-6 at m = 1, 2e-4 at m = 10.
      sample_dtype: as `ops.moments`. With `shift` too it is the distances from it that are rounded, so that
        errors grow with m; samples with weights are then not rounded at all.
    Returns:
      `Moments` with leading axes `groups.stat_shape`.
    Raises:
      ValueError: `x` has another rank than `geometry` asks for, is smaller than the kernel or has no samples;
        `groups` are those of other columns; `mask` or `shift` has another shape; `sampling_stride` < 1, or
        `sample_dtype` is unknown.
      TypeError: `x` or `dtype` is not floating point, `sampling_stride` not an int, `centred` not a bool, or
        `geometry` or `groups` of another type.

    Source: the original FastDeconv. `mask` and pooling over devices are ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> groups = ops.column_groups(channels=3, taps=9, block_size=64)
      >>> ops.patch_moments(jnp.ones((2, 8, 8, 3)), ops.window((3, 3)), groups).cov.shape
      (27, 27)
    """
    x = check_floating("x", x)
    if dtype is None:
        dtype = jnp.promote_types(jnp.float32, x.dtype)
    dtype = check_float_dtype("dtype", dtype)
    check_sample_dtype(sample_dtype)
    if sampled_rows(x.shape, geometry, groups, sampling_stride, centred=centred) == 0:
        raise ValueError(f"`x` has no samples: shape {x.shape}.")
    if mask is not None:
        mask = full_mask(mask, x).astype(dtype)
    if axis_index_groups is not None:
        axis_index_groups = tuple(map(tuple, axis_index_groups))
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    grid, axis = Grid(sampling_stride, centred), (axis_name, axis_index_groups)
    if shift is None:
        result = _own_moments(x, mask, geometry, groups, grid, axis, dtype, sample_dtype)
        if axis_name is not None:
            result = result.psum(axis_name, axis_index_groups)
    else:
        shift = jnp.asarray(shift, dtype)
        if shift.shape != groups.mean_shape:
            raise ValueError(f"`shift` must have shape {groups.mean_shape}, got {shift.shape}.")
        sums = _own_sums(x, mask, shift, geometry, groups, grid, axis, sample_dtype)
        if axis_name is not None:
            sums = lax.psum(sums, axis_name, axis_index_groups=axis_index_groups)
        result = moments_of_sums(sums, shift.reshape(*sums.shape[:-2], groups.width))
    shape = groups.stat_shape
    count = result.count.reshape(shape) if result.count.ndim else result.count
    return Moments(
        jnp.broadcast_to(count, shape),
        result.mean.reshape(*shape, groups.width),
        result.cov.reshape(*shape, groups.width, groups.width),
    )


# `jit`: one program where nobody else compiles, and a trace that equal layers share.
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7), inline=True)
def _own_moments(x, mask, geometry, groups, grid, axis, dtype, sample_dtype):
    """The moments of this device's samples."""
    if _tap_by_tap(x, groups):
        return _moments_by_tap(x, mask, geometry, groups, grid, dtype, sample_dtype)
    rows, weights, axes = _rows(x, mask, geometry, groups, grid, axis)
    return moments(rows, weights, axes=axes, dtype=dtype, sample_dtype=sample_dtype)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7), inline=True)
def _own_sums(x, mask, shift, geometry, groups, grid, axis, sample_dtype):
    """The sums of this device's samples, about `shift`."""
    rows, weights, axes = _rows(x, mask, geometry, groups, grid, axis)
    lead = [n for i, n in enumerate(rows.shape[:-1]) if i not in axes]
    return shifted_sums(rows, weights, shift.reshape(*lead, groups.width), axes, sample_dtype)


def _tap_by_tap(x, groups):
    """Whether there are whiteners for each feature group, and a CPU that is slow at what `_rows` lays out."""
    return (
        groups.feature_groups > 1
        and groups.sets == groups.groups == 1
        and not _pointwise(groups, x.shape[-1])
        and jax.default_backend() == "cpu"
        and not on_explicit_mesh(x)
    )


def _moments_by_tap(x, mask, geometry, groups, grid, dtype, sample_dtype):
    """The same moments, of samples in the order that slices and sums are fast in: channels last."""
    place = grid.of_windows(geometry, x.shape[1:-1])
    taps = cut_by_tap(x, geometry, *place).astype(dtype)  # [taps, batch, *rows, channels]
    axes = tuple(range(1, taps.ndim - 1))
    weights = None
    if mask is not None:
        weights = _patch_weights(x, mask, geometry, place)[None, ..., None]
    count, mean, centred = centre(taps, weights, axes)

    def split(taps):  # [feature groups, batch, *rows, width], columns in (channel, tap) order
        apart = taps.reshape(*taps.shape[:-1], groups.feature_groups, -1)
        apart = jnp.moveaxis(apart, (-2, -1), (0, 1))
        columns = apart.reshape(groups.feature_groups, groups.width, *taps.shape[1:-1])
        return jnp.moveaxis(columns, 1, -1)

    count, mean = count.reshape(()), split(mean).reshape(groups.feature_groups, groups.width)
    scatter = gram(split(centred), weights, axes, sample_dtype)
    return Moments(count, mean, scatter / at_least_one_sample(count))


def _rows(x, mask, geometry, groups, grid, axis):
    """This device's samples, their weights or None, and the axes that hold them."""
    if _pointwise(groups, x.shape[-1]):
        columns, weights = _sampled_pixels(x, mask, *grid.of_pixels(geometry, x.shape[1:-1]), *axis)
    else:
        columns, weights = _sampled_patches(x, mask, geometry, grid)
    rows = groups.split(columns)  # [batch, *rows, feature groups, sets, groups, width]
    axes = (*range(columns.ndim - 1), rows.ndim - 2)
    if weights is not None:
        weights = weights[..., None, None, None]
    return rows, weights, axes


def sampled_rows(
    shape: tuple[int, ...],
    geometry: Window,
    groups: ColumnGroups,
    sampling_stride: int,
    *,
    centred: bool = False,
) -> int:
    """Return how many rows the covariance of `patch_moments` is taken over, all pooled groups together.

    Args:
      shape: of `x`, [batch, *spatial, channels].
      geometry, groups, sampling_stride, centred: as `patch_moments`.
    Raises:
      ValueError, TypeError: as `patch_moments` for what is given here.

    Source: ours.

    Example:
      >>> from netdeconv_jax import ops
      >>> groups = ops.column_groups(channels=128, taps=9, block_size=64)
      >>> ops.sampled_rows((32, 16, 16, 128), ops.window((3, 3)), groups, 3)
      2304
    """
    check_count("sampling_stride", sampling_stride)
    for name, value, kind in (("geometry", geometry, Window), ("groups", groups, ColumnGroups)):
        if not isinstance(value, kind):
            raise TypeError(f"`{name}` must be a {kind.__name__}, got {value!r}.")
    if len(shape) < 2:
        raise ValueError(f"`x` must be [batch, *spatial, channels], got shape {shape}.")
    columns, channels = math.prod((*groups.stat_shape, groups.groups, groups.width)), shape[-1]
    if columns not in (channels, channels * geometry.taps):
        raise ValueError(
            f"`groups` must have {channels} columns, or {channels * geometry.taps} with kernel taps, "
            f"got {columns}."
        )
    if not isinstance(centred, bool):
        raise TypeError(f"`centred` must be a bool, got {centred!r}.")
    grid = Grid(sampling_stride, centred)
    if _pointwise(groups, shape[-1]):
        step, first = grid.of_pixels(geometry, shape[1:-1])
        return -((first - shape[0] * math.prod(shape[1:-1])) // step) * groups.groups
    if len(shape) != geometry.ndim + 2:
        raise ValueError(
            f"`x` must be [batch, *spatial, channels] with {geometry.ndim} spatial axes, got shape {shape}."
        )
    out = geometry.out_shape(shape[1:-1], *grid.of_windows(geometry, shape[1:-1]))
    return shape[0] * math.prod(out) * groups.groups


def _pointwise(groups: ColumnGroups, channels: int) -> bool:
    return groups.feature_groups * groups.sets * groups.groups * groups.width == channels


def flat_position(batch: int, axis_name: AxisName | None, axis_index_groups: Any) -> Any:
    """Return the place in the whole batch of this device's examples, and the size of the whole.

    Both static unless `axis_name` is given, when the first is traced.
    """
    index = np.arange(batch)
    if axis_name is None:
        return index, batch
    device = lax.axis_index(axis_name)
    if axis_index_groups is None:
        return index + device * batch, batch * lax.axis_size(axis_name)
    table = np.zeros(sum(len(g) for g in axis_index_groups), np.int32)
    for members in axis_index_groups:
        table[np.asarray(members)] = np.arange(len(members))
    return index + jnp.asarray(table)[device] * batch, batch * len(axis_index_groups[0])


def _sampled_pixels(x, mask, step, first, axis_name, axis_index_groups):
    batch, channels = x.shape[0], x.shape[-1]
    pixels = math.prod(x.shape[1:-1])
    if axis_name is None and on_one_device(x, *([] if mask is None else [mask])):
        # As one image, which has no holes: a slice, where several need a gather and weights.
        columns = x.reshape(1, batch * pixels, channels)[:, first::step]
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*x.shape[:-1], 1)).reshape(1, batch * pixels)
            mask = mask[:, first::step]
        return columns, mask
    index, _ = flat_position(batch, axis_name, axis_index_groups)
    phase = index * (pixels % step) - first
    columns, weights = every_nth(x.reshape(batch, pixels, channels), step, phase[:, None])
    if weights is not None:
        weights = weights[..., 0]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*x.shape[:-1], 1)).reshape(batch, pixels)
        kept, _ = every_nth(mask, step, phase)
        weights = kept if weights is None else kept * weights
    return columns, weights


def _sampled_patches(x, mask, geometry, grid):
    place = grid.of_windows(geometry, x.shape[1:-1])
    # (channel, tap) order, as the original flattens
    columns = cut(x, geometry, *place, channels_first=True)
    columns = columns.reshape(*columns.shape[: x.ndim - 1], x.shape[-1] * geometry.taps)
    return columns, None if mask is None else _patch_weights(x, mask, geometry, place)


def _patch_weights(x, mask, geometry, place):
    """What each sample weighs: [batch, *rows]."""
    if mask.shape[1:-1] == (1,) * geometry.ndim:
        counts = geometry.out_shape(x.shape[1:-1], *place)
        return jnp.broadcast_to(mask[..., 0], (x.shape[0], *counts))
    mask = jnp.broadcast_to(mask, (*x.shape[:-1], 1))
    touched = cut(mask, geometry, *place, value=jnp.inf)
    least = jnp.min(touched, axis=tuple(range(x.ndim - 1, touched.ndim - 1)))
    # A window of padding alone weighs as much as the heaviest pixel of its image.
    heaviest = jnp.max(mask, axis=tuple(range(1, mask.ndim)), keepdims=True)
    return jnp.where(jnp.isinf(least), heaviest, least)[..., 0]


def full_mask(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Return `mask` with the rank of `x` [batch, *spatial, channels], once it is known to fit its pixels.

    Raises:
      ValueError: `mask` is not broadcastable to [batch, *spatial, 1].
    """
    mask = jnp.asarray(mask)
    if mask.ndim > x.ndim or any(
        m not in (1, n) for m, n in zip(mask.shape[::-1], (1, *x.shape[-2::-1]), strict=False)
    ):
        raise ValueError(
            f"`mask` must be broadcastable to {(*x.shape[:-1], 1)}, one weight per pixel, got {mask.shape}."
        )
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
