"""Network deconvolution for Flax NNX: used as `nnx.Conv`, `nnx.Linear` and `nnx.BatchNorm` are.

`from netdeconv_jax import nnx as dnnx`. The layers, their settings and their numbers are those of
`netdeconv_jax.DeconvConv` and its like, array for array: both call the pure forward in
`netdeconv_jax.whitening`. What differs is what differs between `nnx` and `linen`: parameters exist when the
layer is made, `use_running_average` is False until the call, `layer.eval()` or `nnx.view` says otherwise, and
statistics are variables of the type `WhiteningStat`, which is an `nnx.BatchStat`.

Microbatches (the collection `moments` of the Linen layers) have no counterpart here: NNX has no call that
says which kinds of variables it may change. The file is long because every argument stands in a signature.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from netdeconv_jax import ops
from netdeconv_jax.ops.grouping import check_count
from netdeconv_jax.whitening.channel import ChannelRunning, channel_block, channel_deconv
from netdeconv_jax.whitening.conv import conv_groups, deconv_conv, deconv_dense, dense_groups
from netdeconv_jax.whitening.diagnostics import diagnostics
from netdeconv_jax.whitening.layer import (
    check_input,
    check_kernel,
    check_mean,
    check_settings,
    layer_spec,
    running_average_wanted,
    statistics_dtype,
    whitener_update_wanted,
)
from netdeconv_jax.whitening.running import Reduction, Running
from netdeconv_jax.whitening.spec import WhiteningSpec
from netdeconv_jax.whitening.strategies import Contiguous, Freeze
from netdeconv_jax.whitening.transposed import deconv_conv_transpose, transposed_shape

__all__ = [
    "ChannelDeconv",
    "DeconvConv",
    "DeconvConvTranspose",
    "DeconvDense",
    "DeconvLinear",
    "WhiteningDiagnostic",
    "WhiteningStat",
]

_kernel_init = nnx.initializers.lecun_normal()
_bias_init = nnx.initializers.zeros_init()
_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class WhiteningStat(nnx.BatchStat):
    """A running statistic of a layer that whitens; filters for `nnx.BatchStat` take it along.

    Source: ours.

    Example:
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> layer = dnnx.DeconvDense(3, 4, rngs=nnx.Rngs(0))
      >>> sorted(nnx.state(layer, dnnx.WhiteningStat))
      ['mean', 'whitener']
    """


class WhiteningDiagnostic(nnx.Intermediate):
    """A figure of what whitening had to do in a training call; computed where `nnx.capture` asks for it.

    `effective_rank`, `under_ridge`, `whitener_norm`, `rows_per_dim` and `nonfinite`: see
    `netdeconv_jax.whitening.diagnostics`. Each is a tuple with a value of every call of the layer.

    Source: ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> layer = dnnx.DeconvDense(3, 4, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (30, 3))
      >>> y, figures = nnx.capture(layer, dnnx.WhiteningDiagnostic)(x)
      >>> [figures[name][0].item() for name in ("rows_per_dim", "nonfinite")]
      [10.0, False]
    """


class _Whitened(nnx.Module):
    """What the layers of this file have in common: the settings, and which statistics a call uses."""

    def __init__(self, spec, use_running_average, dtype, param_dtype, axis_name, axis_index_groups):
        check_settings(
            dtype=dtype,
            param_dtype=param_dtype,
            use_running_average=use_running_average,
            update_whitener=None,
        )
        if axis_index_groups is not None:  # hashable, as static attributes must be
            axis_index_groups = tuple(map(tuple, axis_index_groups))
        self.spec = spec
        self.use_running_average = use_running_average
        self.update_whitener = True
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups

    def set_view(
        self, use_running_average: bool | None = None, update_whitener: bool | None = None
    ):
        """Set attributes, for `nnx.view`.

        Args:
          use_running_average: use running statistics, not the batch's.
          update_whitener: compute statistics in training, or reuse the running ones.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_whitener is not None:
            self.update_whitener = update_whitener

    def _wanted(self, argument: bool | None) -> bool:
        return running_average_wanted(self.use_running_average, argument, overrides=True)

    def _updates(self, argument: bool | None) -> bool:
        return whitener_update_wanted(self.update_whitener, argument, overrides=True)

    def _collected(self, running: Running, evaluating: bool) -> Running:
        """Return `running`, ready to collect the batch's moments where somebody asks for diagnostics."""
        captures = getattr(self, "__captures__", ())
        if evaluating or not any(type(kind) is WhiteningDiagnostic for kind in captures):
            return running
        moments = ops.Moments.none(running.mean.shape, running.mean.dtype)
        return dataclasses.replace(running, moments=moments)

    def _sow_diagnostics(self, running: Running) -> None:
        if running.moments is not None:
            for name, value in diagnostics(running.moments, running.whitener, self.spec).items():
                self.sow(WhiteningDiagnostic, name, value)

    @property
    def _reduction(self) -> Reduction:
        return Reduction(self.axis_name, self.axis_index_groups)


class _Deconvolved(_Whitened):
    """What `DeconvConv` and `DeconvDense` have in common: a kernel, a bias and running statistics."""

    in_features: int
    out_features: int

    def _declare(
        self, rngs, kernel_shape, kernel_init, kernel_metadata, use_bias, bias_init, bias_metadata
    ):
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), kernel_shape, self.param_dtype), **kernel_metadata
        )
        self.bias: nnx.Param[jax.Array] | None
        if use_bias:
            value = bias_init(rngs.params(), (self.out_features,), self.param_dtype)
            self.bias = nnx.Param(value, **bias_metadata)
        else:
            self.bias = nnx.data(None)
        self.use_bias = use_bias
        start = Running.start(
            self._mean_shape,
            statistics_dtype(self.param_dtype),
            counted=self.spec.freeze is not None,
        )
        self.mean = WhiteningStat(start.mean)
        self.whitener = WhiteningStat(start.whitener)
        self.step = nnx.data(None) if start.step is None else WhiteningStat(start.step)

    @property
    def _mean_shape(self) -> tuple[int, ...]:
        """The shape of the running mean, which every kind of layer tells by itself."""
        raise NotImplementedError(f"{type(self).__name__} must tell the shape of its mean.")

    def _arrays(
        self, channels: int, evaluating: bool, axis: int = -2
    ) -> tuple[jax.Array, jax.Array | None, Running]:
        """Return kernel, bias and running statistics, once they are known to fit the input."""
        kernel = self.kernel[...]
        check_kernel(kernel.shape, channels, axis=axis)
        mean = self.mean[...]
        check_mean(mean.shape, self._mean_shape)
        step = None if self.step is None else self.step[...]
        bias = None if self.bias is None else self.bias[...]
        running = Running(mean, self.whitener[...], step)
        return kernel, bias, self._collected(running, evaluating)

    def _store(self, running: Running) -> None:
        self._sow_diagnostics(running)
        _assign(self.mean, running.mean)
        _assign(self.whitener, running.whitener)
        if self.step is not None:
            _assign(self.step, running.step)


class DeconvConv(_Deconvolved):
    """A convolution of whitened patches: `y = (X - mu) D w + b`, in place of `nnx.Conv` and `nnx.BatchNorm`.

    Variables: `kernel` [*kernel_size, in_features / feature_group_count, out_features] and `bias`
    [out_features]; `mean` and `whitener`, `WhiteningStat`s in `promote_types(float32, param_dtype)` whatever
    the compute `dtype` (their column order is private), and `step` with a `freeze_schedule`. Before any
    statistics exist they are 0 and the identity, so that evaluation is a plain convolution.

    Args:
      in_features, out_features, kernel_size, strides, padding, input_dilation, kernel_dilation,
        feature_group_count, use_bias, dtype, param_dtype, precision, kernel_init, bias_init,
        conv_general_dilated, promote_dtype, preferred_element_type, rngs, kernel_metadata, bias_metadata: as
        `nnx.Conv`. Of `promote_dtype` only the dtype that it chooses is used. A mask of the kernel there is
        not; the call's is one of the samples.
      use_running_average, axis_name, axis_index_groups: as `nnx.BatchNorm`.
      spec, block_size, eps, epsilon, num_iters, momentum, sampling_stride, whiten, grouping,
        shared_whitener, method, freeze_schedule, local_norm: as `netdeconv_jax.DeconvConv`. The attribute
        `spec` holds what they come to.

    The attribute `update_whitener`, True, is `netdeconv_jax.DeconvConv`'s: `nnx.view(model,
    update_whitener=False)` is the same model in the steps that reuse its running statistics.

    Raises:
      ValueError: a setting is out of range.
      TypeError: a setting is of the wrong type, or `dtype` or `param_dtype` not floating point.

    Source: FastDeconv of the original code; Ye et al. 2020, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> layer = dnnx.DeconvConv(3, 8, (3, 3), rngs=nnx.Rngs(0))
      >>> x = jnp.arange(1536.0).reshape(2, 16, 16, 3) % 7
      >>> layer(x).shape, layer.whitener.shape, bool((layer.mean[...] > 0).all())
      ((2, 16, 16, 8), (27, 27), True)
      >>> layer.eval()
      >>> bool((layer(x) == layer(x, use_running_average=True)).all())
      True
    """

    _defaults: ClassVar[WhiteningSpec] = WhiteningSpec()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: ops.Padding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        use_running_average: bool | None = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: jax.nn.initializers.Initializer = _kernel_init,
        bias_init: jax.nn.initializers.Initializer = _bias_init,
        conv_general_dilated: Callable[..., jax.Array] = lax.conv_general_dilated,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: Any = None,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        spec: WhiteningSpec | None = None,
        block_size: int | None = None,
        eps: float | None = None,
        epsilon: float | None = None,
        num_iters: int | None = None,
        momentum: float | None = None,
        sampling_stride: int | None = None,
        whiten: str | None = None,
        grouping: str | None = None,
        shared_whitener: bool | None = None,
        method: str | None = None,
        freeze_schedule: Freeze | tuple[int, int] | None = None,
        local_norm: str | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        spec = layer_spec(
            spec,
            self._defaults,
            block_size=block_size,
            eps=eps,
            epsilon=epsilon,
            num_iters=num_iters,
            momentum=momentum,
            sampling_stride=sampling_stride,
            whiten=whiten,
            grouping=grouping,
            shared_whitener=shared_whitener,
            method=method,
            freeze_schedule=freeze_schedule,
            local_norm=local_norm,
        )
        super().__init__(
            spec, use_running_average, dtype, param_dtype, axis_name, axis_index_groups
        )
        self.geometry = ops.window(kernel_size, strides, padding, input_dilation, kernel_dilation)
        self.in_features = check_count("in_features", in_features)
        self.out_features = check_count("out_features", out_features)
        self.feature_group_count = feature_group_count
        self.precision = precision
        self.conv_general_dilated = conv_general_dilated
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self._mean_shape  # noqa: B018, which refuses a feature_group_count that does not divide
        self._declare(
            rngs,
            (*self.geometry.kernel_size, in_features // feature_group_count, out_features),
            kernel_init,
            kernel_metadata,
            use_bias,
            bias_init,
            bias_metadata,
        )

    @property
    def effective_block(self) -> int:
        """The channels whitened together."""
        return conv_groups(self.spec, self.in_features, 1, self.feature_group_count).width

    @property
    def groups(self) -> ops.ColumnGroups:
        """How columns of patches are whitened together."""
        taps, count = self.geometry.taps, self.feature_group_count
        return conv_groups(self.spec, self.in_features, taps, count)

    @property
    def _mean_shape(self) -> tuple[int, ...]:
        return self.groups.mean_shape

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_whitener: bool | None = None,
    ) -> jax.Array:
        """Whiten and convolve; in training, update the running statistics.

        Args:
          x: [*batch, *spatial, in_features] with any number of batch axes, as in `nnx.Conv`.
          use_running_average, update_whitener: override the attributes.
          mask: weights >= 0 of the samples, broadcastable to [*batch, *spatial, 1]; statistics ignore
            what weighs 0.
        Returns:
          [*batch, *out, out_features].
        Raises:
          ValueError: wrong rank, other channels than `in_features`, an input smaller than the kernel, or
            `use_running_average` given nowhere.
          TypeError: `x` is not floating point, or `use_running_average` or `update_whitener` no bool.
        """
        use_running_average = self._wanted(use_running_average)
        check_input(x, min_ndim=self.geometry.ndim + 1)
        kernel, bias, running = self._arrays(
            x.shape[-1] // self.feature_group_count, use_running_average
        )
        promoted, *_ = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
        y, running = deconv_conv(
            x,
            kernel,
            bias,
            running,
            geometry=self.geometry,
            spec=self.spec,
            feature_group_count=self.feature_group_count,
            use_running_average=use_running_average,
            update_whitener=self._updates(update_whitener),
            mask=mask,
            reduction=self._reduction,
            dtype=promoted.dtype,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            conv_general_dilated=self.conv_general_dilated,
        )
        if not use_running_average:
            self._store(running)
        return y


class DeconvConvTranspose(_Deconvolved):
    """A transposed convolution of whitened patches, in place of `nnx.ConvTranspose` and `nnx.BatchNorm`.

    What is whitened is the patch of pixels that an output pixel sees, without the zeros between them: see
    `netdeconv_jax.DeconvConvTranspose`. Variables are those of `DeconvConv`, statistics with a leading axis
    of phases, `kernel` [*kernel_size, out_features, in_features] with `transpose_kernel`.

    Args:
      in_features, out_features, kernel_size, strides, padding, kernel_dilation, use_bias, dtype, param_dtype,
        precision, kernel_init, bias_init, transpose_kernel, promote_dtype, preferred_element_type, rngs,
        kernel_metadata, bias_metadata: as `nnx.ConvTranspose`.
      use_running_average, axis_name, axis_index_groups, spec and below: as `DeconvConv`.

    Raises:
      ValueError, TypeError: as `DeconvConv`.

    Source: ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> layer = dnnx.DeconvConvTranspose(3, 8, (4, 4), 2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 8, 8, 3))).shape, layer.whitener.shape
      ((2, 16, 16, 8), (4, 12, 12))
    """

    _defaults: ClassVar[WhiteningSpec] = WhiteningSpec()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        padding: ops.Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = None,
        use_bias: bool = True,
        use_running_average: bool | None = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: jax.nn.initializers.Initializer = _kernel_init,
        bias_init: jax.nn.initializers.Initializer = _bias_init,
        transpose_kernel: bool = False,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: Any = None,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        spec: WhiteningSpec | None = None,
        block_size: int | None = None,
        eps: float | None = None,
        epsilon: float | None = None,
        num_iters: int | None = None,
        momentum: float | None = None,
        sampling_stride: int | None = None,
        whiten: str | None = None,
        grouping: str | None = None,
        shared_whitener: bool | None = None,
        method: str | None = None,
        freeze_schedule: Freeze | tuple[int, int] | None = None,
        local_norm: str | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        spec = layer_spec(
            spec,
            self._defaults,
            block_size=block_size,
            eps=eps,
            epsilon=epsilon,
            num_iters=num_iters,
            momentum=momentum,
            sampling_stride=sampling_stride,
            whiten=whiten,
            grouping=grouping,
            shared_whitener=shared_whitener,
            method=method,
            freeze_schedule=freeze_schedule,
            local_norm=local_norm,
        )
        super().__init__(
            spec, use_running_average, dtype, param_dtype, axis_name, axis_index_groups
        )
        self.geometry = ops.transposed(
            kernel_size, strides, padding, kernel_dilation, transpose_kernel
        )
        self.in_features = check_count("in_features", in_features)
        self.out_features = check_count("out_features", out_features)
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        ends = (out_features, in_features) if transpose_kernel else (in_features, out_features)
        self._declare(
            rngs,
            (*self.geometry.kernel_size, *ends),
            kernel_init,
            kernel_metadata,
            use_bias,
            bias_init,
            bias_metadata,
        )

    @property
    def effective_block(self) -> int:
        """The channels whitened together."""
        return conv_groups(self.spec, self.in_features, 1).width

    @property
    def groups(self) -> tuple[ops.Transposed, WhiteningSpec]:
        """Geometry and spec, from which follows how columns of each phase are whitened together."""
        return self.geometry, self.spec

    @property
    def _mean_shape(self) -> tuple[int, ...]:
        return transposed_shape(self.spec, self.in_features, self.geometry)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_whitener: bool | None = None,
    ) -> jax.Array:
        """Whiten and convolve; in training, update the running statistics.

        Args:
          x: [*batch, *spatial, in_features] with any number of batch axes, as in `nnx.ConvTranspose`.
          use_running_average, update_whitener: override the attributes.
          mask: weights >= 0 of the samples, broadcastable to [*batch, *spatial, 1].
        Returns:
          [*batch, *out, out_features].
        Raises:
          ValueError: wrong rank, other channels than `in_features`, or `use_running_average` given nowhere.
          TypeError: `x` is not floating point, or `use_running_average` or `update_whitener` no bool.
        """
        use_running_average = self._wanted(use_running_average)
        check_input(x, min_ndim=self.geometry.ndim + 1)
        axis = -1 if self.geometry.transpose_kernel else -2
        kernel, bias, running = self._arrays(x.shape[-1], use_running_average, axis)
        promoted, *_ = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
        y, running = deconv_conv_transpose(
            x,
            kernel,
            bias,
            running,
            geometry=self.geometry,
            spec=self.spec,
            use_running_average=use_running_average,
            update_whitener=self._updates(update_whitener),
            mask=mask,
            reduction=self._reduction,
            dtype=promoted.dtype,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        if not use_running_average:
            self._store(running)
        return y


class DeconvDense(_Deconvolved):
    """A dense layer of whitened inputs: `y = (x - mu) D w + b`, in place of `nnx.Linear` and `nnx.BatchNorm`.

    Acts on the last axis of any [..., in_features]; every leading axis holds samples. Groups are contiguous
    blocks of features. Mind that `gcd(512, 784) = 16`: whoever wants all of a 784-vector whitened together
    sets `block_size` to 784 or more. `DeconvLinear` is another name for it.

    Variables are those of `DeconvConv`, with `kernel` [in_features, out_features].

    Args:
      in_features, out_features, use_bias, dtype, param_dtype, precision, kernel_init, bias_init, dot_general,
        promote_dtype, preferred_element_type, rngs, kernel_metadata, bias_metadata: as `nnx.Linear`.
      use_running_average, axis_name, axis_index_groups, spec and below: as `DeconvConv`; without `spec`
        the block size is 512. Sampling and grouping of a `spec` do not apply: all samples are seen. What
        `local_norm` normalizes is each vector along the last axis.

    Raises:
      ValueError, TypeError: as `DeconvConv`.

    Source: Delinear of the original code.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> layer = dnnx.DeconvDense(20, 10, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((32, 20))).shape, layer.mean.shape
      ((32, 10), (20,))
    """

    _defaults: ClassVar[WhiteningSpec] = WhiteningSpec(grouping=Contiguous(512))

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        use_running_average: bool | None = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: jax.nn.initializers.Initializer = _kernel_init,
        bias_init: jax.nn.initializers.Initializer = _bias_init,
        dot_general: Callable[..., jax.Array] | None = None,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: Any = None,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        spec: WhiteningSpec | None = None,
        block_size: int | None = None,
        eps: float | None = None,
        epsilon: float | None = None,
        num_iters: int | None = None,
        momentum: float | None = None,
        shared_whitener: bool | None = None,
        method: str | None = None,
        freeze_schedule: Freeze | tuple[int, int] | None = None,
        local_norm: str | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        spec = layer_spec(
            spec,
            self._defaults,
            block_size=block_size,
            eps=eps,
            epsilon=epsilon,
            num_iters=num_iters,
            momentum=momentum,
            shared_whitener=shared_whitener,
            method=method,
            freeze_schedule=freeze_schedule,
            local_norm=local_norm,
        )
        super().__init__(
            spec, use_running_average, dtype, param_dtype, axis_name, axis_index_groups
        )
        self.in_features = check_count("in_features", in_features)
        self.out_features = check_count("out_features", out_features)
        self.precision = precision
        self.dot_general = dot_general
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self._declare(
            rngs,
            (in_features, out_features),
            kernel_init,
            kernel_metadata,
            use_bias,
            bias_init,
            bias_metadata,
        )

    @property
    def effective_block(self) -> int:
        """The features whitened together."""
        return dense_groups(self.spec, self.in_features).width

    @property
    def groups(self) -> ops.ColumnGroups:
        """How features are whitened together."""
        return dense_groups(self.spec, self.in_features)

    @property
    def _mean_shape(self) -> tuple[int, ...]:
        return self.groups.mean_shape

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_whitener: bool | None = None,
    ) -> jax.Array:
        """Whiten and multiply; in training, update the running statistics.

        Args:
          x: [..., in_features].
          use_running_average, update_whitener: override the attributes.
          mask: weights >= 0 of the samples, broadcastable to [..., 1].
        Returns:
          [..., out_features].
        Raises:
          ValueError: other features than `in_features`, or `use_running_average` given nowhere.
          TypeError: `x` is not floating point, or `use_running_average` or `update_whitener` no bool.
        """
        use_running_average = self._wanted(use_running_average)
        check_input(x, min_ndim=1)
        kernel, bias, running = self._arrays(x.shape[-1], use_running_average)
        promoted, *_ = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
        y, running = deconv_dense(
            x,
            kernel,
            bias,
            running,
            spec=self.spec,
            use_running_average=use_running_average,
            update_whitener=self._updates(update_whitener),
            mask=mask,
            reduction=self._reduction,
            dtype=promoted.dtype,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            dot_general=self.dot_general,
        )
        if not use_running_average:
            self._store(running)
        return y


DeconvLinear = DeconvDense


class ChannelDeconv(_Whitened):
    """A normalization layer that whitens channels in place, where `nnx.BatchNorm` would stand.

    Channels are divided into groups of `block_size` that share one whitener; what does not fill a group is
    standardized with one mean and one variance. It has no scale and no bias. Running statistics (`mean`,
    `whitener`, `rest_mean`, `rest_var`, `step`) start at the first batch.

    Args:
      num_features, use_running_average, dtype, param_dtype, axis_name, axis_index_groups: as
        `nnx.BatchNorm`; statistics are kept in `promote_types(float32, param_dtype)`.
      block_size, eps, epsilon, num_iters, momentum, sampling_stride, method: as
        `netdeconv_jax.ChannelDeconv`.
      rngs: taken as `nnx.BatchNorm` takes it; there is nothing to draw.

    Raises:
      ValueError, TypeError: as `DeconvConv`.

    Source: ChannelDeconv of the original code, with its covariance centred.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import nnx as dnnx
      >>> layer = dnnx.ChannelDeconv(10, block_size=4)
      >>> layer(jnp.ones((2, 8, 8, 10))).shape, layer.whitener.shape
      ((2, 8, 8, 10), (4, 4))
    """

    _defaults: ClassVar[WhiteningSpec] = WhiteningSpec(eps=1e-2)

    def __init__(
        self,
        num_features: int,
        *,
        block_size: int,
        use_running_average: bool | None = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        eps: float | None = None,
        epsilon: float | None = None,
        num_iters: int | None = None,
        momentum: float | None = None,
        sampling_stride: int | None = None,
        method: str | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        spec = layer_spec(
            None,
            self._defaults,
            block_size=block_size,
            eps=eps,
            epsilon=epsilon,
            num_iters=num_iters,
            momentum=momentum,
            sampling_stride=sampling_stride,
            method=method,
        )
        super().__init__(
            spec, use_running_average, dtype, param_dtype, axis_name, axis_index_groups
        )
        self.num_features = check_count("num_features", num_features)
        start = ChannelRunning.start(self.effective_block, statistics_dtype(param_dtype))
        self.mean = WhiteningStat(start.whitened.mean)
        self.whitener = WhiteningStat(start.whitened.whitener)
        self.step = WhiteningStat(start.whitened.step)
        self.rest_mean = WhiteningStat(start.rest_mean)
        self.rest_var = WhiteningStat(start.rest_var)

    @property
    def effective_block(self) -> int:
        """The channels whitened together."""
        return channel_block(self.spec, self.num_features)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_whitener: bool | None = None,
    ) -> jax.Array:
        """Whiten the channels of `x`; in training, update the running statistics.

        Args:
          x: [batch, *spatial, num_features].
          use_running_average, update_whitener: override the attributes.
          mask: weights >= 0 of the samples, broadcastable to [batch, *spatial, 1].
        Returns:
          An array of the shape of `x`.
        Raises:
          ValueError: other channels than `num_features`, or `use_running_average` given nowhere.
          TypeError: `x` is not floating point, or `use_running_average` or `update_whitener` no bool.
        """
        use_running_average = self._wanted(use_running_average)
        check_input(x, min_ndim=2)
        if x.shape[-1] != self.num_features:
            raise ValueError(
                f"`x` has {x.shape[-1]} channels, but this layer was made for `num_features` "
                f"{self.num_features}."
            )
        whitened = Running(self.mean[...], self.whitener[...], self.step[...])
        y, running = channel_deconv(
            x,
            ChannelRunning(
                self._collected(whitened, use_running_average),
                self.rest_mean[...],
                self.rest_var[...],
            ),
            block=self.effective_block,
            spec=self.spec,
            use_running_average=use_running_average,
            update_whitener=self._updates(update_whitener),
            mask=mask,
            reduction=self._reduction,
            dtype=self.dtype or jnp.promote_types(x.dtype, self.param_dtype),
        )
        if not use_running_average:
            self._sow_diagnostics(running.whitened)
            _assign(self.mean, running.whitened.mean)
            _assign(self.whitener, running.whitened.whitener)
            _assign(self.step, running.whitened.step)
            _assign(self.rest_mean, running.rest_mean)
            _assign(self.rest_var, running.rest_var)
        return y


def _assign(variable: nnx.Variable, value: Any) -> None:
    # Without a derivative, as in nnx.BatchNorm: a variable may be a mutable array of JAX, which takes none.
    variable.set_value(lax.stop_gradient(value))
