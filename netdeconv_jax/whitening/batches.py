"""What is taken from a pass over data: the mean of what each batch gives."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

Tree = Any


def checked_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator of batches.

    Raises:
      ValueError: `batches` is one batch, whose examples would pass for batches.
      TypeError: it is no iterable.
    """
    if hasattr(batches, "shape") or isinstance(batches, Mapping):
        shapes = jax.tree.map(lambda leaf: leaf.shape, batches)
        raise ValueError(
            f"`batches` must be an iterable of batches, as a list of one; got one batch of shape {shapes}."
        )
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(f"`batches` must be an iterable of batches, got {type(batches).__name__}.")
    return iter(batches)


def arguments(batch: Any) -> tuple[Any, ...]:
    """Return the positional arguments of a model that a batch is: those of a tuple, or one."""
    return batch if type(batch) is tuple else (batch,)


def first_and_all(batches: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """Return the first batch, and all of them.

    Raises:
      ValueError: there is none, or `batches` is one batch itself.
      TypeError: `batches` is no iterable.
    """
    rest = checked_batches(batches)
    if (first := next(rest, None)) is None:
        raise ValueError("`batches` must hold at least one batch, got none.")
    return first, itertools.chain([first], rest)


def mean_over(batches: Iterable[Any], measure: Callable[[Any], Tree]) -> Tree:
    """Return the mean of `measure(batch)` over batches, each of which weighs what it holds.

    Raises:
      ValueError: as `first_and_all`.
    """
    _, batches = first_and_all(batches)
    mean, count = None, 0
    for x in batches:
        size = jax.tree.leaves(x)[0].shape[0]
        count += size
        own = measure(x)
        mean = own if mean is None else _moved(mean, own, size / count)
    return mean


@functools.partial(jax.jit, donate_argnames="mean")
def _moved(mean: Tree, own: Tree, share: Any) -> Tree:
    return jax.tree.map(lambda old, new: old + (share * (new - old)).astype(old.dtype), mean, own)
