"""Any NNX model with whitening layers in the place of its own: `deconvolve`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from netdeconv_jax.nnx.former import FORMERS, FormerNorm, former, is_norm
from netdeconv_jax.nnx.layers import WhiteningStat
from netdeconv_jax.nnx.plan import evaluated, located, map_layers, plan
from netdeconv_jax.whitening.conversion import (
    KEPT,
    DenseRule,
    Entry,
    Path,
    Report,
    Rules,
    rules,
)
from netdeconv_jax.whitening.spec import WhiteningSpec

_SHARED = ("dtype", "param_dtype", "precision", "promote_dtype", "preferred_element_type")
_SHAPE = ("in_features", "out_features")
_GEOMETRY = ("padding", "kernel_dilation")
# The settings of each kind that it keeps, by place and by name.
_SETTINGS: dict[type[nnx.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {
    nnx.Conv: (
        (*_SHAPE, "kernel_size", "strides"),
        (*_GEOMETRY, "input_dilation", "feature_group_count", "conv_general_dilated"),
    ),
    nnx.ConvTranspose: (
        (*_SHAPE, "kernel_size", "strides"),
        (*_GEOMETRY, "transpose_kernel"),
    ),
    nnx.Linear: (_SHAPE, ("dot_general",)),
}
_zeros = nnx.initializers.zeros_init()


def deconvolve(
    model: Any,
    spec: WhiteningSpec | None = None,
    x: Any = None,
    *,
    dense: DenseRule = False,
    keep: str | Sequence[str] = (),
    use_running_average: bool | None = None,
    axis_name: Any = None,
    **call_kwargs: Any,
) -> Any:
    """Return a copy of an NNX model whose convolutions whiten, with its batch norms the identity.

    The model given stays what it is; the copy starts from its parameters. Make the optimizer for the copy.

    The rules are those of `netdeconv_jax.deconvolve`:

    - Every `nnx.Conv` becomes a `DeconvConv`, every `nnx.ConvTranspose` a `DeconvConvTranspose`, with the
      same settings and kernel, always with a bias, that is still of its class: attributes and the methods of
      heirs stay. One with a `mask` of its kernel, of a class with another `__call__`, or below
      `nnx.SpectralNorm` or `nnx.WeightNorm` stays. `nnx.Linear` becomes `DeconvDense` where `dense` says so,
      in blocks of 512 features at least. Every other module that holds a matrix and no modules is a layer
      that stays.
    - Batch statistics are used after `train()`, running ones after `eval()`, as with `nnx.BatchNorm`; at
      first as the model's batch norms do; without any, running ones if its dropout is off. A
      `use_running_average` that the model passes to a batch norm in the call does not reach the
      convolutions.
    - Every batch norm becomes the identity, also of classes that are like `nnx.BatchNorm` and hold no
      modules, unless `keep` names it; heirs with a `__call__` of their own stay. One whose scale is zero
      becomes the product with one learnt scalar that starts at zero. A `mask` that it is called with is not
      used.
    - Given an input `x`, a batch norm that directly follows a layer that stays is kept. Without one it is
      not known what a batch norm follows: **one behind a layer that stays is then dropped, unless `keep`
      names it**. "Directly": behind a reshape or a sum nobody looks.
    - A layer that is held under several attributes goes by the first of them, in alphabetical order.

    `conversion_report` lists what is done and why, given an input. Convert outside of `nnx.jit` and
    `nnx.eval_shape`.

    Args:
      model: an `nnx.Module`; layers in lists and dicts, shared and stacked ones (`nnx.vmap`) included.
      spec: how the new layers whiten, default that of `DeconvConv`.
      x: an input of the model, or its shape and dtype, to find out what its norms follow.
      dense: False, True, patterns of paths, or a function of (path, in_features, out_features).
      keep: patterns of paths of the layers that stay what they are; see `netdeconv_jax.deconvolve`.
      use_running_average: of the new layers at first.
      axis_name: mapped axis over which statistics are pooled, as `nnx.BatchNorm`.
      **call_kwargs: what the model's call needs besides `x`.
    Returns:
      A module of the class of `model`; a `FormerConv`, a `DeconvConv` too, if it is a convolution itself.
    Raises:
      TypeError: `model` is no NNX module, or an argument is of the wrong type.
      ValueError: a pattern names no layer of the model; a scale of a batch norm is traced or abstract.

    Source: ours; De and Smith 2020 (SkipInit) for the scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> rngs = nnx.Rngs(0)
      >>> net = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)
      >>> model = dnnx.deconvolve(net)
      >>> type(model.layers[0]).__name__, model(jnp.ones((2, 8, 8, 3))).shape
      ('FormerConv', (2, 8, 8, 8))
    """
    wanted = rules(spec, dense, keep, use_running_average, axis_name)
    plans = plan(model, wanted)
    wanted.check_used(plans)
    if x is not None:
        plans |= located(model, plans, (x,), call_kwargs)[0]
    return converted(model, plans, wanted)


def conversion_report(
    model: Any,
    *args: Any,
    dense: DenseRule = False,
    keep: str | Sequence[str] = (),
    warm: bool = False,
    **kwargs: Any,
) -> Report:
    """Return what `deconvolve`, given the input, makes of each layer of a model that is not converted yet.

    Args:
      model: an `nnx.Module`.
      *args: inputs of the model, from a trace with which it is known what stands behind what.
      dense, keep: as `deconvolve`.
      warm: whether to report what `warm_start` does.
      **kwargs: to the model.
    Returns:
      A `Report`, which prints as a table, of the layers that the call runs.
    Raises:
      TypeError, ValueError: as `deconvolve`.

    Source: ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> rngs = nnx.Rngs(0)
      >>> net = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)
      >>> print(dnnx.conversion_report(net, jnp.ones((2, 8, 8, 3))))
      replaced  layers/0  Conv       by DeconvConv
      dropped   layers/1  BatchNorm  follows layers/0, which whitens
      1 replaced, 1 dropped, 0 kept
    """
    wanted = dataclasses.replace(rules(None, dense, keep, None, None), warm=warm)
    model = evaluated(model) if warm else model
    found, _ = located(model, plan(model, wanted), args, kwargs, warm=warm)
    wanted.check_used(found)
    return Report(tuple(found.values()))


def converted(model: nnx.Module, plans: Mapping[Path, Entry], wanted: Rules) -> Any:
    """Return a copy of a model with everything done that is planned."""
    given = wanted.use_running_average
    running = _mode(model) if given is None else given

    def convert(path: Path, node: nnx.Module, wrapped: bool) -> nnx.Module:
        del wrapped
        if plans[path].action == KEPT:
            return node
        return FormerNorm(node) if is_norm(node) else _whitening(node, wanted, running)

    return map_layers(convert, nnx.clone(model))


def _whitening(layer: Any, wanted: Rules, running: bool) -> Any:
    """The layer as one that whitens, with its kernel, bias and whatever else it has."""
    kind = next(kind for kind in FORMERS if isinstance(layer, kind))
    places, names = _SETTINGS[kind]
    settings = {name: getattr(layer, name) for name in (*_SHARED, *names)}
    if settings.get("dot_general") is jax.lax.dot_general:
        settings["dot_general"] = None  # whose default rounds once where this one would round twice
    fresh = FORMERS[kind][0](
        *(getattr(layer, name) for name in places),
        **settings,
        spec=wanted.dense_spec if kind is nnx.Linear else wanted.spec,
        use_running_average=running,
        axis_name=wanted.axis_name,
        kernel_init=_zeros,  # not to be used
        rngs=nnx.Rngs(0),
    )
    # Those that `nnx.vmap` has stacked.
    lead = layer.kernel.shape[: len(layer.kernel.shape) - len(fresh.kernel.shape)]
    own = {"kernel"} if layer.bias is None else {"kernel", "bias"}
    layer.__class__ = former(type(layer), kind)
    for name, value in vars(fresh).items():
        if name not in own and not name.startswith("_pytree"):
            is_array = isinstance(value, nnx.Variable)
            setattr(layer, name, _stacked(value, lead) if is_array else value)
    return layer


def _stacked(variable: Any, lead: tuple[int, ...]) -> Any:
    value = variable[...]
    value = jnp.broadcast_to(value.reshape((1,) * len(lead) + value.shape), (*lead, *value.shape))
    return WhiteningStat(value) if isinstance(variable, WhiteningStat) else nnx.Param(value)


def _mode(model: nnx.Module) -> bool:
    """Whether a model's batch norms use running statistics; without any, whether it drops nothing out."""
    modules: list[Any] = [module for _, module in nnx.iter_modules(model)]
    if norms := [module for module in modules if is_norm(module)]:
        return all(norm.use_running_average for norm in norms)
    flags = [getattr(module, "deterministic", None) for module in modules]
    flags = [flag for flag in flags if isinstance(flag, bool)]  # None is left to the call
    return bool(flags) and all(flags)
