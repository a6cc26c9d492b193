"""NNX modules folded: a copy in which every layer that whitens is a plain one.

Which batch norm follows which convolution is read from the program that the copy traces to: the names that
its layers leave there say whose output goes where.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params

from netdeconv_jax import ops
from netdeconv_jax.interop.fold import merged
from netdeconv_jax.nnx import DeconvConv, DeconvConvTranspose, DeconvDense
from netdeconv_jax.whitening.conv import conv_groups, dense_groups, plain_conv, plain_dense
from netdeconv_jax.whitening.local_norm import locally_normalized
from netdeconv_jax.whitening.transposed import fold_transposed, plain_conv_transpose

Path = tuple[Any, ...]


class _Plain:
    """A plain layer that is called as the whitened one in whose place it stands."""

    geometry: Any = None
    local_norm: str | None = None

    def _arrays(
        self: Any, x: Any = None, *_: Any, inputs: Any = None, mask: Any = None, **__: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = jnp.asarray(inputs if x is None else x)
        kernel, bias = self.kernel[...], self.bias[...]
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(self.dtype or kernel.dtype)  # images of integers
        dtype = self.promote_dtype((x, kernel, bias), dtype=self.dtype)[0].dtype
        ndim = 0 if self.geometry is None else self.geometry.ndim
        x = locally_normalized(x, self.local_norm, ndim=ndim, mask=mask, dtype=dtype)
        return x, kernel.astype(dtype), bias


class PlainConv(_Plain, nnx.Conv):
    """The `nnx.Conv` that a folded `DeconvConv` is; its bias is added in its own precision."""

    def __call__(self, *args: Any, **kwargs: Any):
        """Convolve; what says which statistics to take has nothing to say any more."""
        return plain_conv(
            *self._arrays(*args, **kwargs),
            geometry=self.geometry,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            conv_general_dilated=self.conv_general_dilated,
        )


class PlainLinear(_Plain, nnx.Linear):
    """The `nnx.Linear` that a folded `DeconvDense` is; its bias is added in its own precision."""

    def __call__(self, *args: Any, **kwargs: Any):
        """Multiply; see `PlainConv`."""
        return plain_dense(
            *self._arrays(*args, **kwargs),
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

    def __call__(self, *args: Any, **kwargs: Any):
        """Convolve; see `PlainConv`."""
        return plain_conv_transpose(
            *self._arrays(*args, **kwargs),
            geometry=self.geometry,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )


def fold_nnx(model: Any, x: Any = None, **call_kwargs: Any) -> Any:
    """Return a copy of `model` with plain layers, in evaluation mode; `fold` says more."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be a Linen or an NNX module, got {type(model).__name__}: {model!r:.60}."
        )

    def plainly(path: Path, node: Any) -> Any:
        if isinstance(node, DeconvConv | DeconvConvTranspose | DeconvDense):
            return _plain(path, node)
        return node

    copy = nnx.recursive_map(plainly, nnx.clone(model), graph=True)
    copy.eval()
    if x is None:
        return copy
    pairs = _norms_behind_layers(copy, x, call_kwargs)

    def without_norms(path: Path, node: Any) -> Any:
        return _Identity() if path in pairs else node

    layers = dict(nnx.iter_modules(copy))
    for norm, layer in pairs.items():
        _merge(layers[norm], layers[layer])
    return nnx.recursive_map(without_norms, copy, graph=True)


def _plain(path: Path, layer: Any) -> Any:
    """The plain layer of the same output."""
    arrays = (
        layer.kernel[...],
        None if layer.bias is None else layer.bias[...],
        layer.mean[...],
        layer.whitener[...],
    )
    spatial = 0 if isinstance(layer, DeconvDense) else layer.geometry.ndim
    if arrays[0].ndim != 2 + spatial:
        raise ValueError(
            f"`model` has a kernel of shape {arrays[0].shape} at {'/'.join(map(str, path))!r}, not that of "
            "one layer: layers under `nnx.vmap` cannot be folded."
        )
    dtype = jnp.dtype(layer.dtype or arrays[0].dtype)
    shared: Any = {
        "dtype": layer.dtype,
        "param_dtype": layer.param_dtype,
        "precision": layer.precision,
        "promote_dtype": layer.promote_dtype,
        "preferred_element_type": layer.preferred_element_type,
        "kernel_init": jax.nn.initializers.zeros,
        "rngs": nnx.Rngs(0),
    }
    if isinstance(layer, DeconvConvTranspose):
        kernel, bias = fold_transposed(
            *arrays, geometry=layer.geometry, spec=layer.spec, dtype=dtype
        )
        plain = PlainConvTranspose(layer)
    elif isinstance(layer, DeconvDense):
        groups = dense_groups(layer.spec, layer.in_features)
        kernel, bias = ops.fold(*arrays, groups, dtype=dtype)
        shared["dot_general"] = layer.dot_general
        plain = PlainLinear(layer.in_features, layer.out_features, **shared)
    else:
        geometry, count = layer.geometry, layer.feature_group_count
        groups = conv_groups(layer.spec, layer.in_features, geometry.taps, count)
        kernel, bias = ops.fold(*arrays, groups, dtype=dtype)
        plain = PlainConv(
            layer.in_features,
            layer.out_features,
            geometry.kernel_size,
            geometry.strides,
            padding=geometry.padding,
            input_dilation=geometry.input_dilation,
            kernel_dilation=geometry.kernel_dilation,
            feature_group_count=count,
            conv_general_dilated=layer.conv_general_dilated,
            **shared,
        )
        plain.geometry = geometry
    plain.local_norm = layer.spec.local_norm
    plain.kernel = nnx.Param(kernel.astype(arrays[0].dtype))
    plain.bias = nnx.Param(bias.astype(arrays[0].dtype))
    return plain


class _Identity(nnx.Module):
    """What stands in the place of a batch norm that is folded."""

    def __call__(self, x: Any, *_: Any, **__: Any) -> jax.Array:
        """Return `x`."""
        return x


class _Named(nnx.Module):
    """A layer that leaves its name in the program: of a batch norm on what it reads, else on its output."""

    def __init__(self, name: str, layer: Any):
        self.name, self.layer = name, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        if not isinstance(self.layer, nnx.BatchNorm):
            return checkpoint_name(self.layer(*args, **kwargs), self.name)
        x = args[0] if args else kwargs.pop("x")
        if self.layer.axis in (-1, x.ndim - 1):  # else a layer's features are not those of the norm
            x = checkpoint_name(x, self.name)
        return self.layer(x, *args[1:], **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "layer"), name)


def _norms_behind_layers(model: Any, x: Any, call_kwargs: Any) -> dict[Path, Path]:
    """The batch norms that are all that reads the output of one layer, with its path; each is called once."""
    paths: dict[str, Path] = {}

    def named(path: Path, node: Any) -> Any:
        if type(node) not in (nnx.Conv, nnx.Linear, PlainConv, PlainLinear, nnx.BatchNorm):
            return node
        kind = "norm" if isinstance(node, nnx.BatchNorm) else "layer"
        paths[name := f"{kind} {len(paths)}"] = path
        return _Named(name, node)

    graph, state = nnx.split(nnx.recursive_map(named, model, graph=True))
    jaxpr = jax.make_jaxpr(lambda x: nnx.merge(graph, state)(x, **call_kwargs))(x)
    made, pairs, readers, calls = {}, {}, collections.Counter(), collections.Counter()

    def walk(jaxpr: Any) -> None:
        readers.update(id(var) for var in jaxpr.outvars)
        for eqn in jaxpr.eqns:
            readers.update(id(var) for var in eqn.invars)
            name = eqn.params.get("name") if eqn.primitive.name == "name" else None
            if name in paths:
                calls[name] += 1
                source = id(eqn.invars[0])
                if name.startswith("layer"):
                    made[id(eqn.outvars[0])] = name
                elif source in made:
                    pairs[name] = made[source], source
            for inner in jaxprs_in_params(eqn.params):
                walk(inner)

    walk(jaxpr.jaxpr)
    return {
        paths[norm]: paths[layer]
        for norm, (layer, output) in pairs.items()
        if readers[output] == calls[norm] == calls[layer] == 1
    }


def _merge(norm: Any, layer: Any) -> None:
    """Fold a batch norm into a layer of the copy."""
    mean, var = norm.mean[...], norm.var[...]
    gain = lax.rsqrt(var + norm.epsilon) * (1 if norm.scale is None else norm.scale[...])
    offset = 0 if norm.bias is None else norm.bias[...]
    bias = None if layer.bias is None else layer.bias[...]
    kernel, bias = merged(layer.kernel[...], bias, mean, gain, offset, layer.dtype)
    layer.kernel = nnx.Param(kernel)  # not in place: other layers may share it
    layer.bias, layer.use_bias = nnx.Param(bias), True
