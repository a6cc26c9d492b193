"""A small convolutional network for quick experiments."""

from typing import ClassVar

import jax
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import global_average

FEATURES = (32, 32, 64, 64)
STRIDES = (1, 1, 2, 1)


class CNN(Network):
    """Four 3x3 convolutions with ReLU, the mean over all pixels, one dense layer.

    Source: ours.
    """

    minimum_size: ClassVar[int | None] = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        for i, (features, strides) in enumerate(zip(FEATURES, STRIDES, strict=True), 1):
            x = units.conv(self.scaled(features), 3, strides, name=f"conv{i}")(x)
            x = ops.relu(units.norm(name=f"bn{i}")(x))
        return units.classifier(self.num_classes, block_size=512, name="linear")(global_average(x))
