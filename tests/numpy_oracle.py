"""Network deconvolution up to the covariance, from the definitions: NumPy, float64, explicit loops.

Nothing here is shared with the library. A pixel is looked up by its index, a group is a list of column
numbers, and X has one row per patch and one column per (channel, kernel tap).
"""

import dataclasses
import math

import numpy as np

NOTHING = -1  # in a table of source pixels: a zero of the padding or of the input dilation


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A convolution: one entry per spatial axis; `padding` is a name or (low, high) pairs."""

    kernel_size: tuple
    strides: tuple
    padding: str | tuple = "SAME"
    input_dilation: tuple | None = None
    kernel_dilation: tuple | None = None

    def table(self, axis, n):
        """[out][tap] -> the pixel of an axis of length n that the tap of that window sees."""
        k, s = self.kernel_size[axis], self.strides[axis]
        input_dilation = self.input_dilation[axis] if self.input_dilation else 1
        kernel_dilation = self.kernel_dilation[axis] if self.kernel_dilation else 1
        span = (k - 1) * kernel_dilation + 1
        low = high = 0
        pixels = list(range(n))
        if self.padding == "CIRCULAR":
            pixels = [i % n for i in range(-((span - 1) // 2), n + span // 2)]
        if self.padding == "REFLECT":
            mirrored = [*range(n), *range(n - 2, 0, -1)]
            pixels = [mirrored[i % len(mirrored)] for i in range(-((span - 1) // 2), n + span // 2)]
        spread = []
        for pixel in pixels:
            spread += [pixel] + [NOTHING] * (input_dilation - 1)
        spread = spread[: len(spread) - (input_dilation - 1)]
        if self.padding in ("SAME", "SAME_LOWER"):
            zeros = max((math.ceil(len(spread) / s) - 1) * s + span - len(spread), 0)
            low, high = zeros // 2, zeros - zeros // 2
            if self.padding == "SAME_LOWER":
                low, high = high, low
        if self.padding == "CAUSAL":
            low = span - 1
        if not isinstance(self.padding, str):
            low, high = self.padding[axis]
        spread = [NOTHING] * low + spread + [NOTHING] * high
        out = (len(spread) - span) // s + 1
        return [[spread[o * s + t * kernel_dilation] for t in range(k)] for o in range(out)]

    def sources(self, spatial):
        """Yield (window, tap, pixel or None) for every window and tap."""
        tables = [self.table(axis, n) for axis, n in enumerate(spatial)]
        for o in np.ndindex(*[len(table) for table in tables]):
            for t in np.ndindex(*self.kernel_size):
                pixel = tuple(table[i][j] for table, i, j in zip(tables, o, t, strict=True))
                yield o, t, None if NOTHING in pixel else pixel


def patches(x, geometry):
    """[batch, *out, *kernel_size, channels], looked up pixel by pixel."""
    spatial = x.shape[1:-1]
    out = [len(geometry.table(axis, n)) for axis, n in enumerate(spatial)]
    result = np.zeros((len(x), *out, *geometry.kernel_size, x.shape[-1]), x.dtype)
    for o, t, pixel in geometry.sources(spatial):
        if pixel is not None:
            result[(slice(None), *o, *t)] = x[(slice(None), *pixel)]
    return result


def columns(patches, ndim):
    """X as [batch, *out, channels * taps]: within a patch, channels first, then taps."""
    lead = patches.shape[: 1 + ndim]
    return np.moveaxis(patches, -1, 1 + ndim).reshape(*lead, -1)


def patch_weights(mask, geometry):
    """[batch, *out]: the least weight among the pixels that a patch touches; mask [batch, *spatial].

    Every patch must touch one: what a window of padding alone weighs is not defined.
    """
    spatial = mask.shape[1:]
    out = [len(geometry.table(axis, n)) for axis, n in enumerate(spatial)]
    touched = {}
    for o, _, pixel in geometry.sources(spatial):
        touched.setdefault(o, [])
        if pixel is not None:
            touched[o].append(mask[(slice(None), *pixel)])
    weights = np.zeros((len(mask), *out))
    for o, seen in touched.items():
        weights[(slice(None), *o)] = np.min(seen, axis=0)
    return weights


def block_of(channels, block_size):
    if block_size > channels:
        return channels
    return max(b for b in range(1, channels + 1) if channels % b == 0 and block_size % b == 0)


def group_columns(channels, taps, block_size, kind="interleaved", feature_groups=1):
    """The column numbers of every group: lists of lists of lists [feature group][group][position]."""
    if feature_groups > 1:
        per = channels // feature_groups * taps
        return [[list(range(f * per, (f + 1) * per))] for f in range(feature_groups)]
    total, width = channels * taps, block_of(channels, block_size) * taps
    count = total // width
    groups = [[None] * width for _ in range(count)]
    for i in range(total):
        group, position = (i % count, i // count) if kind == "interleaved" else divmod(i, width)
        groups[group][position] = i
    return [groups]


def moments(rows, weights=None):
    """(count, mean, biased covariance) of rows [n, d]."""
    rows = np.asarray(rows, np.float64)
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64)
    count = weights.sum()
    mean, cov = np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2)
    kept = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight > 0]
    for row, weight in kept:
        mean += weight * row / count
    for row, weight in kept:
        cov += weight * np.outer(row - mean, row - mean) / count
    return count, mean, cov


def grouped_moments(rows, groups, shared=True, weights=None):
    """(count, mean, cov), stacked over the sets that have statistics of their own; X is rows [n, columns]."""
    sets = []
    for in_feature_group in groups:
        sets += [in_feature_group] if shared else [[group] for group in in_feature_group]
    found = [
        moments(
            np.concatenate([rows[:, group] for group in members]),
            None if weights is None else np.tile(weights, len(members)),
        )
        for members in sets
    ]
    count, mean, cov = (np.array(part) for part in zip(*found, strict=True))
    return (count, mean, cov) if len(sets) > 1 else (count[0], mean[0], cov[0])


def local_norm(x, mask=None, eps=1e-5):
    """(x - mean) / sqrt(var + eps), one sample after the other; mask [batch, *spatial] or None."""
    x = np.asarray(x, np.float64)
    result = np.zeros(x.shape)
    for i, sample in enumerate(x):
        weights = np.ones(sample.shape[:-1]) if mask is None or not mask[i].any() else mask[i]
        kept = [(sample[p], weights[p]) for p in np.ndindex(weights.shape) if weights[p] > 0]
        count = sum(weight for _, weight in kept) * sample.shape[-1]
        mean = sum(weight * pixel.sum() for pixel, weight in kept) / count
        var = sum(weight * ((pixel - mean) ** 2).sum() for pixel, weight in kept) / count
        result[i] = (sample - mean) / np.sqrt(var + eps)
    return result


def whitened(rows, groups, mean, whitener, shared=True):
    """(X - mu) D, group by group; mean and whitener stacked as `grouped_moments` stacks them."""
    result = np.zeros(rows.shape)
    mean, whitener = mean.reshape(-1, mean.shape[-1]), whitener.reshape(-1, *whitener.shape[-2:])
    which = 0
    for in_feature_group in groups:
        for group in in_feature_group:
            result[:, group] = (rows[:, group] - mean[which]) @ whitener[which]
            which += 0 if shared else 1
        which += 1 if shared else 0
    return result
