"""Linen modules that run as the plain ones that folding made of them."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.interop.dry_run import WHITENED, geometry_of
from netdeconv_jax.linen import DeconvDense, DeconvolvedModel
from netdeconv_jax.linen.batch_norms import first_argument, in_trial
from netdeconv_jax.whitening.conv import plain_conv, plain_dense
from netdeconv_jax.whitening.local_norm import locally_normalized
from netdeconv_jax.whitening.transposed import plain_conv_transpose

Tree = Any

# By which `nn.jit` tells what it traces of a folded model from what it traced of the model as it was.
_traces = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class FoldedModel:
    """A Linen module whose layers run as the plain ones that `fold` made of them.

    A layer that whitened has a kernel and a bias; that of a `DeconvConvTranspose` is [*strides, features],
    one bias for each place modulo the strides. One with `local_norm` still normalizes each sample, by itself
    and so without statistics. Where `affine_norms`, a batch norm is its scale and bias.

    Attributes:
      model: the module that was folded, or the converted model.
      affine_norms: whether batch norms were made a scale and a bias, as in some networks of the zoo.

    Source: ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import DeconvDense
      >>> from netdeconv_jax.interop import fold
      >>> layer, x = DeconvDense(3, use_running_average=True), jnp.ones((4, 2))
      >>> plain, variables = fold(layer, layer.init(jax.random.key(0), x), x)
      >>> type(plain).__name__, sorted(variables), plain.apply(variables, x).shape
      ('FoldedModel', ['params'], (4, 3))
    """

    model: nn.Module | DeconvolvedModel
    affine_norms: bool = False

    def apply(self, variables: Mapping[str, Tree], *args: Any, **kwargs: Any) -> Any:
        """Return `model.apply(variables, *args, **kwargs)` with plain layers in place of whitened ones."""
        with contextlib.ExitStack() as stack:
            rules = getattr(self.model, "rules", None)
            stack.enter_context(_traces((self.affine_norms, rules)))
            stack.enter_context(nn.intercept_methods(_folded_ones))
            if self.affine_norms:
                stack.enter_context(nn.intercept_methods(_affinely))
            return self.model.apply(variables, *args, **kwargs)


def _folded_ones(run, args, kwargs, context):
    """Run the layers that are folded as `plainly`; those that `fold` did not see still whiten."""
    module = context.module
    layer = context.method_name == "__call__" and isinstance(module, WHITENED)
    if layer and module.has_variable("batch_stats", "whitener"):
        return run(*args, **kwargs)
    return plainly(run, args, kwargs, context)


def plainly(run, args, kwargs, context):
    """Run a layer as the plain one that its folded variables describe."""
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, WHITENED) or in_trial():
        return run(*args, **kwargs)
    x: Any = first_argument(context.orig_method, args, kwargs)
    kernel, bias = (module.get_variable("params", name) for name in ("kernel", "bias"))
    # The bias is in the precision of the statistics, and says nothing about that of computation.
    promoted, *_ = module.promote_dtype(x, kernel, None, dtype=module.dtype)
    kernel = kernel.astype(promoted.dtype)
    geometry: Any = geometry_of(module)
    x = locally_normalized(
        x,
        module.resolved_spec().local_norm,
        ndim=geometry.ndim if geometry else 0,
        mask=kwargs.get("mask"),
        dtype=kernel.dtype,
    )
    if isinstance(module, DeconvDense):
        return plain_dense(
            x, kernel, bias, precision=module.precision, dot_general=module.dot_general
        )
    if isinstance(geometry, ops.Transposed):
        return plain_conv_transpose(
            x,
            kernel,
            bias,
            geometry=geometry,
            precision=module.precision,
            preferred_element_type=module.preferred_element_type,
        )
    return plain_conv(
        x,
        kernel,
        bias,
        geometry=geometry,
        feature_group_count=module.feature_group_count,
        precision=module.precision,
        conv_general_dilated=module.conv_general_dilated,
    )


def _affinely(run, args, kwargs, context):
    """Run a batch norm as the scale and bias that are left of it, applied in their precision."""
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, nn.BatchNorm):
        return run(*args, **kwargs)
    if module.has_variable("batch_stats", "mean"):  # `fold` did not see it
        return run(*args, **kwargs)
    x: Any = first_argument(context.orig_method, args, kwargs)
    scale, bias = (module.get_variable("params", name) for name in ("scale", "bias"))
    shape = (1,) * (x.ndim - 1) + (-1,)
    dtype = module.dtype or jnp.promote_types(x.dtype, scale.dtype)
    return (x.astype(scale.dtype) * scale.reshape(shape) + bias.reshape(shape)).astype(dtype)
