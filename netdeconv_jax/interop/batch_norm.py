"""Running averages of `nn.BatchNorm` and its like: what whole batches make of them, from what parts made."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import unfreeze
from jax import lax

from netdeconv_jax.linen.batch_norms import in_trial

Tree = Any
Path = tuple[str, ...]  # of a module, or of a leaf

# By which `nn.jit` tells what it traces with outputs cut off from what it traces otherwise.
_cut_traces = jax.make_user_context(None)


def merge_batch_norm(new: Tree, momentum: float | Mapping[Path, float] = 0.9) -> Tree:
    """Return the `batch_stats` that the whole batch would have given, from those of its microbatches.

    Means average. The variance of the whole is the mean of the variances plus the variance of the means b_i;
    new_i = m old + (1 - m) b_i, so that the latter adds var(new_i) / (1 - m). Any other running average
    averages too, and what is no float (a count of steps) is that of the first.

    Args:
      new: `batch_stats` as `nn.BatchNorm` stores them, each leaf stacked to [k, ...]: what k microbatches of
        one size made, each of the same old statistics.
      momentum: m in [0, 1), Flax's; or that of each module by its path.
    Returns:
      A tree like `new`, without the leading axis.
    Raises:
      ValueError: `momentum` is not in [0, 1), or has no number for a module.
      TypeError: `new` is no nested dict, or `momentum` neither a number nor numbers by path.

    Source: ours; Chan, Golub and LeVeque 1979, for the pooling.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax.interop import merge_batch_norm
      >>> new = {"mean": jnp.array([0.1, 0.3]), "var": jnp.array([1.0, 1.0])}  # batch means 1 and 3
      >>> {name: round(float(leaf), 6) for name, leaf in merge_batch_norm(new).items()}
      {'mean': 0.2, 'var': 1.1}
    """
    check_variables("new", new)
    if not isinstance(momentum, int | float | np.number | jax.Array | Mapping):
        raise TypeError(f"`momentum` must be a number, or numbers by path, got {momentum!r}.")
    flat = leaves(new)
    merged = {}
    for path, leaf in flat.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            merged[path] = leaf[0]
            continue
        merged[path] = leaf.mean(0)
        if (means := mean_beside(flat, path)) is not None:
            share = momentum.get(path[:-1]) if isinstance(momentum, Mapping) else momentum
            if not isinstance(share, int | float | np.number | jax.Array):
                raise ValueError(
                    f"`momentum` must have a number by path for {path[:-1]!r}, got {momentum!r}."
                )
            if not 0 <= share < 1:
                raise ValueError(f"`momentum` must be in [0, 1), got {share}.")
            merged[path] += means.var(0) / (1 - share)
    return traverse_util.unflatten_dict(merged)


def check_variables(name: str, variables: Any) -> None:
    """Raise unless variables, or one collection of them, are a dict or its like, frozen or not."""
    if not isinstance(variables, Mapping):
        raise TypeError(f"`{name}` must be nested dicts of arrays, got {type(variables).__name__}.")


def leaves(stats: Tree) -> dict[Path, Any]:
    """Return the leaves of a nested dict by path."""
    flat: Any = traverse_util.flatten_dict(unfreeze(stats))
    return flat


def mean_beside(flat: Mapping[Path, Any], path: Path) -> Any:
    """Return the leaf `mean` that stands beside a leaf `var` of its shape; None for any other leaf."""
    means = flat.get((*path[:-1], "mean")) if path[-1] == "var" else None
    return means if means is not None and means.shape == flat[path].shape else None


def momentum_of(module: nn.Module) -> Any:
    """Return the momentum that a module says it has, None if none."""
    return getattr(module, "momentum", None)


@dataclasses.dataclass(frozen=True)
class Met:
    """The modules with a momentum that a trace has run, by path.

    Attributes:
      momentum: of each.
      updated: a running statistic of each as every call that moved it left it; more than one call may also be
        one that was traced again.
      repeated: the modules one of whose calls moved on what another had left.
    """

    momentum: dict[Path, float]
    updated: dict[Path, list[Any]]
    repeated: set[Path]


def momenta(
    trace: Callable[[], Any], momentum_of: Callable[[nn.Module], Any] = momentum_of
) -> tuple[Any, Met]:
    """Return what `trace` returns, and what it met: every Linen module that has a momentum.

    Not those inside of a `jit` whose trace is that of another time.
    """
    met = Met({}, {}, set())

    def look(run, args, kwargs, context):
        momentum = momentum_of(context.module)
        if not isinstance(momentum, (int, float)) or in_trial():
            return run(*args, **kwargs)
        path = tuple(context.module.path)
        met.momentum[path] = momentum
        before = _one_statistic(context.module)
        result = run(*args, **kwargs)
        after = _one_statistic(context.module)
        if after is not before:
            left = met.updated.setdefault(path, [])
            if any(before is earlier for earlier in left):
                met.repeated.add(path)
            left.append(after)
        return result

    with nn.intercept_methods(look):
        return trace(), met


def _one_statistic(module: nn.Module) -> Any:
    return next(iter(jax.tree.leaves(module.variables.get("batch_stats", {}))), None)


def shares_left(
    update: Callable[[dict[Path, Any]], Mapping[Path, Any]], old: dict[Path, Any]
) -> Mapping[Path, Any]:
    """Return the share of each old running statistic in its new one, as `update` applies Linen modules.

    That is the derivative: m^k after k steps of momentum m, in a loop too; 1 where there was none. What the
    old statistics do to outputs, as in a layer that evaluates, is no part of it, so that outputs are cut
    off. The values of this trace have no use: where a model differentiates inside, they are wrong.
    """

    def cut(run, args, kwargs, context):
        del context
        return jax.tree.map(
            lambda leaf: lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf,
            run(*args, **kwargs),
        )

    with _cut_traces(True), nn.intercept_methods(cut):
        return jax.jvp(update, (old,), (jax.tree.map(jnp.ones_like, old),))[1]


def shares_of(stats: Tree, met: Met, momentum: float | None) -> dict[Path, float]:
    """Return the momentum of every batch norm in `stats`: `momentum`, or the one that is known of it."""
    flat = leaves(stats)
    paths = {path[:-1] for path in flat if mean_beside(flat, path) is not None}
    if repeated := sorted(paths & met.repeated):
        raise ValueError(
            f"`loss_fn` runs a model whose batch norm {'/'.join(repeated[0]) or '(the model)'} is called "
            "more than once in a pass: what microbatches make of its variance cannot be merged."
        )
    if momentum is not None:
        return dict.fromkeys(paths, momentum)
    if unknown := sorted(paths - met.momentum.keys()):
        raise ValueError(
            f"`momentum` of {'/'.join(unknown[0]) or 'the batch norm'} is not to be found; give it, got None."
        )
    return {path: met.momentum[path] for path in paths}


def without(stats: Tree, moments: Tree) -> Tree:
    """Return the statistics of the modules that have no `moments`."""
    have = {path[:-1] for path in leaves(moments)}
    flat = leaves(stats)
    return traverse_util.unflatten_dict({p: leaf for p, leaf in flat.items() if p[:-1] not in have})


def laid_over(stats: Tree, other: Tree) -> Tree:
    """Return `stats` with the leaves of `other` in the place of its own."""
    flat = leaves(stats) | leaves(other)
    return traverse_util.unflatten_dict(flat)
