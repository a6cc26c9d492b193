"""Network deconvolution for Flax Linen: used as `nn.Conv`, `nn.Dense` and `nn.BatchNorm` are.

Every module here declares variables, calls the pure forward in `netdeconv_jax.whitening`, stores the running
statistics (not while initializing) and returns. The file is long because every field is documented here,
where users look; its code is short.

In training, a collection `moments` stands between the batch and the running statistics:

| `moments` | output is whitened by | stored |
|---|---|---|
| absent | the batch's | `batch_stats`: one step with the batch's |
| mutable | the batch's | `moments`: the batch's merged with those given; if mutable, `batch_stats` too |
| given, not mutable | the given | `batch_stats`: one step with the given |

So k microbatches that are passed with `mutable=["moments"]`, each on top of the last, and one pass with their
moments make one step of the running statistics, that of the whole batch. The output of the last pass has no
use: under `jit` it costs nothing, only the roots are left. `interop.accumulate` does all that.
Where a freeze schedule or `update_whitener=False` uses the running statistics no moments are taken: the
count stays what it was.

Asked for with `mutable=["diagnostics"]`, a training pass also sows what whitening had to do:
`effective_rank`, `under_ridge`, `whitener_norm`, `rows_per_dim` and `nonfinite`, see `whitening.diagnostics`.
Who does not ask pays nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from netdeconv_jax import ops
from netdeconv_jax.ops.grouping import check_count
from netdeconv_jax.whitening.channel import ChannelRunning, channel_block, channel_deconv
from netdeconv_jax.whitening.conv import conv_groups, deconv_conv, deconv_dense, dense_groups
from netdeconv_jax.whitening.diagnostics import diagnostics
from netdeconv_jax.whitening.layer import (
    check_channel_mean,
    check_input,
    check_kernel,
    check_mean,
    check_settings,
    layer_spec,
    running_average_wanted,
    statistics_dtype,
    whitener_update_wanted,
)
from netdeconv_jax.whitening.running import LOCAL, Reduction, Running
from netdeconv_jax.whitening.spec import WhiteningSpec
from netdeconv_jax.whitening.strategies import Contiguous, Freeze
from netdeconv_jax.whitening.transposed import deconv_conv_transpose, transposed_shape

_default_kernel_init = nn.initializers.lecun_normal()


class _Whitened(nn.Module):
    """What the layers of this file have in common: the settings, and where statistics come from."""

    _defaults: ClassVar[WhiteningSpec]

    _: dataclasses.KW_ONLY
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_running_average: bool | None = None
    update_whitener: bool | None = None
    axis_name: Any = None
    axis_index_groups: Any = None
    eps: float | None = None
    epsilon: float | None = None
    num_iters: int | None = None
    momentum: float | None = None
    method: str | None = None

    def __post_init__(self):
        # So that a bad setting is refused here, not when the model first runs.
        self.resolved_spec()
        check_settings(
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_running_average=self.use_running_average,
            update_whitener=self.update_whitener,
        )
        super().__post_init__()

    @nn.nowrap
    def resolved_spec(self) -> WhiteningSpec:
        """Return `spec`, or the layer's defaults, with the keywords that were given laid over it."""
        names = (
            "eps epsilon block_size num_iters momentum sampling_stride whiten grouping shared_whitener "
            "method freeze_schedule local_norm"
        )
        settings = {name: getattr(self, name, None) for name in names.split()}
        return layer_spec(getattr(self, "spec", None), self._defaults, **settings)

    @nn.nowrap
    def _merge_use_running_average(self, argument: bool | None) -> bool:
        return running_average_wanted(self.use_running_average, argument, overrides=False)

    @nn.nowrap
    def _merge_update_whitener(self, argument: bool | None) -> bool:
        return whitener_update_wanted(self.update_whitener, argument, overrides=False)

    @property
    def _reduction(self) -> Reduction:
        if self.is_initializing():  # the mapped axis need not exist yet
            return LOCAL
        return Reduction(self.axis_name, self.axis_index_groups)

    @nn.nowrap
    def _declare_moments(
        self, shape: tuple[int, ...], evaluating: bool, prefix: str = ""
    ) -> tuple[ops.Moments | None, ops.Moments | None, Callable[[ops.Moments | None], None]]:
        """Return the moments that stand in for the batch's, those to add the batch's to, and what stores.

        At most one of the two is not None. `shape` is that of the mean.
        """

        def store(moments: ops.Moments | None) -> None:
            if moments is not None and self.is_mutable_collection("moments"):
                for field in dataclasses.fields(moments):
                    value = getattr(moments, field.name)
                    self.put_variable("moments", prefix + field.name, value)

        if evaluating or self.is_initializing():
            return None, None, store
        have = None
        if self.has_variable("moments", f"{prefix}mean"):
            names = (f"{prefix}{field.name}" for field in dataclasses.fields(ops.Moments))
            have = ops.Moments(*(self.get_variable("moments", name) for name in names))
            if have.mean.shape != shape:
                raise ValueError(
                    f"`moments` hold a {prefix}mean of shape {have.mean.shape}, this layer needs {shape}: "
                    "they come from another layer or other settings."
                )
        if not self.is_mutable_collection("moments") and (
            have is not None or not self._diagnosed(evaluating)
        ):
            return have, None, store
        return None, ops.Moments.none(shape, self._stats_dtype) if have is None else have, store

    @nn.nowrap
    def _diagnosed(self, evaluating: bool) -> bool:
        """Whether somebody asks for diagnostics."""
        return not (evaluating or self.is_initializing()) and self.is_mutable_collection(
            "diagnostics"
        )

    @nn.nowrap
    def _sow_diagnostics(
        self, moments: ops.Moments | None, running: Running, evaluating: bool
    ) -> None:
        """Sow figures of `moments`, given in place of the batch's, or else of those that were collected."""
        if not self._diagnosed(evaluating):
            return
        moments = running.moments if moments is None else moments
        assert moments is not None
        for name, value in diagnostics(moments, running.whitener, self.resolved_spec()).items():
            self.sow("diagnostics", name, value)

    @nn.nowrap
    def _stores_running(self, evaluating: bool) -> bool:
        """Whether running statistics are to be updated: not in a pass that only collects moments."""
        if evaluating or self.is_initializing():
            return False
        return self.is_mutable_collection("batch_stats") or not self.is_mutable_collection(
            "moments"
        )

    @property
    def _stats_dtype(self) -> Any:
        return statistics_dtype(self.param_dtype)


class _Deconvolved(_Whitened):
    """What `DeconvConv` and `DeconvDense` have in common: a kernel, a bias and running statistics."""

    _: dataclasses.KW_ONLY
    use_bias: bool = True
    precision: Any = None
    kernel_init: nn.initializers.Initializer = _default_kernel_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    promote_dtype: Callable[..., Any] = promote_dtype
    spec: WhiteningSpec | None = None
    block_size: int | None = None
    shared_whitener: bool | None = None
    freeze_schedule: Freeze | tuple[int, int] | None = None
    local_norm: str | None = None

    @nn.nowrap
    def _declare_params(
        self, shape: tuple[int, ...], transpose_kernel: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        features, inputs = (-2, -1) if transpose_kernel else (-1, -2)
        check_count("features", shape[features])
        if self.has_variable("params", "kernel"):
            have = np.shape(nn.unbox(self.get_variable("params", "kernel")))
            check_kernel(have, shape[inputs], axis=inputs)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", self.bias_init, (shape[features],), self.param_dtype)

    @nn.nowrap
    def _declare_running(
        self, shape: tuple[int, ...], evaluating: bool
    ) -> tuple[Running, ops.Moments | None, Callable[[Running], None]]:
        """Declare the running statistics, with a mean of `shape`.

        Return them, given moments, and what stores new ones.
        """
        counted = self.resolved_spec().freeze is not None
        if evaluating and not self.has_variable("batch_stats", "step"):
            counted = counted and self.is_initializing()  # evaluation never reads the count
        if self.has_variable("batch_stats", "mean"):
            check_mean(np.shape(nn.unbox(self.get_variable("batch_stats", "mean"))), shape)
        start = Running.start(shape, self._stats_dtype, counted=counted)
        mean = self.variable("batch_stats", "mean", lambda: start.mean)
        whitener = self.variable("batch_stats", "whitener", lambda: start.whitener)
        step = self.variable("batch_stats", "step", lambda: start.step) if counted else None

        def store(running: Running) -> None:
            keep(running.moments)
            self._sow_diagnostics(given, running, evaluating)
            if not self._stores_running(evaluating):
                return
            mean.value, whitener.value = running.mean, running.whitener
            if step is not None:
                step.value = running.step

        given, so_far, keep = self._declare_moments(shape, evaluating)
        count = step.value if step is not None else None
        return Running(mean.value, whitener.value, count, so_far), given, store


class DeconvConv(_Deconvolved):
    """A convolution of whitened patches: `y = (X - mu) D w + b`, in place of `nn.Conv` and `nn.BatchNorm`.

    Reads as `nn.Conv` reads, NHWC and HWIO, in one, two or three dimensions, and takes its statistics as
    `nn.BatchNorm` does. The default momentum is 0.9, not Flax's 0.99.

    Variables: `params` holds `kernel` [*kernel_size, in / feature_group_count, features] and `bias`
    [features]; `batch_stats` holds `mean` and `whitener` in `promote_types(float32, param_dtype)` whatever
    the compute `dtype` (their column order is private), and `step` with a `freeze_schedule`. Before any
    statistics exist they are 0 and the identity, so that evaluation is a plain convolution. `moments`, where
    it is mutable or given, holds `count`, `mean` and `cov` of microbatches: see the head of this file.

    Attributes:
      features, kernel_size, strides, padding, input_dilation, kernel_dilation, feature_group_count,
        use_bias, dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype,
        conv_general_dilated: as `nn.Conv`. `precision` is the convolution's; that of statistics is
        HIGHEST unless `spec` has it otherwise.
        Of `promote_dtype` only the dtype that it chooses is used: the kernel is folded before it is cast.
      use_running_average: use running statistics (evaluation) or the batch's (training); here or in the
        call, not both.
      update_whitener: False, here or in the call, makes a training step take no statistics and no root: the
        input is whitened by the running mean and whitener, as constants to the gradient, and these stay as
        they are. Static, so that a loop that sets it in some steps alternates between two compiled ones.
        Running values are 0 and the identity before the first update, and near them for some tens after
        it: compute statistics in the first steps. None is True.
      axis_name, axis_index_groups: pool statistics over the devices of a `pmap` or `shard_map` axis. Under
        `jit` with a sharded batch they are global by themselves.
      spec: a `WhiteningSpec`, default `WhiteningSpec()`. The following override it, None leaves it:
      block_size: channels whitened together (64), made to divide: `effective_block`.
      eps, epsilon: added to the diagonal of the covariance (1e-5); two names for one thing.
      num_iters: Newton-Schulz steps (5).
      momentum: share of the old running average (0.9).
      sampling_stride: statistics see every so many-th patch along each axis (3); of a 1x1 kernel, and of
        whitened channels, as many pixels, but in the order of the flattened batch. On maps of a few pixels
        that leaves very few: set 1 there.
      whiten: `"patches"` (pixels and channels) or `"channels"`.
      grouping: `"interleaved"` or `"contiguous"`.
      shared_whitener: one mean and whitener for all groups (True).
      method: `"newton_schulz"`, `"chebyshev"` or `"eigh"`.
      freeze_schedule: `Freeze(active_steps, period)` or a pair of ints.
      local_norm: `"layer"` to centre each sample and divide it by its own deviation, over its pixels and
        channels, before statistics are taken; pixels that `mask` weighs 0 are left out, in evaluation too.

    Raises:
      ValueError: a setting is out of range.
      TypeError: a setting is of the wrong type, or `dtype` or `param_dtype` not floating point.

    Source: FastDeconv of the original code; Ye et al. 2020, Algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import DeconvConv
      >>> layer, x = DeconvConv(8, (3, 3)), jnp.ones((2, 16, 16, 3))
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
      >>> y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> y.shape, updates["batch_stats"]["whitener"].shape
      ((2, 16, 16, 8), (27, 27))
    """

    _defaults: ClassVar = WhiteningSpec()

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    _: dataclasses.KW_ONLY
    padding: ops.Padding = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    conv_general_dilated: Callable[..., jax.Array] | None = None
    sampling_stride: int | None = None
    whiten: str | None = None
    grouping: str | None = None

    @nn.nowrap
    def effective_block(self, channels: int) -> int:
        """Return the channels whitened together, of `channels` input channels."""
        return conv_groups(self.resolved_spec(), channels, 1, self.feature_group_count).width

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_whitener: bool | None = None,
    ) -> jax.Array:
        """Whiten and convolve.

        Args:
          x: [*batch, *spatial, channels] with any number of batch axes, as in `nn.Conv`.
          use_running_average, update_whitener: see the attributes.
          mask: weights >= 0 of the samples, broadcastable to [*batch, *spatial, 1]; statistics ignore
            what weighs 0. As with `nn.BatchNorm`, what is not finite there still spoils gradients.
        Returns:
          [*batch, *out, features].
        Raises:
          ValueError: wrong rank, no channels, channels that do not fit the kernel or the feature groups,
            an input smaller than the kernel, or `use_running_average` given twice or never.
          TypeError: `x` is not floating point, or `use_running_average` or `update_whitener` no bool.
        """
        use_running_average = self._merge_use_running_average(use_running_average)
        spec = self.resolved_spec()
        geometry = ops.window(
            self.kernel_size, self.strides, self.padding, self.input_dilation, self.kernel_dilation
        )
        check_input(x, min_ndim=geometry.ndim + 1)
        groups = conv_groups(spec, x.shape[-1], geometry.taps, self.feature_group_count)
        shape = (*geometry.kernel_size, x.shape[-1] // self.feature_group_count, self.features)
        kernel, bias = self._declare_params(shape)
        running, moments, store = self._declare_running(groups.mean_shape, use_running_average)
        promoted, *_ = self.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y, running = deconv_conv(
            x,
            kernel,
            bias,
            running,
            geometry=geometry,
            spec=spec,
            feature_group_count=self.feature_group_count,
            use_running_average=use_running_average,
            update_whitener=self._merge_update_whitener(update_whitener),
            mask=mask,
            moments=moments,
            reduction=self._reduction,
            dtype=promoted.dtype,
            precision=self.precision,
            conv_general_dilated=self.conv_general_dilated,
        )
        store(running)
        return y


class DeconvConvTranspose(_Deconvolved):
    """A transposed convolution of whitened patches, in place of `nn.ConvTranspose` and `nn.BatchNorm`.

    With strides s an output pixel sees a pixel under every s-th tap only, and which ones depends on its
    place modulo s. What is whitened is the patch of pixels that it does see, without the zeros between them:
    each of these phases has a mean and a whitener of its own, so that no pattern of period s is left of the
    input's mean. With strides of 1 there is one phase, and the layer is a `DeconvConv`.

    Variables: `params` holds `kernel` [*kernel_size, in, features], or [*kernel_size, features, in] with
    `transpose_kernel`, and `bias` [features]; `batch_stats` as `DeconvConv`, with a leading axis of phases
    (none with `whiten="channels"`, where one whitener serves all taps of all phases).

    Attributes:
      features, kernel_size, strides, padding, kernel_dilation, use_bias, dtype, param_dtype, precision,
        kernel_init, bias_init, transpose_kernel, promote_dtype, preferred_element_type: as
        `nn.ConvTranspose`.
      use_running_average, update_whitener, axis_name, axis_index_groups, spec and below: as `DeconvConv`;
        statistics see every `sampling_stride`-th window of each phase.

    Raises:
      ValueError, TypeError: as `DeconvConv`.

    Source: ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import DeconvConvTranspose
      >>> layer, x = DeconvConvTranspose(8, (4, 4), strides=2), jnp.ones((2, 8, 8, 3))
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
      >>> y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> y.shape, updates["batch_stats"]["whitener"].shape
      ((2, 16, 16, 8), (4, 12, 12))
    """

    _defaults: ClassVar = WhiteningSpec()

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = None
    _: dataclasses.KW_ONLY
    padding: ops.Padding = "SAME"
    kernel_dilation: int | Sequence[int] | None = None
    transpose_kernel: bool = False
    preferred_element_type: Any = None
    sampling_stride: int | None = None
    whiten: str | None = None
    grouping: str | None = None

    @nn.nowrap
    def effective_block(self, channels: int) -> int:
        """Return the channels whitened together, of `channels` input channels."""
        return conv_groups(self.resolved_spec(), channels, 1).width

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_whitener: bool | None = None,
    ) -> jax.Array:
        """Whiten and convolve.

        Args:
          x: [*batch, *spatial, channels] with any number of batch axes, as in `nn.ConvTranspose`.
          use_running_average, update_whitener: see the attributes.
          mask: weights >= 0 of the samples, broadcastable to [*batch, *spatial, 1].
        Returns:
          [*batch, *out, features].
        Raises:
          ValueError: wrong rank, no channels, channels that do not fit the kernel, or `use_running_average`
            given twice or never.
          TypeError: `x` is not floating point, or `use_running_average` or `update_whitener` no bool.
        """
        use_running_average = self._merge_use_running_average(use_running_average)
        spec = self.resolved_spec()
        geometry = ops.transposed(
            self.kernel_size,
            self.strides,
            self.padding,
            self.kernel_dilation,
            self.transpose_kernel,
        )
        check_input(x, min_ndim=geometry.ndim + 1)
        ends = (x.shape[-1], self.features)
        shape = (*geometry.kernel_size, *(ends[::-1] if self.transpose_kernel else ends))
        kernel, bias = self._declare_params(shape, self.transpose_kernel)
        running, moments, store = self._declare_running(
            transposed_shape(spec, x.shape[-1], geometry), use_running_average
        )
        promoted, *_ = self.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y, running = deconv_conv_transpose(
            x,
            kernel,
            bias,
            running,
            geometry=geometry,
            spec=spec,
            use_running_average=use_running_average,
            update_whitener=self._merge_update_whitener(update_whitener),
            mask=mask,
            moments=moments,
            reduction=self._reduction,
            dtype=promoted.dtype,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        store(running)
        return y


class DeconvDense(_Deconvolved):
    """A dense layer of whitened inputs: `y = (x - mu) D w + b`, in place of `nn.Dense` and `nn.BatchNorm`.

    Acts on the last axis of any [..., in_features]; every leading axis holds samples. Groups are contiguous
    blocks of features. Mind that `gcd(512, 784) = 16`: whoever wants all of a 784-vector whitened together
    sets `block_size` to 784 or more.

    Variables are those of `DeconvConv`, with `kernel` [in_features, features].

    Attributes:
      features, use_bias, dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype,
        dot_general: as `nn.Dense`.
      use_running_average, update_whitener, axis_name, axis_index_groups, spec and below: as `DeconvConv`;
        without `spec` the block size is 512. Sampling and grouping of a `spec` do not apply: all samples
        are seen. What `local_norm` normalizes is each vector along the last axis.

    Raises:
      ValueError, TypeError: as `DeconvConv`.

    Source: Delinear of the original code.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import DeconvDense
      >>> layer, x = DeconvDense(10, use_running_average=False), jnp.ones((32, 20))
      >>> y, updates = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
      >>> y.shape, updates["batch_stats"]["mean"].shape
      ((32, 10), (20,))
    """

    _defaults: ClassVar = WhiteningSpec(grouping=Contiguous(512))

    features: int
    _: dataclasses.KW_ONLY
    dot_general: Callable[..., jax.Array] | None = None

    @nn.nowrap
    def effective_block(self, features: int) -> int:
        """Return the features whitened together, of `features` input features."""
        return dense_groups(self.resolved_spec(), features).width

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_whitener: bool | None = None,
    ) -> jax.Array:
        """Whiten and multiply.

        Args:
          x: [..., in_features].
          use_running_average, update_whitener: see the attributes.
          mask: weights >= 0 of the samples, broadcastable to [..., 1].
        Returns:
          [..., features].
        Raises:
          ValueError: no features, features that do not fit the kernel, or `use_running_average` given
            twice or never.
          TypeError: `x` is not floating point, or `use_running_average` or `update_whitener` no bool.
        """
        use_running_average = self._merge_use_running_average(use_running_average)
        spec = self.resolved_spec()
        check_input(x, min_ndim=1)
        kernel, bias = self._declare_params((x.shape[-1], self.features))
        groups = dense_groups(spec, x.shape[-1])
        running, moments, store = self._declare_running(groups.mean_shape, use_running_average)
        promoted, *_ = self.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y, running = deconv_dense(
            x,
            kernel,
            bias,
            running,
            spec=spec,
            use_running_average=use_running_average,
            update_whitener=self._merge_update_whitener(update_whitener),
            mask=mask,
            moments=moments,
            reduction=self._reduction,
            dtype=promoted.dtype,
            precision=self.precision,
            dot_general=self.dot_general,
        )
        store(running)
        return y


class ChannelDeconv(_Whitened):
    """A normalization layer that whitens channels in place, where `nn.BatchNorm` would stand.

    Channels are divided into groups of `block_size` that share one whitener; what does not fill a group is
    standardized with one mean and one variance. It has no scale and no bias. Running statistics (`mean`,
    `whitener`, `rest_mean`, `rest_var`, `step`) start at the first batch; before it they are 0, the
    identity, 0 and 1. `moments` is as in `DeconvConv`, with `rest_count`, `rest_mean` and `rest_cov` where
    channels are left over.

    Attributes:
      block_size: channels whitened together, all of them if there are fewer.
      eps, epsilon: added to the diagonal of the covariance and to the variance (1e-2).
      num_iters: Newton-Schulz steps (5).
      momentum: share of the old running average (0.9).
      sampling_stride: statistics see one in `sampling_stride ** spatial axes` values (3); all of them
        where the feature map is smaller than the stride.
      method: `"newton_schulz"`, `"chebyshev"` or `"eigh"`.
      dtype: of the result; default that of `x` and `param_dtype` promoted.
      param_dtype: statistics are kept in `promote_types(float32, param_dtype)`.
      use_running_average, update_whitener, axis_name, axis_index_groups: as `DeconvConv`.

    Raises:
      ValueError, TypeError: as `DeconvConv`.

    Source: ChannelDeconv of the original code, with its covariance centred.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import ChannelDeconv
      >>> layer, x = ChannelDeconv(block_size=4, use_running_average=False), jnp.ones((2, 8, 8, 10))
      >>> y, updates = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
      >>> y.shape, updates["batch_stats"]["whitener"].shape
      ((2, 8, 8, 10), (4, 4))
    """

    _defaults: ClassVar = WhiteningSpec(eps=1e-2)

    _: dataclasses.KW_ONLY
    block_size: int
    sampling_stride: int | None = None

    @nn.nowrap
    def effective_block(self, channels: int) -> int:
        """Return the channels whitened together, of `channels` input channels."""
        return channel_block(self.resolved_spec(), channels)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_whitener: bool | None = None,
    ) -> jax.Array:
        """Whiten the channels of `x`.

        Args:
          x: [batch, *spatial, channels].
          use_running_average, update_whitener: see the attributes.
          mask: weights >= 0 of the samples, broadcastable to [batch, *spatial, 1].
        Returns:
          An array of the shape of `x`.
        Raises:
          ValueError: no channels, another block than initialized, or `use_running_average` given twice
            or never.
          TypeError: `x` is not floating point, or `use_running_average` or `update_whitener` no bool.
        """
        use_running_average = self._merge_use_running_average(use_running_average)
        check_input(x, min_ndim=2)
        block = self.effective_block(x.shape[-1])
        if self.has_variable("batch_stats", "mean"):
            have = np.shape(nn.unbox(self.get_variable("batch_stats", "mean")))
            check_channel_mean(have, block, x.shape[-1])
        start = ChannelRunning.start(block, self._stats_dtype)
        mean = self.variable("batch_stats", "mean", lambda: start.whitened.mean)
        whitener = self.variable("batch_stats", "whitener", lambda: start.whitened.whitener)
        step = self.variable("batch_stats", "step", lambda: start.whitened.step)
        rest_mean = self.variable("batch_stats", "rest_mean", lambda: start.rest_mean)
        rest_var = self.variable("batch_stats", "rest_var", lambda: start.rest_var)
        given, so_far, keep = self._declare_moments((block,), use_running_average)
        rest_given = rest_so_far = keep_rest = None
        if x.shape[-1] % block:
            rest_given, rest_so_far, keep_rest = self._declare_moments(
                (1,), use_running_average, prefix="rest_"
            )
        y, running = channel_deconv(
            x,
            ChannelRunning(
                Running(mean.value, whitener.value, step.value, so_far),
                rest_mean.value,
                rest_var.value,
                rest_so_far,
            ),
            block=block,
            spec=self.resolved_spec(),
            use_running_average=use_running_average,
            update_whitener=self._merge_update_whitener(update_whitener),
            mask=mask,
            moments=None if given is None else (given, rest_given),
            reduction=self._reduction,
            dtype=self.dtype or jnp.promote_types(x.dtype, self.param_dtype),
        )
        keep(running.whitened.moments)
        self._sow_diagnostics(given, running.whitened, use_running_average)
        if keep_rest is not None:
            keep_rest(running.rest_moments)
        if self._stores_running(use_running_average):
            mean.value, whitener.value = running.whitened.mean, running.whitened.whitener
            step.value = running.whitened.step
            rest_mean.value, rest_var.value = running.rest_mean, running.rest_var
        return y
