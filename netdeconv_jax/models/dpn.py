"""Dual-path network DPN-92 (Chen et al. 2017) for 32x32 images."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import global_average
from netdeconv_jax.models.units import Units, Whitening
from netdeconv_jax.whitening import Freeze

# features of the grouped convolution, of the residual path, new ones of the dense path, blocks, first stride
STAGES = (
    (96, 256, 16, 3, 1),
    (192, 512, 32, 4, 2),
    (384, 1024, 24, 20, 2),
    (768, 2048, 128, 3, 2),
)
GROUPS = 32
STEM: Whitening = {"num_iters": 10, "freeze": Freeze()}


class DualPathBlock(nn.Module):
    """A grouped bottleneck whose first features are added to the input, and whose last are appended.

    Attributes:
      units: where layers come from.
      inner: features of the grouped convolution.
      groups: its number of groups.
      residual: features that are added.
      dense: features that are appended.
      strides: of the grouped convolution.
      projects: whether the input goes through a convolution first: the first block of a stage.
    """

    units: Units
    inner: int
    groups: int
    residual: int
    dense: int
    strides: int = 1
    projects: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to `dense` features more, at 1 / `strides` of the size."""
        conv, norm = self.units.conv, self.units.norm
        features = self.residual + self.dense
        y = ops.relu(norm(name="bn1")(conv(self.inner, 1, name="conv1")(x)))
        y = conv(self.inner, 3, self.strides, groups=self.groups, name="conv2")(y)
        y = ops.relu(norm(name="bn2")(y))
        y = norm(name="bn3")(conv(features, 1, name="conv3")(y))
        if self.projects:
            x = norm(name="shortcut_bn")(conv(features, 1, self.strides, name="shortcut")(x))
        x, old = jnp.split(x, [self.residual], axis=-1)
        y, new = jnp.split(y, [self.residual], axis=-1)
        return ops.relu(jnp.concatenate([x + y, old, new], axis=-1))


class DPN(Network):
    """DPN-92: a 3x3 stem, 30 dual-path blocks.

    Source: Chen et al. 2017; stem settings of the original code.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        x = units.conv(self.scaled(64), 3, name="conv1", **STEM)(x)
        x = ops.relu(units.norm(name="bn1")(x))
        groups = self.scaled(GROUPS)
        for stage, (inner, residual, dense, count, strides) in enumerate(STAGES, 1):
            for i in range(count):
                x = DualPathBlock(
                    units,
                    inner // GROUPS * groups,
                    groups,
                    self.scaled(residual),
                    self.scaled(dense),
                    strides if i == 0 else 1,
                    projects=i == 0,
                    name=f"layer{stage}_{i}",
                )(x)
        return units.classifier(self.num_classes, block_size=512, name="linear")(global_average(x))
