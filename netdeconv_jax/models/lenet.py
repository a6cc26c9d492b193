"""LeNet (LeCun et al. 1998) with ReLU and maximum pools."""

from typing import ClassVar

import jax
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import MaxPool, channels_first


class LeNet(Network):
    """LeNet-5: two 5x5 convolutions with pools, three dense layers.

    Convolutions keep the size, so that 8x8 digits pass as well as 28x28 ones.

    Source: LeCun et al. 1998.
    """

    minimum_size: ClassVar[int | None] = 4

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        for i, features in enumerate((6, 16), 1):
            x = units.conv(self.scaled(features), 5, name=f"conv{i}")(x)
            x = MaxPool(2, name=f"pool{i}")(ops.relu(units.norm(name=f"bn{i}")(x)))
        x = channels_first(x)
        for i, features in enumerate((120, 84), 1):
            x = ops.relu(units.dense(self.scaled(features), block_size=512, name=f"fc{i}")(x))
        return units.classifier(self.num_classes, block_size=512, name="fc3")(x)
