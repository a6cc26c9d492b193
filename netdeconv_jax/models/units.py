"""The one place where a network's norm is chosen.

A network asks for `conv`, `norm` and `dense` and never for a kind of norm:

| norm | `conv` | `norm` | `dense` |
|---|---|---|---|
| `"batch"` | `nn.Conv`, no bias unless asked for | `nn.BatchNorm` | `nn.Dense` |
| `"deconv"` | `DeconvConv` | nothing | `DeconvDense` |
| `"channel"` | `DeconvConv`, `whiten="channels"` | nothing | `DeconvDense` |
| `"none"` | `nn.Conv` | nothing | `nn.Dense` |
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.linen import DeconvConv, DeconvDense
from netdeconv_jax.models.initializers import PYTORCH, Initializers
from netdeconv_jax.whitening import WhiteningSpec

NORMS = ("batch", "channel", "deconv", "none")
LAYOUTS = ("full", "original")

WHOLE = 1024  # all of a 28x28 image together; gcd(512, 784) would be 16

Layer = Callable[[jax.Array], jax.Array]
Whitening = dict[str, Any]  # settings of `WhiteningSpec` that a network lays over the user's


@dataclasses.dataclass(frozen=True)
class Units:
    """The layers of a network under one choice of norm, for the body of an `nn.compact` method.

    Each method returns a function of `x` that declares a layer in the module that is running. A network lays
    its own `**whitening` (stem iterations, freeze schedule, ...) over the user's `spec`; without whitening,
    they mean nothing.

    Attributes:
      kind: of norm, one of `NORMS`.
      spec: how layers whiten where the network does not say otherwise.
      layout: `"full"`, or `"original"` to reproduce the original code's networks, quirks included.
      train: use batch statistics, not running ones.
      update_whitener: False in a training step whose whitening layers reuse running statistics, see
        `DeconvConv`. Batch norms take the batch's all the same.
      dtype, param_dtype: of computation and of parameters, as `nn.Conv`.
      axis_name: mapped axis over which statistics are pooled, as `nn.BatchNorm`.
      initializers: how parameters start.

    Source: ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from netdeconv_jax import WhiteningSpec, ops
      >>> from netdeconv_jax.models import Units
      >>> class Block(nn.Module):
      ...     units: Units
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return ops.relu(self.units.norm()(self.units.conv(8, 3)(x)))
      >>> block = Block(Units("batch", WhiteningSpec()))
      >>> sorted(block.init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))["params"])
      ['BatchNorm_0', 'Conv_0']
    """

    kind: str
    spec: WhiteningSpec
    layout: str = "full"
    train: bool = False
    update_whitener: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: Any = None
    initializers: Initializers = PYTORCH

    def in_original(self, **norms: str) -> "Units":
        """Return units whose norm is another one in the original layout.

        `units.in_original(deconv="batch")` is for layers that kept their batch norm there.
        """
        if self.layout != "original":
            return self
        return dataclasses.replace(self, kind=norms.get(self.kind, self.kind))

    def conv(
        self,
        features: int,
        kernel_size: int,
        strides: int = 1,
        *,
        padding: int | None = None,
        groups: int = 1,
        use_bias: bool | None = None,
        name: str | None = None,
        **whitening: Any,
    ) -> Layer:
        """Return a square convolution, NHWC.

        Args:
          features, strides, name: as `nn.Conv`.
          kernel_size: side of the kernel, a static int.
          padding: zeros on every side; default `kernel_size // 2`, so that stride 1 keeps the size.
          groups: `feature_group_count`.
          use_bias: default True, but False where a batch norm brings its own.
          **whitening: settings of `WhiteningSpec` that this layer lays over the user's.
        """
        plain = self.initializers.conv
        whitened = self.initializers.deconv

        def layer(x: jax.Array) -> jax.Array:
            init = whitened if self._whitens else plain
            fan_in = x.shape[-1] // groups * kernel_size**2
            arguments: dict[str, Any] = {
                "features": features,
                "kernel_size": (kernel_size,) * 2,
                "strides": (strides,) * 2,
                "padding": kernel_size // 2 if padding is None else padding,
                "feature_group_count": groups,
                "use_bias": self.kind != "batch" if use_bias is None else use_bias,
            } | self._shared(init.kernel, init.bias(fan_in), name)
            if self._whitens:
                return DeconvConv(**arguments, **self._whitening(whitening))(x)
            # In training as `DeconvConv`, so that the norms are compared on the same convolution.
            operation = ops.convolution if self.train else None
            return nn.Conv(**arguments, conv_general_dilated=operation)(x)

        return layer

    def norm(self, *, name: str | None = None) -> Layer:
        """Return a batch norm where there is one, else the identity."""
        if self.kind != "batch":
            return lambda x: x
        return nn.BatchNorm(
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            # Otherwise statistics are float32 even where parameters are float64.
            force_float32_reductions=jnp.promote_types(jnp.float32, self.param_dtype)
            == jnp.float32,
            name=name,
            **self._statistics,
        )

    def dense(self, features: int, *, name: str | None = None, **whitening: Any) -> Layer:
        """Return a dense layer; `**whitening` as in `conv`."""

        def layer(x: jax.Array) -> jax.Array:
            init = self.initializers.deconv_dense if self._whitens else self.initializers.dense
            arguments = self._shared(init.kernel, init.bias(x.shape[-1]), name)
            if self._whitens:
                return DeconvDense(features, **arguments, **self._whitening(whitening))(x)
            return nn.Dense(features, **arguments)(x)

        return layer

    def classifier(self, classes: int, *, name: str | None = None, **whitening: Any) -> Layer:
        """Return the dense layer that makes the logits, in float32 at least so that a loss is exact."""
        dense = self.dense(classes, name=name, **whitening)

        def layer(x: jax.Array) -> jax.Array:
            logits = dense(x)
            return logits.astype(jnp.promote_types(jnp.float32, logits.dtype))

        return layer

    def flattened(self, x: jax.Array) -> tuple[jax.Array, Whitening]:
        """Return x [batch, ...] as vectors for `dense`, and what it is to whiten together.

        That is all of a vector; but where only channels are whitened, the channels of each pixel, by one
        whitener for all pixels: of a grey image a single mean and variance.
        """
        flat = x.reshape(x.shape[0], -1)
        if self.kind == "channel" and x.ndim > 2:
            return flat, {"block_size": x.shape[-1]}
        return flat, {"block_size": WHOLE}

    def in_full(self, **whitening: Any) -> dict[str, Any]:
        """Return `whitening` in the full layout, and nothing where the original code is reproduced."""
        return whitening if self.layout == "full" else {}

    @property
    def _whitens(self) -> bool:
        return self.kind in ("deconv", "channel")

    @property
    def _statistics(self) -> dict[str, Any]:
        return {"use_running_average": not self.train, "axis_name": self.axis_name}

    def _shared(self, kernel_init: Any, bias_init: Any, name: str | None) -> dict[str, Any]:
        return {
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "name": name,
        }

    def _whitening(self, whitening: dict[str, Any]) -> dict[str, Any]:
        settings = {"update_whitener": self.update_whitener, "spec": self._spec(whitening)}
        return self._statistics | settings

    def _spec(self, whitening: dict[str, Any]) -> WhiteningSpec:
        settings = dict(whitening)
        if not hasattr(self.spec.root, "num_iters"):
            settings.pop("num_iters", None)  # a number of iterations means nothing to other roots
        if self.kind == "channel":
            settings["whiten"] = "channels"
        return self.spec.replace(**settings)
