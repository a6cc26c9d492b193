"""What stands in an NNX model in the place of its layers once it is converted.

What whitens is still what it was, with all its attributes and, as an heir, methods: a `FormerConv` comes
before `nnx.Conv` among its classes, behind the heir's own, so that `super()` finds what whitens.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from netdeconv_jax.nnx.layers import ChannelDeconv, DeconvConv, DeconvConvTranspose, DeconvDense

OURS = (ChannelDeconv, DeconvConv, DeconvConvTranspose, DeconvDense)


class FormerNorm(nnx.Module):
    """What a batch norm has become: the identity, or a learnt scalar where its scale was zero.

    Args:
      norm: the batch norm.

    Source: ours; De and Smith 2020 (SkipInit) for the scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from netdeconv_jax.nnx import FormerNorm
      >>> last = nnx.BatchNorm(3, scale_init=nnx.initializers.zeros_init(), rngs=nnx.Rngs(0))
      >>> FormerNorm(last)(jnp.ones((1, 3))).tolist()
      [[0.0, 0.0, 0.0]]
    """

    def __init__(self, norm: nnx.Module):
        self.input_name = next(iter(inspect.signature(norm.__call__).parameters), "x")
        self.num_features = getattr(norm, "num_features", None)
        scale, bias = getattr(norm, "scale", None), getattr(norm, "bias", None)
        self.scale = nnx.data(None)
        if scale is not None and starts_at_zero(norm):
            lead = scale.shape[:-1]  # of layers stacked by `nnx.vmap`
            self.scale = nnx.Param(jnp.zeros(lead, scale.dtype))
        self.dtype = getattr(norm, "dtype", None)
        self.affine_dtype = next((p.dtype for p in (scale, bias) if p is not None), None)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Return the input in the dtype that the batch norm gave it, times the scalar if there is one.

        It takes what the batch norm took, of which only the input counts.
        """
        x = args[0] if args else kwargs.get(self.input_name)
        affine = () if self.affine_dtype is None else (self.affine_dtype,)
        dtype = self.dtype or jnp.result_type(x, *affine)
        x = jnp.asarray(x, dtype)
        return x if self.scale is None else x * self.scale[...].astype(dtype)


class FormerConv(DeconvConv, nnx.Conv):
    """A `DeconvConv` that is the `nnx.Conv` it was: called with `inputs` of any dtype, with all attributes.

    `deconvolve` makes it. Of an heir of `nnx.Conv` it makes an heir of both.

    Source: ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> layer = dnnx.deconvolve(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)))
      >>> layer(inputs=jnp.ones((2, 8, 8, 3), jnp.uint8)).shape
      (2, 8, 8, 4)
    """

    def __call__(self, inputs: Any = None, *args: Any, out_sharding: Any = None, **kwargs: Any):
        """Return what a `DeconvConv` does of `inputs`, or of `x`, its own name for them."""
        return super().__call__(_input(self, inputs, kwargs, out_sharding), *args, **kwargs)


class FormerConvTranspose(DeconvConvTranspose, nnx.ConvTranspose):
    """A `DeconvConvTranspose` that is the `nnx.ConvTranspose` it was; see `FormerConv`.

    Source: ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> layer = dnnx.deconvolve(nnx.ConvTranspose(3, 4, (4, 4), 2, rngs=nnx.Rngs(0)))
      >>> layer(inputs=jnp.ones((2, 8, 8, 3), jnp.uint8)).shape
      (2, 16, 16, 4)
    """

    def __call__(self, inputs: Any = None, *args: Any, out_sharding: Any = None, **kwargs: Any):
        """Return what a `DeconvConvTranspose` does of `inputs`, or of `x`, its own name for them."""
        return super().__call__(_input(self, inputs, kwargs, out_sharding), *args, **kwargs)


class FormerLinear(DeconvDense, nnx.Linear):
    """A `DeconvDense` that is the `nnx.Linear` it was; see `FormerConv`.

    Source: ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> layer = dnnx.deconvolve(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), dense=True)
      >>> layer(inputs=jnp.ones((8, 3))).shape
      (8, 4)
    """

    def __call__(self, inputs: Any = None, *args: Any, out_sharding: Any = None, **kwargs: Any):
        """Return what a `DeconvDense` does of `inputs`, or of `x`, its own name for them."""
        return super().__call__(_input(self, inputs, kwargs, out_sharding), *args, **kwargs)


FORMERS: dict[type[Any], tuple[type[Any], type[Any]]] = {
    nnx.Conv: (DeconvConv, FormerConv),
    nnx.ConvTranspose: (DeconvConvTranspose, FormerConvTranspose),
    nnx.Linear: (DeconvDense, FormerLinear),
}
# What layers that whiten keep in attributes, and others do not.
_STATE = {"spec", "use_running_average", "update_whitener", "axis_name", "axis_index_groups"}
_STATE |= {"geometry", "mean", "whitener", "step"}


@functools.cache  # a class is never forgotten by JAX
def former(heir: type[Any], kind: type[Any]) -> type[Any]:
    """Return the class of what was of the class `heir`, as which `kind` counts, and whitens."""
    _, whitening = FORMERS[kind]
    if heir is kind:
        return whitening
    made_by: Any = type(heir)
    name = f"Former{heir.__name__}"

    def reduce(self, protocol):
        """Pickle what the class is made of, since no module holds it by name."""
        _, _, *state = object.__reduce_ex__(self, protocol)
        return _empty, (heir, kind), *state

    body = {"__module__": heir.__module__, "__reduce_ex__": reduce}
    return made_by(name, (heir, whitening), body)


def _empty(heir: type[Any], kind: type[Any]) -> Any:
    return object.__new__(former(heir, kind))


def taken_names(layer: nnx.Module, kind: type[Any]) -> list[str]:
    """Return the names that an heir of `kind` has of its own, and whitening would need."""
    own = {*dir(type(layer)), *vars(layer)} - {*dir(kind)}
    return sorted(own & (_STATE | {*dir(FORMERS[kind][0])}))


def _input(layer: Any, inputs: Any, kwargs: dict[str, Any], out_sharding: Any) -> jax.Array:
    """The input of a layer under either name, of a dtype that can be whitened."""
    if out_sharding is not None:
        raise ValueError(
            f"`out_sharding` must be None for a layer that whitens, got {out_sharding}."
        )
    x = jnp.asarray(kwargs.pop("x") if inputs is None else inputs)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(layer.dtype or layer.param_dtype)  # as nnx.Conv does
    return x


def is_norm(node: Any) -> bool:
    """Whether a module is an `nnx.BatchNorm` or another class with settings and statistics like its own."""
    if isinstance(node, nnx.BatchNorm):
        return True
    if not isinstance(node, nnx.Module) or isinstance(node, OURS):
        return False
    return (
        all(hasattr(node, name) for name in ("use_running_average", "momentum", "epsilon"))
        and all(isinstance(getattr(node, name, None), nnx.BatchStat) for name in ("mean", "var"))
        and not any(inner is not node for _, inner in nnx.iter_modules(node))
    )


def starts_at_zero(norm: nnx.Module) -> bool:
    """Return whether the scale of a batch norm is zero.

    Raises:
      ValueError: it is traced or abstract.
    """
    scale = getattr(norm, "scale", None)
    value = None if scale is None else scale.get_value()
    if value is None:
        return False
    if isinstance(value, Tracer | jax.ShapeDtypeStruct):
        raise ValueError(
            "`model` has a batch norm whose scale is traced or abstract, so that it is not known whether it "
            "starts at zero; convert outside of `nnx.jit` and `nnx.eval_shape`."
        )
    return not np.asarray(value).any()
