"""Pooling, NHWC. `MaxPool` and `AvgPool` are modules so that a table of layers can show them."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class MaxPool(nn.Module):
    """The largest value in each square window.

    Where windows do not overlap, equal largest values share the gradient; elsewhere the first has it.

    Attributes:
      window: side of the window.
      strides: default `window`.
      padding: rows and columns of minus infinity on every side.
    """

    window: int
    strides: int | None = None
    padding: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pool x [batch, height, width, channels]."""
        strides = self.strides or self.window
        if strides == self.window and not self.padding:
            # XLA's gradient of reduce_window is slow on CPUs; windows that do not overlap need none.
            rows, columns = (size // strides for size in x.shape[1:3])
            # Not by `x[:, :n]`, which is a gather where the size of the batch is a symbol.
            x = jax.lax.slice_in_dim(x, 0, rows * strides, axis=1)
            x = jax.lax.slice_in_dim(x, 0, columns * strides, axis=2)
            shape = (x.shape[0], rows, strides, columns, strides, x.shape[3])
            return x.reshape(shape).max((2, 4))
        if self.padding:
            # XLA makes one operation of both; exporters know no padding of a pool, nor a pool by position.
            pad = [(0, 0), *[(self.padding,) * 2] * 2, (0, 0)]
            x = jnp.pad(x, pad, constant_values=-jnp.inf)
        return nn.max_pool(x, window_shape=(self.window,) * 2, strides=(strides,) * 2)


class AvgPool(nn.Module):
    """The mean of each square window; windows do not overlap, and what fills none is left out.

    Attributes:
      window: side of the window.
    """

    window: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pool x [batch, height, width, channels]."""
        return nn.avg_pool(x, window_shape=(self.window,) * 2, strides=(self.window,) * 2)


def global_average(x: jax.Array, *, keepdims: bool = False) -> jax.Array:
    """Return the mean over height and width of x [batch, height, width, channels]."""
    return x.mean((1, 2), keepdims=keepdims)


def adaptive_average(x: jax.Array, size: int) -> jax.Array:
    """Return `size` x `size` means over windows that cover x [batch, height, width, channels].

    Window i of n rows is floor(i n / size) to ceil((i + 1) n / size): windows overlap where `size` does not
    divide n, and repeat rows where n is below `size`.

    Source: `torch.nn.AdaptiveAvgPool2d`.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax.models.pooling import adaptive_average
      >>> adaptive_average(jnp.ones((1, 2, 5, 3)), 7).shape
      (1, 7, 7, 3)
    """
    for axis in (1, 2):
        count = x.shape[axis]
        windows = [
            jax.lax.slice_in_dim(x, i * count // size, -(-(i + 1) * count // size), axis=axis)
            for i in range(size)
        ]
        x = jnp.concatenate([w.mean(axis, keepdims=True) for w in windows], axis)
    return x


def channels_first(x: jax.Array) -> jax.Array:
    """Flatten [batch, ...space, channels] to [batch, n], channels outermost.

    A block of neighbours that is whitened together is then pixels of few channels, as in the original.
    """
    return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
