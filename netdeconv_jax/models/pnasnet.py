"""PNASNet (Liu et al. 2018), two small forms for 32x32 images."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import MaxPool, global_average
from netdeconv_jax.models.units import Units, Whitening
from netdeconv_jax.whitening import Freeze

CELLS = 6  # in each of three stages, with a strided cell between them
STEM: Whitening = {"num_iters": 10, "freeze": Freeze()}


class SepConv(nn.Module):
    """A convolution that filters each input channel by itself, with its norm.

    Attributes:
      units: where layers come from.
      features: a multiple of the input's.
      kernel_size: side of the kernel.
      strides: of the convolution.
    """

    units: Units
    features: int
    kernel_size: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to `features`, at 1 / `strides` of the size."""
        conv = self.units.conv(
            self.features, self.kernel_size, self.strides, groups=x.shape[-1], name="conv1"
        )
        return self.units.norm(name="bn1")(conv(x))


class CellA(nn.Module):
    """A 7x7 separable convolution plus a 3x3 maximum.

    Attributes:
      units: where layers come from.
      features: of the output.
      strides: of the cell; the maximum is projected where it is not 1.
    """

    units: Units
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to `features`, at 1 / `strides` of the size."""
        y = SepConv(self.units, self.features, 7, self.strides, name="sep_conv1")(x)
        return ops.relu(y + projected_maximum(self, x))


class CellB(nn.Module):
    """7x7 plus 3x3, 5x5 plus a maximum; both side by side, then a 1x1 convolution.

    Attributes:
      units, features, strides: as `CellA`.
    """

    units: Units
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to `features`, at 1 / `strides` of the size."""
        units, features, strides = self.units, self.features, self.strides
        left = SepConv(units, features, 7, strides, name="sep_conv1")(x)
        left = ops.relu(left + SepConv(units, features, 3, strides, name="sep_conv2")(x))
        right = projected_maximum(self, x)
        right = ops.relu(right + SepConv(units, features, 5, strides, name="sep_conv3")(x))
        y = units.conv(features, 1, name="conv2")(jnp.concatenate([left, right], axis=-1))
        return ops.relu(units.norm(name="bn2")(y))


def projected_maximum(cell: CellA | CellB, x: jax.Array) -> jax.Array:
    """Return the 3x3 maximum of x, through a 1x1 convolution where the cell strides."""
    y = MaxPool(3, cell.strides, padding=1, name="maxpool")(x)
    if cell.strides == 1:
        return y
    return cell.units.norm(name="bn1")(cell.units.conv(cell.features, 1, name="conv1")(y))


class PNASNet(Network):
    """PNASNet: a 3x3 stem, three stages of six cells, a strided cell that doubles the features between.

    Attributes:
      cell: `CellA` or `CellB`.
      features: of the first stage.

    Source: Liu et al. 2018; sizes and stem settings of the original code.
    """

    cell: type[CellA] | type[CellB]
    features: int

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        features = self.scaled(self.features)
        x = units.conv(features, 3, name="conv1", **STEM)(x)
        x = ops.relu(units.norm(name="bn1")(x))
        for stage in range(1, 6):
            if stage % 2:
                for i in range(CELLS):
                    x = self.cell(units, features, name=f"layer{stage}_{i}")(x)
            else:
                features *= 2
                x = self.cell(units, features, 2, name=f"layer{stage}")(x)
        return units.classifier(self.num_classes, block_size=512, name="linear")(global_average(x))
