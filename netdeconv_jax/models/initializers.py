"""Initial distributions of the zoo, those of the original PyTorch code.

| layer | kernel | bias |
|---|---|---|
| every convolution and dense layer, unless below | U(-b, b), b = 1 / sqrt(fan_in) | U(-b, b) |
| ImageNet ResNet: convolutions, plain and whitened | N(0, 2 / fan_out) | U(-b, b) |
| ImageNet VGG: convolutions, plain and whitened | N(0, 2 / fan_out) | 0 |
| ImageNet VGG: plain dense layers | N(0, 0.01^2) | 0 |
| ImageNet DenseNet: plain convolutions | N(0, 2 / fan_in) | 0 |
| ImageNet DenseNet: plain dense layer | U(-b, b) | 0 |
| batch norm | scale 1 | 0 |

fan_in = in_features / feature_group_count * taps, fan_out = features * taps.

Source: the defaults of PyTorch's layers, and the loops over modules in the original's ImageNet files.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

BiasInit = Callable[[int], nn.initializers.Initializer]

PYTORCH_KERNEL = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
FAN_IN = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def uniform_bias(fan_in: int) -> nn.initializers.Initializer:
    """Return an initializer of U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), PyTorch's for a bias.

    Args:
      fan_in: int >= 1, inputs that one output sums.
    Returns:
      A function of (key, shape, dtype).

    Source: `torch.nn.Linear.reset_parameters`.

    Example:
      >>> import jax
      >>> from netdeconv_jax.models.initializers import uniform_bias
      >>> uniform_bias(4)(jax.random.key(0), (8,)).shape
      (8,)
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Any, dtype: Any = float) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def zero_bias(fan_in: int) -> nn.initializers.Initializer:
    """Return an initializer of zeros, whatever `fan_in`."""
    del fan_in
    return nn.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class LayerInit:
    """How one kind of layer starts.

    Attributes:
      kernel: initializer of the kernel.
      bias: function of fan_in that returns the initializer of the bias.
    """

    kernel: nn.initializers.Initializer = PYTORCH_KERNEL
    bias: BiasInit = uniform_bias


@dataclasses.dataclass(frozen=True)
class Initializers:
    """How the layers of one network start; the defaults are PyTorch's.

    Attributes:
      conv, dense: layers that do not whiten.
      deconv, deconv_dense: layers that do.
    """

    conv: LayerInit = LayerInit()
    dense: LayerInit = LayerInit()
    deconv: LayerInit = LayerInit()
    deconv_dense: LayerInit = LayerInit()


PYTORCH = Initializers()
