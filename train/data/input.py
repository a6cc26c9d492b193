"""What the loop asks of its data: a feed for every step, made into a batch inside the jitted step."""

import abc
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import flax.struct
import jax
import numpy as np


@flax.struct.dataclass
class Batch:
    """What one step, or one evaluation, sees.

    Attributes:
      images: float32 [n, height, width, channels], normalized.
      labels: int32 [n].
      weights: float32 [n]; 0 is padding, which counts for nothing.
    """

    images: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array
    weights: np.ndarray | jax.Array


class Input(abc.ABC):
    """A training set and a test set, as feeds from the host and a pure function from feeds to batches.

    Feeds are pytrees of arrays that are split along axis 0 among all devices; each process yields its part.

    Attributes:
      num_classes: labels are below this.
      image_shape: height, width and channels that the network sees.
      train_size: examples to train on.
      test_size: examples to evaluate on.
      skipped: how often each example that could not be read was passed over, by its name.
      arrays: a pytree of what every device holds whole, all the time: a resident dataset, or nothing.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    train_size: int
    test_size: int
    skipped: Mapping[str, int] = MappingProxyType({})
    arrays: Any = None

    @abc.abstractmethod
    def train_feeds(self, seed: int, first_step: int) -> Iterator[Any]:
        """Yield the feed of every training step, for ever, from step `first_step` on.

        Feed k depends on the seed and k alone: a run resumes at any step, on any number of processes, with
        exactly the same examples in each global batch.
        """

    @abc.abstractmethod
    def test_feeds(self) -> Iterator[Any]:
        """Yield the feed of every evaluation batch, equally many on every process."""

    @abc.abstractmethod
    def train_batch(self, arrays: Any, feed: Any, key: jax.Array, step: jax.Array) -> Batch:
        """Return a training batch, or the part of it that `feed` holds; pure, inside jit.

        Args:
          arrays: `self.arrays`, on the device.
          feed: what `train_feeds` yielded for this step.
          key: a random key of this step.
          step: int32 scalar, counted from 0.
        """

    @abc.abstractmethod
    def test_batch(self, arrays: Any, feed: Any) -> Batch:
        """Return an evaluation batch, or the part of it that `feed` holds; pure, inside jit."""

    def sizes(self) -> dict[str, Any]:
        """Return what tells these data from others, as JSON has it."""
        return {
            "train_size": self.train_size,
            "test_size": self.test_size,
            "num_classes": self.num_classes,
            "image_shape": list(self.image_shape),
        }

    def close(self) -> None:  # noqa: B027 - what holds nothing has nothing to release
        """Release threads and files."""
