"""A trained model as the plain network that it is: every whitener and mean folded into kernel and bias."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import meta, unfreeze
from jax import lax

from netdeconv_jax import ops
from netdeconv_jax.interop.dry_run import (
    ALL,
    WHITENED,
    Layer,
    Norm,
    Path,
    dry_run,
    geometry_of,
    small_input,
)
from netdeconv_jax.linen import DeconvDense, DeconvolvedModel
from netdeconv_jax.linen.batch_norms import first_argument, in_trial
from netdeconv_jax.models.network import Network
from netdeconv_jax.whitening.conv import plain_conv, plain_dense
from netdeconv_jax.whitening.folding import features_axis, folded, merged
from netdeconv_jax.whitening.local_norm import locally_normalized
from netdeconv_jax.whitening.same_function import TIED, check_same
from netdeconv_jax.whitening.transposed import plain_conv_transpose

if TYPE_CHECKING:
    from flax import nnx

Tree = Any
Leaves = dict[Path, Any]

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
            stack.enter_context(_traces(self.affine_norms))
            stack.enter_context(nn.intercept_methods(_folded_ones))
            if self.affine_norms:
                stack.enter_context(nn.intercept_methods(_affinely))
            return self.model.apply(variables, *args, **kwargs)


@overload
def fold(
    model: nn.Module | DeconvolvedModel,
    variables: Mapping[str, Tree],
    x: Any = None,
    **apply_kwargs: Any,
) -> tuple[Any, dict[str, Tree]]: ...
@overload
def fold(model: "nnx.Module", *, x: Any = None, **call_kwargs: Any) -> Any: ...
def fold(
    model: Any, variables: Mapping[str, Tree] | None = None, x: Any = None, **apply_kwargs: Any
) -> Any:
    """Return the plain network that `model` is in evaluation, and its variables.

    `(X - mu) D w + b = X (D w) + (b - mu D w)`: with the running statistics a whitened layer is a plain one.
    Logits are the same to rounding. Where computation is in low precision the kernel is rounded before its
    bias is formed, as in evaluation.

    A network of the zoo comes back as its twin of `norm="none"`, batch norms folded into the convolutions
    before them. One with a batch norm that follows no convolution (a pre-activation network or `linear`,
    of `norm="batch"`) has no such twin: the norm cannot pass the ReLU behind it, nor a sum that others read
    too, so that all its norms stay as a scale and a bias per channel, in a `FoldedModel`. Nor has a network
    whose layers whiten with `local_norm`: what they divide by is each sample's own. Any other Linen module
    comes back as a `FoldedModel`, whose `apply` is that of the module; what it holds besides, batch
    norms and `ChannelDeconv` too, stays as it is.

    An NNX module comes back as a copy in evaluation mode, in which each layer of `netdeconv_jax.nnx` is a
    plain one, an `nnx.Conv` or `nnx.Linear`. Given `x`, a batch norm that is all that reads the output of one
    convolution or dense layer is folded into it.

    Given `x` as an array, outputs of the two are compared, except for networks of the zoo: a kernel that is
    also used elsewhere cannot be seen from the layers. Without it, or by its shape, nothing is compared.

    Args:
      model: a network of the zoo, any Linen or NNX module, or what `deconvolve` made of one.
      variables: `params`, `batch_stats` and whatever else; also NumPy's arrays. None for NNX.
      x: an input of the model, or its shape and dtype; needed for Linen modules that are not of the zoo.
      **apply_kwargs: what `model.apply`, or an NNX model's call, needs besides in evaluation: `train=False`.
    Returns:
      The model, and variables as nested dicts, without the statistics that were folded; of an NNX module the
      copy alone.
    Raises:
      ValueError: `x` or `variables` is missing or one too many; a layer has no statistics, is stacked by
        `nn.scan` or `nnx.vmap`, or overrides what ours does; or outputs differ by more than rounding.
      TypeError: `model` is neither a Linen nor an NNX module.

    Source: ours; Ye et al. 2020, section 3.4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import models
      >>> from netdeconv_jax.interop import fold
      >>> model, x = models.create("lenet", norm="deconv"), jnp.ones((2, 28, 28, 1))
      >>> plain, variables = fold(model, model.init(jax.random.key(0), x))
      >>> plain.norm, sorted(variables), plain.apply(variables, x).shape
      ('none', ['params'], (2, 10))
    """
    if not isinstance(model, nn.Module | DeconvolvedModel):
        return _fold_nnx(model, variables, x, apply_kwargs)
    if variables is None:
        raise ValueError("`variables` must be those of the Linen module `model`, got None.")
    plain = unfreeze(meta.unbox(dict(variables)))
    collections = {name: _leaves(tree) for name, tree in plain.items()}
    params, stats = collections.get("params", {}), collections.get("batch_stats", {})
    zoo = isinstance(model, Network)
    if x is None:
        if not zoo:
            raise ValueError(
                "`x` must be an input of the model, or its shape and dtype, where the model is none of the "
                "zoo; got None."
            )
        x = small_input(model)
    kinds = ALL if zoo else WHITENED
    layers, norms = dry_run(lambda x: model.apply(plain, x, **apply_kwargs), params, x, kinds)
    for path, layer in layers.items():
        if layer.groups is not None:
            _fold_whitener(path, layer, params, stats)
    new = FoldedModel(model)
    if zoo:
        new, params, stats = _network(model, layers, norms, params, stats, x)
    found = new, _trees(collections | {"params": params, "batch_stats": stats})
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x)):
        flags = {name: flag for name, flag in apply_kwargs.items() if name != "mutable"}
        run, again = (functools.partial(one.apply, **flags) for one in (model, new))
        check_same(run, plain, again, found[1], x, after="folding", remedy=TIED)
    return found


def _network(
    model: Network,
    layers: Mapping[Path, Layer],
    norms: Mapping[Path, Norm],
    params: Leaves,
    stats: Leaves,
    x: Any,
) -> tuple[Network | FoldedModel, Leaves, Leaves]:
    """The twin without norms if there is one, else the network with affine norms; and its variables."""
    lone = any(norm.behind is None for norm in norms.values())
    lone |= any(layer.local_norm is not None for layer in layers.values())
    if not lone:
        twin, alone, rest = model.clone(norm="none"), dict(params), dict(stats)
        for path, norm in norms.items():
            fold_batch_norm(path, norm, layers, alone, rest)
        if _runs_as(twin, layers, alone, x):
            left = sorted(path for path in alone if path[:-1] not in layers) + sorted(rest)
            if left:
                raise ValueError(
                    f"`variables` do not fit `model` of {type(model).__name__}: {'/'.join(left[0])!r} is "
                    "left over."
                )
            return twin, alone, rest
    for (
        path,
        norm,
    ) in norms.items():  # its convolutions may have no bias to take up what a norm adds
        fold_batch_norm(path, dataclasses.replace(norm, behind=None), layers, params, stats)
    return FoldedModel(model, affine_norms=True), params, stats


def _fold_nnx(model, variables, x, call_kwargs):
    # A quarter of a second that who uses Linen does not wait for.
    from netdeconv_jax.interop.fold_nnx import fold_nnx

    if variables is not None:
        raise ValueError(
            "`variables` must be None for an NNX module, which holds its own; give `x=`."
        )
    return fold_nnx(model, x, **call_kwargs)


def _fold_whitener(path: Path, layer: Layer, params: Leaves, stats: Leaves) -> None:
    """Put kernel and bias of the plain layer in the place of what the whitened one has."""
    if (*path, "whitener") not in stats:
        raise ValueError(f"`variables` have no `batch_stats` of the layer {'/'.join(path)!r}.")
    kernel = params[(*path, "kernel")]
    params[(*path, "kernel")], params[(*path, "bias")] = folded(
        kernel,
        params.get((*path, "bias")),
        stats.pop((*path, "mean")),
        stats.pop((*path, "whitener")),
        groups=layer.groups,
        dtype=jnp.dtype(layer.dtype or kernel.dtype),
    )
    stats.pop((*path, "step"), None)


def fold_batch_norm(
    path: Path, norm: Norm, layers: Mapping[Path, Layer], params: Leaves, stats: Leaves
) -> None:
    """Fold a batch norm into the layer before it; leave a scale and a bias where there is none."""
    mean, var = stats.pop((*path, "mean")), stats.pop((*path, "var"))
    gain = lax.rsqrt(var + norm.epsilon) * params.pop((*path, "scale"), 1)
    offset = params.pop((*path, "bias"), 0)
    if norm.behind is None:
        params[(*path, "scale")], params[(*path, "bias")] = gain, offset - mean * gain
        return
    layer = layers[norm.behind]
    kernel, bias = params[(*norm.behind, "kernel")], params.get((*norm.behind, "bias"))
    kernel, bias = merged(
        kernel, bias, mean, gain, offset, layer.dtype, features_axis(layer.groups)
    )
    params[(*norm.behind, "kernel")], params[(*norm.behind, "bias")] = kernel, bias


def _runs_as(twin: Network, layers: Mapping[Path, Layer], params: Leaves, x: Any) -> bool:
    """Whether the twin runs these very layers, all of them plain."""
    tree = {"params": traverse_util.unflatten_dict(params)}
    try:
        own, norms = dry_run(lambda x: twin.apply(tree, x), params, x, ALL)
    except ValueError:  # layers have other names: those that follow from their class
        return False
    used = {(*path, "kernel") for path in own}
    used |= {(*path, "bias") for path, layer in own.items() if layer.use_bias}
    have = {path for path in params if path[:-1] in layers}
    return used == have and not norms and all(layer.groups is None for layer in own.values())


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


def _leaves(tree: Tree) -> Leaves:
    flat: Any = traverse_util.flatten_dict(tree)
    return flat


def _trees(collections: Mapping[str, Leaves]) -> dict[str, Tree]:
    return {name: traverse_util.unflatten_dict(flat) for name, flat in collections.items() if flat}
