"""Random changes to a batch of images, inside the jitted step.

Every image has a key of its own: what happens to it does not depend on how many devices share the batch.
"""

import jax
import jax.numpy as jnp


def crop(keys: jax.Array, images: jax.Array, border: int) -> jax.Array:
    """Cut each image out of itself with a black border, anywhere.

    Args:
      keys: [batch] random keys.
      images: [batch, height, width, channels].
      border: static int >= 0, pixels on every side; 0 leaves the images alone.
    Returns:
      An array of the shape of `images`.
    """
    if border == 0:
        return images

    def one(key, image):
        padded = jnp.pad(image, ((border, border), (border, border), (0, 0)))
        row, column = jax.random.randint(key, (2,), 0, 2 * border + 1)
        return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)

    return jax.vmap(one)(keys, images)


def flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror every other image, left to right, by chance.

    Args:
      keys: [batch] random keys.
      images: [batch, height, width, channels].
    """
    mirrored = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
