"""Moments about a vector known beforehand: one product, one reduction over devices, then a correction.

With y = x - s and the extended sample z = (y, 1), the sum of w z z' holds the count n, the sum of y and that
of y y' in one symmetric matrix. From it mean = s + d and cov = sum(w y y') / n - d d', with d = sum(w y) / n.
What is subtracted is as large as the square of what s misses: little for a running mean, all for s = 0.
"""

import jax
import jax.numpy as jnp
from jax import lax

from netdeconv_jax.ops.gram import gram
from netdeconv_jax.ops.moments import Moments


def shifted_sums(
    x: jax.Array,
    weights: jax.Array | None,
    shift: jax.Array,
    axes: tuple[int, ...],
    sample_dtype: str | None = None,
) -> jax.Array:
    """Return the sum of `w z z'` over the sample axes, z = (x - shift, 1): additive in sets of samples.

    Args:
      x: [..., d], floating point; the last axis is the variable.
      weights: as `ops.moments`.
      shift: [*others, d], near the mean, a constant to the derivative; its dtype is that of the result.
      axes: the sample axes; the others lead.
      sample_dtype: as `ops.moments`, but what is rounded is the distance from `shift`, and the mean with it.
        Ignored beside weights: they must weigh the ones as they do the rest.
    Returns:
      [*others, d + 1, d + 1].

    Source: Chan, Golub and LeVeque 1983 ("Algorithms for Computing the Sample Variance"), for the shift.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax.ops.shifted import moments_of_sums, shifted_sums
      >>> x, shift = jnp.array([[1.0], [3.0]]), jnp.array([1.5])
      >>> found = moments_of_sums(shifted_sums(x, None, shift, (0,)), shift)
      >>> found.count.item(), found.mean.tolist(), found.cov.tolist()
      (2.0, [2.0], [[1.0]])
    """
    others = iter(shift.shape[:-1])
    shape = [1 if axis in axes else next(others) for axis in range(x.ndim - 1)]
    x = x.astype(shift.dtype)
    if weights is not None:
        weights = jnp.broadcast_to(weights.astype(x.dtype), x.shape[:-1])[..., None]
        x = jnp.where(weights > 0, x, 0)
    x = x - lax.stop_gradient(shift).reshape(*shape, x.shape[-1])
    # `pad` rather than a concatenation: over an explicit mesh the ones lie where the samples do.
    one = jnp.ones((), x.dtype)
    sample_dtype = sample_dtype if weights is None else None
    return gram(
        lax.pad(x, one, [(0, 0, 0)] * (x.ndim - 1) + [(0, 1, 0)]), weights, axes, sample_dtype
    )


def moments_of_sums(sums: jax.Array, shift: jax.Array) -> Moments:
    """Return the moments of the samples whose `shifted_sums` about `shift` are `sums`.

    Args:
      sums: [..., d + 1, d + 1].
      shift: [..., d].
    Returns:
      `Moments`; of no samples, a mean of `shift` and a covariance of 0.

    Source: as `shifted_sums`.
    """
    count = sums[..., -1, -1]
    total = jnp.where(count > 0, count, 1)[..., None]
    missed = sums[..., -1, :-1] / total
    cov = sums[..., :-1, :-1] / total[..., None] - missed[..., :, None] * missed[..., None, :]
    return Moments(count, lax.stop_gradient(shift) + missed, cov)
