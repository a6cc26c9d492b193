"""Whitening folded into the kernel: `(X - mu) D w + b = X (D w) + (b - mu D w)`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from netdeconv_jax.ops.arguments import as_array, check_float_dtype, check_floating
from netdeconv_jax.ops.devices import on_one_device, whole
from netdeconv_jax.ops.grouping import ColumnGroups
from netdeconv_jax.ops.roots import check_precision


def fold(
    kernel: jax.Array,
    bias: jax.Array | None,
    mean: jax.Array,
    whitener: jax.Array,
    groups: ColumnGroups,
    *,
    dtype: Any = None,
    precision: str = "highest",
) -> tuple[jax.Array, jax.Array]:
    """Return the kernel and bias of the plain convolution that equals whitening and convolving.

    The product is formed in the precision of the statistics and rounded once; the bias is formed from the
    *rounded* kernel, because the rounding would otherwise become a bias that grows with the mean.

    Args:
      kernel: [*kernel_size, channels / feature_group_count, features], floating point.
      bias: [features], or None for zero.
      mean: [*groups.stat_shape, width].
      whitener: [*groups.stat_shape, width, width].
      groups: of all columns (channel, tap), or of the channels alone, whose one whitener then serves
        every kernel tap.
      dtype: of the folded kernel; default that of `kernel`.
      precision: of the product of whitener and kernel, as `ops.newton_schulz`. The bias's is the highest.
    Returns:
      A kernel of the same shape in `dtype`, and a bias [features] in the dtype of the statistics; whole on
      each device of an explicit mesh, however a kernel with spatial axes was sharded.
    Raises:
      ValueError: the kernel has fewer than two axes, other columns than `groups`, or features that its
        feature groups do not divide; `bias`, `mean` or `whitener` has another shape than these; `precision`
        is unknown.
      TypeError: `kernel`, `whitener` or `dtype` is not floating point, or `groups` is no `ColumnGroups`.

    Source: Ye et al. 2020, section 3.4; the original code multiplies the kernel in the same way.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> groups = ops.column_groups(channels=1, taps=1, block_size=1)
      >>> k, b = ops.fold(jnp.ones((1, 1, 1)), None, jnp.array([3.0]), jnp.array([[0.5]]), groups)
      >>> k.item(), b.item()
      (0.5, -1.5)
    """
    if not isinstance(groups, ColumnGroups):
        raise TypeError(f"`groups` must be a ColumnGroups, got {groups!r}.")
    kernel = check_floating("kernel", kernel)
    mean, whitener = as_array(mean), check_floating("whitener", whitener)
    bias = None if bias is None else as_array(bias)
    dtype = kernel.dtype if dtype is None else check_float_dtype("dtype", dtype)
    if kernel.ndim < 2:
        raise ValueError(
            f"`kernel` must be [*kernel_size, channels, features], got shape {kernel.shape}."
        )
    *kernel_size, channels, features = kernel.shape
    taps, columns = math.prod(kernel_size), groups.sets * groups.groups * groups.width
    if columns not in (channels, channels * taps):
        raise ValueError(
            f"`kernel` of shape {kernel.shape} has {channels * taps} columns in a feature group, "
            f"`groups` has {columns}."
        )
    if features % groups.feature_groups:
        raise ValueError(
            f"`kernel` has {features} features, not divisible by {groups.feature_groups} feature groups."
        )
    lead = groups.stat_shape
    for name, value, shape in (
        ("mean", mean, (*lead, groups.width)),
        ("whitener", whitener, (*lead, groups.width, groups.width)),
        ("bias", bias, (features,)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {value.shape}.")
    check_precision(precision)
    return _fold(kernel, bias, mean, whitener, groups, dtype, precision)


# `jit`: one program where nobody else compiles, and a trace that equal layers share.
@functools.partial(jax.jit, static_argnums=(4, 5, 6), inline=True)
def _fold(kernel, bias, mean, whitener, groups, dtype, precision):
    columns = groups.sets * groups.groups * groups.width
    taps = math.prod(kernel.shape[:-2])
    own_taps = taps if columns == kernel.shape[-2] * taps else 1
    if kernel.ndim > 2:  # taps and channels are merged, which is not done to what is sharded
        kernel, bias, mean, whitener = jax.tree.map(whole, (kernel, bias, mean, whitener))
    product = _matrix if _is_one_matrix(kernel, groups, taps == own_taps) else _features_first
    folded, shift = product(kernel, mean, whitener, groups, dtype, precision, own_taps)
    return folded, -shift if bias is None else bias.astype(shift.dtype) - shift


def _is_one_matrix(kernel, groups, every_tap):
    """Whether a kernel as it lies, features last, is a matrix of a group's positions by all else."""
    one_whitener = groups.feature_groups == groups.sets == 1
    interleaved = groups.kind == "interleaved" or groups.groups == 1
    # Where features may be sharded they must not be merged with groups.
    return one_whitener and interleaved and every_tap and on_one_device(kernel)


def _matrix(kernel, mean, whitener, groups, dtype, precision, own_taps):
    """On CPUs in about half the time, with 1x1 kernels in an eighth: rows move in runs of features."""
    channels, features = kernel.shape[-2:]
    w = kernel.astype(whitener.dtype).reshape(own_taps, channels, features)
    w = jnp.swapaxes(w, 0, 1).reshape(groups.width, -1)
    w = jnp.matmul(whitener.reshape(groups.width, groups.width), w, precision=precision)
    w = w.astype(dtype)
    shift = jnp.einsum(
        "i,igf->f",
        mean.reshape(groups.width),
        w.astype(whitener.dtype).reshape(groups.width, groups.groups, features),
        precision=lax.Precision.HIGHEST,
    )
    folded = jnp.swapaxes(w.reshape(channels, own_taps, features), 0, 1)
    return folded.reshape(kernel.shape), shift


def _features_first(kernel, mean, whitener, groups, dtype, precision, own_taps):
    """In any other case: the kernel is turned so that columns come last, and back."""
    channels, features = kernel.shape[-2:]
    shared_taps = math.prod(kernel.shape[:-2]) // own_taps
    per_group = features // groups.feature_groups

    # [shared taps, features in a feature group, (feature group, channel, own taps)]
    w = kernel.astype(whitener.dtype).reshape(
        shared_taps, own_taps, channels, groups.feature_groups, per_group
    )
    w = groups.split(w.transpose(0, 4, 3, 2, 1).reshape(shared_taps, per_group, -1))

    lead = (groups.feature_groups, groups.sets)
    d = whitener.reshape(*lead, groups.width, groups.width)
    w = jnp.einsum("asij,tfasgj->tfasgi", d, w, precision=precision)
    folded = groups.join(w).reshape(
        shared_taps, per_group, groups.feature_groups, channels, own_taps
    )
    folded = folded.transpose(0, 4, 3, 2, 1).reshape(kernel.shape).astype(dtype)

    mu = mean.reshape(*lead, groups.width)
    shift = jnp.einsum(
        "asi,tfasgi->af", mu, w.astype(dtype).astype(w.dtype), precision=lax.Precision.HIGHEST
    ).reshape(features)
    return folded, shift
