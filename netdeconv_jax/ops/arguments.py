"""Checks that several functions share; each raises one line that names the argument and its value."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def check_floating(name: str, x: Any) -> jax.Array:
    """Return `x` as an array, once it is known to be floating point."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating point, got {x.dtype}.")
    return x


def check_float_dtype(name: str, dtype: Any) -> Any:
    """Return the NumPy dtype that `dtype` names, once it is known to be floating point."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"`{name}` must be a floating point dtype, got {dtype!r}.")
    return found


def check_axes(name: str, axes: Any, ndim: int, *, least: int = 0) -> tuple[int, ...]:
    """Return `axes` in rising order, counted from 0, once they are known to be different ones.

    Args:
      name: of the argument.
      axes: ints, from `least` up to `ndim - 1`.
      ndim: of the axes that may be named.
      least: 0, or `-ndim` where axes may be counted from the end.
    """
    try:
        found = [operator.index(axis) for axis in axes] if not isinstance(axes, str) else None
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"`{name}` must be a sequence of ints, got {axes!r}.")
    if any(not least <= axis < ndim for axis in found):
        raise ValueError(f"`{name}` must be from {least} to {ndim - 1}, got {tuple(found)}.")
    found = sorted(axis % ndim for axis in found)
    if len(set(found)) < len(found):
        raise ValueError(f"`{name}` must not name an axis twice, got {tuple(axes)}.")
    return tuple(found)


def check_number(name: str, value: Any, *, above: float | None = None) -> float:
    """Return `value` as a float, once it is known to be finite and at least 0, or greater than `above`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    value = float(value)
    if above is None and not value >= 0:
        raise ValueError(f"`{name}` must be at least 0, got {value}.")
    if above is not None and not value > above:
        raise ValueError(f"`{name}` must be greater than {above:g}, got {value}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    return value


def check_broadcastable(name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise unless an array of `shape` has the rank of `wanted` and can be broadcast to it."""
    shape, wanted = tuple(shape), tuple(wanted)
    if len(shape) != len(wanted) or any(
        one not in (1, all_) for one, all_ in zip(shape, wanted, strict=False)
    ):
        raise ValueError(
            f"`{name}` must be broadcastable to {wanted}, of the same rank, got {shape}."
        )
