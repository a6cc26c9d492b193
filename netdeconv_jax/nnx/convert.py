"""Any NNX model with whitening layers in the place of its own: `deconvolve`."""

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from netdeconv_jax.nnx.former import FormerConv, FormerLinear, FormerNorm, is_norm, starts_at_zero
from netdeconv_jax.nnx.layers import WhiteningStat
from netdeconv_jax.whitening.conversion import (
    DROPPED,
    KEPT,
    REPLACED,
    DenseRule,
    Entry,
    Path,
    Report,
    Rules,
    explain_norm,
    explain_unwhitened,
    rules,
)
from netdeconv_jax.whitening.spec import WhiteningSpec

_LINEAR = (nnx.Conv, nnx.Linear, nnx.ConvTranspose, nnx.LinearGeneral)
_WRAPPERS = (nnx.SpectralNorm, nnx.WeightNorm)
_zeros = nnx.initializers.zeros_init()


def deconvolve(
    model: Any,
    spec: WhiteningSpec | None = None,
    *,
    dense: DenseRule = False,
    keep: str | Sequence[str] = (),
    use_running_average: bool | None = None,
    axis_name: Any = None,
) -> Any:
    """Return a copy of an NNX model whose convolutions whiten, with its batch norms the identity.

    The model given stays what it is; the copy starts from its parameters. Make the optimizer for the copy.

    The rules are those of `netdeconv_jax.deconvolve`:

    - Every `nnx.Conv` becomes a `DeconvConv` with the same settings and kernel, always with a bias. One with
      a `mask` of its kernel, of a class with another `__call__`, or below `nnx.SpectralNorm` or
      `nnx.WeightNorm` stays. `nnx.Linear` becomes `DeconvDense` where `dense` says so, in blocks of 512
      features at least. `nnx.ConvTranspose` and `nnx.LinearGeneral` stay.
    - Batch statistics are used after `train()`, running ones after `eval()`, as with `nnx.BatchNorm`; at
      first as the model's batch norms do. A `use_running_average` that the model passes to a batch norm
      in the call does not reach the convolutions.
    - Every batch norm becomes the identity, also of classes that are like `nnx.BatchNorm` and hold no
      modules, unless `keep` names it; heirs with a `__call__` of their own stay. One whose scale is zero
      becomes the product with one learnt scalar that starts at zero. A `mask` that it is called with is not
      used.
    - No input is given here, so that it is not known what a batch norm follows: **one behind a layer that
      stays is dropped, unless `keep` names it**. `conversion_report` lists these.

    `conversion_report` lists what is done and why. Convert outside of `nnx.jit` and `nnx.eval_shape`.

    Args:
      model: an `nnx.Module`; layers in lists and dicts, shared and stacked ones (`nnx.vmap`) included.
      spec: how the new layers whiten, default that of `DeconvConv`.
      dense: False, True, patterns of paths, or a function of (path, in_features, out_features).
      keep: patterns of paths of the layers that stay what they are; see `netdeconv_jax.deconvolve`.
      use_running_average: of the new layers at first.
      axis_name: mapped axis over which statistics are pooled, as `nnx.BatchNorm`.
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
    running = use_running_average if use_running_average is not None else _mode(_checked(model))
    seen: list[Path] = []

    def convert(path: Path, node: nnx.Module, wrapped: bool) -> nnx.Module:
        seen.append(path)
        plan = _plan(path, node, wanted, wrapped)
        if plan.action == KEPT:
            return node
        if isinstance(node, nnx.Conv):
            return _conv(node, wanted, running)
        return _dense(node, wanted, running) if isinstance(node, nnx.Linear) else FormerNorm(node)

    converted = _map(convert, nnx.clone(model))
    wanted.check_used(seen)
    return converted


def conversion_report(
    model: Any, *args: Any, dense: DenseRule = False, keep: str | Sequence[str] = (), **kwargs: Any
) -> Report:
    """Return what `deconvolve` makes of each layer of a model that is not converted yet.

    Args:
      model: an `nnx.Module`.
      *args: inputs of the model, from a trace with which it is known what stands behind what.
      dense, keep: as `deconvolve`.
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
    wanted, record = rules(None, dense, keep, None, None), _Record()

    def probe(path: Path, node: nnx.Module, wrapped: bool) -> nnx.Module:
        return _probed(path, node, _plan(path, node, wanted, wrapped), record)

    probed = _map(probe, nnx.clone(_checked(model)))
    given, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
    traced = {i: leaf for i, leaf in enumerate(given) if hasattr(leaf, "shape") or _is_node(leaf)}

    def run(probed: Any, arrays: dict[int, Any]) -> Any:
        leaves = [arrays.get(i, leaf) for i, leaf in enumerate(given)]  # flags stay what they are
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return probed(*args, **kwargs)

    nnx.eval_shape(run, probed, traced)
    wanted.check_used(record.entries)
    return Report(tuple(record.entries.values()))


def _plan(path: Path, node: nnx.Module, wanted: Rules, wrapped: bool = False) -> Entry:
    """What becomes of a layer; of a norm it is not yet known what it stands behind."""

    def entry(action: str, why: str) -> Entry:
        return Entry("/".join(path), type(node).__name__, action, why)

    kind = nnx.Conv if isinstance(node, nnx.Conv) else nnx.Linear
    if why := wanted.why_kept(path):
        return entry(KEPT, why)
    if isinstance(node, nnx.BatchNorm) and type(node).__call__ is not nnx.BatchNorm.__call__:
        return entry(KEPT, f"{type(node).__name__} has a `__call__` of its own")
    if is_norm(node):
        return entry(DROPPED, explain_norm(None, scalar=starts_at_zero(node)))
    if not isinstance(node, nnx.Conv | nnx.Linear):
        return entry(KEPT, f"{type(node).__name__} is not converted")
    if wrapped:
        return entry(KEPT, "below a SpectralNorm or WeightNorm, which would normalize the whitener")
    if isinstance(node, nnx.Linear) and not wanted.wants_dense(
        path, node.in_features, node.out_features
    ):
        return entry(KEPT, "`dense` does not ask for it")
    if getattr(node, "mask", None) is not None:
        return entry(KEPT, "has a mask of its kernel")
    if type(node).__call__ is not kind.__call__:
        return entry(KEPT, f"{type(node).__name__} has a `__call__` of its own")
    return entry(REPLACED, f"by {'DeconvConv' if kind is nnx.Conv else 'DeconvDense'}")


def _conv(conv: nnx.Conv, wanted: Rules, running: bool) -> FormerConv:
    twin = FormerConv(
        conv.in_features,
        conv.out_features,
        conv.kernel_size,
        conv.strides,
        padding=conv.padding,
        input_dilation=conv.input_dilation,
        kernel_dilation=conv.kernel_dilation,
        feature_group_count=conv.feature_group_count,
        conv_general_dilated=conv.conv_general_dilated,
        spec=wanted.spec,
        **_common(conv, wanted, running),
    )
    return _with_variables_of(conv, twin)


def _dense(dense: nnx.Linear, wanted: Rules, running: bool) -> FormerLinear:
    twin = FormerLinear(
        dense.in_features,
        dense.out_features,
        # Its own default rounds once where this one would round twice.
        dot_general=None if dense.dot_general is jax.lax.dot_general else dense.dot_general,
        spec=wanted.dense_spec,
        **_common(dense, wanted, running),
    )
    return _with_variables_of(dense, twin)


def _common(layer: nnx.Conv | nnx.Linear, wanted: Rules, running: bool) -> dict[str, Any]:
    names = ("dtype", "param_dtype", "precision", "promote_dtype", "preferred_element_type")
    return {name: getattr(layer, name) for name in names} | {
        "use_running_average": running,
        "axis_name": wanted.axis_name,
        "kernel_init": _zeros,  # to be replaced
        "rngs": nnx.Rngs(0),
    }


def _with_variables_of(layer: nnx.Conv | nnx.Linear, twin: Any) -> Any:
    """Give the twin the kernel and bias of a layer, and the axes of one that `nnx.vmap` has stacked."""
    lead = layer.kernel.shape[: len(layer.kernel.shape) - len(twin.kernel.shape)]
    twin.kernel = layer.kernel
    twin.bias = layer.bias if layer.bias is not None else _stacked(twin.bias, lead)
    for name in ("mean", "whitener", "step"):
        if (stat := getattr(twin, name)) is not None:
            setattr(twin, name, _stacked(stat, lead))
    return twin


def _stacked(variable: Any, lead: tuple[int, ...]) -> Any:
    value = variable[...]
    value = jnp.broadcast_to(value.reshape((1,) * len(lead) + value.shape), (*lead, *value.shape))
    return WhiteningStat(value) if isinstance(variable, WhiteningStat) else nnx.Param(value)


class _Record:
    """What the layers of a trace were, and which of their outputs are alive."""

    def __init__(self):
        self.entries: dict[Path, Entry] = {}
        self.made: list[tuple[weakref.ref, Path, bool]] = []  # and whether it whitens


def _probed(path: Path, layer: Any, plan: Entry, record: _Record) -> Any:
    """The layer, which runs as it is, and notes what a conversion would make of it."""
    kind = type(layer)
    name = next(iter(inspect.signature(layer.__call__).parameters), None)
    scalar = is_norm(layer) and starts_at_zero(layer)  # which a trace could not tell

    class Probe(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            found = plan
            if plan.action == DROPPED:
                x = args[0] if args else kwargs.get(name or "")
                made = ((path, whitens) for made, path, whitens in record.made if made() is x)
                source, whitens = next(made, (None, True))
                why = explain_norm(source if whitens else None, scalar=scalar)
                if source is not None and not whitens:
                    why = f"{explain_unwhitened(source)}: name it in `keep`"
                found = dataclasses.replace(plan, why=why)
            record.entries[path] = found
            y = super().__call__(*args, **kwargs)
            if isinstance(self, _LINEAR):
                record.made.append((weakref.ref(y), path, plan.action == REPLACED))
            return y

    # Of its class, and not around it: what holds it may look at its variables.
    layer.__class__ = Probe
    return layer


def _map(change: Callable[[Path, Any, bool], Any], model: nnx.Module) -> Any:
    """Return the model with every linear layer and batch norm changed, which is told if it is wrapped."""
    # By their kernels, which are shared by the copies that nnx makes of the modules.
    wrapped = {
        id(inner.kernel)
        for _, wrapper in nnx.iter_modules(model)
        if isinstance(wrapper, _WRAPPERS)
        for _, inner in nnx.iter_modules(wrapper)
        if isinstance(inner, _LINEAR)
    }

    def visit(path, node):
        if isinstance(node, _LINEAR) or is_norm(node):
            return change(tuple(map(str, path)), node, id(getattr(node, "kernel", None)) in wrapped)
        return node

    return nnx.recursive_map(visit, model)


def _checked(model: Any) -> nnx.Module:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be an NNX module, got {type(model).__name__}; for Linen there is "
            "`netdeconv_jax.deconvolve`."
        )
    return model


def _mode(model: nnx.Module) -> bool:
    """Whether a model's batch norms, if it has any, use running statistics."""
    norms: list[Any] = [module for _, module in nnx.iter_modules(model) if is_norm(module)]
    return bool(norms) and all(norm.use_running_average for norm in norms)


def _is_node(given: Any) -> bool:
    """Whether an argument is a module, or random numbers, that a trace must take apart."""
    return isinstance(given, nnx.Module | nnx.Rngs)
