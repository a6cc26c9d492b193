"""What becomes of each layer of an NNX model, as it is made and as it runs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from netdeconv_jax.nnx.behind import LAYER, NORM, places
from netdeconv_jax.nnx.former import FORMERS, OURS, is_norm, starts_at_zero, taken_names
from netdeconv_jax.whitening.conversion import (
    DROPPED,
    KEPT,
    REPLACED,
    UNFOLDED,
    Entry,
    Path,
    Rules,
    explain_norm,
    explain_unwhitened,
)

_WRAPPERS = (nnx.SpectralNorm, nnx.WeightNorm)


def plan(model: Any, wanted: Rules) -> dict[Path, Entry]:
    """Return what becomes of each layer, by path; of a norm it is not yet known what it stands behind."""
    plans: dict[Path, Entry] = {}

    def note(path: Path, node: nnx.Module, wrapped: bool) -> nnx.Module:
        plans[path] = _plan(path, node, wanted, wrapped)
        return node

    map_layers(note, checked(model))
    return plans


def located(
    model: nnx.Module,
    plans: Mapping[Path, Entry],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    warm: bool = False,
) -> tuple[dict[Path, Entry], dict[Path, Path]]:
    """Return what becomes of the layers that a call runs, in that order, and the layers that norms follow.

    Args:
      model, args, kwargs: of the call.
      plans: from `plan`.
      warm: whether a norm goes only where it can be folded.
    """

    def role(path: tuple[Any, ...], node: Any) -> str | None:
        if is_norm(node):
            return NORM
        return LAYER if _is_layer(node) else None

    layers = {_named(path): node for path, node in nnx.iter_modules(model)}
    found, sources = {}, {}
    for raw, place in places(model, role, args, kwargs).items():
        path, source = _named(raw), None if place.source is None else _named(place.source)
        found[path] = entry = plans[path]
        if entry.action != DROPPED:
            continue
        if source is not None:
            sources[path] = source
        whitens = folds = False
        if source is not None:
            whitens = plans[source].action == REPLACED
            folds = whitens and place.alone and _folds(layers[path], layers[source])
        if warm and not folds:
            entry = dataclasses.replace(entry, action=KEPT, why=UNFOLDED)
        elif source is not None and not whitens:
            why = f"{explain_unwhitened(source)}; `deconvolve` must be given the input to know"
            entry = dataclasses.replace(entry, action=KEPT, why=why)
        else:
            # A warm start folds the scale and leaves no scalar.
            why = explain_norm(source, scalar=not warm and starts_at_zero(layers[path]))
            entry = dataclasses.replace(entry, why=why)
        found[path] = entry
    return found, sources


def _plan(path: Path, node: nnx.Module, wanted: Rules, wrapped: bool = False) -> Entry:
    """What becomes of a layer; of a norm it is not yet known what it stands behind."""

    def entry(action: str, why: str) -> Entry:
        return Entry("/".join(path), type(node).__name__, action, why)

    kind = next((kind for kind in FORMERS if isinstance(node, kind)), None)
    if why := wanted.why_kept(path):
        return entry(KEPT, why)
    if isinstance(node, nnx.BatchNorm) and type(node).__call__ is not nnx.BatchNorm.__call__:
        return entry(KEPT, f"{type(node).__name__} has a `__call__` of its own")
    if is_norm(node):
        return entry(DROPPED, explain_norm(None, scalar=starts_at_zero(node)))
    if kind is None:
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
    if taken := taken_names(node, kind):
        name = type(node).__name__
        return entry(KEPT, f"{name} has a `{taken[0]}` of its own, a name that whitening needs")
    if isinstance(node, nnx.ConvTranspose) and (why := wanted.why_strided(node.strides)):
        return entry(KEPT, why)
    return entry(REPLACED, f"by Deconv{'Dense' if kind is nnx.Linear else kind.__name__}")


def _is_layer(node: Any) -> bool:
    """Whether a module is one of the kinds that are converted, or holds a matrix, and no modules."""
    if isinstance(node, OURS) or not isinstance(node, nnx.Module) or is_norm(node):
        return False
    if isinstance(node, tuple(FORMERS)):
        return True
    if not callable(node) or any(inner is not node for _, inner in nnx.iter_modules(node)):
        return False
    return any(leaf.ndim > 1 for leaf in jax.tree.leaves(nnx.state(node, nnx.Param)))


def _folds(norm: Any, layer: Any) -> bool:
    """Whether a norm is one of the features of the layer before it, with no parameters but a batch norm's."""
    own = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(norm, nnx.Param))}
    shape = (layer.out_features,)
    return own <= {"scale", "bias"} and norm.mean.shape == norm.var.shape == shape


def _named(path: Sequence[Any]) -> Path:
    return tuple(map(str, path))


def map_layers(change: Callable[[Path, Any, bool], Any], model: nnx.Module) -> Any:
    """Return the model with every linear layer and batch norm changed, which is told if it is wrapped."""
    wrapped = wrapped_kernels(model)

    def visit(path, node):
        if is_norm(node) or _is_layer(node):
            return change(_named(path), node, id(getattr(node, "kernel", None)) in wrapped)
        return node

    return nnx.recursive_map(visit, model)


def wrapped_kernels(model: nnx.Module) -> set[int]:
    """Return the ids of the kernels that a wrapper changes, which copies that nnx makes of modules share."""
    return {
        id(kernel)
        for _, wrapper in nnx.iter_modules(model)
        if isinstance(wrapper, _WRAPPERS)
        for _, inner in nnx.iter_modules(wrapper)
        if (kernel := getattr(inner, "kernel", None)) is not None
    }


def checked(model: Any) -> nnx.Module:
    """Return `model`; raise unless it is an NNX module."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be an NNX module, got {type(model).__name__}; for Linen there is "
            "`netdeconv_jax.deconvolve`."
        )
    return model


def evaluated(model: nnx.Module) -> Any:
    """Return a copy of a model in evaluation mode."""
    copy = nnx.clone(checked(model))
    copy.eval()
    return copy
