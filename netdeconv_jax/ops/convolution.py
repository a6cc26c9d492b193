"""A convolution that is not slow to train on a CPU.

XLA's CPU backend computes the gradient of a kernel as one convolution with the images as its channels, the
slower the more images there are: at batch 128 often a third as fast as the convolution itself. In up to four
parts of the batch, or as a product of matrices where the kernel is 1x1, it is one to three times as fast.

A depthwise convolution it computes channel by channel. As a sum over the kernel's taps, each of which scales
the shifted image, it takes half of the time at most where a step trains it on 128 images, and less than a
tenth at a stride of 2; a small one may gain nothing, and all compile longer. It is a program of its own, or
XLA would compute it again in everything that uses it.

The gradient of any other grouped convolution takes it 15 to 40 times as long as that of one without groups,
in layers with 32 of them. So up to four dense ones stand in, each of some groups, whose kernels are blocks
along its diagonal.

Anywhere else this is `lax.conv_general_dilated`. All forms are one file, and a long one: each must be the
same function as the others, and which one stands in is decided in one place.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental.xla_metadata import set_xla_metadata

from netdeconv_jax.ops.devices import on_one_device

_PART, _MOST_PARTS = 32, 4  # more parts gain little and compile longer
_MOST_BLOCKS = 4  # of a grouped kernel, for the same reason
_MOST_TAPS = 49  # of a depthwise kernel: so many terms are compiled
_MOST_KERNELS = 2  # of each channel: as many times that
_PRECISIONS = (None, "default", "high", "highest")  # not algorithms, which a product may not have


def convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """Convolve as `lax.conv_general_dilated` does; on one CPU, with faster gradients.

    The same function with the same derivatives, of every order, forward and reverse: a kernel's is a sum over
    images, which is only taken in parts, and a depthwise convolution is itself a sum over taps. A grouped one
    adds zeros: values that are not finite spread from their group to its neighbours. To be given
    as `conv_general_dilated` to a layer of Flax. It is the process that traces which must have one device, a
    CPU; only float32 and float64 are computed otherwise, and in parts only batches of 64 and more.

    Args:
      lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
        batch_group_count, precision, preferred_element_type, out_sharding: as `lax.conv_general_dilated`.
    Returns:
      As `lax.conv_general_dilated`, of the same shape and dtype.
    Raises:
      What `lax.conv_general_dilated` does, for shapes and settings that do not go together.

    Source: ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from netdeconv_jax import ops
      >>> layer = nn.Conv(4, (3, 3), conv_general_dilated=ops.convolution)
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((64, 8, 8, 3)))[0].shape
      (64, 8, 8, 4)
    """
    settings = _Settings(
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )
    if not isinstance(padding, (str, Sequence)) or out_sharding is not None:
        return lax.conv_general_dilated(lhs, rhs, **settings._asdict(), out_sharding=out_sharding)
    settings = settings._replace(  # static to `jit`, so that all of it must be hashable
        window_strides=tuple(window_strides),
        padding=padding if isinstance(padding, str) else tuple(tuple(pair) for pair in padding),
        lhs_dilation=None if lhs_dilation is None else tuple(lhs_dilation),
        rhs_dilation=None if rhs_dilation is None else tuple(rhs_dilation),
        dimension_numbers=lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers),
        precision=tuple(precision) if isinstance(precision, list) else precision,
    )
    if _on_one_cpu(lhs, rhs):
        if _is_grouped(lhs, rhs, settings):
            form = _by_taps if _is_depthwise(lhs, rhs, settings) else _by_blocks
            return form(lhs, rhs, settings)
        if _is_slow(lhs, rhs, settings):
            return _with_fast_gradient(lhs, rhs, settings)
    return _convolve(lhs, rhs, settings)


class _Settings(NamedTuple):
    window_strides: Sequence[int]
    padding: Any
    lhs_dilation: Sequence[int] | None
    rhs_dilation: Sequence[int] | None
    dimension_numbers: Any
    feature_group_count: int
    batch_group_count: int
    precision: Any
    preferred_element_type: Any


_Form = Callable[[jax.Array, jax.Array, _Settings], jax.Array]


def _on_one_cpu(*arrays: jax.Array) -> bool:
    return jax.default_backend() == "cpu" and on_one_device(*arrays)


def _is_plain(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether shapes are known and not empty, and types such that sums may be taken in another order."""
    return (
        all(isinstance(n, int) and n > 0 for n in (*x.shape, *kernel.shape))
        and x.dtype == kernel.dtype
        # Parts of others would be added in their rounding.
        and x.dtype in (jnp.float32, jnp.float64)
    )


def _is_slow(x: jax.Array, kernel: jax.Array, settings: _Settings) -> bool:
    """Whether the gradient is one of those that are slow, and its images can be taken apart."""
    numbers = settings.dimension_numbers
    return (
        _is_plain(x, kernel)
        and x.shape[0] >= 2 * _PART
        and numbers.lhs_spec[0] == numbers.out_spec[0] == 0
        and settings.feature_group_count == settings.batch_group_count == 1
        and (isinstance(settings.precision, lax.Precision) or settings.precision in _PRECISIONS)
    )


def _is_grouped(x: jax.Array, kernel: jax.Array, settings: _Settings) -> bool:
    """Whether channels are in groups that fit, and there is something to compute."""
    groups = settings.feature_group_count
    return (
        _is_plain(x, kernel)
        and settings.dimension_numbers == _channels_last(x.ndim)
        and groups > 1
        and settings.batch_group_count == 1
        and kernel.shape[-2] * groups == x.shape[-1]
        and kernel.shape[-1] % groups == 0
        and jax.eval_shape(functools.partial(_convolve, settings=settings), x, kernel).size > 0
    )


def _is_depthwise(x: jax.Array, kernel: jax.Array, settings: _Settings) -> bool:
    """Whether of these every group is one channel, and the sum over taps the same function, not too long."""
    return (
        settings.feature_group_count == x.shape[-1]
        and settings.preferred_element_type in (None, x.dtype)
        and math.prod(kernel.shape[:-2]) <= _MOST_TAPS
        and kernel.shape[-1] <= _MOST_KERNELS * x.shape[-1]
    )


def _apart(form: _Form) -> _Form:
    """`form` as a program of its own, whether the whole is compiled or not: fused with nothing around it.

    XLA heeds the attribute without documenting it; a barrier is gone before it fuses. A test counts products.
    What is traced within bears it too, which keeps the small programs in the loop over taps apart as well.
    """
    program = jax.jit(form, static_argnums=2)

    @functools.wraps(form)
    def call(x: jax.Array, kernel: jax.Array, settings: _Settings) -> jax.Array:
        with set_xla_metadata(inlineable="false"):
            return program(x, kernel, settings)

    return call


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@_apart
def _by_taps(x: jax.Array, kernel: jax.Array, settings: _Settings) -> jax.Array:
    """The convolution of each channel with kernels of its own, as a sum over their taps: one loop."""
    padded, starts, span, scales = _laid_out(x, kernel, settings)
    totals = [jnp.zeros((), x.dtype)] * scales.shape[-1]
    for start, scale in zip(starts, scales, strict=True):
        seen = lax.slice(padded, start, start + span, (1, *settings.window_strides, 1))
        totals = [total + seen * scale[..., i] for i, total in enumerate(totals)]
    y = jnp.stack(totals, -1)
    return y.reshape(*y.shape[:-2], kernel.shape[-1])


@functools.partial(jax.jit, static_argnums=2)
def _by_blocks(x: jax.Array, kernel: jax.Array, settings: _Settings) -> jax.Array:
    """The grouped convolution as dense ones, each of several groups, and side by side."""
    groups, (*taps, channels, features) = settings.feature_group_count, kernel.shape
    features //= groups
    dense = settings._replace(feature_group_count=1)
    together = -(-groups // _MOST_BLOCKS)
    parts = []
    for first in range(0, groups, together):
        last = min(first + together, groups)
        count = last - first
        own = kernel[..., first * features : last * features]
        own = own.reshape(*taps, 1, channels, count, features)
        diagonal = np.eye(count, dtype=bool)[:, None, :, None]
        block = jnp.where(diagonal, own, 0).reshape(*taps, count * channels, count * features)
        seen = x[..., first * channels : last * channels]
        form = _with_fast_gradient if _is_slow(seen, block, dense) else _convolve
        parts.append(form(seen, block, dense))
    return lax.concatenate(parts, x.ndim - 1)


@_apart
def _to_taps(x: jax.Array, kernel: jax.Array, settings: _Settings) -> jax.Array:
    """The same, written so that its transpose in `x` is a sum of slices: one loop, where pads are many."""
    padded, starts, span, scales = _laid_out(x, kernel, settings)
    reach = starts[-1]
    totals = [jnp.zeros((), x.dtype)] * scales.shape[-1]
    for start, scale in zip(starts, scales, strict=True):
        sides = zip(reach - start, start, strict=True)
        around = [(int(before), int(after), 0) for before, after in sides]
        totals = [
            total + lax.pad(padded * scale[..., i], jnp.zeros((), x.dtype), around)
            for i, total in enumerate(totals)
        ]
    steps = (1, *settings.window_strides, 1)
    y = jnp.stack([lax.slice(total, reach, reach + span, steps) for total in totals], -1)
    return y.reshape(*y.shape[:-2], kernel.shape[-1])


@_apart
def _tap_after_tap(x: jax.Array, kernel: jax.Array, settings: _Settings) -> jax.Array:
    """The same, written so that its transpose in `kernel` holds one shifted image at a time, not all."""
    padded, starts, span, scales = _laid_out(x, kernel, settings)
    steps = (1, *settings.window_strides, 1)

    @jax.checkpoint
    def one(start, scale):
        seen = lax.dynamic_slice(padded, start, span)
        return lax.slice(seen, (0,) * x.ndim, span, steps)[..., None] * scale

    # Begun with a tap and not with zeros, which would not vary over devices where the image does.
    total, _ = lax.scan(
        lambda total, tap: (total + one(*tap), None),
        one(starts[0], scales[0]),
        (starts[1:], scales[1:]),
    )
    return total.reshape(*total.shape[:-2], kernel.shape[-1])


def _laid_out(x: jax.Array, kernel: jax.Array, settings: _Settings) -> tuple[Any, ...]:
    """The padded image; where each tap begins; how far it reaches; its scales [..., channels, multiplier]."""
    *taps, _, features = kernel.shape
    ones = (1,) * len(taps)
    inner, apart = settings.lhs_dilation or ones, settings.rhs_dilation or ones
    extent = [(k - 1) * d + 1 for k, d in zip(taps, apart, strict=True)]
    sizes = [(n - 1) * d + 1 for n, d in zip(x.shape[1:-1], inner, strict=True)]
    strides, padding = settings.window_strides, settings.padding
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(sizes, extent, strides, padding)
    around = [(low, high, d - 1) for (low, high), d in zip(padding, inner, strict=True)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *around, (0, 0, 0)])
    room = np.array(padded.shape[1:-1]) - extent
    span = np.array((x.shape[0], *(room // strides * strides + 1), x.shape[-1]))
    starts = np.array([(0, *np.multiply(tap, apart), 0) for tap in np.ndindex(*taps)])
    alike = (1,) * (x.ndim - 1)  # users may forbid to broadcast between ranks
    scales = kernel.reshape(len(starts), *alike, x.shape[-1], features // x.shape[-1])
    return padded, starts, span, scales


def _convolve(x: jax.Array, kernel: jax.Array, settings: _Settings) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, **settings._asdict())


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _with_fast_gradient(x: jax.Array, kernel: jax.Array, settings: _Settings) -> jax.Array:
    return _convolve(x, kernel, settings)


def _in_parts(x: jax.Array, kernel: jax.Array, settings: _Settings) -> jax.Array:
    """The convolution, written so that its transpose in `kernel` is a sum over parts of the images."""
    if _is_a_product(x, kernel, settings):
        steps = (slice(None), *(slice(None, None, s) for s in settings.window_strides), slice(None))
        x = x[steps]
        product = lax.dot_general(
            x.reshape(-1, x.shape[-1]),
            kernel.reshape(kernel.shape[-2:]),
            (((1,), (0,)), ((), ())),
            precision=settings.precision,
            preferred_element_type=settings.preferred_element_type,
        )
        return product.reshape(*x.shape[:-1], product.shape[-1])
    size = max(_PART, -(-x.shape[0] // _MOST_PARTS))
    parts = [
        _convolve(x[first : first + size], kernel, settings) for first in range(0, x.shape[0], size)
    ]
    return lax.concatenate(parts, 0)


def _is_a_product(x: jax.Array, kernel: jax.Array, settings: _Settings) -> bool:
    unpadded = isinstance(settings.padding, str) or not any(map(any, settings.padding))
    return (
        settings.dimension_numbers == _channels_last(x.ndim)
        and set(kernel.shape[:-2]) == {1}
        and set(settings.lhs_dilation or (1,)) == {1}
        and unpadded
    )


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    last = ndim - 1
    return lax.ConvDimensionNumbers(
        lhs_spec=(0, last, *range(1, last)),
        rhs_spec=(last, last - 1, *range(last - 1)),
        out_spec=(0, last, *range(1, last)),
    )


def _bilinear(
    value: _Form, of_x: _Form, of_kernel: _Form
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return the derivative of a convolution: forms of it that are good to transpose in one argument each."""

    def jvp(settings, primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        y = value(x, kernel, settings)
        terms = []
        if not isinstance(dkernel, SymbolicZero):
            terms.append(of_kernel(x, dkernel, settings))
        if not isinstance(dx, SymbolicZero):
            terms.append(of_x(dx, kernel, settings))
        return y, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)

    return jvp


_by_taps.defjvp(_bilinear(_by_taps, _to_taps, _tap_after_tap), symbolic_zeros=True)
# By plain convolutions, which policies of `jax.checkpoint` know.
_with_fast_gradient.defjvp(_bilinear(_convolve, _convolve, _in_parts), symbolic_zeros=True)
