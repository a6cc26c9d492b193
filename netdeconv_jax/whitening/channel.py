"""Channel deconvolution as a normalization layer: whiten the channels in place."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from netdeconv_jax import ops
from netdeconv_jax.ops.grouping import check_count
from netdeconv_jax.ops.patch_moments import flat_position, full_mask
from netdeconv_jax.whitening.layer import check_samples
from netdeconv_jax.whitening.running import (
    LOCAL,
    Reduction,
    Running,
    average,
    where_any,
    whitener_of,
)
from netdeconv_jax.whitening.spec import WhiteningSpec

# Of the whitened channels, and of the remaining ones if there are any.
ChannelMoments = tuple[ops.Moments, ops.Moments | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChannelRunning:
    """Running statistics of `channel_deconv`: of the whitened channels, and of the remaining ones.

    Attributes:
      whitened: mean [d], whitener [d, d] and the count of steps.
      rest_mean, rest_var: scalars; mean 0 and variance 1 before any statistics exist.
      rest_moments: of the remaining channels, of mean [1], as `whitened.moments`; None without any.
    """

    whitened: Running
    rest_mean: jax.Array
    rest_var: jax.Array
    rest_moments: ops.Moments | None = None

    @staticmethod
    def start(block: int, dtype: Any) -> "ChannelRunning":
        """Return the state before any statistics exist."""
        whitened = Running.start((block,), dtype, counted=True)
        return ChannelRunning(whitened, jnp.zeros((), dtype), jnp.ones((), dtype))


def channel_block(spec: WhiteningSpec, channels: int) -> int:
    """Return how many of `channels` channels are whitened together: all of them if a block holds more."""
    return min(spec.grouping.block_size, check_count("channels", channels))


def channel_deconv(
    x: jax.Array,
    running: ChannelRunning,
    *,
    block: int,
    spec: WhiteningSpec,
    use_running_average: bool = False,
    update_whitener: bool = True,
    mask: jax.Array | None = None,
    moments: ChannelMoments | None = None,
    reduction: Reduction = LOCAL,
    dtype: Any = None,
) -> tuple[jax.Array, ChannelRunning]:
    """Whiten the channels of `x` in groups of `block`; standardize those that are left over.

    With c = channels // block * block, channel ch < c is row `ch // G` of group `ch % G`, G = c / block; all
    groups share one mean and one whitener. The other channels share one mean and one unbiased variance.
    Running averages start at the first batch.

    Args:
      x: [batch, *spatial, channels].
      running: statistics so far.
      block: channels per group, 1 <= block <= channels.
      spec: root, sampling, sample_dtype, eps and momentum are used; grouping is as above, no grid is centred.
      use_running_average, update_whitener, reduction, dtype: as `deconv_conv`. The count of steps is that
        of batches in the averages, and stays where these do.
      moments: of the whitened channels and of the rest, in place of the batch's.
      mask: weights >= 0, broadcastable to [batch, *spatial, 1].
    Returns:
      y, shape of `x`, in `dtype`; and the running statistics after this step.

    Source: ChannelDeconv of the original code; its covariance forgets the mean, ours is centred.
    """
    dtype = dtype or x.dtype
    channels = x.shape[-1]
    whole = channels // block * block
    grouped = x[..., :whole].reshape(*x.shape[:-1], block, whole // block)
    rest = x[..., whole:]
    if use_running_average:
        now = running
    elif not update_whitener:
        now = lax.stop_gradient(running)
    else:
        check_samples(x)
        if moments is None:
            moments = _moments(x, grouped, rest, mask, spec, reduction, running.whitened.mean.dtype)
        now, running = _step(running, moments, spec)
    mean, whitener = now.whitened.mean, now.whitened.whitener
    rest_mean, rest_var = now.rest_mean, now.rest_var

    y = grouped.astype(mean.dtype) - mean.reshape((1,) * (x.ndim - 1) + (block, 1))
    y = jnp.einsum(
        "...ig,ij->...jg",
        y.astype(dtype),
        whitener.astype(dtype),
        precision=lax.Precision.HIGHEST,
    ).reshape(*x.shape[:-1], whole)
    if whole < channels:
        left = (rest.astype(mean.dtype) - rest_mean) * lax.rsqrt(rest_var + spec.eps)
        y = jnp.concatenate([y, left.astype(dtype)], axis=-1)
    return y, running


def _moments(x, grouped, rest, mask, spec, reduction, dtype) -> ChannelMoments:
    """Moments of the whitened channels and of the rest, None where all channels are whitened."""
    block, groups = grouped.shape[-2:]
    spatial, rows = x.shape[1:-1], reduction.devices() * math.prod(x.shape[:-1]) * groups
    stride = spec.sampling.choose(
        lambda stride: rows // _sampling_step(spatial, stride),
        block,
        largest=max(spatial, default=1),
    )
    step = _sampling_step(spatial, stride)
    if mask is not None:
        mask = jnp.broadcast_to(full_mask(mask, x), (*x.shape[:-1], 1)).reshape(x.shape[0], -1)
    whitened = _grouped_moments(grouped, mask, step, reduction, dtype, spec.sample_dtype)
    if not rest.shape[-1]:
        return whitened, None
    return whitened, _rest_moments(rest, mask, step, reduction, dtype, spec.sample_dtype)


def _step(running, moments, spec):
    """The statistics to use now, and the running ones after this step."""
    whitened, rest = moments
    rest_mean, rest_var = running.rest_mean, running.rest_var
    if rest is not None:
        rest_mean, rest_var = _mean_and_variance(rest)
    batch = ChannelRunning(
        Running(whitened.mean, whitener_of(whitened, spec), running.whitened.step),
        rest_mean,
        rest_var,
    )
    old = _without_moments(running)
    # A batch that is masked out altogether has no statistics: the running ones serve.
    now = jax.tree.map(functools.partial(where_any, whitened.count), batch, old)
    after = _averaged(old, now, whitened.count, spec.momentum)
    return now, _with_moments_of(after, running, moments)


def _without_moments(running):
    whitened = dataclasses.replace(running.whitened, moments=None)
    return dataclasses.replace(running, whitened=whitened, rest_moments=None)


def _with_moments_of(after, running, moments):
    """`after`, with the moments of this batch added to those of `running` where it has any."""

    def added(so_far, batch):
        return None if so_far is None else so_far.merge(batch)

    whitened = dataclasses.replace(
        after.whitened, moments=added(running.whitened.moments, moments[0])
    )
    rest = added(running.rest_moments, moments[1])
    return dataclasses.replace(after, whitened=whitened, rest_moments=rest)


def _sampling_step(spatial: tuple[int, ...], stride: int) -> int:
    """Every which pixel is a sample: none is left out where the map is smaller than the stride."""
    return stride ** len(spatial) if all(n >= stride for n in spatial) else 1


def _grouped_moments(x, mask, step, reduction, dtype, sample_dtype):
    """Moments of x [batch, *spatial, d, groups]: every `step`-th sample in (group, batch, pixel) order."""
    batch, pixels = x.shape[0], math.prod(x.shape[1:-2])
    index, total = flat_position(batch, reduction.axis_name, reduction.axis_index_groups)
    # [batch, groups]: the images of all groups are counted through.
    image = index[:, None] + np.arange(x.shape[-1])[None] * total
    x = jnp.swapaxes(x, -1, -2).reshape(batch, pixels, x.shape[-1], x.shape[-2])
    phase = image % step * (pixels % step)
    return _thinned_moments(x, mask, step, phase, reduction, dtype, sample_dtype)


def _rest_moments(x, mask, step, reduction, dtype, sample_dtype):
    """Moments of all values of x [batch, *spatial, c]: every `step`-th of an image's (channel, pixel)."""
    batch, pixels = x.shape[0], math.prod(x.shape[1:-1])
    x = x.reshape(batch, pixels, x.shape[-1])[..., None]
    phase = np.arange(x.shape[2])[None] * (pixels % step)
    return _thinned_moments(x, mask, step, phase, reduction, dtype, sample_dtype)


def _thinned_moments(x, mask, step, phase, reduction, dtype, sample_dtype):
    """Moments of x [batch, pixels, kinds, d], each kind thinned from its own phase [batch | 1, kinds]."""
    rows, weights = ops.every_nth(x, step, phase[..., None])
    if weights is not None:
        weights = weights[..., 0]
    if mask is not None:
        mask = jnp.broadcast_to(mask[..., None], x.shape[:-1]).astype(dtype)
        kept, _ = ops.every_nth(mask, step, phase)
        weights = kept if weights is None else weights * kept
    result = ops.moments(rows, weights, axes=(0, 1, 2), dtype=dtype, sample_dtype=sample_dtype)
    if reduction.axis_name is None:
        return result
    return result.psum(reduction.axis_name, reduction.axis_index_groups)


def _mean_and_variance(moments):
    """The scalar mean and unbiased variance of one-dimensional moments."""
    unbiased = moments.count / jnp.maximum(moments.count - 1, 1)
    return moments.mean[0], moments.cov[0, 0] * unbiased


def _averaged(running, batch, count, momentum):
    """The running averages after this step; the first step replaces what was there."""
    step = running.whitened.step
    momentum = jnp.where(step == 0, 0, momentum)
    averaged = jax.tree.map(
        lambda old, new: where_any(count, average(old, new, momentum), old), running, batch
    )
    # A batch that is masked out altogether must not pass for the first.
    step = step + (count > 0).astype(jnp.int32)
    whitened = dataclasses.replace(averaged.whitened, step=step)
    return dataclasses.replace(averaged, whitened=whitened)
