"""Gradient accumulation: the microbatches of one optimizer step, and one step of the running statistics."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jax import lax

from netdeconv_jax.interop.batch_norm import (
    check_variables,
    laid_over,
    merge_batch_norm,
    momenta,
    shares_of,
    without,
)
from netdeconv_jax.whitening.running import varying_like

Tree = Any
# (variables, microbatch, mutable) -> (loss, (updates, aux)): one `model.apply(..., mutable=mutable)`.
LossFn = Callable[[Mapping[str, Tree], Tree, list[str]], tuple[jax.Array, tuple[Tree, Tree]]]


def accumulate(
    loss_fn: LossFn,
    variables: Mapping[str, Tree],
    batches: Tree,
    *,
    momentum: float | None = None,
) -> tuple[tuple[jax.Array, Tree], Tree, Tree]:
    """Return loss, gradients and running statistics of one optimizer step, a microbatch at a time.

    The gradient is the mean over microbatches, in the memory of one. What accumulation changes: each
    microbatch is whitened (or batch-normalized) by its own statistics, in the forward and in the gradient,
    not by those of the whole batch. The running statistics take one step, with the moments of the whole
    batch: those of `moments` in the layers of this package, `merge_batch_norm` elsewhere. Freeze schedules
    count one step. A layer of this package that is called more than once takes a step for each call, all
    with the moments of all its calls. Microbatches of a layer with 1x1 kernels sample the rows that the
    whole batch would if their pixels are a multiple of the sampling step.

    To be called under `jit`, where the pass that updates costs the roots alone; also inside `shard_map` or
    `pmap` (`loss_fn` then takes the mean over devices as ever). Shard the batch axis, not that of the
    microbatches.

    Args:
      loss_fn: `(variables, microbatch, mutable) -> (loss, (updates, aux))` with `_, updates =
        model.apply(variables, ..., mutable=mutable)`. It is traced up to three times.
      variables: `params`, and `batch_stats` where the model has any; others are passed on unchanged.
      batches: pytree of arrays [k, ...]; microbatch i is element i of each, random keys included.
      momentum: of the batch norm layers; by default each says its own, which is read while it is traced.
    Returns:
      The mean loss and `aux` stacked to [k, ...]; the gradients, as `params`; the new `batch_stats`, {}
      without any. With k = 1 that is what `jax.value_and_grad` gives.
    Raises:
      ValueError: `batches` has no arrays, or their first axes differ; or a batch norm's momentum is not to
        be found (its trace was cached by a `jit` inside `loss_fn`); or there are several microbatches, and
        one batch norm is called more than once in a pass, as seen outside of `nn.remat` and the like.
      TypeError: `loss_fn` is no function, or `variables` are no nested dicts.

    Source: ours; Chan, Golub and LeVeque 1979, for the pooling.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import DeconvDense
      >>> from netdeconv_jax.interop import accumulate
      >>> layer, x = DeconvDense(1, use_running_average=False), jnp.arange(24.0).reshape(3, 4, 2)
      >>> def loss_fn(variables, x, mutable):
      ...     y, updates = layer.apply(variables, x, mutable=mutable)
      ...     return jnp.mean(y**2), (updates, y)
      >>> variables = layer.init(jax.random.key(0), x[0])
      >>> (loss, y), grads, batch_stats = accumulate(loss_fn, variables, x)
      >>> y.shape, [round(m, 3) for m in batch_stats["mean"].tolist()]
      ((3, 4, 1), [1.1, 1.2])
    """
    if not callable(loss_fn):
        raise TypeError(f"`loss_fn` must be a function, got {loss_fn!r:.60}.")
    check_variables("variables", variables)
    count = _microbatches(batches)
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    if count == 1:
        (loss, (updates, aux)), grads = _value_and_grad(loss_fn, variables, first, ["batch_stats"])
        aux = jax.tree.map(lambda leaf: leaf[None], aux)
        return (loss, aux), grads, unfreeze(updates).get("batch_stats", {})

    def step(moments, batch):
        given = {**variables, "moments": moments} if moments else variables
        mutable = ["batch_stats", "moments"]
        (loss, (updates, aux)), grads = _value_and_grad(loss_fn, given, batch, mutable)
        updates = unfreeze(updates)
        moments = updates.get("moments", {})
        return loss, grads, moments, (without(updates.get("batch_stats", {}), moments), aux)

    shapes, met = momenta(lambda: jax.eval_shape(lambda batch: step({}, batch), first))
    loss, grads, moments, (others, _) = shapes
    shares = shares_of(others, met, momentum)
    start = jax.tree.map(_zeros_like, (loss, grads, moments))

    def body(carry, batch):
        loss, grads, moments = carry
        more_loss, more_grads, moments, rest = step(moments, batch)
        grads = jax.tree.map(jnp.add, grads, more_grads)
        return (loss + more_loss, grads, moments), rest

    (loss, grads, moments), (others, aux) = lax.scan(body, start, batches)
    loss, grads = jax.tree.map(lambda total: total / count, (loss, grads))
    # The whole batch in `others`, nothing of the first microbatch that this pass sees besides.
    batch_stats = laid_over(
        _updated(loss_fn, variables, first, moments), merge_batch_norm(others, shares)
    )
    return (loss, aux), grads, batch_stats


def _microbatches(batches: Tree) -> int:
    counts = {leaf.shape[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(batches)}
    if len(counts) != 1 or 0 in counts:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
        raise ValueError(
            f"`batches` must be arrays [k, ...] with one number k of microbatches, got shapes {shapes}."
        )
    (count,) = counts
    return count


def _value_and_grad(loss_fn, variables, batch, mutable):
    def of_params(params):
        return loss_fn({**variables, "params": params}, batch, mutable)

    return jax.value_and_grad(of_params, has_aux=True)(variables.get("params", {}))


def _updated(loss_fn, variables, batch, moments):
    """The running statistics after one step with the merged moments."""
    _, (updates, _) = loss_fn({**variables, "moments": moments}, batch, ["batch_stats"])
    return unfreeze(updates).get("batch_stats", {})


def _zeros_like(like):
    return varying_like(jnp.zeros(like.shape, like.dtype), like)
