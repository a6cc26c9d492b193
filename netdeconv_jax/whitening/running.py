"""From moments to (mean, whitener), and the running averages of both."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from netdeconv_jax.ops import Moments
from netdeconv_jax.ops.roots import identity_like
from netdeconv_jax.whitening.spec import WhiteningSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Running:
    """Running statistics of a layer: averages of the mean and of the whitener, as the original keeps them.

    Attributes:
      mean: [*stat_shape, d], from 0.
      whitener: [*stat_shape, d, d], from the identity.
      step: int32 scalar counting training steps, or None for layers that need no count.
      moments: of the samples of earlier microbatches, to which this one's are added; or None where nobody
        accumulates them.
    """

    mean: jax.Array
    whitener: jax.Array
    step: jax.Array | None = None
    moments: Moments | None = None

    @staticmethod
    def start(shape: tuple[int, ...], dtype: Any, *, counted: bool = False) -> "Running":
        """Return the state before any statistics exist: mean of `shape` [*stat_shape, d] 0, identity."""
        width = shape[-1]
        whitener = jnp.broadcast_to(jnp.eye(width, dtype=dtype), (*shape, width))
        return Running(
            jnp.zeros(shape, dtype), whitener, jnp.zeros((), jnp.int32) if counted else None
        )


@dataclasses.dataclass(frozen=True)
class Reduction:
    """Over which devices statistics are pooled: `axis_name` and `axis_index_groups` of `lax.psum`."""

    axis_name: Any = None
    axis_index_groups: Any = None

    def devices(self) -> int:
        """Return how many devices' samples are pooled."""
        if self.axis_name is None:
            return 1
        if self.axis_index_groups is not None:
            return len(self.axis_index_groups[0])
        return lax.axis_size(self.axis_name)


LOCAL = Reduction()


def statistics(
    batch_moments: Callable[[], Moments],
    running: Running,
    spec: WhiteningSpec,
    *,
    use_running_average: bool,
    update_whitener: bool = True,
    moments: Moments | None = None,
) -> tuple[jax.Array, jax.Array, Running]:
    """Return the mean and whitener to use now, and the running statistics after this step.

    Args:
      batch_moments: called only where batch statistics are wanted.
      running: before this step; `running.step` must be there if `spec.freeze` is set.
      spec: root, eps, momentum and freeze schedule.
      use_running_average: use `running`, and leave it as it is.
      update_whitener: static; False in a training step that uses `running` as a constant, and leaves it as it
        is but for the count of steps.
      moments: stand in for those of the batch, which are then not taken.

    Where a training step uses running statistics no moments are taken, and none are added.
    """
    if use_running_average:
        return running.mean, running.whitener, running
    take = batch_moments if moments is None else lambda: moments
    if not update_whitener:
        mean, whitener, averaged = _frozen(running)
    elif spec.freeze is None:
        mean, whitener, averaged = _fresh(take, running, spec)
    else:
        assert running.step is not None
        fresh = functools.partial(_fresh, take, running, spec)
        like = jax.eval_shape(fresh)
        mean, whitener, averaged = lax.cond(
            running.step % spec.freeze.period < spec.freeze.active_steps,
            fresh,
            lambda: jax.tree.map(varying_like, _frozen(running), like),
        )
    if running.step is not None:
        averaged = dataclasses.replace(averaged, step=running.step + 1)
    return mean, whitener, averaged


def whitener_of(moments: Moments, spec: WhiteningSpec) -> jax.Array:
    """Return D ~ (cov + eps I)^(-1/2) as `spec.root` takes it."""
    return spec.root(moments.cov + spec.eps * identity_like(moments.cov))


def where_any(count: jax.Array, batch: jax.Array, running: jax.Array) -> jax.Array:
    """Return `batch`, or `running` where `count` says that no sample was seen."""
    return jnp.where(
        count.reshape(count.shape + (1,) * (batch.ndim - count.ndim)) > 0, batch, running
    )


def average(old: jax.Array, batch: jax.Array, momentum: float | jax.Array) -> jax.Array:
    """Return the exponential moving average, in Flax's sense of momentum."""
    return momentum * old + (1 - momentum) * batch


def _fresh(take, running, spec):
    moments = take()
    whitener = whitener_of(moments, spec)
    # A batch that is masked out altogether has no statistics: the running ones serve.
    mean = where_any(moments.count, moments.mean, running.mean)
    whitener = where_any(moments.count, whitener, running.whitener)
    averaged = Running(
        where_any(moments.count, average(running.mean, mean, spec.momentum), running.mean),
        where_any(
            moments.count, average(running.whitener, whitener, spec.momentum), running.whitener
        ),
        running.step,
        None if running.moments is None else running.moments.merge(moments),
    )
    return mean, whitener, averaged


def _frozen(running):
    return lax.stop_gradient(running.mean), lax.stop_gradient(running.whitener), running


def varying_like(value: jax.Array, like: Any) -> jax.Array:
    """Mark a value that is equal on all devices of a `shard_map` as one that may differ, where `like` may."""
    axes = tuple(_varying_axes(like) - _varying_axes(jax.typeof(value)))
    return lax.pcast(value, axes, to="varying") if axes else value


def _varying_axes(type_: Any) -> frozenset[str]:
    # JAX renamed `vma` to `manual_axis_type` in 0.10; either may be None outside of `shard_map`.
    if getattr(type_, "manual_axis_type", None) is not None:
        return type_.manual_axis_type.varying
    return getattr(type_, "vma", None) or frozenset()
