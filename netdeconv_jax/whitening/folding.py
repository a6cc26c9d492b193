"""Kernel and bias of a plain layer that does what one does with a whitener before it, or a norm behind it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from netdeconv_jax import ops
from netdeconv_jax.whitening.spec import WhiteningSpec
from netdeconv_jax.whitening.transposed import fold_transposed

# How columns are whitened; those of each phase of a transposed convolution follow from the pair.
Groups = ops.ColumnGroups | tuple[ops.Transposed, WhiteningSpec]


def features_axis(groups: Groups | None) -> int:
    """Return the axis of a layer's kernel that holds its features."""
    return -2 if isinstance(groups, tuple) and groups[0].transpose_kernel else -1


@functools.partial(jax.jit, static_argnames=("groups", "dtype"))
def folded(
    kernel: jax.Array,
    bias: jax.Array | None,
    mean: jax.Array,
    whitener: jax.Array,
    groups: Groups,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Return kernel and bias of the plain layer that whitening and this one are.

    The kernel is rounded to `dtype`, in which the layer computes, before the bias is formed; it is in the
    wider of `dtype` and its own, the bias in the dtype of the statistics. Of a transposed convolution the
    bias is [*strides, features].
    """
    plain, shift = _folded(kernel, bias, mean, whitener, groups, dtype)
    return plain.astype(jnp.promote_types(kernel.dtype, plain.dtype)), shift


def _folded(kernel, bias, mean, whitener, groups, dtype=None):
    if not isinstance(groups, tuple):
        return ops.fold(kernel, bias, mean, whitener, groups, dtype=dtype)
    geometry, spec = groups
    return fold_transposed(kernel, bias, mean, whitener, geometry=geometry, spec=spec, dtype=dtype)


def unfolded(
    kernel: jax.Array, bias: jax.Array, mean: jax.Array, whitener: jax.Array, groups: Groups
) -> tuple[jax.Array, jax.Array]:
    """Return kernel and bias that behind a whitener and a mean do what these do without.

    `w = D^-1 w_f`, `b = b_f + mu w_f`: solved in float64, and corrected once for what rounding leaves. A
    transposed convolution must have one phase: with more, each would need a bias of its own.
    """
    inverse = np.linalg.inv(np.asarray(whitener, np.float64)).astype(whitener.dtype)
    zero = jnp.zeros_like(mean)

    def times(matrix: Any, kernel: jax.Array) -> jax.Array:
        return _folded(kernel, None, zero, matrix, groups)[0]

    solved = times(inverse, kernel)
    solved += times(inverse, kernel - times(whitener, solved))
    _, shift = _folded(solved, None, mean, whitener, groups)
    return solved, (bias - shift.reshape(bias.shape)).astype(bias.dtype)


def merged(
    kernel: jax.Array,
    bias: jax.Array | None,
    mean: Any,
    gain: Any,
    offset: Any,
    dtype: Any = None,
    axis: int = -1,
) -> tuple[jax.Array, jax.Array]:
    """Return kernel and bias of a layer with the norm behind it, `(y - mean) * gain + offset`.

    Args:
      kernel: with features on `axis`.
      bias: [features] or None.
      mean, gain, offset: [features]; `offset` may be 0.
      dtype: in which the layer computes. The kernel is rounded to it, and in the wider of `dtype` and its
        own; the bias is in the dtype of `gain`. By default both are in the kernel's.
      axis: -1, or -2 of a transposed kernel.
    """
    lift = (*(1,) * (kernel.ndim + axis), -1, *(1,) * (-1 - axis))
    plain = kernel * gain.reshape(lift)
    shift = (mean if bias is None else mean - bias) * gain
    if dtype is None:
        return plain.astype(kernel.dtype), (offset - shift).astype(kernel.dtype)
    return plain.astype(dtype).astype(jnp.promote_types(kernel.dtype, dtype)), offset - shift
