"""The transposed convolution, taken apart into the plain convolutions that its output pixels see.

A transposed convolution of stride s is a convolution of the input with s - 1 zeros between pixels. Of the
taps over a window only every s-th meets a pixel; which ones, depends on the output pixel modulo s: its phase.
Each tap belongs to one phase, and each phase is a convolution of stride 1 of the input itself.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from netdeconv_jax.ops.patches import Padding, Window, window


@dataclasses.dataclass(frozen=True)
class Transposed:
    """Geometry of a transposed convolution, in `nn.ConvTranspose`'s words; see `transposed`.

    Attributes:
      kernel_size, strides, kernel_dilation: tuples of ints >= 1.
      padding: `"SAME"`, `"VALID"`, `"CIRCULAR"`, or (low, high) zeros around the dilated input.
      transpose_kernel: flip the kernel and swap its input and output channels.

    Source: `jax.lax.conv_transpose`; flax.linen.ConvTranspose for `"CIRCULAR"`.

    Example:
      >>> from netdeconv_jax import ops
      >>> geometry = ops.transposed((4, 4), strides=2)
      >>> len(geometry.first_taps), geometry.taps_of((0, 1)), geometry.window((8, 8)).padding
      (4, (slice(0, None, 2), slice(1, None, 2)), ((2, 2), (2, 2)))
    """

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    kernel_dilation: tuple[int, ...]
    transpose_kernel: bool

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    @property
    def tap_steps(self) -> tuple[int, ...]:
        """Per axis, how far apart the taps of one phase are."""
        pairs = zip(self.strides, self.kernel_dilation, strict=True)
        return tuple(s // math.gcd(s, d) for s, d in pairs)

    @property
    def first_taps(self) -> list[tuple[int, ...]]:
        """The first tap of every phase that has any, which stands for the phase."""
        sizes = zip(self.kernel_size, self.tap_steps, strict=True)
        return list(itertools.product(*(range(min(k, step)) for k, step in sizes)))

    def taps_of(self, first: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the taps of a phase, as slices of the kernel's spatial axes."""
        return tuple(slice(t, None, step) for t, step in zip(first, self.tap_steps, strict=True))

    def counts_of(self, first: tuple[int, ...]) -> tuple[int, ...]:
        """Return per axis how many taps a phase has."""
        taps = zip(self.kernel_size, self.taps_of(first), strict=True)
        return tuple(len(range(k)[s]) for k, s in taps)

    def wrap(self, x: jax.Array) -> jax.Array:
        """Apply what zero padding cannot express: `"CIRCULAR"`; else x [batch, *spatial, channels] itself."""
        if self.padding != "CIRCULAR":
            return x
        pads = [wrapped for wrapped, _ in self._per_axis(x.shape[1:-1])]
        return jnp.pad(x, [(0, 0), *pads, (0, 0)], mode="wrap")

    def window(self, spatial: tuple[int, ...]) -> Window:
        """Return the convolution of the wrapped, dilated input; `spatial` is the shape before wrapping."""
        pads = tuple(zeros for _, zeros in self._per_axis(spatial))
        return Window(self.kernel_size, (1,) * self.ndim, pads, self.strides, self.kernel_dilation)

    def remainder(self, first: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output pixels of a phase, modulo the strides: the same whatever the input's size."""
        per_axis = zip(
            first, self.kernel_dilation, self.strides, self._per_axis((1,) * self.ndim), strict=True
        )
        return tuple((low - t * d) % s for t, d, s, (_, (low, _)) in per_axis)

    def phase(
        self, first: tuple[int, ...], wrapped: tuple[int, ...], full: Window
    ) -> tuple[tuple[int, ...], Window | None]:
        """Return one phase: the output pixels modulo the strides, and the convolution that they are.

        Args:
          first: tap of the phase.
          wrapped: spatial shape of the wrapped input.
          full: from `window`.
        Returns:
          The remainders, and the convolution of the wrapped input, None where no pixel is of the phase.
        """
        out = full.out_shape(wrapped, full.strides)
        counts, steps, remainders = self.counts_of(first), self.tap_steps, self.remainder(first)
        dilations, pads = [], []
        for axis, (t, d, s) in enumerate(
            zip(first, self.kernel_dilation, self.strides, strict=True)
        ):
            low = full.zero_padding(wrapped)[axis][0]
            windows = len(range(remainders[axis], out[axis], s))
            # The pixel under the first tap of the first window.
            start = (remainders[axis] + t * d - low) // s
            dilation = steps[axis] * d // s
            reach = start + windows - 1 + (counts[axis] - 1) * dilation
            dilations.append(dilation)
            pads.append((-start, reach - wrapped[axis] + 1) if windows else None)
        if None in pads:
            return remainders, None
        ones = (1,) * self.ndim
        return remainders, Window(counts, ones, tuple(pads), ones, tuple(dilations))

    def join_kernels(self, kernels: Sequence[jax.Array]) -> jax.Array:
        """Return the kernel whose taps are those of the phases, in the order of `first_taps`."""
        whole = []
        for first, kernel in zip(self.first_taps, kernels, strict=True):
            gaps = []
            for t, step, count, k in zip(
                first, self.tap_steps, kernel.shape, self.kernel_size, strict=False
            ):
                gaps.append((t, k - t - (count - 1) * step - 1, step - 1))
            zero = jnp.zeros((), kernel.dtype)
            whole.append(lax.pad(kernel, zero, [*gaps, (0, 0, 0), (0, 0, 0)]))
        return functools.reduce(jnp.add, whole)

    def _per_axis(self, spatial: tuple[int, ...]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Per axis, (low, high) pixels to wrap around the input, then zeros around the dilated one."""
        result = []
        for axis, n in enumerate(spatial):
            s, d = self.strides[axis], self.kernel_dilation[axis]
            k = (self.kernel_size[axis] - 1) * d + 1
            if isinstance(self.padding, tuple):
                result.append(((0, 0), self.padding[axis]))
            elif self.padding == "CIRCULAR":
                result.append(_circular(n, s, k, self.transpose_kernel))
            else:
                valid = self.padding == "VALID"
                total = k + s - 2 + (max(k - s, 0) if valid else 0)
                low = k - 1 if valid or s > k - 1 else -(-total // 2)
                result.append(((0, 0), (low, total - low)))
        return result


def transposed(
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = None,
    transpose_kernel: bool = False,
) -> Transposed:
    """Spell out the geometry of a transposed convolution, in `nn.ConvTranspose`'s words.

    Args:
      kernel_size: one int per spatial axis, or an int for one axis.
      strides, kernel_dilation: an int for all axes, or one per axis; None means 1.
      padding: `"SAME" | "VALID" | "CIRCULAR"`, an int, or per axis an int or a (low, high) pair.
      transpose_kernel: flip the kernel and swap its input and output channels.
    Returns:
      The `Transposed`.
    Raises:
      ValueError: a size, stride or dilation below 1, a wrong number of entries, or unknown padding.

    Source: flax.linen.ConvTranspose.

    Example:
      >>> from netdeconv_jax import ops
      >>> ops.transposed((3, 3), strides=2).first_taps
      [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    plain = window(kernel_size, strides, padding, 1, kernel_dilation)
    known = ("SAME", "VALID", "CIRCULAR")
    if isinstance(plain.padding, str) and plain.padding not in known:
        raise ValueError(
            f"`padding` of a transposed convolution must be one of {known}, an int or pairs, got {padding!r}."
        )
    return Transposed(
        plain.kernel_size, plain.strides, plain.padding, plain.kernel_dilation, transpose_kernel
    )


def _circular(n: int, s: int, k: int, transpose_kernel: bool):
    """Wrapped pixels and zeros of one axis of n pixels: flax sums the `"VALID"` output modulo its period."""
    period = n * s
    surplus = -max(k - s, 0) % (2 * period)
    left = surplus // 2 if transpose_kernel else (surplus + 1) // 2
    shift = (
        left + k - 1
    ) % period  # output o and tap t meet dilated pixel o + t - shift, modulo the period
    if shift > period // 2:
        shift -= period
    low = max(0, -(-shift // s))
    last = period - 1 + k - 1 - shift
    high = max(0, last // s - (n - 1))
    return (low, high), (shift - low * s, last - (n + high - 1) * s)
