"""Each sample centred and scaled by itself: what follows cannot see its brightness nor its contrast."""

import functools
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
    check_floating,
    check_number,
)


def local_norm(
    x: jax.Array,
    weights: jax.Array | None = None,
    *,
    axes: Sequence[int],
    eps: float = 1e-5,
    dtype: Any = None,
) -> jax.Array:
    """Return `(x - mean) / sqrt(var + eps)`, with a mean and a biased variance of each sample, over `axes`.

    There is no learnt scale or shift. In two passes, the mean first, as `moments`. A constant sample gives
    zeros. `7 * x` gives what `x` gives, as far as `eps` is small beside the variance.

    Args:
      x: floating point, of any shape.
      weights: bool or >= 0, broadcastable to the shape of `x`. What weighs 0 does not enter mean
        and variance, even if it is not finite, but is normalized with the rest of its sample. A sample that
        weighs nothing is normalized as if there were no weights.
      axes: of `x`, that make up a sample; they may be counted from the end.
      eps: >= 0, added to the variance.
      dtype: of the result; default that of `x`. Computed in float32 or wider.
    Returns:
      An array of the shape of `x`.
    Raises:
      ValueError: an axis that `x` does not have or that is named twice, `eps` below 0, or `weights` of
        another shape.
      TypeError: `x` or `dtype` is not floating point, `axes` no ints, or `eps` no number.

    Source: Ye et al. 2022 ("Exploiting Invariance in Training Deep Neural Networks"), scale invariance by
    local statistics; departure: the window is the whole sample, as in layer norm (Ba et al. 2016).

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> x = jnp.array([[1.0, 3.0], [100.0, 300.0]])
      >>> ops.local_norm(x, axes=(1,)).round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """
    x = check_floating("x", x)
    axes = check_axes("axes", axes, x.ndim, least=-x.ndim)
    if weights is not None:
        weights = as_array(weights)
        check_broadcastable("weights", weights.shape, x.shape)
    dtype = x.dtype if dtype is None else check_float_dtype("dtype", dtype)
    return _local_norm(x, weights, axes, check_number("eps", eps), dtype)


# `jit`: one program where nobody else compiles, and a trace that equal layers share.
@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _local_norm(x, weights, axes, eps, dtype):
    x = x.astype(jnp.promote_types(jnp.float32, jnp.promote_types(x.dtype, dtype)))
    if weights is None:
        centred = x - jnp.mean(x, axes, keepdims=True)
        var = jnp.mean(jnp.square(centred), axes, keepdims=True)
    else:
        weights = jnp.broadcast_to(weights.astype(x.dtype), x.shape)
        total = jnp.sum(weights, axes, keepdims=True)
        shares = jnp.where(total > 0, weights, 1)
        shares = shares / jnp.sum(shares, axes, keepdims=True)
        kept = jnp.where(shares > 0, x, 0)
        mean = jnp.sum(shares * kept, axes, keepdims=True)
        centred = x - mean
        var = jnp.sum(shares * jnp.square(kept - mean), axes, keepdims=True)
    return (centred * lax.rsqrt(var + eps)).astype(dtype)
