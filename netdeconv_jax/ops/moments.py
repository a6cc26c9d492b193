"""Mean and covariance as a monoid: pooled over batches, devices, masks and microbatches, in any order."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from netdeconv_jax.ops.arguments import (
    as_array,
    check_axes,
    check_broadcastable,
    check_float_dtype,
)
from netdeconv_jax.ops.gram import gram

AxisName = str | Sequence[str]
SAMPLE_DTYPES = (None, "bfloat16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """How many samples there were, their mean and their biased covariance.

    A pytree. Averaging the covariances of two halves is wrong unless their means agree; `merge` is right.
    Nothing here is updated in place, and a count of 0 is the neutral element of `merge`.

    Attributes:
      count: number of samples or sum of their weights, float, shape [] or [...].
      mean: [..., d], float32 or float64.
      cov: [..., d, d], dtype of `mean`.

    Source: Chan, Golub and LeVeque 1979, for the pooling.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> x = jnp.array([[1.0], [2.0], [6.0]])
      >>> both = ops.moments(x[:1]).merge(ops.moments(x[1:]))
      >>> both.mean.tolist(), bool(jnp.allclose(both.cov, ops.moments(x).cov))
      ([3.0], True)
    """

    count: jax.Array
    mean: jax.Array
    cov: jax.Array

    @staticmethod
    def none(shape: Sequence[int], dtype: Any = jnp.float32) -> "Moments":
        """Return the moments of no samples, whose mean has `shape` [..., d]: neutral in `merge`."""
        shape = tuple(shape)
        cov = jnp.zeros((*shape, shape[-1]), dtype)
        return Moments(jnp.zeros(shape[:-1], dtype), jnp.zeros(shape, dtype), cov)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of samples together."""
        count = self.count + other.count
        share = _beside(other.count / at_least_one_sample(count), self.mean)
        shift = other.mean - self.mean
        mean = self.mean + shift * share
        between = (share * (1 - share))[..., None] * _outer(shift)
        cov = self.cov + share[..., None] * (other.cov - self.cov) + between
        return Moments(count, mean, cov)

    def psum(self, axis_name: AxisName, axis_index_groups: Any = None) -> "Moments":
        """Return the moments of the samples of all devices along a mapped axis, as `lax.psum` does."""

        def total(value):
            return lax.psum(value, axis_name, axis_index_groups=axis_index_groups)

        count = total(self.count)
        share = _beside(self.count / at_least_one_sample(count), self.mean)
        mean = total(self.mean * share)
        # About the common mean, so that nothing cancels: two reductions, the first of them small.
        cov = total(share[..., None] * (self.cov + _outer(self.mean - mean)))
        return Moments(count, mean, cov)

    def ema(self, batch: "Moments", momentum: float) -> "Moments":
        """Return `momentum * self + (1 - momentum) * batch`, in Flax's sense of momentum."""
        return jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, self, batch)


def moments(
    x: jax.Array,
    weights: jax.Array | None = None,
    *,
    axes: Sequence[int] = (0,),
    dtype: Any = None,
    sample_dtype: str | None = None,
) -> Moments:
    """Return the moments of samples along `axes`, in two passes: first the mean, then the covariance.

    One pass over raw second moments loses every digit where the mean is a hundred deviations. The product
    runs at HIGHEST precision, unless `sample_dtype` is given. Over an explicit mesh `axes` are contracted as
    they are, since a sharded axis must not be merged with others, and the result is replicated.

    Args:
      x: [..., d], real; the last axis is the variable.
      weights: bool or >= 0, shape broadcastable to `x.shape[:-1]`; samples of weight 0 are ignored, even if
        they are not finite.
      axes: the sample axes, non-negative; the others become leading axes of the result.
      dtype: of the result; default `promote_types(float32, x.dtype)`.
      sample_dtype: `"bfloat16"` rounds the centred samples before they are multiplied, with sums in `dtype`:
        what accelerators are fastest at. An entry of the covariance is then off by at most 0.8% of the
        product of both deviations, the whole by 0.1 to 0.2% of its norm on images; derivatives by about 1%
        where their terms do not cancel.
    Returns:
      `Moments`, with `count` of shape [] without weights.
    Raises:
      ValueError: there is no sample; `x` has fewer than two axes; an axis is none of those in front of the
        last one, or is named twice; `weights` has another shape, or `sample_dtype` is another.
      TypeError: `dtype` is not floating point, `axes` are no ints, or `sample_dtype` is no string.

    Source: Ye et al. 2020, section 3.1 and Algorithm 1, line 7.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> ops.moments(jnp.array([[1.0, 0.0], [3.0, 0.0]])).cov.tolist()
      [[1.0, 0.0], [0.0, 0.0]]
    """
    check_sample_dtype(sample_dtype)
    x = as_array(x)
    if x.ndim < 2:
        raise ValueError(f"`x` must be [..., d] with a sample axis in front, got shape {x.shape}.")
    axes = check_axes("axes", axes, x.ndim - 1)
    if weights is not None:
        weights = as_array(weights)
        check_broadcastable("weights", weights.shape, x.shape[:-1])
    if dtype is None:
        dtype = jnp.promote_types(jnp.float32, x.dtype)
    if math.prod(x.shape[axis] for axis in axes) == 0:
        raise ValueError(f"`x` has no samples: shape {x.shape}, sample axes {axes}.")
    x = x.astype(check_float_dtype("dtype", dtype))
    if weights is not None:
        weights = jnp.broadcast_to(weights.astype(x.dtype), x.shape[:-1])[..., None]
    count, mean, centred = centre(x, weights, axes)
    norm = count
    if weights is not None:
        count = jnp.squeeze(count, (*axes, x.ndim - 1))
        norm = at_least_one_sample(count)[..., None, None]
    cov = gram(centred, weights, axes, sample_dtype) / norm
    return Moments(count, jnp.squeeze(mean, axes), cov)


def centre(
    x: jax.Array, weights: jax.Array | None, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return how many samples there are along `axes`, their mean, and `x` without it.

    `weights`, if not None, have the rank of `x`; its count then keeps all axes, as the mean does.
    """
    if weights is None:
        total = math.prod(x.shape[axis] for axis in axes)
        mean = jnp.sum(x, axes, keepdims=True) / total
        return jnp.asarray(total, x.dtype), mean, x - mean
    x = jnp.where(weights > 0, x, 0)
    count = jnp.sum(weights, axes, keepdims=True)
    mean = jnp.sum(x * weights, axes, keepdims=True) / at_least_one_sample(count)
    return count, mean, x - mean


def check_sample_dtype(sample_dtype: str | None) -> None:
    """Raise unless `sample_dtype` is one of `SAMPLE_DTYPES`."""
    if sample_dtype is not None and not isinstance(sample_dtype, str):
        raise TypeError(f"`sample_dtype` must be None or a string, got {sample_dtype!r}.")
    if sample_dtype not in SAMPLE_DTYPES:
        raise ValueError(f"`sample_dtype` must be one of {SAMPLE_DTYPES}, got {sample_dtype!r}.")


def _outer(v: jax.Array) -> jax.Array:
    return v[..., :, None] * v[..., None, :]


def _beside(value: jax.Array, mean: jax.Array) -> jax.Array:
    """`value`, one for all sets or one for each, with the rank of `mean` [..., d]."""
    return value.reshape(value.shape or (1,) * (mean.ndim - 1))[..., None]


def at_least_one_sample(count: jax.Array) -> jax.Array:
    """Return `count`, or 1 where it is 0: what to divide a sum by that may be one of nothing."""
    return jnp.where(count > 0, count, 1)
