"""The small convolutional network of the first experiments; the choice of norm is made here alone."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from netdeconv_jax import DeconvConv, DeconvDense

NETWORKS = ("cnn",)
NORMS = {"batch": "batch norm", "deconv": "deconvolution"}


def create(name: str, *, norm: str, num_classes: int, **settings: Any) -> nn.Module:
    """Return the network `name` with normalization `norm`, called as `model(x, train=True)`.

    Args:
      name: one of `NETWORKS`.
      norm: `"batch"`, convolutions followed by batch normalization with momentum 0.9 and epsilon 1e-5 (Flax's
        default 0.99 would make it look bad for its first hundred steps), or `"deconv"`.
      num_classes: int.
      settings: attributes of the network, such as `widths`.
    Raises:
      ValueError: an unknown name, norm or setting.
    """
    if name not in NETWORKS:
        raise ValueError(f"`network` must be one of {NETWORKS}, got {name!r}.")
    if norm not in NORMS:
        raise ValueError(f"`norm` must be one of {tuple(NORMS)}, got {norm!r}.")
    known = {f.name for f in dataclasses.fields(ConvNet)} - {"parent", "name"}
    for setting in settings:
        if setting not in known:
            raise ValueError(f"`model` must hold settings of {sorted(known)}, got {setting!r}.")
    if "widths" in settings and len(settings["widths"]) != len(settings.get("strides", ())):
        raise ValueError(
            f"`model.widths` and `model.strides` must be as long as each other, got "
            f"{settings['widths']} and {settings.get('strides')}."
        )
    return ConvNet(num_classes=num_classes, norm=norm, **settings)


class ConvNet(nn.Module):
    """3x3 convolutions with ReLU, the mean over all pixels, and a linear classifier.

    Attributes:
      num_classes: width of the output.
      norm: one of `NORMS`.
      widths: features of each convolution.
      strides: of each convolution.
      block_size: channels that a deconvolution whitens together; no meaning to the other norms.
    """

    num_classes: int
    norm: str
    widths: tuple[int, ...] = (32, 32, 64, 64)
    strides: tuple[int, ...] = (1, 1, 2, 1)
    block_size: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return logits [batch, num_classes] of images [batch, height, width, channels]."""
        deconv, running = self.norm == "deconv", not train
        for width, stride in zip(self.widths, self.strides, strict=True):
            if deconv:
                layer = DeconvConv(width, (3, 3), stride, block_size=self.block_size)
                x = layer(x, use_running_average=running)
            else:
                x = nn.Conv(width, (3, 3), stride, use_bias=False)(x)
                x = nn.BatchNorm(momentum=0.9, epsilon=1e-5)(x, use_running_average=running)
            x = nn.relu(x)
        x = x.mean(axis=(1, 2))
        if deconv:
            return DeconvDense(self.num_classes)(x, use_running_average=running)
        return nn.Dense(self.num_classes)(x)
