"""im2col: the patches that a convolution sees, as rows.

A `Window` is the geometry of a convolution with everything spelled out; the same one cuts the patches for
the statistics and runs the convolution, so that both always see the same padding: geometry and cutting are
one file for that reason, and a long one because every argument is spelled out, documented and checked here.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Padding = str | int | Sequence[int | tuple[int, int]]

_WRAP_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
_LAX_MODES = ("SAME", "SAME_LOWER", "VALID")


@dataclasses.dataclass(frozen=True)
class Window:
    """Kernel size, strides, padding and dilations of a convolution, one entry per spatial axis.

    Attributes:
      kernel_size, strides, input_dilation, kernel_dilation: tuples of ints >= 1.
      padding: one of nn.Conv's names, or a tuple of (low, high) pairs.

    Source: the geometry of flax.linen.Conv.

    Example:
      >>> from netdeconv_jax import ops
      >>> window = ops.window((3, 3), strides=2)
      >>> window.taps, window.zero_padding((8, 8))
      (9, [(0, 1), (0, 1)])
    """

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    @property
    def taps(self) -> int:
        """Number of kernel positions."""
        return math.prod(self.kernel_size)

    def wrap(self, x: jax.Array) -> jax.Array:
        """Apply what zero padding cannot express: `"CIRCULAR"` and `"REFLECT"`; else `x` itself."""
        if self.padding not in _WRAP_MODES:
            return x
        pads = [((k - 1) // 2, k // 2) for k in self._dilated_kernel]
        return jnp.pad(x, [(0, 0), *pads, (0, 0)], mode=_WRAP_MODES[str(self.padding)])

    def zero_padding(self, spatial: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return the (low, high) zeros around a wrapped, input-dilated input of that spatial shape.

        Raises:
          ValueError: not even one window fits.
        """
        dilated = tuple((n - 1) * d + 1 for n, d in zip(spatial, self.input_dilation, strict=True))
        if isinstance(self.padding, tuple):
            pads = list(self.padding)
        elif self.padding in _LAX_MODES:
            pads = list(
                lax.padtype_to_pads(dilated, self._dilated_kernel, self.strides, self.padding)
            )
        elif self.padding == "CAUSAL":
            pads = [(self._dilated_kernel[0] - 1, 0)]
        else:
            pads = [(0, 0)] * self.ndim
        for n, (low, high), k in zip(dilated, pads, self._dilated_kernel, strict=True):
            if n + low + high < k:
                raise ValueError(
                    f"`x` is smaller than the kernel: spatial shape {spatial} with padding "
                    f"{self.padding!r} does not hold one window of `kernel_size` {self.kernel_size} "
                    f"and `kernel_dilation` {self.kernel_dilation}."
                )
        return pads

    def out_shape(
        self, spatial: tuple[int, ...], strides: Sequence[int], first: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """Return how many windows, `strides` apart, an unpadded input of that spatial shape holds.

        The first of them is the corner's, or as many pixels from it as `first` says: no further than the
        last.
        """
        if self.padding in _WRAP_MODES:
            spatial = tuple(n + k - 1 for n, k in zip(spatial, self._dilated_kernel, strict=True))
        sizes = zip(
            spatial,
            self.input_dilation,
            self.zero_padding(spatial),
            self._dilated_kernel,
            strides,
            first or (0,) * self.ndim,
            strict=True,
        )
        return tuple(
            ((n - 1) * d + 1 + low + high - k - f) // s + 1 for n, d, (low, high), k, s, f in sizes
        )

    def pad(self, x: jax.Array, value: float = 0) -> jax.Array:
        """Pad and dilate `x` [batch, *spatial, channels] so that `"VALID"` windows are all that is left."""
        x = self.wrap(x)
        pads = self.zero_padding(x.shape[1:-1])
        config = [
            (low, high, d - 1) for (low, high), d in zip(pads, self.input_dilation, strict=True)
        ]
        return lax.pad(x, jnp.asarray(value, x.dtype), [(0, 0, 0), *config, (0, 0, 0)])

    def convolve(
        self,
        x: jax.Array,
        kernel: jax.Array,
        *,
        feature_group_count: int = 1,
        precision: Any = None,
        preferred_element_type: Any = None,
        conv_general_dilated: Callable[..., jax.Array] | None = None,
    ) -> jax.Array:
        """Convolve [batch, *spatial, channels] with a kernel [*kernel_size, channels / groups, features]."""
        # Only passed on where it is given: a function of the user's need not know it.
        preferred = (
            {}
            if preferred_element_type is None
            else {"preferred_element_type": preferred_element_type}
        )
        x = self.wrap(x)
        numbers = lax.ConvDimensionNumbers(
            lhs_spec=(0, x.ndim - 1, *range(1, x.ndim - 1)),
            rhs_spec=(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)),
            out_spec=(0, x.ndim - 1, *range(1, x.ndim - 1)),
        )
        return (conv_general_dilated or lax.conv_general_dilated)(
            x,
            kernel,
            self.strides,
            self.zero_padding(x.shape[1:-1]),
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            **preferred,
        )

    @property
    def _dilated_kernel(self) -> tuple[int, ...]:
        return tuple(
            (k - 1) * d + 1 for k, d in zip(self.kernel_size, self.kernel_dilation, strict=True)
        )


def window(
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
) -> Window:
    """Spell out the geometry of a convolution, in `nn.Conv`'s words.

    Args:
      kernel_size: one int per spatial axis, or an int for one axis.
      strides, input_dilation, kernel_dilation: an int for all axes, or one per axis; None means 1.
      padding: `"SAME" | "SAME_LOWER" | "VALID" | "CIRCULAR" | "REFLECT" | "CAUSAL"`, an int, or per
        axis an int or a (low, high) pair.
    Returns:
      The `Window`.
    Raises:
      ValueError: a size, stride or dilation below 1, a wrong number of entries, or unknown padding.
      TypeError: a size, stride or dilation that is neither an int nor a sequence.

    Source: flax.linen.Conv.

    Example:
      >>> from netdeconv_jax import ops
      >>> ops.window((3, 3), strides=2, padding=1).padding
      ((1, 1), (1, 1))
    """
    sizes = (kernel_size,) if isinstance(kernel_size, (int, np.integer)) else kernel_size
    if not isinstance(sizes, Sequence):
        raise TypeError(f"`kernel_size` must be an int or a sequence of ints, got {kernel_size!r}.")
    if not sizes:
        raise ValueError("`kernel_size` must have one entry per spatial axis, got ().")
    ndim = len(sizes)
    return Window(
        _per_axis("kernel_size", sizes, ndim),
        _per_axis("strides", strides, ndim),
        _canonical_padding(padding, ndim),
        _per_axis("input_dilation", input_dilation, ndim),
        _per_axis("kernel_dilation", kernel_dilation, ndim),
    )


def extract_patches(
    x: jax.Array,
    kernel_size: int | Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
) -> jax.Array:
    """Return the patch under every window.

    By one strided slice per kernel tap, or by a transposition where windows do not overlap. Two to four times
    faster than `lax.conv_general_dilated_patches`, and exact at every matmul precision (that one is a
    convolution with an identity kernel).

    Args:
      x: [batch, *spatial, channels], any dtype.
      kernel_size, strides, padding, input_dilation, kernel_dilation: as `window`.
    Returns:
      [batch, *out, *kernel_size, channels], dtype of `x`.
    Raises:
      ValueError: `x` has the wrong rank or is smaller than the kernel, or see `window`.

    Source: im2col of Ye et al. 2020, section 3.4.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> ops.extract_patches(jnp.ones((2, 8, 8, 3)), (3, 3), padding="VALID").shape
      (2, 6, 6, 3, 3, 3)
    """
    geometry = window(kernel_size, strides, padding, input_dilation, kernel_dilation)
    if x.ndim != geometry.ndim + 2:
        raise ValueError(
            f"`x` must be [batch, *spatial, channels] with {geometry.ndim} spatial axes, got shape {x.shape}."
        )
    return cut(x, geometry, geometry.strides)


def cut(
    x: jax.Array,
    geometry: Window,
    strides: Sequence[int],
    first: Sequence[int] | None = None,
    *,
    value: float = 0,
    channels_first: bool = False,
) -> jax.Array:
    """Return the pixels under every window: [batch, *out, *kernel_size, channels].

    Args:
      x: [batch, *spatial, channels], unpadded.
      geometry: of the windows, all but their strides.
      strides: between windows; larger than the convolution's where patches are sampled.
      first: as `Window.out_shape`.
      value: of the padding.
      channels_first: static; [batch, *out, channels, *kernel_size] instead.
    Raises:
      ValueError: `x` is smaller than the kernel.
    """
    first = first or (0,) * geometry.ndim
    counts = geometry.out_shape(x.shape[1:-1], strides, first)
    taps, dilation = geometry.kernel_size, geometry.kernel_dilation
    extent = [(k - 1) * d + 1 for k, d in zip(taps, dilation, strict=True)]
    if all(e <= s for e, s in zip(extent, strides, strict=True)):
        return _blocks(x, geometry, counts, strides, first, extent, value, channels_first)
    slices, batch, channels = _by_tap(x, geometry, strides, first, value), x.shape[0], x.shape[-1]
    if channels_first:
        return jnp.stack(slices, axis=-1).reshape(batch, *counts, channels, *taps)
    return jnp.stack(slices, axis=-2).reshape(batch, *counts, *taps, channels)


def cut_by_tap(
    x: jax.Array, geometry: Window, strides: Sequence[int], first: Sequence[int]
) -> jax.Array:
    """Return the same pixels tap by tap: [taps, batch, *out, channels]."""
    return jnp.stack(_by_tap(x, geometry, strides, first, 0))


def _by_tap(x, geometry, strides, first, value):
    """What each tap of the kernel sees: [batch, *out, channels] each."""
    counts = geometry.out_shape(x.shape[1:-1], strides, first)
    padded = geometry.pad(x, value)
    slices = []
    for tap in np.ndindex(*geometry.kernel_size):
        start = [f + t * d for f, t, d in zip(first, tap, geometry.kernel_dilation, strict=True)]
        stop = [b + (n - 1) * s + 1 for b, n, s in zip(start, counts, strides, strict=True)]
        limits = (x.shape[0], *stop, x.shape[-1])
        slices.append(lax.slice(padded, (0, *start, 0), limits, (1, *strides, 1)))
    return slices


def _blocks(x, geometry, counts, strides, first, extent, value, channels_first):
    """`cut` where windows do not overlap: a transposition, cheaper to compile and run than slices by tap."""
    x = geometry.wrap(x)
    value = jnp.asarray(value, x.dtype)
    lows = [
        low - f for (low, _), f in zip(geometry.zero_padding(x.shape[1:-1]), first, strict=True)
    ]
    strides = [s if c > 1 else e for s, c, e in zip(strides, counts, extent, strict=True)]
    ndim = len(counts)
    # Axis by axis, so that no more is split at a time over an explicit mesh, and each padded only once what
    # no window sees of the one before is gone.
    for i, (low, inner) in enumerate(zip(lows, geometry.input_dilation, strict=True)):
        row, tap = 2 * i + 1, 2 * i + 2
        high = counts[i] * strides[i] - low - ((x.shape[row] - 1) * inner + 1)
        around = [(0, 0, 0)] * x.ndim
        around[row] = (low, high, inner - 1)
        x = lax.pad(x, value, around)
        x = x.reshape(*x.shape[:row], counts[i], strides[i], *x.shape[tap:])
        x = lax.slice_in_dim(x, 0, extent[i], geometry.kernel_dilation[i], axis=tap)
    rows, taps, channel = range(1, 2 * ndim, 2), range(2, 2 * ndim + 1, 2), 2 * ndim + 1
    return x.transpose(0, *rows, *((channel, *taps) if channels_first else (*taps, channel)))


def _per_axis(name: str, value: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    if value is None:
        value = 1
    entries = (value,) * ndim if isinstance(value, (int, np.integer)) else value
    if not isinstance(entries, Sequence):
        raise TypeError(f"`{name}` must be an int or a sequence of ints, got {value!r}.")
    if len(entries) != ndim:
        raise ValueError(f"`{name}` must have {ndim} entries, one per spatial axis, got {value!r}.")
    if not all(
        isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v >= 1 for v in entries
    ):
        raise ValueError(f"`{name}` must hold integers of at least 1, got {value!r}.")
    return tuple(int(v) for v in entries)


def _canonical_padding(padding: Padding, ndim: int) -> str | tuple[tuple[int, int], ...]:
    known = (*_LAX_MODES, *_WRAP_MODES, "CAUSAL")
    if isinstance(padding, str):
        name = padding.upper()
        if name not in known:
            raise ValueError(f"`padding` must be one of {known}, an int or pairs, got {padding!r}.")
        if name == "CAUSAL" and ndim != 1:
            raise ValueError(f"`padding` 'CAUSAL' needs one spatial axis, got {ndim}.")
        return name
    entries = (padding,) * ndim if isinstance(padding, (int, np.integer)) else padding
    if not isinstance(entries, Sequence):
        raise TypeError(f"`padding` must be one of {known}, an int or pairs, got {padding!r}.")
    if len(entries) != ndim:
        raise ValueError(
            f"`padding` must have {ndim} entries, one per spatial axis, got {padding!r}."
        )
    pairs = []
    for entry in entries:
        pair = (entry, entry) if isinstance(entry, (int, np.integer)) else entry
        if (
            not isinstance(pair, Sequence)
            or len(pair) != 2
            or not all(isinstance(side, (int, np.integer)) for side in pair)
        ):
            raise ValueError(f"`padding` must hold ints or (low, high) pairs, got {padding!r}.")
        pairs.append((int(pair[0]), int(pair[1])))
    return tuple(pairs)
