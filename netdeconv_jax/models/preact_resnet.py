"""Pre-activation ResNet (He et al. 2016, Identity Mappings) for 32x32 images."""

import jax
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import global_average
from netdeconv_jax.models.units import Units, Whitening
from netdeconv_jax.whitening import Freeze

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # features, stride of the first block
STEM: Whitening = {"num_iters": 10, "freeze": Freeze()}


class PreActBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions; the shortcut starts behind the first ReLU.

    Attributes:
      units: where layers come from.
      features: of every convolution.
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
        return y + x


class PreActResNet(Network):
    """Pre-activation ResNet-18: a 3x3 stem, four stages of two blocks, nothing behind the last.

    Source: He et al. 2016; stem settings of the original code.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        x = units.conv(self.scaled(64), 3, name="conv1", **STEM)(x)
        if self.layout == "original":
            units.norm(name="bn1")(x)  # declared there and never used; its parameters count
        for stage, (features, strides) in enumerate(STAGES, 1):
            for i in range(2):
                block_strides = strides if i == 0 else 1
                name = f"layer{stage}_{i}"
                x = PreActBlock(units, self.scaled(features), block_strides, name=name)(x)
        return units.classifier(self.num_classes, block_size=512, name="linear")(global_average(x))
