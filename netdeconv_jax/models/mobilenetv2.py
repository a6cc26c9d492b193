"""MobileNetV2 (Sandler et al. 2018) for 32x32 images."""

import jax
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import global_average
from netdeconv_jax.models.units import Units, Whitening
from netdeconv_jax.whitening import Freeze

# expansion, features, blocks, stride of the first; strides are smaller than the paper's for 32x32 images
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM: Whitening = {"num_iters": 10, "freeze": Freeze()}
DEPTHWISE: Whitening = {"num_iters": 1}
PROJECTION: Whitening = {"num_iters": 1}  # in blocks as wide as the input of the inverted residual


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel by a 3x3, project by a 1x1 without ReLU.

    Where the size stays there is a shortcut, projected if the features change: the paper has none then.

    Attributes:
      units: where layers come from.
      expansion: of the features in between.
      features: of the output.
      strides: of the 3x3 convolution.
    """

    units: Units
    expansion: int
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to `features`, at 1 / `strides` of the size."""
        conv, norm = self.units.conv, self.units.norm
        wide = self.expansion * x.shape[-1]
        y = ops.relu(norm(name="bn1")(conv(wide, 1, name="conv1")(x)))
        depthwise = conv(wide, 3, self.strides, groups=wide, name="conv2", **DEPTHWISE)
        y = ops.relu(norm(name="bn2")(depthwise(y)))
        projection: Whitening = PROJECTION | {"block_size": x.shape[-1]}
        y = norm(name="bn3")(conv(self.features, 1, name="conv3", **projection)(y))
        if self.strides != 1:
            return y
        if x.shape != y.shape:
            x = norm(name="shortcut_bn")(conv(self.features, 1, name="shortcut")(x))
        return y + x


class MobileNetV2(Network):
    """MobileNetV2: a 3x3 stem, 17 inverted residuals, a 1x1 convolution.

    Source: Sandler et al. 2018; stem, depthwise and projection settings of the original code.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        x = units.conv(self.scaled(32), 3, name="conv1", **STEM)(x)
        x = ops.relu(units.norm(name="bn1")(x))
        number = 0
        for expansion, features, count, strides in STAGES:
            for i in range(count):
                x = InvertedResidual(
                    units,
                    expansion,
                    self.scaled(features),
                    strides if i == 0 else 1,
                    name=f"layers_{number}",
                )(x)
                number += 1
        x = ops.relu(units.norm(name="bn2")(units.conv(self.scaled(1280), 1, name="conv2")(x)))
        return units.classifier(self.num_classes, block_size=512, name="linear")(global_average(x))
