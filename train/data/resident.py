"""A dataset small enough to live on the device whole: picked from and augmented inside the jitted step."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from train import augment
from train.data.input import Batch, Input
from train.data.sources import Dataset

if TYPE_CHECKING:
    from train.config import Config


class Resident(Input):
    """The whole dataset on every device; a feed is only the order in which an epoch visits it.

    An epoch of `train_size // batch_size` steps leaves out what does not fill a batch, something else each
    time. Epoch n of a seed has the same order whoever asks, so that a run resumes at any step.

    Args:
      dataset: uint8 images.
      config: `batch_size`, `eval_batch_size` and `augment` are used.
      process_index, process_count: which part of each batch this process feeds; default JAX's.

    Raises:
      ValueError: a batch larger than the training set, or one that the processes cannot share evenly.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: "Config",
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        self.num_classes = dataset.num_classes
        height, width, channels = dataset.train.images.shape[1:]
        self.image_shape = (height, width, channels)
        self.train_size, self.test_size = len(dataset.train), len(dataset.test)
        self.arrays = {"train": dataset.train, "test": dataset.test}
        self._scale = dataset.mean, dataset.deviation
        self._augment = config.augment
        self._index = jax.process_index() if process_index is None else process_index
        self._count = jax.process_count() if process_count is None else process_count
        self._batch, self._eval_batch = config.batch_size, config.eval_batch_size
        if self._batch > self.train_size:
            raise ValueError(
                f"`batch_size` must be at most the {self.train_size} training examples, got {self._batch}."
            )

    def train_feeds(self, seed: int, first_step: int) -> Iterator[Any]:
        """Yield {"order": int32 [local batch, steps of an epoch]}: the same object all through an epoch."""
        steps = self.train_size // self._batch
        epoch, done = divmod(first_step, steps)
        while True:
            order = np.random.default_rng((seed, epoch)).permutation(self.train_size)
            order = order[: steps * self._batch].astype(np.int32).reshape(steps, self._batch)
            feed = {"order": self._part(np.ascontiguousarray(order.T))}
            for _ in range(steps - done):
                yield feed
            epoch, done = epoch + 1, 0

    def test_feeds(self) -> Iterator[Any]:
        """Yield {"index": int32 [local batch], "weight": float32 [local batch]} an evaluation batch."""
        for first in range(0, self.test_size, self._eval_batch):
            index = np.arange(first, first + self._eval_batch, dtype=np.int32)
            weight = (index < self.test_size).astype(np.float32)
            index = np.minimum(index, self.test_size - 1)
            yield {"index": self._part(index), "weight": self._part(weight)}

    def train_batch(self, arrays: Any, feed: Any, key: jax.Array, step: jax.Array) -> Batch:
        """Pick the batch of a step and augment it."""
        order = feed["order"]
        chosen = jax.lax.dynamic_index_in_dim(order, step % order.shape[1], 1, keepdims=False)
        images, labels = arrays["train"].images[chosen], arrays["train"].labels[chosen]
        keys = jax.vmap(lambda example: jax.random.split(jax.random.fold_in(key, example)))(chosen)
        images = augment.crop(keys[:, 0], images, self._augment.crop)
        if self._augment.flip:
            images = augment.flip(keys[:, 1], images)
        return Batch(self._normalized(images), labels, jnp.ones(labels.shape, jnp.float32))

    def test_batch(self, arrays: Any, feed: Any) -> Batch:
        """Pick an evaluation batch."""
        images = self._normalized(arrays["test"].images[feed["index"]])
        return Batch(images, arrays["test"].labels[feed["index"]], feed["weight"])

    def _normalized(self, images: jax.Array) -> jax.Array:
        mean, deviation = (np.asarray(values, np.float32) for values in self._scale)
        shape = (1,) * (images.ndim - 1) + (-1,)
        return (images.astype(jnp.float32) - mean.reshape(shape)) / deviation.reshape(shape)

    def _part(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) % self._count:
            raise ValueError(
                f"`batch_size` and `eval_batch_size` must be multiples of the {self._count} processes, got "
                f"{len(rows)}."
            )
        each = len(rows) // self._count
        return rows[self._index * each : (self._index + 1) * each]
