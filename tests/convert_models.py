"""Linen models of the structures that people write, by people who never heard of whitening.

Small, in float32, with the manners of their kinds: norms from `partial`, zeros for the last scale of a block,
modules in `setup` or on the fly, blocks that are scanned, rematerialized or shared.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1; the last scale starts at zero, the shortcut is projected where it must be."""

    width: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(2 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(2 * self.width, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Stem with a pool, two stages of bottlenecks, dense head."""

    classes: int = 5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)
        x = conv(8, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage in range(2):
            strides = (2, 2) if stage else (1, 1)
            x = Bottleneck(4 * 2**stage, conv, norm, strides)(x)
        x = nn.Dense(self.classes, dtype=self.dtype)(jnp.mean(x, (1, 2)))
        return jnp.asarray(x, jnp.float32)


class PreActivation(nn.Module):
    """Norm and ReLU first; the norms in front of blocks see a sum, those inside a convolution's output."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.Conv(6, (3, 3), use_bias=False, name="stem")(x)
        for block in range(2):
            y = nn.relu(norm(name=f"first{block}")(x))
            y = nn.Conv(6, (3, 3), use_bias=False, name=f"conv{block}a")(y)
            y = nn.relu(norm(name=f"second{block}")(y))
            x = x + nn.Conv(6, (3, 3), use_bias=False, name=f"conv{block}b")(y)
        x = nn.relu(norm(name="last")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Tutorial(nn.Module):
    """Two convolutions with pools, two dense layers, no norm and no flags."""

    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(nn.Conv(4, kernel_size=(3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(8, kernel_size=(3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(16)(x.reshape(len(x), -1)))
        return nn.Dense(5)(x)


class Shared(nn.Module):
    """Modules made in `setup`; one convolution and one norm that run twice; a grouped and a dilated layer."""

    def setup(self):
        self.enter = nn.Conv(4, (3, 3), padding="CIRCULAR")
        self.enter_norm = nn.BatchNorm(momentum=0.9)
        self.twice = nn.Conv(4, (1, 1), use_bias=False)
        self.twice_norm = nn.BatchNorm(momentum=0.9, use_scale=False)
        self.grouped = nn.Conv(8, (3, 3), feature_group_count=2, kernel_dilation=2)
        self.grouped_norm = nn.BatchNorm(momentum=0.9, use_bias=False)
        self.heads = [nn.Dense(3), nn.Dense(5)]

    def features(self, x, train):
        x = nn.elu(self.enter_norm(self.enter(x), use_running_average=not train))
        for _ in range(2):
            x = nn.elu(self.twice_norm(self.twice(x), use_running_average=not train))
        return nn.elu(self.grouped_norm(self.grouped(x), use_running_average=not train))

    def __call__(self, x, train: bool = True):
        x = self.features(x, train).mean((1, 2))
        return self.heads[1](nn.elu(self.heads[0](x)))


def sequential() -> nn.Module:
    """Layers in a list, with functions among them."""
    return nn.Sequential(
        [
            nn.Conv(6, (3, 3), strides=2, use_bias=False),
            nn.BatchNorm(use_running_average=True),
            nn.relu,
            nn.Conv(6, (3, 3), padding="VALID"),
            nn.relu,
            lambda x: x.mean((1, 2)),
            nn.Dense(5),
        ]
    )


class Residual(nn.Module):
    """A block that keeps its shape, so that it can be scanned."""

    train: bool

    @nn.compact
    def __call__(self, x, _=None):
        norm = partial(nn.BatchNorm, use_running_average=not self.train, momentum=0.9)
        y = norm()(nn.Conv(x.shape[-1], (3, 3), use_bias=False)(nn.relu(x)))
        return x + y, None


class Stacked(nn.Module):
    """Blocks under a transform: `"scan"`, `"remat"` or `"vmap"` (an ensemble whose members are averaged)."""

    transform: str
    collections: Sequence[str] = ("params", "batch_stats")

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        axes: Any = dict.fromkeys(self.collections, 0)
        rngs: Any = {"params": True}
        everywhere: Any = None
        if self.transform == "scan":
            blocks = nn.scan(Residual, variable_axes=axes, split_rngs=rngs, length=2)
            x, _ = blocks(train, name="blocks")(x, None)
        elif self.transform == "remat":
            for i in range(2):
                x, _ = nn.remat(Residual)(train, name=f"block{i}")(x)
        else:
            members = nn.vmap(
                Residual, in_axes=everywhere, axis_size=2, variable_axes=axes, split_rngs=rngs
            )
            x = members(train, name="members")(x)[0].mean(0)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class OwnBatchNorm(nn.Module):
    """A batch norm of one's own, as packages carry them along."""

    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-3
    scale_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x):
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", self.scale_init, shape)
        mu, sigma = mean.value, var.value
        if not self.use_running_average:
            axes = tuple(range(x.ndim - 1))
            mu, sigma = x.mean(axes), x.var(axes)
            if not self.is_initializing():
                share = 1 - self.momentum
                mean.value = mean.value + share * (mu - mean.value)
                var.value = var.value + share * (sigma - var.value)
        lift = (1,) * (x.ndim - 1) + shape
        gain = (scale * jax.lax.rsqrt(sigma + self.epsilon)).reshape(lift)
        return (x - mu.reshape(lift)) * gain


class Homemade(nn.Module):
    """Convolution, a batch norm of one's own; a second pair that starts at zero."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.relu(OwnBatchNorm(not train)(nn.Conv(4, (3, 3))(x)))
        y = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = x + OwnBatchNorm(not train, scale_init=nn.initializers.zeros)(y)
        return nn.Dense(5)(x.mean((1, 2)))


class ConvBN(nn.Module):
    """A block with settings of the same names as those of a batch norm."""

    features: int
    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        return nn.BatchNorm(self.use_running_average, momentum=self.momentum)(x)


class BNReLU(nn.BatchNorm):
    """An heir that does more than its parent."""

    def __call__(self, x, *args, **kwargs):
        return nn.relu(super().__call__(x, *args, **kwargs))


class GammaBatchNorm(OwnBatchNorm):
    """A batch norm whose scale has another name."""

    @nn.compact
    def __call__(self, x):
        gamma = self.param("gamma", nn.initializers.ones, x.shape[-1:])
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        lift = (1,) * (x.ndim - 1) + x.shape[-1:]
        gain = gamma * jax.lax.rsqrt(var.value + self.epsilon)
        return (x - mean.value.reshape(lift)) * gain.reshape(lift)


class Lookalikes(nn.Module):
    """What has the settings of a batch norm and is none, or more than one."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.relu(ConvBN(4, not train, name="block")(x))
        x = BNReLU(not train, name="heir")(nn.Conv(4, (1, 1), name="before_heir")(x))
        x = GammaBatchNorm(not train, name="gamma")(nn.Conv(4, (1, 1), name="before_gamma")(x))
        x = nn.BatchNorm(not train, axis=1, name="rows")(nn.Conv(8, (1, 1), name="before_rows")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Decoder(nn.Module):
    """Transposed convolutions, with strides and without, each with a batch norm behind it."""

    strides: int = 2
    flipped: bool = False

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = partial(nn.ConvTranspose, transpose_kernel=self.flipped)
        x = nn.elu(norm(name="norm_in")(conv(4, (3, 3), use_bias=False, name="in")(x)))
        x = conv(4, (4, 3), (self.strides, self.strides), padding="CIRCULAR", name="up")(x)
        x = nn.elu(norm(name="norm_up")(x))
        return nn.Conv(2, (1, 1), name="out")(x).max((1, 2))


class Unconverted(nn.Module):
    """Layers that do not convert, each with a batch norm behind it."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        masked = nn.ConvTranspose(4, (2, 2), mask=jnp.ones((2, 2, 3, 4)), name="up")
        x = nn.BatchNorm(not train, name="norm_up")(masked(x))
        x = nn.BatchNorm(not train, name="norm_local")(nn.ConvLocal(4, (1, 1), name="local")(x))
        x = nn.SpectralNorm(nn.Conv(4, (1, 1), name="normed"), name="spectral")(
            x, update_stats=False
        )
        x = nn.Conv(4, (1, 1), name="conv")(inputs=nn.BatchNorm(not train, name="norm_normed")(x))
        x = nn.BatchNorm(name="norm_conv")(use_running_average=not train, x=x).mean((1, 2))
        x = nn.BatchNorm(not train, name="norm_dense")(nn.Dense(4, name="dense")(x))
        return nn.DenseGeneral(3, name="head")(x)
