"""The rectifier, with a derivative that reads its output: a step keeps one array for it and not two."""

import jax
import jax.numpy as jnp
from jax import lax

from netdeconv_jax.ops.arguments import as_array


def relu(x: jax.Array) -> jax.Array:
    """Return `max(x, 0)`: `jax.nn.relu`, value and derivatives, in less memory where gradients are taken.

    The derivative is 1 where the output is above 0, else 0. `jax.nn.relu` reads that from its input, and so
    a GPU keeps a convolution's output for the backward pass beside the rectified one, which the next layer
    keeps anyway. Batch norm in between has to keep it; behind a whitened convolution it is the only use.

    Args:
      x: of any shape; floating point or integers.
    Returns:
      An array of the shape and dtype of `x`.
    Raises:
      TypeError: `x` is neither floating point nor of integers.

    Source: ours; `jax.nn.relu` for what it computes.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> x = jnp.array([-1.0, 0.0, 2.0])
      >>> ops.relu(x).tolist(), jax.vmap(jax.grad(ops.relu))(x).tolist()
      ([0.0, 0.0, 2.0], [0.0, 0.0, 1.0])
    """
    x = as_array(x)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"`x` must be floating point or integers, got {x.dtype}.")
    return _relu(x)


@jax.custom_jvp
def _relu(x: jax.Array) -> jax.Array:
    return jax.nn.relu(x)  # by this name exporters know it


def _slope(tangent: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    del x
    # By its sign: of `y > 0` XLA makes `x > 0` again, and keeps `x` for it. A NaN has no positive one.
    return lax.select(lax.sign(y) > 0, tangent, jnp.zeros_like(tangent))


_relu.defjvps(_slope)
