"""EfficientNet-B0 (Tan and Le 2019) for 32x32 images."""

import jax
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import global_average
from netdeconv_jax.models.senet import gates
from netdeconv_jax.models.units import Units, Whitening
from netdeconv_jax.whitening import Freeze

# expansion, features, blocks, stride of the first; every kernel 3x3
STAGES = (
    (1, 16, 1, 2),
    (6, 24, 2, 1),
    (6, 40, 2, 2),
    (6, 80, 3, 2),
    (6, 112, 3, 1),
    (6, 192, 4, 2),
    (6, 320, 1, 2),
)
STEM: Whitening = {"num_iters": 10, "freeze": Freeze()}


class MBConv(nn.Module):
    """An inverted residual, gated channel by channel, plus its input, or plus itself where it strides.

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
        y = conv(wide, 3, self.strides, groups=wide, name="conv2")(y)
        y = ops.relu(norm(name="bn2")(y))
        y = norm(name="bn3")(conv(self.features, 1, name="conv3")(y))
        if self.strides != 1:
            x = y  # the original adds the ungated features where the size changes; the paper nothing
        elif x.shape != y.shape:
            x = norm(name="shortcut_bn")(conv(self.features, 1, name="shortcut")(x))
        return y * gates(self.units, y) + x


class EfficientNet(Network):
    """EfficientNet-B0: a 3x3 stem, 16 gated inverted residuals.

    The original layout whitens only the stem and the classifier, and keeps batch norm in between.

    Source: Tan and Le 2019, with ReLU and 3x3 kernels as in the original code; stem settings from there.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        inner = units.in_original(deconv="batch", channel="batch")
        x = units.conv(self.scaled(32), 3, name="conv1", **STEM)(x)
        x = ops.relu(units.norm(name="bn1")(x))
        number = 0
        for expansion, features, count, strides in STAGES:
            for i in range(count):
                x = MBConv(
                    inner,
                    expansion,
                    self.scaled(features),
                    strides if i == 0 else 1,
                    name=f"layers_{number}",
                )(x)
                number += 1
        return units.classifier(self.num_classes, block_size=512, name="linear")(global_average(x))
