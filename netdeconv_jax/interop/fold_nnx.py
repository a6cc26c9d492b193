"""NNX modules folded: a copy in which every layer that whitens is a plain one.

Which batch norm follows which convolution is read from the program that the copy traces to: the names that
its layers leave there say whose output goes where.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from netdeconv_jax.nnx import DeconvConv, DeconvConvTranspose, DeconvDense
from netdeconv_jax.nnx.behind import LAYER, NORM, fold_norm, places
from netdeconv_jax.nnx.former import FormerConv, FormerConvTranspose, FormerLinear
from netdeconv_jax.nnx.plan import evaluated, wrapped_kernels
from netdeconv_jax.nnx.warm_start import function_of
from netdeconv_jax.whitening.conv import plain_conv, plain_dense
from netdeconv_jax.whitening.folding import folded
from netdeconv_jax.whitening.local_norm import locally_normalized
from netdeconv_jax.whitening.same_function import TIED, check_same
from netdeconv_jax.whitening.transposed import plain_conv_transpose

Path = tuple[Any, ...]
_OURS: tuple[Any, ...] = (
    FormerConv,
    FormerConvTranspose,
    FormerLinear,
    DeconvConv,
    DeconvConvTranspose,
    DeconvDense,
)


class _Plain:
    """A plain layer that is called as the whitened one in whose place it stands.

    A kernel of half precision is kept in float32 where `dtype` does not say in what to compute; outputs are
    of the dtype that the whitened layer's would be, which is what `answers` is for.
    """

    geometry: Any = None
    local_norm: str | None = None
    answers: Any = None  # dtype of the kernel that the whitened layer has

    def __call__(
        self: Any, x: Any = None, *_: Any, inputs: Any = None, mask: Any = None, **__: Any
    ) -> jax.Array:
        """Run the layer; what says which statistics to take has nothing to say any more."""
        x = jnp.asarray(inputs if x is None else x)
        kernel, bias = self.kernel[...], self.bias[...]
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(self.dtype or self.answers)  # images of integers
        dtype, answers = (
            self.promote_dtype((x, like), dtype=self.dtype)[0].dtype
            for like in (kernel, jnp.zeros((), self.answers))
        )
        ndim = 0 if self.geometry is None else self.geometry.ndim
        x = locally_normalized(x, self.local_norm, ndim=ndim, mask=mask, dtype=dtype)
        y = self._run(x, kernel.astype(dtype), bias)
        return y.astype(self.preferred_element_type or answers)


class PlainConv(_Plain, nnx.Conv):
    """The `nnx.Conv` that a folded `DeconvConv` is; its bias is added in its own precision."""

    def _run(self, *arrays: jax.Array) -> jax.Array:
        return plain_conv(
            *arrays,
            geometry=self.geometry,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            conv_general_dilated=self.conv_general_dilated,
        )


class PlainLinear(_Plain, nnx.Linear):
    """The `nnx.Linear` that a folded `DeconvDense` is; its bias is added in its own precision."""

    def _run(self, *arrays: jax.Array) -> jax.Array:
        return plain_dense(
            *arrays,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            dot_general=self.dot_general,
        )


class PlainConvTranspose(_Plain, nnx.Module):
    """What a folded `DeconvConvTranspose` is; `bias` is [*strides, features], by place modulo the strides."""

    def __init__(self, layer: DeconvConvTranspose):
        self.geometry, self.dtype, self.precision = layer.geometry, layer.dtype, layer.precision
        self.promote_dtype = layer.promote_dtype
        self.preferred_element_type = layer.preferred_element_type
        self.kernel, self.bias = nnx.Param(layer.kernel[...]), nnx.Param(jnp.zeros(()))

    def _run(self, *arrays: jax.Array) -> jax.Array:
        return plain_conv_transpose(
            *arrays,
            geometry=self.geometry,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )


def fold_nnx(model: nnx.Module, x: Any = None, **call_kwargs: Any) -> Any:
    """Return a copy of `model` with plain layers, in evaluation mode; `fold` says more."""
    copy = nnx.clone(model)
    wrapped = wrapped_kernels(copy)

    def plainly(path: Path, node: Any) -> Any:
        if isinstance(node, DeconvConv | DeconvConvTranspose | DeconvDense):
            _check_ours(path, node, id(node.kernel) in wrapped)
            return _plain(path, node)
        return node

    copy = nnx.recursive_map(plainly, copy, graph=True)
    copy.eval()
    if x is None:
        return copy
    found = places(copy, _role, (x,), call_kwargs)
    pairs: dict[Path, Any] = {path: place.source for path, place in found.items() if place.alone}
    wrapped = wrapped_kernels(copy)

    def without_norms(path: Path, node: Any) -> Any:
        return _Identity() if path in pairs else node

    layers: dict[Path, Any] = dict(nnx.iter_modules(copy))
    pairs = {
        norm: layer for norm, layer in pairs.items() if id(layers[layer].kernel) not in wrapped
    }
    for norm, layer in pairs.items():
        _check_single(
            layer, layers[layer].kernel, np.size(getattr(layers[layer], "kernel_size", ()))
        )
        _fold_norm(layers[norm], layers[layer], x)
    copy = nnx.recursive_map(without_norms, copy, graph=True)
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x)):
        old, new = (function_of(one, call_kwargs) for one in (evaluated(model), copy))
        check_same(*old, *new, x, after="folding", remedy=TIED)
    return copy


def _fold_norm(norm: Any, layer: Any, x: Any) -> None:
    """Fold a batch norm into the plain layer before it, without loss where `x` has more precision."""
    if hasattr(layer, "answers"):
        arrays = (norm.mean, norm.var, norm.scale, norm.bias)
        own = [leaf.dtype for leaf in arrays if leaf is not None]
        # What the norm would answer in.
        layer.answers = norm.dtype or functools.reduce(jnp.promote_types, own, layer.answers)
    have = layer.kernel.dtype
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(x) if hasattr(leaf, "dtype")]
    dtypes = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    wide = functools.reduce(jnp.promote_types, dtypes, have)
    fold_norm(norm, layer, dtype=layer.dtype or (None if wide == have else wide))


def _check_ours(path: Path, layer: Any, wrapped: bool) -> None:
    """Raise if a layer that whitens is not all that there is to its output."""
    name = "/".join(map(str, path))
    if type(layer).__call__ not in [kind.__call__ for kind in _OURS]:
        kind = next(kind.__name__ for kind in _OURS if isinstance(layer, kind))
        raise ValueError(
            f"`model` has a layer {name!r} that overrides {kind}.__call__; it cannot be folded."
        )
    if wrapped:
        raise ValueError(
            f"`model` has a layer {name!r} below a SpectralNorm or WeightNorm; it cannot be folded."
        )


def _check_single(path: Path, kernel: Any, spatial: int) -> None:
    """Raise if a kernel is that of many layers."""
    if kernel.ndim != 2 + spatial:
        raise ValueError(
            f"`model` has a kernel of shape {kernel.shape} at {'/'.join(map(str, path))!r}, not that of "
            "one layer: layers under `nnx.vmap` cannot be folded."
        )


def _plain(path: Path, layer: Any) -> Any:
    """The plain layer of the same output."""
    arrays = (
        layer.kernel[...],
        None if layer.bias is None else layer.bias[...],
        layer.mean[...],
        layer.whitener[...],
    )
    spatial = 0 if isinstance(layer, DeconvDense) else layer.geometry.ndim
    _check_single(path, arrays[0], spatial)
    own = arrays[0].dtype
    dtype = jnp.dtype(layer.dtype or jnp.promote_types(own, jnp.float32))
    shared: Any = {
        "dtype": layer.dtype,
        "param_dtype": layer.param_dtype,
        "precision": layer.precision,
        "promote_dtype": layer.promote_dtype,
        "preferred_element_type": layer.preferred_element_type,
        "kernel_init": jax.nn.initializers.zeros,
        "rngs": nnx.Rngs(0),
    }
    kernel, bias = folded(*arrays, layer.groups, dtype)
    if isinstance(layer, DeconvConvTranspose):
        plain = PlainConvTranspose(layer)
    elif isinstance(layer, DeconvDense):
        shared["dot_general"] = layer.dot_general
        plain = PlainLinear(layer.in_features, layer.out_features, **shared)
    else:
        geometry = layer.geometry
        plain = PlainConv(
            layer.in_features,
            layer.out_features,
            geometry.kernel_size,
            geometry.strides,
            padding=geometry.padding,
            input_dilation=geometry.input_dilation,
            kernel_dilation=geometry.kernel_dilation,
            feature_group_count=layer.feature_group_count,
            conv_general_dilated=layer.conv_general_dilated,
            **shared,
        )
        plain.geometry = geometry
    plain.local_norm, plain.answers = layer.spec.local_norm, own
    plain.kernel, plain.bias = nnx.Param(kernel), nnx.Param(bias)
    return plain


class _Identity(nnx.Module):
    """What stands in the place of a batch norm that is folded."""

    def __call__(self, x: Any, *_: Any, **__: Any) -> jax.Array:
        """Return `x`."""
        return x


def _role(path: Path, node: Any) -> str | None:
    if type(node) is nnx.BatchNorm:
        return NORM
    return LAYER if type(node) in (nnx.Conv, nnx.Linear, PlainConv, PlainLinear) else None
