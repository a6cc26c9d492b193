"""The networks without convolutions, for inputs of any shape."""

from typing import ClassVar

import jax
from flax import linen as nn

from netdeconv_jax.models.network import Network
from netdeconv_jax.models.units import WHOLE


class Linear(Network):
    """One dense layer on all of the input; a batch norm is one of the input, pixel by pixel.

    Source: Ye et al. 2020, figure 4 a and b.
    """

    minimum_size: ClassVar[int | None] = None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, ...]."""
        units = self.units(x, train, update_whitener)
        x, whitening = units.flattened(x)
        x = units.norm(name="bn")(x)
        return units.classifier(self.num_classes, name="linear", **whitening)(x)


class MLP(Network):
    """Three hidden layers of 128 sigmoid units.

    Source: Ye et al. 2020, figure 4 c and d.
    """

    minimum_size: ClassVar[int | None] = None

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, ...]."""
        units = self.units(x, train, update_whitener)
        x, whitening = units.flattened(x)
        for i in (1, 2, 3):
            x = units.dense(self.scaled(128), name=f"fc{i}", **whitening)(x)
            whitening = {"block_size": WHOLE}
            x = nn.sigmoid(units.norm(name=f"bn{i}")(x))
        return units.classifier(self.num_classes, name="linear", block_size=WHOLE)(x)
