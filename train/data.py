"""Datasets small enough to live on the device whole, as arrays."""

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

DATASETS = ("digits",)


@flax.struct.dataclass
class Examples:
    """Images and what they show; a pytree, in NumPy or on a device.

    Attributes:
      images: float32 [n, height, width, channels], normalized.
      labels: int32 [n].
    """

    images: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, chosen: np.ndarray) -> "Examples":
        """Return the examples that the boolean mask or the indices `chosen` pick."""
        return Examples(self.images[chosen], self.labels[chosen])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training set and the test set that it is measured on."""

    train: Examples
    test: Examples
    num_classes: int


def load(name: str, data_dir: str = "") -> Dataset:
    """Return the dataset `name`.

    Args:
      name: one of `DATASETS`.
      data_dir: where prepared data lie; the digits need none, they come inside scikit-learn.
    Raises:
      ValueError: an unknown name.
    """
    del data_dir
    if name not in DATASETS:
        raise ValueError(f"`dataset` must be one of {DATASETS}, got {name!r}.")
    return digits()


def digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits of 8x8 pixels, split for good.

    Every third image (index % 3 == 2) is a test image: 1,198 to train on, 599 to test. The file is ordered
    by writer, and within a writer by digit in runs of ten, so that this takes each writer's hand and each
    digit into both parts. Pixels are 0 to 16; both parts are normalized by the training part's mean and
    deviation.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this dataset needs it

    source: Any = load_digits()
    pixels = source.images.astype(np.float32)[..., None]
    in_test = np.arange(len(pixels)) % 3 == 2
    mean, deviation = pixels[~in_test].mean(), pixels[~in_test].std()
    examples = Examples((pixels - mean) / deviation, source.target.astype(np.int32))
    return Dataset(examples.where(~in_test), examples.where(in_test), num_classes=10)


def hold_out(dataset: Dataset, fold: int, folds: int = 4) -> Dataset:
    """Return the training part alone, every `folds`-th image of it in the place of the test set.

    For choosing settings: whatever is chosen this way has never seen the test set. All folds are of equal
    size; the up to `folds - 1` images left over at the end are in none.
    """
    index = np.arange(len(dataset.train) // folds * folds)
    held = index[index % folds == fold]
    kept = index[index % folds != fold]
    return dataclasses.replace(
        dataset, train=dataset.train.where(kept), test=dataset.train.where(held)
    )
