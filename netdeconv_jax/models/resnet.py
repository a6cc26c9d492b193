"""ResNet (He et al. 2016), for 32x32 images and for ImageNet."""

from typing import ClassVar

import jax
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.initializers import FAN_OUT, Initializers, LayerInit
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import MaxPool, global_average
from netdeconv_jax.models.units import Units, Whitening
from netdeconv_jax.whitening import Freeze

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # features, stride of the first block
IMAGENET_STEM: Whitening = {"num_iters": 15, "freeze": Freeze()}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Attributes:
      units: where layers come from.
      features: of every convolution.
      strides: of the first.
      keeps_norm: the norms that keep a batch norm behind the shortcut in the original layout.
    """

    units: Units
    features: int
    strides: int = 1
    keeps_norm: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to `features`, at 1 / `strides` of the size."""
        conv, norm = self.units.conv, self.units.norm
        y = ops.relu(norm(name="bn1")(conv(self.features, 3, self.strides, name="conv1")(x)))
        y = norm(name="bn2")(conv(self.features, 3, name="conv2")(y))
        return ops.relu(y + shortcut(self, x, self.features))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 convolutions, the last four times as wide, and a shortcut.

    Attributes:
      units, features, strides, keeps_norm: as `BasicBlock`; `features` of the 3x3 convolution.
    """

    units: Units
    features: int
    strides: int = 1
    keeps_norm: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, height, width, channels] to `4 * features`, at 1 / `strides` of the size."""
        conv, norm = self.units.conv, self.units.norm
        y = ops.relu(norm(name="bn1")(conv(self.features, 1, name="conv1")(x)))
        y = ops.relu(norm(name="bn2")(conv(self.features, 3, self.strides, name="conv2")(y)))
        y = norm(name="bn3")(conv(4 * self.features, 1, name="conv3")(y))
        return ops.relu(y + shortcut(self, x, 4 * self.features))


def shortcut(block: BasicBlock | Bottleneck, x: jax.Array, features: int) -> jax.Array:
    """Return x, projected where the block changes its shape."""
    if block.strides == 1 and x.shape[-1] == features:
        return x
    x = block.units.conv(features, 1, block.strides, name="shortcut")(x)
    norm = block.units.in_original(**dict.fromkeys(block.keeps_norm, "batch")).norm
    return norm(name="shortcut_bn")(x)


class ResNet(Network):
    """ResNet for 32x32 images: a 3x3 stem that whitens like any layer, four stages.

    Attributes:
      blocks: number of blocks in each stage.
      block: `BasicBlock` or `Bottleneck`.

    Source: He et al. 2016, with the stem of the original code.

    Example:
      >>> from netdeconv_jax.models.resnet import BasicBlock, ResNet
      >>> ResNet((2, 2, 2, 2), BasicBlock, norm="batch").norm
      'batch'
    """

    blocks: tuple[int, ...]
    block: type[BasicBlock] | type[Bottleneck]

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        x = ops.relu(units.norm(name="bn1")(units.conv(self.scaled(64), 3, name="conv1")(x)))
        x = stages(self, units, x, keeps_norm=())
        return units.classifier(self.num_classes, block_size=512, name="linear")(global_average(x))


class ImageNetResNet(Network):
    """ResNet for 224x224 images: a strided 7x7 stem with a pool, four stages.

    The original layout keeps a batch norm behind every whitened shortcut.

    Attributes:
      blocks, block: as `ResNet`.

    Source: He et al. 2016; stem settings of the original code.
    """

    blocks: tuple[int, ...]
    block: type[BasicBlock] | type[Bottleneck]

    initializers: ClassVar[Initializers] = Initializers(
        conv=LayerInit(FAN_OUT), deconv=LayerInit(FAN_OUT)
    )

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, update_whitener: bool = True
    ) -> jax.Array:
        """Return the logits of x [batch, height, width, channels]."""
        units = self.units(x, train, update_whitener)
        x = units.conv(self.scaled(64), 7, 2, name="conv1", **IMAGENET_STEM)(x)
        x = ops.relu(units.norm(name="bn1")(x))
        x = MaxPool(3, 2, padding=1, name="maxpool")(x)
        x = stages(self, units, x, keeps_norm=("deconv", "channel"))
        return units.classifier(self.num_classes, name="fc")(global_average(x))


def stages(
    net: ResNet | ImageNetResNet, units: Units, x: jax.Array, *, keeps_norm: tuple[str, ...]
) -> jax.Array:
    """Return the features of x after all blocks of `net`."""
    for stage, ((features, strides), count) in enumerate(zip(STAGES, net.blocks, strict=True), 1):
        for i in range(count):
            x = net.block(
                units,
                net.scaled(features),
                strides if i == 0 else 1,
                keeps_norm=keeps_norm,
                name=f"layer{stage}_{i}",
            )(x)
    return x
