"""Precise statistics: what evaluation uses, from one pass over data instead of an exponential average."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import unfreeze

from netdeconv_jax.interop.batch_norm import (
    check_variables,
    laid_over,
    leaves,
    momenta,
    shares_left,
)
from netdeconv_jax.linen import (
    ChannelDeconv,
    DeconvConv,
    DeconvConvTranspose,
    DeconvDense,
    DeconvolvedModel,
)
from netdeconv_jax.whitening.batches import arguments, mean_over

Tree = Any


def recalibrate(
    model: nn.Module | DeconvolvedModel,
    variables: Mapping[str, Tree],
    batches: Iterable[Any],
    *,
    apply_kwargs: Mapping[str, Any] | None = None,
    rngs: Mapping[str, jax.Array] | None = None,
) -> dict[str, Tree]:
    """Return `variables` with running statistics that are the mean of those of `batches`.

    Running statistics are exponential averages over the last steps of training, and over weights that moved
    meanwhile. This takes them anew, with the weights as they are: each batch is whitened and normalized by
    its own statistics as in training, and their plain mean takes the place of the running ones. Give
    batches of the size that was trained with: what is averaged is each batch's whitener, not its covariance.
    The root of the pooled covariance would come nearer to that of all data as one batch, but the network was
    trained behind whiteners of batches (docs/decisions.md has the figures). Batches of other sizes weigh
    what they hold, and each size is compiled once; a second call with the same model and shapes compiles
    nothing, if the model is hashable. That unrolls loops (`nn.RNN`, `lax.scan`) to look into them once: long
    ones take seconds. Of a layer that is called more than once in a pass, the calls weigh
    what they weigh in its running average: the last the most.

    It knows the layers of this package and every module that has a field `momentum` and keeps
    `new = momentum * old + (1 - momentum) * batch` in floats, as `nn.BatchNorm` does. What other modules
    keep, and every count of steps, stays as it is; so do statistics of a momentum of 1, which never move.

    Args:
      model: a Linen module, or what `deconvolve` makes of one.
      variables: `params`, `batch_stats` and whatever else `model.apply` needs.
      batches: iterable of inputs, each the one positional argument of the model, or a tuple of several;
        arrays on several devices will do.
      apply_kwargs: what makes the model use batch statistics, default `{"train": True}`; arrays and hashable
        values.
      rngs: as `model.apply`, where training needs them (dropout); the same for every batch.
    Returns:
      A dict like `variables`; `variables` themselves if there are no `batch_stats`.
    Raises:
      ValueError: `batches` is empty, or one batch itself; or `apply_kwargs` hold what cannot be hashed.
      TypeError: `model` is no Linen module, or `variables` are no nested dicts.

    Source: ours; Wu and Johnson 2021 ("Rethinking Batch in BatchNorm"), for batch norm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import DeconvDense
      >>> from netdeconv_jax.interop import recalibrate
      >>> layer, x = DeconvDense(3), jnp.arange(24.0).reshape(12, 2)
      >>> variables = layer.init(jax.random.key(0), x, True)
      >>> new = recalibrate(layer, variables, [x[:8], x[8:]], apply_kwargs={"use_running_average": False})
      >>> [round(m, 3) for m in new["batch_stats"]["mean"].tolist()]
      [11.0, 12.0]
    """
    if isinstance(model, type) or not callable(getattr(model, "apply", None)):
        raise TypeError(
            "`model` must be a Linen module, or what `deconvolve` makes of one, got "
            f"{model.__name__ if isinstance(model, type) else type(model).__name__}."
        )
    check_variables("variables", variables)
    if not jax.tree.leaves(variables.get("batch_stats", {})):
        return dict(variables)
    flags, arrays = _parted({"train": True} if apply_kwargs is None else apply_kwargs)
    variables = dict(variables)
    run = _compiled(model, flags)
    own = mean_over(batches, lambda x: run(variables, arguments(x), arrays, rngs))
    return {**variables, "batch_stats": laid_over(variables["batch_stats"], own)}


def _parted(apply_kwargs):
    """What a program is compiled for, sorted, and the arrays that it takes."""
    arrays = {
        name: value
        for name, value in apply_kwargs.items()
        if any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))
    }
    flags = tuple(sorted(item for item in apply_kwargs.items() if item[0] not in arrays))
    for name, value in flags:
        try:
            hash(value)
        except TypeError:
            raise ValueError(
                f"`apply_kwargs` must hold arrays and hashable values, got {value!r:.60} for {name!r}."
            ) from None
    return flags, arrays


def _compiled(model, flags):
    """What maps (variables, inputs, arrays, rngs) to the batch's own statistics, compiled once a shape."""
    try:
        hash(model)
    except TypeError:  # a field holds a list: no other call can know the model again
        return jax.jit(functools.partial(_own, model, flags))
    return functools.partial(_own_of_hashable, model, flags)


def _own(model, flags, variables, inputs, arrays, rngs):
    """The batch's own statistics, where it is known how they enter the running ones."""
    # From a count of 0 a freeze schedule is active.
    start = jax.tree.map(_restarted, unfreeze(variables["batch_stats"]))

    def update(stats):
        given = {**variables, "batch_stats": laid_over(start, traverse_util.unflatten_dict(stats))}
        settings = {"mutable": ["batch_stats"], "rngs": rngs, **dict(flags), **arrays}
        _, updates = model.apply(given, *inputs, **settings)
        return {path: new for path, new in leaves(updates["batch_stats"]).items() if path in stats}

    old = {p: leaf for p, leaf in leaves(start).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    # Without `jit`, whose earlier traces would hide modules; that unrolls loops, here for shapes alone.
    with jax.disable_jit():
        _, met = momenta(lambda: jax.eval_shape(update, old), _share)
    new = update(old)
    # Each call is a step. Only what was called again costs a second trace, of which nothing heavy is left.
    again = {path for path, calls in met.updated.items() if len(calls) > 1}
    measured = shares_left(update, old) if again else {}
    own = {}
    for path in new:
        if path[:-1] in again:
            share = measured[path]
            moved = share != 1
            rest = (new[path] - share * old[path]) / jnp.where(moved, 1 - share, 1)
            own[path] = jnp.where(moved, rest, old[path])
        elif (share := met.momentum.get(path[:-1], 1)) != 1:
            own[path] = (new[path] - share * old[path]) / (1 - share)
    return traverse_util.unflatten_dict(own)


_own_of_hashable = jax.jit(_own, static_argnames=("model", "flags"))


def _share(module: nn.Module) -> Any:
    """The share of the old in a module's running averages after a step from a count of 0."""
    if isinstance(module, ChannelDeconv):
        return 0.0  # its averages start at the first batch
    if isinstance(module, DeconvConv | DeconvConvTranspose | DeconvDense):
        return module.resolved_spec().momentum
    return getattr(module, "momentum", None)


def _restarted(leaf):
    return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.zeros_like(leaf)
