"""The networks without convolutions, for inputs of any shape."""

from typing import ClassVar

import jax
from flax import linen as nn

from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import channels_first
from netdeconv_jax.models.units import Whitening

WHOLE: Whitening = {"block_size": 1024}  # all of a 28x28 image together; gcd(512, 784) would be 16


class Linear(Network):
    """One dense layer on all of the input.

    Source: Ye et al. 2020, figure 4 a and b.
    """

    minimum_size: ClassVar[int | None] = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return the logits of x [batch, ...]."""
        units = self.units(x, train)
        return units.classifier(self.num_classes, name="linear", **WHOLE)(channels_first(x))


class MLP(Network):
    """Three hidden layers of 128 sigmoid units.

    Source: Ye et al. 2020, figure 4 c and d.
    """

    minimum_size: ClassVar[int | None] = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return the logits of x [batch, ...]."""
        units = self.units(x, train)
        x = channels_first(x)
        for i in (1, 2, 3):
            x = units.dense(self.scaled(128), name=f"fc{i}", **WHOLE)(x)
            x = nn.sigmoid(units.norm(name=f"bn{i}")(x))
        return units.classifier(self.num_classes, name="linear", **WHOLE)(x)
