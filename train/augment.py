"""Random changes to a batch of images, inside the jitted step."""

import jax
import jax.numpy as jnp


def shift(key: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
    """Move each image by up to `pixels` along both axes; what comes in repeats the border.

    Args:
      key: a random key.
      images: [batch, height, width, channels].
      pixels: static int >= 0; 0 leaves the images alone.
    Returns:
      An array of the shape of `images`.
    """
    if pixels == 0:
        return images
    batch, *shape = images.shape
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (batch, 2), 0, 2 * pixels + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)

    return jax.vmap(crop)(padded, corners)
