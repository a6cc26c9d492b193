"""The deconvolved transposed convolution: an output pixel's patch is whitened without the zeros between."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from netdeconv_jax import ops
from netdeconv_jax.ops.patch_moments import full_mask
from netdeconv_jax.whitening.conv import conv_groups, sampling
from netdeconv_jax.whitening.layer import check_samples
from netdeconv_jax.whitening.local_norm import locally_normalized
from netdeconv_jax.whitening.running import LOCAL, Reduction, Running, statistics
from netdeconv_jax.whitening.spec import WhiteningSpec


def transposed_shape(
    spec: WhiteningSpec, channels: int, geometry: ops.Transposed
) -> tuple[int, ...]:
    """Return the shape of the running mean: [phases, *stat_shape, width], of channels without phases.

    Phases with fewer taps than others use the first of the columns.
    """
    groups = _groups(spec, channels, geometry)
    shape = (*groups[0].stat_shape, max(g.width for g in groups))
    return shape if spec.whiten == "channels" else (len(groups), *shape)


def deconv_conv_transpose(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    running: Running,
    *,
    geometry: ops.Transposed,
    spec: WhiteningSpec,
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
    """Whiten the patches of every phase and convolve: one transposed convolution with a folded kernel.

    Args:
      x: [*batch, *spatial, channels], with any number of batch axes.
      kernel: [*kernel_size, channels, features], or [*kernel_size, features, channels] to be transposed.
      bias: [features] or None. The whitened mean is subtracted in either case.
      running: statistics so far, of `transposed_shape(...)`.
      geometry: of the transposed convolution.
      spec: as the layer's. Statistics see one in `sampling_stride` windows of every phase along each axis.
      use_running_average, update_whitener, mask, moments, reduction, dtype, precision,
        preferred_element_type, conv_general_dilated: as `deconv_conv`.
    Returns:
      y [*batch, *out, features] in `dtype`, or as preferred, and the running statistics after this step.

    Source: ours.
    """
    batch_shape = x.shape[: -geometry.ndim - 1]
    if not use_running_average:
        check_samples(x)
    dtype = dtype or jnp.promote_types(x.dtype, kernel.dtype)
    x = locally_normalized(x, spec.local_norm, ndim=geometry.ndim, mask=mask, dtype=dtype)
    if mask is not None:
        mask = jnp.broadcast_to(full_mask(mask, x), (*x.shape[:-1], 1))
        mask = mask.reshape(math.prod(batch_shape), *mask.shape[len(batch_shape) :])
        mask = geometry.wrap(mask)
    x = x.reshape(math.prod(batch_shape), *x.shape[len(batch_shape) :])
    full = geometry.window(x.shape[1:-1])
    x = geometry.wrap(x)
    groups = _groups(spec, x.shape[-1], geometry)
    phases = [geometry.phase(first, x.shape[1:-1], full) for first in geometry.first_taps]
    stat_dtype = running.mean.dtype

    def moments_of(groups: ops.ColumnGroups, window: ops.Window, phase: tuple) -> ops.Moments:
        return ops.patch_moments(
            x,
            window,
            groups,
            **sampling(spec, x.shape, window, groups, devices=reduction.devices()),
            mask=mask,
            axis_name=reduction.axis_name,
            axis_index_groups=reduction.axis_index_groups,
            dtype=stat_dtype,
            shift=running.mean[phase][..., : groups.width] if spec.one_pass else None,
            sample_dtype=spec.sample_dtype,
        )

    def batch_moments() -> ops.Moments:
        if spec.whiten == "channels":
            return moments_of(groups[0], ops.window((1,) * geometry.ndim), ())
        width = running.mean.shape[-1]
        found = [
            ops.Moments.none(g.mean_shape, stat_dtype)
            if window is None
            else moments_of(g, window, (i,))
            for i, (g, (_, window)) in enumerate(zip(groups, phases, strict=True))
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(_widened(m, width) for m in found))

    mean, whitener, running = statistics(
        batch_moments,
        running,
        spec,
        use_running_average=use_running_average,
        update_whitener=update_whitener,
        moments=moments,
    )
    kernel, bias = fold_transposed(
        kernel,
        bias,
        mean,
        whitener,
        geometry=geometry,
        spec=spec,
        dtype=dtype,
        precision=spec.fold_precision(dtype, training=not use_running_average),
    )
    y = _convolve(
        x, kernel, bias, geometry, full, precision, preferred_element_type, conv_general_dilated
    )
    return y.reshape(*batch_shape, *y.shape[1:]), running


def fold_transposed(
    kernel: jax.Array,
    bias: jax.Array | None,
    mean: jax.Array,
    whitener: jax.Array,
    *,
    geometry: ops.Transposed,
    spec: WhiteningSpec,
    dtype: Any = None,
    precision: str = "highest",
) -> tuple[jax.Array, jax.Array]:
    """Return the kernel and biases of the plain transposed convolution that equals whitening and convolving.

    Args:
      kernel, bias, mean, whitener, geometry, spec: as in `deconv_conv_transpose`.
      dtype: of the folded kernel; default that of `kernel`.
      precision: of the product of whitener and kernel, as `ops.fold`.
    Returns:
      A kernel of the same shape in `dtype`; and [*strides, features] in the dtype of the statistics, the bias
      of an output pixel by its place modulo the strides.
    """
    channels = kernel.shape[-1 if geometry.transpose_kernel else -2]
    groups = _groups(spec, channels, geometry)
    kernel = _turned(kernel, geometry)
    kernels, biases = [], []
    for i, (first, g) in enumerate(zip(geometry.first_taps, groups, strict=True)):
        at = () if spec.whiten == "channels" else (i,)
        folded, shifted = ops.fold(
            kernel[geometry.taps_of(first)],
            bias,
            mean[at][..., : g.width],
            whitener[at][..., : g.width, : g.width],
            g,
            dtype=dtype,
            precision=precision,
        )
        kernels.append(folded)
        biases.append(shifted)
    # Where the strides exceed the kernel there are pixels that no tap reaches.
    alone = jnp.zeros_like(biases[0]) if bias is None else bias.astype(biases[0].dtype)
    which = np.full(geometry.strides, len(biases))
    for i, first in enumerate(geometry.first_taps):
        which[geometry.remainder(first)] = i
    biases = jnp.stack([*biases, alone])[which]
    return _turned(geometry.join_kernels(kernels), geometry), biases


def plain_conv_transpose(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    geometry: ops.Transposed,
    precision: Any = None,
    preferred_element_type: Any = None,
    conv_general_dilated: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Convolve x [*batch, *spatial, channels] with what `fold_transposed` made of kernel and bias."""
    batch_shape = x.shape[: -geometry.ndim - 1]
    x = x.reshape(math.prod(batch_shape), *x.shape[len(batch_shape) :])
    full = geometry.window(x.shape[1:-1])
    x = geometry.wrap(x)
    y = _convolve(
        x, kernel, bias, geometry, full, precision, preferred_element_type, conv_general_dilated
    )
    return y.reshape(*batch_shape, *y.shape[1:])


def _convolve(x, kernel, bias, geometry, full, *settings):
    """The convolution of an input that is wrapped already, with a bias for each place modulo the strides."""
    precision, preferred_element_type, conv_general_dilated = settings
    y = full.convolve(
        x.astype(kernel.dtype),
        _turned(kernel, geometry),
        precision=precision,
        preferred_element_type=preferred_element_type,
        conv_general_dilated=conv_general_dilated,
    )
    out = y.shape[1:-1]
    repeats = [-(-n // s) for n, s in zip(out, geometry.strides, strict=True)]
    bias = jnp.tile(bias, (*repeats, 1))[tuple(slice(n) for n in out)]
    return (y + bias[None]).astype(y.dtype)


def _turned(kernel: jax.Array, geometry: ops.Transposed) -> jax.Array:
    """The kernel as it is laid over the input, or from there as the layer keeps it: the same turn."""
    if not geometry.transpose_kernel:
        return kernel
    return jnp.swapaxes(jnp.flip(kernel, range(geometry.ndim)), -1, -2)


def _groups(spec: WhiteningSpec, channels: int, geometry: ops.Transposed) -> list[ops.ColumnGroups]:
    """Return how `spec` divides the columns of each phase."""
    return [
        conv_groups(spec, channels, math.prod(geometry.counts_of(first)))
        for first in geometry.first_taps
    ]


def _widened(moments: ops.Moments, width: int) -> ops.Moments:
    """Moments with columns of zeros at the end, which no root mixes with the others."""
    more = (0, width - moments.mean.shape[-1])
    lead = [(0, 0)] * (moments.mean.ndim - 1)
    return ops.Moments(
        moments.count,
        jnp.pad(moments.mean, [*lead, more]),
        jnp.pad(moments.cov, [*lead, more, more]),
    )
