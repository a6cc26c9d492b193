"""ResNeXt-29 (Xie et al. 2017) with 32 groups of 4 features, for 32x32 images."""

import jax
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import global_average
from netdeconv_jax.models.units import Units, Whitening
from netdeconv_jax.whitening import Freeze

STAGES = ((128, 1), (256, 2), (512, 2))  # features of the grouped convolution, first stride
BLOCKS = 3
GROUPS = 32
STEM: Whitening = {"num_iters": 10, "freeze": Freeze()}
GROUPED: Whitening = {"num_iters": 3}


class ResNeXtBlock(nn.Module):
    """A grouped 3x3 convolution between two 1x1 convolutions, the last twice as wide, and a shortcut.

    Attributes:
      units: where layers come from.
      features: of the grouped convolution.
      groups: its number of groups.
      strides: its stride.
    """

    units: Units
    features: int
    groups: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to `2 * features`, at 1 / `strides` of the size."""
        conv, norm = self.units.conv, self.units.norm
        features = self.features
        y = ops.relu(norm(name="bn1")(conv(features, 1, name="conv1")(x)))
        grouped = conv(features, 3, self.strides, groups=self.groups, name="conv2", **GROUPED)
        y = ops.relu(norm(name="bn2")(grouped(y)))
        y = norm(name="bn3")(conv(2 * features, 1, name="conv3")(y))
        if x.shape != y.shape:
            x = conv(2 * features, 1, self.strides, name="shortcut")(x)
            x = norm(name="shortcut_bn")(x)
        return ops.relu(y + x)


class ResNeXt(Network):
    """ResNeXt-29 32x4d: a 1x1 stem, three stages of three blocks.

    Source: Xie et al. 2017; stem and grouped settings of the original code.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        x = units.conv(self.scaled(64), 1, name="conv1", **STEM)(x)
        x = ops.relu(units.norm(name="bn1")(x))
        groups = self.scaled(GROUPS)
        for stage, (features, strides) in enumerate(STAGES, 1):
            for i in range(BLOCKS):
                x = ResNeXtBlock(
                    units,
                    features // GROUPS * groups,
                    groups,
                    strides if i == 0 else 1,
                    name=f"layer{stage}_{i}",
                )(x)
        return units.classifier(self.num_classes, block_size=512, name="linear")(global_average(x))
