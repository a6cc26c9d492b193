"""VGG (Simonyan and Zisserman 2015), for 32x32 images and for ImageNet."""

from typing import ClassVar

import jax
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.initializers import FAN_OUT, Initializers, LayerInit, zero_bias
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import (
    MaxPool,
    adaptive_average,
    channels_first,
    global_average,
)
from netdeconv_jax.models.units import Units, Whitening
from netdeconv_jax.whitening import Freeze

FEATURES = (64, 128, 256, 512, 512)  # of the convolutions before each of the five pools
DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
STEM: Whitening = {"num_iters": 15, "freeze": Freeze()}


def convolutions(net: "VGG | ImageNetVGG", units: Units, x: jax.Array) -> jax.Array:
    """Return the features of x after all convolutions and pools of `net`."""
    number = 0
    for stage, (features, depth) in enumerate(zip(FEATURES, net.depths, strict=True), 1):
        for _ in range(depth):
            number += 1
            stem = STEM if number == 1 else {}
            # The original gives its convolutions a bias even before a batch norm.
            conv = units.conv(net.scaled(features), 3, use_bias=True, name=f"conv{number}", **stem)
            x = ops.relu(units.norm(name=f"bn{number}")(conv(x)))
        x = MaxPool(2, name=f"pool{stage}")(x)
    return x


class VGG(Network):
    """VGG for 32x32 images: 3x3 convolutions, five pools, one dense layer.

    Attributes:
      depths: number of convolutions before each pool.

    Source: Simonyan and Zisserman 2015; stem settings of the original code.
    """

    depths: tuple[int, ...]

    minimum_size: ClassVar[int | None] = 32

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        x = global_average(convolutions(self, units, x))
        return units.classifier(self.num_classes, block_size=512, name="classifier")(x)


class ImageNetVGG(Network):
    """VGG for 224x224 images: 3x3 convolutions, five pools, three dense layers with dropout.

    In training it needs `rngs={"dropout": key}`. The original's batch-norm form has no norm at all.

    Attributes:
      depths: number of convolutions before each pool.

    Source: Simonyan and Zisserman 2015; stem settings of the original code.
    """

    depths: tuple[int, ...]

    minimum_size: ClassVar[int | None] = 32
    initializers: ClassVar[Initializers] = Initializers(
        conv=LayerInit(FAN_OUT, zero_bias),
        deconv=LayerInit(FAN_OUT, zero_bias),
        dense=LayerInit(nn.initializers.normal(0.01), zero_bias),
    )

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener).in_original(batch="none")
        x = channels_first(adaptive_average(convolutions(self, units, x), 7))
        for name in ("fc1", "fc2"):
            x = ops.relu(units.dense(self.scaled(4096), name=name)(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return units.classifier(self.num_classes, name="fc3")(x)
