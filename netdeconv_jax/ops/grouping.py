"""Columns of the patch matrix X <-> the groups that are whitened together.

X has a column for each (input channel, kernel tap), flattened in that order. They are divided into groups
of `block * taps` columns, `block` channels' worth, because the covariance of all of them would be large
and ill-conditioned. `"interleaved"`: column i belongs to group `i % G` at position `i // G`, as in the
original code; `"contiguous"`: to group `i // width` at position `i % width`, as in the paper's text.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("interleaved", "contiguous")


def effective_block(channels: int, block_size: int) -> int:
    """Return the channels per group: `channels` if `block_size` exceeds it, else their gcd.

    The rule can silently give 1: 65 channels and `block_size=64` whiten nothing but the kernel taps.

    Args:
      channels: int >= 1.
      block_size: int >= 1.
    Returns:
      A divisor of `channels`.
    Raises:
      ValueError: `channels` or `block_size` is below 1.
      TypeError: one of them is not an int.

    Source: the original code; the paper says "evenly divide".

    Example:
      >>> from netdeconv_jax import ops
      >>> ops.effective_block(96, 64), ops.effective_block(3, 64)
      (32, 3)
    """
    check_count("block_size", block_size)
    check_count("channels", channels)
    return channels if block_size > channels else math.gcd(block_size, channels)


@dataclasses.dataclass(frozen=True)
class ColumnGroups:
    """A static division of `feature_groups * sets * groups * width` columns; see `column_groups`.

    Attributes:
      kind: `"interleaved"` or `"contiguous"`.
      feature_groups: of the convolution; each has a mean and a whitener of its own.
      sets: of groups in a feature group; each set has a mean and a whitener of its own.
      groups: in a set; they are pooled as samples and share its mean and whitener.
      width: columns in a group, the side of the whitener.

    Source: the original code for `"interleaved"`, Ye et al. 2020, section 3.5, for `"contiguous"`.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> groups = ops.column_groups(channels=4, taps=1, block_size=2)
      >>> groups.split(jnp.arange(4)).reshape(2, 2).tolist()
      [[0, 2], [1, 3]]
    """

    kind: str
    feature_groups: int
    sets: int
    groups: int
    width: int

    @property
    def stat_shape(self) -> tuple[int, ...]:
        """Leading axes of `mean` [*, width] and `whitener` [*, width, width]: none if all is shared."""
        return () if self.feature_groups == self.sets == 1 else (self.feature_groups * self.sets,)

    @property
    def mean_shape(self) -> tuple[int, ...]:
        """Shape of `mean`: `stat_shape`, then the columns of a group."""
        return (*self.stat_shape, self.width)

    def split(self, x: jax.Array) -> jax.Array:
        """Turn columns [..., n] into [..., feature_groups, sets, groups, width]."""
        lead, count = x.shape[:-1], self.sets * self.groups
        if self.kind == "interleaved":
            x = jnp.swapaxes(x.reshape(*lead, self.feature_groups, self.width, count), -1, -2)
        return x.reshape(*lead, self.feature_groups, self.sets, self.groups, self.width)

    def join(self, x: jax.Array) -> jax.Array:
        """Turn [..., feature_groups, sets, groups, width] into columns [..., n]."""
        lead, count = x.shape[:-4], self.sets * self.groups
        if self.kind == "interleaved":
            x = jnp.swapaxes(x.reshape(*lead, self.feature_groups, count, self.width), -1, -2)
        return x.reshape(*lead, self.feature_groups * count * self.width)


def column_groups(
    channels: int,
    taps: int,
    block_size: int,
    *,
    kind: str = "interleaved",
    shared: bool = True,
    feature_group_count: int = 1,
) -> ColumnGroups:
    """Divide the `channels * taps` columns of a layer into groups.

    Args:
      channels: input channels of the layer.
      taps: product of the kernel size, or 1 where channels alone are whitened.
      block_size: channels per group, made to divide by `effective_block`.
      kind: `"interleaved"` or `"contiguous"`.
      shared: one mean and whitener for all groups, or one for each.
      feature_group_count: of the convolution. Above 1, each feature group is one group, whatever
        `block_size`, with a mean and a whitener of its own.
    Returns:
      The static `ColumnGroups`.
    Raises:
      ValueError: an unknown `kind`, or a count below 1, or `channels` not divisible by
        `feature_group_count`.
      TypeError: a count is no int, or `shared` no bool.

    Source: Ye et al. 2020, section 3.5 and the original code, which pools all groups as samples.
      `shared=False` is ours.

    Example:
      >>> from netdeconv_jax import ops
      >>> ops.column_groups(128, 9, 64).width
      576
    """
    check_kind(kind)
    if not isinstance(shared, bool | np.bool_):
        raise TypeError(f"`shared` must be True or False, got {shared!r}.")
    check_count("channels", channels)
    check_count("taps", taps)
    check_count("feature_group_count", feature_group_count)
    if channels % feature_group_count:
        raise ValueError(
            f"`feature_group_count` must divide the {channels} input channels, got {feature_group_count}."
        )
    block = effective_block(channels, block_size)
    if feature_group_count > 1:
        return ColumnGroups(kind, feature_group_count, 1, 1, channels // feature_group_count * taps)
    count = channels // block
    return ColumnGroups(kind, 1, 1 if shared else count, count if shared else 1, block * taps)


def check_kind(kind: str) -> None:
    """Raise unless `kind` is a known grouping."""
    if kind not in KINDS:
        raise ValueError(f"`grouping` must be one of {KINDS}, got {kind!r}.")


def check_count(name: str, value: int) -> int:
    """Return `value` if it is an int of at least 1, else raise an error that names it."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    return int(value)


def check_shared(shared: bool) -> None:
    """Raise unless `shared` is a bool."""
    if not isinstance(shared, bool):
        raise TypeError(f"`shared_whitener` must be True or False, got {shared!r}.")
