"""Checks that several functions share; each raises one line that names the argument and its value."""

import functools
import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_array(x: Any) -> jax.Array:
    """Return `x` as an array: at once what is one, which `jnp.asarray` takes its time to see."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


@functools.cache
def _is_floating(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def check_floating(name: str, x: Any) -> jax.Array:
    """Return `x` as an array, once it is known to be floating point."""
    x = as_array(x)
    if not _is_floating(x.dtype):
        raise TypeError(f"`{name}` must be floating point, got {x.dtype}.")
    return x


def check_float_dtype(name: str, dtype: Any) -> Any:
    """Return the NumPy dtype that `dtype` names, once it is known to be floating point."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not _is_floating(found):
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
        axes = axes if isinstance(axes, str) else tuple(axes)
        found = [operator.index(axis) for axis in axes]
    except TypeError:
        raise TypeError(f"`{name}` must be a sequence of ints, got {axes!r}.") from None
    if any(not least <= axis < ndim for axis in found):
        raise ValueError(f"`{name}` must be from {least} to {ndim - 1}, got {tuple(found)}.")
    found = sorted(axis % ndim for axis in found)
    if len(set(found)) < len(found):
        raise ValueError(f"`{name}` must not name an axis twice, got {axes}.")
    return tuple(found)


def check_number(name: str, value: Any, *, above: float | None = None) -> float:
    """Return `value` as a float, once it is known to be finite and at least 0, or greater than `above`."""
    try:
        if isinstance(value, str | bool | np.bool_):
            raise TypeError
        value = float(value)
    except TypeError:  # a traced value among them
        raise TypeError(f"`{name}` must be a number, got {value!r}.") from None
    if above is None and not value >= 0:
        raise ValueError(f"`{name}` must be at least 0, got {value}.")
    if above is not None and not value > above:
        raise ValueError(f"`{name}` must be greater than {above:g}, got {value}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    return value


def check_path(name: str, path: Any, *, to_write: bool = False) -> Path:
    """Return `path` as a `Path`, once it is known to be one or its text; `to_write`: its folder exists."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"`{name}` must be a path, got {path!r}.")
    path = Path(path)
    if to_write and (path.is_dir() or not path.name):
        raise IsADirectoryError(f"`{name}` must be a file, got the folder {str(path)!r}.")
    if to_write and not path.parent.is_dir():
        raise FileNotFoundError(f"`{name}` must be in a folder that exists, got {str(path)!r}.")
    return path


def check_broadcastable(name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise unless an array of `shape` can be broadcast to `wanted`."""
    wanted = tuple(wanted)
    lead = len(wanted) - len(shape)
    if lead < 0 or any(m not in (1, n) for m, n in zip(shape, wanted[lead:], strict=True)):
        raise ValueError(f"`{name}` must be broadcastable to {wanted}, got {tuple(shape)}.")
