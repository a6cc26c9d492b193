"""What a layer does to each sample before it whitens: nothing, or `local_norm` of its spec."""

from typing import Any

import jax
import jax.numpy as jnp

from netdeconv_jax import ops
from netdeconv_jax.ops.patch_moments import full_mask

LOCAL_NORMS = (None, "layer")


def locally_normalized(
    x: jax.Array, local_norm: str | None, *, ndim: int, mask: jax.Array | None, dtype: Any
) -> jax.Array:
    """Return `x` with every sample normalized over all its own axes, or `x` itself.

    It comes before any padding, so that zeros of the padding are those of a normalized image. Sums run
    within a sample: a sharded batch axis stays as it is, and devices need not talk.

    Args:
      x: [*batch, *spatial, channels].
      local_norm: None for `x` itself; `"layer"`.
      ndim: number of spatial axes that belong to one sample with the channels; 0 in a dense layer.
      mask: weights >= 0, broadcastable to [*batch, *spatial, 1]; in evaluation too.
      dtype: of computation in the layer. The result is of this or that of `x`, whichever is wider.

    Source: see `ops.local_norm`.
    """
    if local_norm is None:
        return x
    return ops.local_norm(
        x,
        None if mask is None else full_mask(mask, x),
        axes=range(x.ndim - ndim - 1, x.ndim),
        dtype=jnp.promote_types(x.dtype, dtype),
    )
