"""The network of CIFAR-10 speed runs (Jordan 2024)."""

from typing import ClassVar

import jax
from flax import linen as nn

from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import MaxPool
from netdeconv_jax.models.units import Whitening

FEATURES = (64, 256, 256)  # of the two convolutions of each group
STEM: Whitening = {"num_iters": 15}


class AirBench(Network):
    """Seven convolutions with GELU: a 2x2 stem, then three groups of two with a pool in each.

    There the patches of the stem are whitened by a layer that is set once and not trained, and a batch norm
    follows each of the other convolutions. In the `"deconv"` form every layer whitens its own.

    Source: Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU": layers and sizes of airbench94.
    Departures: logits are not divided by 9, and have a bias; GELU by tanh; initial kernels are PyTorch's,
    with no identity in them. With `norm="batch"` the stem is trained and has a batch norm too, and batch
    norms are those of the zoo, with a scale.
    """

    minimum_size: ClassVar[int | None] = 25

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        x = units.conv(self.scaled(24), 2, padding=0, name="stem", **STEM)(x)
        x = nn.gelu(units.norm(name="stem_bn")(x))
        for group, features in enumerate(FEATURES, 1):
            for i in (1, 2):
                x = units.conv(self.scaled(features), 3, name=f"conv{group}_{i}")(x)
                if i == 1:
                    x = MaxPool(2, name=f"pool{group}")(x)
                x = nn.gelu(units.norm(name=f"bn{group}_{i}")(x))
        x = MaxPool(3, name="pool")(x)
        x = x.reshape(x.shape[0], -1)
        return units.classifier(self.num_classes, block_size=512, name="linear")(x)
