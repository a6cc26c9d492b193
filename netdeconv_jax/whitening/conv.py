"""The deconvolved convolution and dense layer as pure functions of arrays."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from netdeconv_jax import ops
from netdeconv_jax.ops.patch_moments import full_mask
from netdeconv_jax.whitening.layer import check_samples
from netdeconv_jax.whitening.local_norm import locally_normalized
from netdeconv_jax.whitening.running import LOCAL, Reduction, Running, statistics
from netdeconv_jax.whitening.spec import WhiteningSpec


def conv_groups(
    spec: WhiteningSpec, channels: int, taps: int, feature_group_count: int = 1
) -> ops.ColumnGroups:
    """Return how `spec` divides the columns of a convolution."""
    return ops.column_groups(
        channels,
        taps if spec.whiten == "patches" else 1,
        spec.grouping.block_size,
        kind=spec.grouping.kind,
        shared=spec.grouping.shared,
        feature_group_count=feature_group_count,
    )


def dense_groups(spec: WhiteningSpec, features: int) -> ops.ColumnGroups:
    """Return how `spec` divides the columns of a dense layer: always contiguous, as the original."""
    return ops.column_groups(
        features,
        1,
        spec.grouping.block_size,
        kind="contiguous",
        shared=spec.grouping.shared,
    )


def sampling(
    spec: WhiteningSpec,
    shape: tuple[int, ...],
    geometry: ops.Window,
    groups: ops.ColumnGroups,
    *,
    devices: int = 1,
) -> dict[str, Any]:
    """Return how `spec` samples an input of `shape` [batch, *spatial, channels], for `ops.patch_moments`."""
    centred = spec.sampling.centred

    def rows_at(stride: int) -> int:
        return devices * ops.sampled_rows(shape, geometry, groups, stride, centred=centred)

    stride = spec.sampling.choose(rows_at, groups.width, largest=max(shape[1:-1]))
    return {"sampling_stride": stride, "centred": centred}


def deconv_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    running: Running,
    *,
    geometry: ops.Window,
    spec: WhiteningSpec,
    feature_group_count: int = 1,
    use_running_average: bool = False,
    update_whitener: bool = True,
    mask: jax.Array | None = None,
    moments: ops.Moments | None = None,
    reduction: Reduction = LOCAL,
    dtype: Any = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    conv_general_dilated: Callable[..., jax.Array] | None = None,
) -> tuple[jax.Array, Running]:
    """Whiten the patches of `x` and convolve: one plain convolution with a folded kernel.

    Args:
      x: [*batch, *spatial, channels], with any number of batch axes.
      kernel: [*kernel_size, channels / feature_group_count, features].
      bias: [features] or None. The whitened mean is subtracted in either case.
      running: statistics so far, of `conv_groups(...).stat_shape`; its dtype is that of the statistics.
      geometry: of the convolution.
      spec, feature_group_count, use_running_average, update_whitener: as the layer's.
      mask: weights >= 0, broadcastable to [*batch, *spatial, 1]; see `ops.patch_moments`.
      moments: stand in for those of the batch; those of several microbatches, merged.
      reduction: where statistics are pooled over a mapped axis.
      dtype: of the convolution; default that of `x` and `kernel` promoted.
      precision, conv_general_dilated: of the convolution alone; of statistics `spec` has it. In training
        `ops.convolution` stands for `lax.conv_general_dilated`, the same function.
      preferred_element_type: of the convolution's result, if not `dtype`.
    Returns:
      y [*batch, *out, features] in `dtype`, or as preferred, and the running statistics after this step.
    Raises:
      ValueError: the channels or features do not fit the feature groups, or `x` is smaller than the kernel.

    Source: Ye et al. 2020, Algorithm 1 and section 3.4.
    """
    if kernel.shape[-1] % feature_group_count:
        raise ValueError(
            f"`features` must be divisible by `feature_group_count` {feature_group_count}, "
            f"got {kernel.shape[-1]}."
        )
    batch_shape = x.shape[: -geometry.ndim - 1]
    if not use_running_average:
        check_samples(x)
    dtype = dtype or jnp.promote_types(x.dtype, kernel.dtype)
    x = locally_normalized(x, spec.local_norm, ndim=geometry.ndim, mask=mask, dtype=dtype)
    if mask is not None and len(batch_shape) != 1:
        mask = full_mask(mask, x)
        mask = jnp.broadcast_to(mask, (*x.shape[:-1], 1))
        mask = mask.reshape(math.prod(batch_shape), *mask.shape[len(batch_shape) :])
    x = x.reshape(math.prod(batch_shape), *x.shape[len(batch_shape) :])
    groups = conv_groups(spec, x.shape[-1], geometry.taps, feature_group_count)
    mean, whitener, running = statistics(
        lambda: ops.patch_moments(
            x,
            geometry,
            groups,
            **sampling(spec, x.shape, geometry, groups, devices=reduction.devices()),
            mask=mask,
            axis_name=reduction.axis_name,
            axis_index_groups=reduction.axis_index_groups,
            dtype=running.mean.dtype,
            shift=running.mean if spec.one_pass else None,
            sample_dtype=spec.sample_dtype,
        ),
        running,
        spec,
        use_running_average=use_running_average,
        update_whitener=update_whitener,
        moments=moments,
    )
    kernel, bias = ops.fold(
        kernel,
        bias,
        mean,
        whitener,
        groups,
        dtype=dtype,
        precision=spec.fold_precision(dtype, training=not use_running_average),
    )
    if not use_running_average and conv_general_dilated in (None, lax.conv_general_dilated):
        conv_general_dilated = ops.convolution
    y = plain_conv(
        x,
        kernel,
        bias,
        geometry=geometry,
        feature_group_count=feature_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        conv_general_dilated=conv_general_dilated,
    )
    return y.reshape(*batch_shape, *y.shape[1:]), running


def plain_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    geometry: ops.Window,
    feature_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    conv_general_dilated: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Convolve x [*batch, *spatial, channels] in the dtype of a folded `kernel`, and add its bias."""
    batch_shape = x.shape[: -geometry.ndim - 1]
    y = geometry.convolve(
        x.reshape(math.prod(batch_shape), *x.shape[len(batch_shape) :]).astype(kernel.dtype),
        kernel,
        feature_group_count=feature_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        conv_general_dilated=conv_general_dilated,
    )
    return _add_bias(y, bias).reshape(*batch_shape, *y.shape[1:])


def deconv_dense(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    running: Running,
    *,
    spec: WhiteningSpec,
    use_running_average: bool = False,
    update_whitener: bool = True,
    mask: jax.Array | None = None,
    moments: ops.Moments | None = None,
    reduction: Reduction = LOCAL,
    dtype: Any = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    dot_general: Callable[..., jax.Array] | None = None,
) -> tuple[jax.Array, Running]:
    """Whiten the last axis of `x` and multiply: one plain product with a folded kernel.

    Args:
      x: [..., in_features]; all leading axes hold samples, and all of them are seen.
      kernel: [in_features, features].
      bias: [features] or None. The whitened mean is subtracted in either case.
      running: statistics so far, of `dense_groups(...).stat_shape`.
      spec, use_running_average, update_whitener, moments, reduction, dtype, precision,
        preferred_element_type: as `deconv_conv`.
      dot_general: in place of `lax.dot_general`.
      mask: weights >= 0, broadcastable to [..., 1].
    Returns:
      y [..., features] in `dtype`, or as preferred, and the running statistics after this step.

    Source: Delinear of the original code.
    """
    if not use_running_average:
        check_samples(x)
    dtype = dtype or jnp.promote_types(x.dtype, kernel.dtype)
    x = locally_normalized(x, spec.local_norm, ndim=0, mask=mask, dtype=dtype)
    groups = dense_groups(spec, x.shape[-1])

    def batch_moments():
        # One dense layer is a 1x1 convolution over whatever lies between the batch and the features.
        samples = x if x.ndim > 1 else x[None]
        window = ops.window((1,) * (samples.ndim - 2) or (1,))
        return ops.patch_moments(
            samples,
            window,
            groups,
            mask=mask,
            axis_name=reduction.axis_name,
            axis_index_groups=reduction.axis_index_groups,
            dtype=running.mean.dtype,
            shift=running.mean if spec.one_pass else None,
            sample_dtype=spec.sample_dtype,
        )

    mean, whitener, running = statistics(
        batch_moments,
        running,
        spec,
        use_running_average=use_running_average,
        update_whitener=update_whitener,
        moments=moments,
    )
    kernel, bias = ops.fold(
        kernel,
        bias,
        mean,
        whitener,
        groups,
        dtype=dtype,
        precision=spec.fold_precision(dtype, training=not use_running_average),
    )
    y = plain_dense(
        x,
        kernel,
        bias,
        precision=precision,
        preferred_element_type=preferred_element_type,
        dot_general=dot_general,
    )
    return y, running


def plain_dense(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    dot_general: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Multiply the last axis of `x` in the dtype of a folded `kernel`, and add its bias."""
    result = preferred_element_type or kernel.dtype
    if dot_general is None:  # one rounding, after the bias: what cancels there can be large
        dot_general, preferred_element_type = (
            lax.dot_general,
            jnp.promote_types(jnp.float32, result),
        )
    # Only passed on where it is given: a function of the user's need not know it.
    preferred = {"preferred_element_type": preferred_element_type}
    preferred = preferred if preferred_element_type is not None else {}
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    y = dot_general(x.astype(kernel.dtype), kernel, contract, precision=precision, **preferred)
    return _add_bias(y, bias).astype(result)


def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Add the bias in its own precision: rounded first, it would shift a feature as a whole."""
    return (y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)).astype(y.dtype)
