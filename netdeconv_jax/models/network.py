"""What all networks of the zoo have in common: their settings, and the check of their input."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from netdeconv_jax.models.initializers import PYTORCH, Initializers
from netdeconv_jax.models.units import LAYOUTS, NORMS, Units
from netdeconv_jax.ops.arguments import check_number
from netdeconv_jax.ops.grouping import check_count
from netdeconv_jax.whitening import WhiteningSpec
from netdeconv_jax.whitening.layer import check_dtypes, check_spec


class Network(nn.Module):
    """Base of the zoo: images [batch, height, width, channels] to logits [batch, num_classes].

    A network writes its layers with `units = self.units(x, train, update_whitener)`, names them as the
    original does, and says which stride or pooling is its limit in `minimum_size`. In a training step called
    with `update_whitener=False` its whitening layers reuse their running statistics, see `DeconvConv`.

    Attributes:
      num_classes: logits per image.
      norm: `"batch"`, `"channel"`, `"deconv"` or `"none"`.
      spec: how layers whiten; the network lays its own stem and overrides over it.
      layout: `"full"`, or `"original"` for the network that the original code built, quirks included.
      width: multiplies every number of features; for quick runs.
      dtype: of computation, as `nn.Conv`. Logits are float32 at least.
      param_dtype: of parameters.
      axis_name: mapped axis over which statistics are pooled, as `nn.BatchNorm`.

    Class attributes:
      minimum_size: smallest height and width that every layer can take; None for inputs of any shape.
      initializers: how parameters start.

    Raises:
      ValueError: an unknown `norm` or `layout`, or a `num_classes` or `width` that is not positive.
      TypeError: `num_classes` is not an int, `width` not a number, `spec` no `WhiteningSpec`, or `dtype` or
        `param_dtype` not floating point.

    Source: ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from netdeconv_jax import ops
      >>> from netdeconv_jax.models import Network
      >>> class Tiny(Network):
      ...     @nn.compact
      ...     def __call__(self, x, train=False, update_whitener=True):
      ...         units = self.units(x, train, update_whitener)
      ...         x = ops.relu(units.norm()(units.conv(self.scaled(8), 3)(x)))
      ...         return units.classifier(self.num_classes)(x.mean((1, 2)))
      >>> x = jnp.ones((2, 8, 8, 3))
      >>> [Tiny(norm=norm).init_with_output(jax.random.key(0), x)[0].shape for norm in ("batch", "deconv")]
      [(2, 10), (2, 10)]
    """

    _: dataclasses.KW_ONLY
    num_classes: int = 10
    norm: str = "deconv"
    spec: WhiteningSpec = WhiteningSpec()
    layout: str = "full"
    width: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: Any = None

    minimum_size: ClassVar[int | None] = 1
    initializers: ClassVar[Initializers] = PYTORCH

    def __post_init__(self):
        for name, allowed in {"norm": NORMS, "layout": LAYOUTS}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        check_count("num_classes", self.num_classes)
        check_number("width", self.width, above=0)
        if self.spec is not None or self.norm == "deconv":
            check_spec(self.spec)
        check_dtypes(self.dtype, self.param_dtype)
        super().__post_init__()

    def units(self, x: jax.Array, train: bool, update_whitener: bool = True) -> Units:
        """Return the layers of this network, after a check of its input.

        Args:
          x: [batch, height, width, channels].
          train: whether statistics come from the batch.
          update_whitener: static; False in a training step that reuses the running ones, as `DeconvConv`.
        Raises:
          ValueError: `x` has not four axes, or is smaller than `minimum_size`.
        """
        if self.minimum_size is not None:
            self._check_image(x, self.minimum_size)
        return Units(
            kind=self.norm,
            spec=self.spec,
            layout=self.layout,
            train=train,
            update_whitener=update_whitener,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            axis_name=self.axis_name,
            initializers=self.initializers,
        )

    def scaled(self, features: int) -> int:
        """Return `features` times `width`, at least 1."""
        return max(1, round(features * self.width))

    def _check_image(self, x: jax.Array, least: int) -> None:
        if x.ndim != 4:
            raise ValueError(f"`x` must be [batch, height, width, channels], got shape {x.shape}.")
        if min(x.shape[1:3]) < least:
            raise ValueError(
                f"`x` is too small for the strides of {type(self).__name__}: got height and width "
                f"{x.shape[1]}x{x.shape[2]}, the smallest that works is {least}x{least}."
            )
