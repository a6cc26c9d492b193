"""Which layers a model runs and how, found in one trace without computing or even tracing any of them."""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.linen.dtypes import canonicalize_dtype
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params

from netdeconv_jax import ops
from netdeconv_jax.linen import DeconvConv, DeconvConvTranspose, DeconvDense
from netdeconv_jax.linen.batch_norms import body_of, first_argument, in_trial, running_body
from netdeconv_jax.models.network import Network
from netdeconv_jax.whitening.conv import conv_groups, dense_groups
from netdeconv_jax.whitening.folding import Groups
from netdeconv_jax.whitening.transposed import plain_conv_transpose

Path = tuple[str, ...]

WHITENED = (DeconvConv, DeconvConvTranspose, DeconvDense)
LAYERS = (*WHITENED, nn.Conv, nn.Dense)
ALL = (*LAYERS, nn.BatchNorm)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or dense layer that a model runs.

    Attributes:
      groups: of the columns of a layer that whitens; of a transposed convolution, its geometry and spec,
        from which those of each phase follow; None for layers that do not whiten.
      dtype: of computation, None for that of the kernel.
      use_bias: whether it adds a bias.
      local_norm: how it normalizes each sample before it whitens, if it does.
    """

    groups: Groups | None
    dtype: Any
    use_bias: bool
    local_norm: str | None = None


@dataclasses.dataclass(frozen=True)
class Norm:
    """A batch norm that a model runs.

    Attributes:
      epsilon: of the batch norm.
      behind: the layer whose output goes here and nowhere else, None if there is no such layer, if the batch
        norm is called more than once, or if its features are not on the last axis.
    """

    epsilon: float
    behind: Path | None


def dry_run(
    run: Callable[..., Any],
    params: Mapping[Path, Any],
    x: Any,
    kinds: tuple[type[nn.Module], ...] = ALL,
    others: Collection[Path] = (),
) -> tuple[dict[Path, Layer], dict[Path, Norm]]:
    """Return the convolutions and dense layers that `run(x)` calls, and the batch norms, by path.

    A layer answers with zeros of the shape that its kernel makes of its input, so that among `ALL` layers `x`
    need not have the channels or the size that the model was made for. Heirs of Flax's layers that do
    something else run.

    Args:
      run: applies a Linen module.
      params: its parameters by path of the leaf.
      x: an array or its shape and dtype, large enough for every stride.
      kinds: of modules that answer so; others run.
      others: paths of modules of other kinds that are batch norms.
    Raises:
      ValueError: a layer has no kernel, or other parameters than it would declare, as under `nn.scan` and
        `nn.vmap`, or is an heir of one of ours that does something else.
    """
    layers, norms, made = {}, {}, []
    readers = (
        collections.Counter()
    )  # that the trace does not show, as what they answer comes from nowhere

    def answer(run, args, kwargs, context):
        module, path = context.module, tuple(context.module.path)
        if context.method_name != "__call__" or in_trial():
            return run(*args, **kwargs)
        norm = _is_norm(context, kinds, path in others)
        if not norm and not (isinstance(module, kinds) and _is_layer(module, path)):
            return run(*args, **kwargs)
        x = first_argument(context.orig_method, args, kwargs)
        source = next((path for output, path in made if output is x), None)
        readers[source] += 1
        if norm:
            if path in norms or getattr(module, "axis", -1) not in (-1, x.ndim - 1):
                source = None
            norms[path] = Norm(module.epsilon, source)
            own = [leaf for name, leaf in params.items() if name[:-1] == path]
            dtype = canonicalize_dtype(x, *own, dtype=getattr(module, "dtype", None))
            return jnp.zeros(x.shape, dtype)
        layers[path], shape = _layer(module, path, params, x)
        dtype = getattr(module, "preferred_element_type", None) or layers[path].dtype
        output = checkpoint_name(jnp.zeros(shape, dtype), "/".join(path))
        made.append((output, path))
        return output

    # Without `jit`, whose traces neither hide layers that others have traced nor keep these zeros.
    with jax.disable_jit(), nn.intercept_methods(answer):
        jaxpr = jax.make_jaxpr(run)(x)
    alone = {path for path in _used_nowhere(jaxpr.jaxpr) if readers[path] == 1}
    return layers, {
        path: norm if norm.behind in alone else dataclasses.replace(norm, behind=None)
        for path, norm in norms.items()
    }


def small_input(model: Network) -> jax.ShapeDtypeStruct:
    """Return an input of a network of the zoo; of any channels, as layers answer by their kernels."""
    return jax.ShapeDtypeStruct((1, *(model.minimum_size or 1,) * 2, 3), jnp.float32)


def kernel_shapes(model: Network, variables: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Return the shapes of the kernels of a network of the zoo, in the order in which it runs them."""
    params: Any = traverse_util.flatten_dict(variables["params"])
    layers, _ = dry_run(lambda x: model.apply(variables, x), params, small_input(model))
    return [jnp.shape(params[(*path, "kernel")]) for path in layers]


def _is_norm(context: Any, kinds: tuple[type[nn.Module], ...], named: bool) -> bool:
    """Whether what runs is a batch norm of the kinds, as such and not as part of an heir that does more."""
    if isinstance(context.module, nn.BatchNorm):
        own = running_body(context) is body_of(nn.BatchNorm)
        return own and (named or isinstance(context.module, kinds))
    return named


def geometry_of(module: nn.Module) -> ops.Window | ops.Transposed | None:
    """Return the geometry of a convolution, None for a module that is none."""
    if isinstance(module, DeconvConvTranspose):
        return ops.transposed(
            module.kernel_size,
            module.strides,
            module.padding,
            module.kernel_dilation,
            module.transpose_kernel,
        )
    if isinstance(module, DeconvConv | nn.Conv):
        return ops.window(
            module.kernel_size,
            module.strides,
            module.padding,
            module.input_dilation,
            module.kernel_dilation,
        )
    return None


def _is_layer(module: nn.Module, path: Path) -> bool:
    """Whether a module is one of `LAYERS` and nothing else; an heir of one of ours must be."""
    kind: Any = next((kind for kind in LAYERS if isinstance(module, kind)), None)
    if kind is None:
        return False
    for name in ("__call__", "param"):
        if inspect.unwrap(getattr(type(module), name)) is inspect.unwrap(getattr(kind, name)):
            continue
        if kind not in WHITENED:
            return False
        raise ValueError(
            f"`model` has a layer {'/'.join(path)!r} that overrides {kind.__name__}.{name}; it cannot be "
            "folded."
        )
    return True


def _layer(module, path, params, x):
    """The record of a layer, and the shape of its output."""
    if (*path, "kernel") not in params:
        raise ValueError(f"`variables` have no kernel of the layer {'/'.join(path)!r}.")
    arrays = [params.get((*path, name)) for name in ("kernel", "bias")]
    like = [None if leaf is None else jnp.zeros((), jnp.result_type(leaf)) for leaf in (x, *arrays)]
    dtype = module.promote_dtype(*like, dtype=module.dtype)[0].dtype
    kernel = jnp.shape(arrays[0])
    geometry = geometry_of(module)
    spec: Any = module.resolved_spec() if isinstance(module, WHITENED) else None
    local_norm = spec.local_norm if spec else None
    layer = functools.partial(Layer, dtype=dtype, use_bias=module.use_bias, local_norm=local_norm)
    if len(kernel) != 2 + (geometry.ndim if geometry else 0):
        raise ValueError(
            f"`variables` hold a kernel of shape {kernel} for {'/'.join(path)!r}, not that of one layer: "
            "layers under `nn.scan` or `nn.vmap` cannot be folded; a warm start may `keep` them."
        )
    if geometry is None:
        groups = dense_groups(spec, kernel[0]) if spec else None
        return layer(groups), (*x.shape[:-1], kernel[-1])
    if isinstance(geometry, ops.Transposed):
        features = kernel[-2 if geometry.transpose_kernel else -1]
        arrays = [
            jax.ShapeDtypeStruct(shape, x.dtype)
            for shape in (x.shape, kernel, (*geometry.strides, features))
        ]
        convolve = functools.partial(plain_conv_transpose, geometry=geometry)
        return layer((geometry, spec)), jax.eval_shape(convolve, *arrays).shape
    groups, count = None, module.feature_group_count
    if spec:
        groups = conv_groups(spec, kernel[-2] * count, geometry.taps, count)
    batch, spatial = x.shape[: -geometry.ndim - 1], x.shape[-geometry.ndim - 1 : -1]
    out = geometry.out_shape(spatial, geometry.strides)
    return layer(groups), (*batch, *out, kernel[-1])


def _used_nowhere(jaxpr: Any) -> set[Path]:
    """The layers that are called once and whose output no operation takes: batch norms are none here."""
    outputs, taken = [], set()

    def walk(jaxpr):
        taken.update(id(var) for var in jaxpr.outvars)
        for eqn in jaxpr.eqns:
            taken.update(id(var) for var in eqn.invars)
            if eqn.primitive.name == "name":
                outputs.append((tuple(eqn.params["name"].split("/")), id(eqn.outvars[0])))
            for inner in jaxprs_in_params(eqn.params):
                walk(inner)

    walk(jaxpr)
    names = [path for path, _ in outputs]
    return {path for path, var in outputs if var not in taken and names.count(path) == 1}
