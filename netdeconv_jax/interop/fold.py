"""A trained model as the plain network that it is: every whitener and mean folded into kernel and bias."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

import jax
from flax import linen as nn
from flax import traverse_util
from flax.core import meta, unfreeze
from jax import lax

from netdeconv_jax.interop.batch_norm import check_variables
from netdeconv_jax.interop.dry_run import (
    ALL,
    WHITENED,
    Layer,
    Norm,
    Path,
    dry_run,
    small_input,
)
from netdeconv_jax.interop.folded_model import FoldedModel
from netdeconv_jax.linen import DeconvolvedModel
from netdeconv_jax.models.network import Network
from netdeconv_jax.whitening.folding import features_axis, folded, merged
from netdeconv_jax.whitening.same_function import TIED, check_same

if TYPE_CHECKING:
    from flax import nnx

Tree = Any
Leaves = dict[Path, Any]


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
    whose layers whiten with `local_norm`, as what they divide by is each sample's own; nor one of yours whose
    layers have other names under `norm="none"`, as those that follow from a class. Any other Linen module
    comes back as a `FoldedModel`, whose `apply` is that of the module; what it holds besides, batch
    norms and `ChannelDeconv` too, and what it does not run when called with `apply_kwargs`, stays as it is.

    An NNX module comes back as a copy in evaluation mode, in which each layer of `netdeconv_jax.nnx` is a
    plain one, an `nnx.Conv` or `nnx.Linear`. Given `x`, a batch norm that is all that reads the output of one
    convolution or dense layer is folded into it.

    Given `x` as an array, outputs of the two are compared: a kernel that is also used elsewhere cannot be
    seen from the layers. Without it, or by its shape, nothing is compared. Of an NNX layer of half precision
    that has no `dtype`, the kernel becomes float32.

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
      TypeError: `model` is neither a Linen nor an NNX module, or `variables` are no nested dicts.

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
    check_variables("variables", variables)
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
    for path, norm in norms.items():  # convolutions may have no bias to take up what a norm adds
        fold_batch_norm(path, dataclasses.replace(norm, behind=None), layers, params, stats)
    return FoldedModel(model, affine_norms=True), params, stats


def _fold_nnx(model, variables, x, call_kwargs):
    # A quarter of a second that who uses Linen does not wait for.
    from flax import nnx

    from netdeconv_jax.interop.fold_nnx import fold_nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be a Linen or an NNX module, got {type(model).__name__}: {model!r:.60}."
        )
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
        dtype=layer.dtype,
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


def _leaves(tree: Tree) -> Leaves:
    flat: Any = traverse_util.flatten_dict(tree)
    return flat


def _trees(collections: Mapping[str, Leaves]) -> dict[str, Tree]:
    return {name: traverse_util.unflatten_dict(flat) for name, flat in collections.items() if flat}
