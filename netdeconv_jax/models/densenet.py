"""DenseNet-121 (Huang et al. 2017), for 32x32 images and for ImageNet."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.initializers import FAN_IN, Initializers, LayerInit, zero_bias
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import AvgPool, MaxPool, global_average
from netdeconv_jax.models.units import Units, Whitening
from netdeconv_jax.whitening import Freeze

DEPTHS = (6, 12, 24, 16)
GROWTH = 32
IMAGENET_STEM: Whitening = {"num_iters": 15, "freeze": Freeze()}


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution: `growth` new features for all later layers.

    Attributes:
      units: where layers come from.
      growth: number of new features.
    """

    units: Units
    growth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the new features of x [batch, height, width, channels]."""
        conv, norm = self.units.conv, self.units.norm
        y = conv(4 * self.growth, 1, name="conv1")(ops.relu(norm(name="bn1")(x)))
        return conv(self.growth, 3, name="conv2")(ops.relu(norm(name="bn2")(y)))


class Transition(nn.Module):
    """Norm, ReLU and a 1x1 convolution to half the features, then a pool to half the size.

    Attributes:
      units: where layers come from.
    """

    units: Units

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to half of everything but the batch."""
        y = ops.relu(self.units.norm(name="bn")(x))
        y = self.units.conv(x.shape[-1] // 2, 1, name="conv")(y)
        return AvgPool(2, name="pool")(y)


def dense_stages(
    net: "DenseNet | ImageNetDenseNet", units: Units, x: jax.Array, *, newest_first: bool
) -> jax.Array:
    """Return the features of x after all dense layers of `net`, with its last norm, ReLU and mean.

    The two forms of the original store new features at different ends; blocks of channels follow the order.
    """
    for stage, depth in enumerate(DEPTHS, 1):
        for i in range(depth):
            new = DenseLayer(units, net.scaled(GROWTH), name=f"dense{stage}_{i}")(x)
            x = jnp.concatenate([new, x] if newest_first else [x, new], axis=-1)
        if stage < len(DEPTHS):
            x = Transition(units, name=f"trans{stage}")(x)
    return global_average(ops.relu(units.norm(name="bn")(x)))


class DenseNet(Network):
    """DenseNet-121 for 32x32 images: a 3x3 stem that whitens like any layer, four dense stages.

    Source: Huang et al. 2017.
    """

    minimum_size: ClassVar[int | None] = 8

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        x = units.conv(self.scaled(2 * GROWTH), 3, name="conv1")(x)
        x = dense_stages(self, units, x, newest_first=True)
        return units.classifier(self.num_classes, block_size=512, name="linear")(x)


class ImageNetDenseNet(Network):
    """DenseNet-121 for 224x224 images: a strided 7x7 stem with a pool, four dense stages.

    Source: Huang et al. 2017; stem settings of the original code.
    """

    minimum_size: ClassVar[int | None] = 29
    initializers: ClassVar[Initializers] = Initializers(
        conv=LayerInit(FAN_IN), dense=LayerInit(bias=zero_bias)
    )

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        x = units.conv(self.scaled(2 * GROWTH), 7, 2, name="conv1", **IMAGENET_STEM)(x)
        x = ops.relu(units.norm(name="bn1")(x))
        x = MaxPool(3, 2, padding=1, name="pool")(x)
        x = dense_stages(self, units, x, newest_first=False)
        return units.classifier(self.num_classes, name="classifier")(x)
