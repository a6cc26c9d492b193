"""Squeeze-and-excitation network (Hu et al. 2018) on pre-activation blocks, for 32x32 images."""

import jax
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import global_average
from netdeconv_jax.models.units import Units, Whitening
from netdeconv_jax.whitening import Freeze

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # features, stride of the first block
STEM: Whitening = {"num_iters": 15, "freeze": Freeze()}
REDUCTION = 16


class SEPreActBlock(nn.Module):
    """A pre-activation block whose output is gated, channel by channel, before the shortcut is added.

    Attributes:
      units: where layers come from.
      features: of both 3x3 convolutions.
      strides: of the first.
    """

    units: Units
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to `features`, at 1 / `strides` of the size."""
        conv, norm = self.units.conv, self.units.norm
        y = ops.relu(norm(name="bn1")(x))
        if self.strides != 1 or x.shape[-1] != self.features:
            x = conv(self.features, 1, self.strides, name="shortcut")(y)
        y = conv(self.features, 3, self.strides, name="conv1")(y)
        y = conv(self.features, 3, name="conv2")(ops.relu(norm(name="bn2")(y)))
        return y * gates(self.units, y) + x


def gates(units: Units, x: jax.Array) -> jax.Array:
    """Return gates in (0, 1), [batch, 1, 1, channels], from the mean of each channel of x.

    Source: Hu et al. 2018, squeeze and excitation with a reduction of 16.
    """
    channels = x.shape[-1]
    y = global_average(x, keepdims=True)
    # One pixel an image: a sampling stride would leave fewer samples than there are channels.
    every = units.in_full(sampling_stride=1)
    y = units.conv(max(1, channels // REDUCTION), 1, use_bias=True, name="fc1", **every)(y)
    return nn.sigmoid(units.conv(channels, 1, use_bias=True, name="fc2", **every)(ops.relu(y)))


class SENet(Network):
    """SENet-18: a 3x3 stem, four stages of two gated pre-activation blocks.

    Source: Hu et al. 2018; stem settings of the original code, which whitens the gates' layers too.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        x = units.conv(self.scaled(64), 3, name="conv1", **STEM)(x)
        x = ops.relu(units.norm(name="bn1")(x))
        for stage, (features, strides) in enumerate(STAGES, 1):
            for i in range(2):
                block_strides = strides if i == 0 else 1
                name = f"layer{stage}_{i}"
                x = SEPreActBlock(units, self.scaled(features), block_strides, name=name)(x)
        return units.classifier(self.num_classes, block_size=512, name="linear")(global_average(x))
