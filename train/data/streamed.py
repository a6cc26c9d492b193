"""Photos in their thousands: read, decoded and cropped by threads while the device computes.

From folders that TFDS has prepared as array_record. The order and the random draws are grain's, both random
access: whatever step a run resumes at, what comes before it is not replayed.
"""

import collections
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from train.data import prepared
from train.data.ahead import Ahead
from train.data.input import Batch, Input

Feed = dict[str, np.ndarray]
# Of ImageNet's pixels, on the scale 0 to 255.
MEAN = (123.675, 116.28, 103.53)
DEVIATION = (58.395, 57.12, 57.375)
CHUNK = 8  # images that a thread takes on at once


class Streamed(Input):
    """An ImageNet-like TFDS dataset; feeds are {"images": uint8, "labels": int32, "weights": float32}.

    A training image is a random crop, resized and mirrored half the time; an evaluation image the middle,
    after its shorter side is resized. Each epoch is another shuffle of the whole set; batches run on over the
    ends of epochs, so that no example is left out. Row i of global batch k is the same example with the same
    crop on any number of processes; a process holds a contiguous part of the rows.

    OpenCV's own threads are turned off, for the whole process: they and ours would fight over the cores.

    An image that cannot be decoded is a ValueError naming its file and record. With `bad_images="skip"` its
    place in a training batch goes to the next record that can be decoded, its row of an evaluation batch
    weighs 0, and `skipped` counts it. A damaged array_record file is an error either way.

    Args:
      name: the dataset's name in TFDS; it has features `image` and `label`.
      data_dir: as in `load_dataset`.
      batch_size: of the global training batch, a multiple of `process_count`.
      eval_batch_size: of the global evaluation batch, likewise.
      image_size: height and width that the network sees.
      resize: the shorter side that an evaluation image is resized to, at least `image_size`.
      scale: least and largest share of a training image's area that a crop takes.
      ratio: least and largest width / height of it.
      train_split, test_split: names of splits, or parts of them as TFDS writes them ("train[:1000]").
      num_threads: that decode; None takes one for each core this process may use.
      prefetch: batches that are being made while the loop is busy with another.
      bad_images: "raise" or "skip".
      process_index, process_count: None takes JAX's.

    Attributes:
      skipped: Counter of the file names that were passed over, by how often.

    Raises:
      ValueError: no prepared data, damaged data, or an argument out of its range.
      ModuleNotFoundError: the extra `train` is not installed.
    """

    def __init__(
        self,
        name: str = "imagenet2012",
        data_dir: str = "",
        *,
        batch_size: int,
        eval_batch_size: int,
        image_size: int = 224,
        resize: int = 256,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        train_split: str = "train",
        test_split: str = "validation",
        num_threads: int | None = None,
        prefetch: int = 2,
        bad_images: Literal["raise", "skip"] = "raise",
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        threads = _cores() if num_threads is None else num_threads
        if not 0 <= index < count:
            raise ValueError(f"`process_index` must be 0 to {count - 1}, got {index}.")
        _check_multiples(count, batch_size=batch_size, eval_batch_size=eval_batch_size)
        _check_positive(image_size=image_size, num_threads=threads, prefetch=prefetch)
        _check_crops(image_size, resize, scale, ratio)
        if bad_images not in ("raise", "skip"):
            raise ValueError(f'`bad_images` must be "raise" or "skip", got {bad_images!r}.')
        folder = prepared.find(name, data_dir)
        if folder is None:
            raise prepared.missing(name, data_dir)
        builder = prepared.open_folder(folder)
        self._train = prepared.Split(folder, builder, train_split)
        self._test = prepared.Split(folder, builder, test_split)
        self._crops = _crops()
        self.num_classes = builder.info.features["label"].num_classes
        self.image_shape = (image_size, image_size, 3)
        self.train_size, self.test_size = len(self._train), len(self._test)
        self.skipped: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()  # over `skipped`
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size
        self._resize, self._scale, self._ratio = resize, scale, ratio
        self._skips = bad_images == "skip"
        self._index, self._count = index, count
        self._ahead = Ahead(threads, prefetch)

    def train_feeds(self, seed: int, first_step: int) -> Iterator[Feed]:
        """Yield this process's part of the training batches from `first_step` on, for ever.

        Args:
          seed: 0 to 2^32 - 1, of order and crops.
          first_step: int >= 0.
        Raises:
          ValueError: an image cannot be decoded, unless bad images are skipped; a damaged file.
        """
        if not 0 <= seed < 2**32:
            raise ValueError(f"`seed` must be 0 to 2^32 - 1, got {seed}.")
        fill = functools.partial(self._train_row, seed, _order(self.train_size, seed))
        return self._ahead.run(
            self._feed(step, self._batch_size, fill) for step in itertools.count(first_step)
        )

    def test_feeds(self) -> Iterator[Feed]:
        """Yield this process's part of the evaluation batches; what fills up the last one weighs 0.

        Raises:
          ValueError: as `train_feeds`.
        """
        batches = range(-(-self.test_size // self._eval_batch_size))
        return self._ahead.run(
            self._feed(batch, self._eval_batch_size, self._test_row) for batch in batches
        )

    def train_batch(self, arrays: Any, feed: Any, key: jax.Array, step: jax.Array) -> Batch:
        """Return the images of a feed, normalized."""
        del arrays, key, step  # the crops were drawn where the images were decoded
        return _batch(feed)

    def test_batch(self, arrays: Any, feed: Any) -> Batch:
        """Return the images of a feed, normalized."""
        del arrays
        return _batch(feed)

    def close(self) -> None:
        """End the threads; what is being decoded is finished first."""
        self._ahead.close()

    def _feed(
        self, batch: int, size: int, fill: Callable[[Feed, int, int], None]
    ) -> tuple[Feed, list[Callable[[], None]]]:
        """Return the arrays of one batch, still empty, and the calls that fill them."""
        local = size // self._count
        feed = {
            "images": np.zeros((local, *self.image_shape), np.uint8),
            "labels": np.zeros(local, np.int32),
            "weights": np.zeros(local, np.float32),
        }
        first = batch * size + self._index * local

        def fill_rows(start: int) -> None:
            for row in range(start, min(start + CHUNK, local)):
                fill(feed, row, first + row)

        return feed, [functools.partial(fill_rows, start) for start in range(0, local, CHUNK)]

    def _train_row(self, seed: int, order: Any, feed: Feed, row: int, position: int) -> None:
        """Fill a row with the example at `position` of the endless training sequence."""
        rng = np.random.Generator(np.random.Philox(key=[seed, position]))
        first = order[position]
        for offset in range(self.train_size):
            index = (first + offset) % self.train_size
            record = self._train[index]
            if self._crops.training_crop(
                record["image"],
                self.image_shape[0],
                rng,
                scale=self._scale,
                ratio=self._ratio,
                out=feed["images"][row],
            ):
                feed["labels"][row], feed["weights"][row] = record["label"], 1
                return
            self._bad(self._train, index, record)
        raise prepared.DataError(f"`data_dir`: {self._train} holds no image that can be decoded.")

    def _test_row(self, feed: Feed, row: int, position: int) -> None:
        """Fill a row with the example at `position`, if there is one."""
        if position >= self.test_size:
            return
        record = self._test[position]
        if self._crops.central_crop(
            record["image"], self.image_shape[0], resize=self._resize, out=feed["images"][row]
        ):
            feed["labels"][row], feed["weights"][row] = record["label"], 1
        else:
            self._bad(self._test, position, record)

    def _bad(self, split: prepared.Split, index: int, record: dict[str, Any]) -> None:
        """Raise, or count the image if such images are skipped."""
        name = record.get("file_name", b"").decode(errors="replace") or f"record {index} of {split}"
        if not self._skips:
            raise prepared.DataError(
                f"`data_dir`: image {name!r}, record {index} of {split}, cannot be decoded; "
                f'`bad_images="skip"` passes over such images and counts them.'
            )
        with self._lock:
            self.skipped[name] += 1


def _check_multiples(of: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1 or value % of:
            raise ValueError(f"`{name}` must be a multiple of the {of} processes, got {value}.")


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _check_crops(
    image_size: int, resize: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    if resize < image_size:
        raise ValueError(f"`resize` must be at least `image_size`, {image_size}, got {resize}.")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"`scale` must be two shares of an area, the lesser first, got {scale}.")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"`ratio` must be two positive numbers, the lesser first, got {ratio}.")


def _crops() -> Any:
    try:
        import cv2

        from train.data import crops
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} is not installed, which photos need; run: pip install ".[train]"'
        ) from error
    cv2.setNumThreads(0)
    return crops


def _order(size: int, seed: int) -> Any:
    """Return the endless sequence of shuffled epochs: `[position]` is a record's index, at once."""
    import grain

    return grain.MapDataset.range(size).seed(seed).shuffle().repeat()


def _batch(feed: Any) -> Batch:
    mean, deviation = (np.array(v, np.float32).reshape(1, 1, 1, 3) for v in (MEAN, DEVIATION))
    images = (feed["images"].astype(np.float32) - mean) / deviation
    return Batch(images, feed["labels"], feed["weights"])


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
