"""Datasets small enough to live in memory whole, as NumPy arrays of pixels.

A dataset of your own is one more entry of `TABLE`; its data are a prepared TFDS folder or one `.npz`.
"""

import dataclasses
import zipfile
import zlib
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np

from train.data import prepared

NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
CHUNK = 4096  # records read at once: large enough to hide the threads that each read starts


@flax.struct.dataclass
class Examples:
    """Images and what they show; a pytree, in NumPy or on a device.

    Attributes:
      images: uint8 [n, height, width, channels].
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
    """A training set and the test set that it is measured on, as pixels.

    Attributes:
      train, test: the examples.
      num_classes: labels are below this.
      mean, deviation: a float per channel, of the pixels; (pixel - mean) / deviation is what a network sees.
    """

    train: Examples
    test: Examples
    num_classes: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of a dataset before it is read.

    Attributes:
      shape: height, width, channels.
      num_classes: labels are below this.
      mean, deviation: of the training set's pixels, a float per channel on the scale 0 to 1.
      image, label: the names of its features in TFDS.
      train_split, test_split: the names of its splits in TFDS.
    """

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    image: str = "image"
    label: str = "label"
    train_split: str = "train"
    test_split: str = "test"


# The constants that everybody publishes with; a test measures them again. The deviation (.2023, .1994, .2010)
# that goes around for CIFAR-10 is the mean of the images' own deviations, not that of the pixels.
TABLE = {
    "mnist": Entry((28, 28, 1), 10, (0.1307,), (0.3081,)),
    "fashion_mnist": Entry((28, 28, 1), 10, (0.2860,), (0.3530,)),
    "cifar10": Entry((32, 32, 3), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Entry((32, 32, 3), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def load_dataset(name: str, data_dir: str = "") -> Dataset:
    """Return the dataset `name`, all of it.

    Looked for in this order:
      1. an .npz file: `data_dir` itself, or `data_dir`/`name`.npz. Its arrays are `x_train` and `x_test`,
         uint8 [n, height, width, channels] (a single channel may be left out), and `y_train` and `y_test`,
         integers [n] or [n, 1]: what Keras's mnist.npz holds. Needs NumPy alone.
      2. a folder that TFDS has prepared as array_record, `data_dir`/`name`/<version>, the newest: what
         `python -m train.prepare` leaves. Needs the extra `train`, not TensorFlow.

    Args:
      name: "digits" or one in `TABLE`; the digits come inside scikit-learn.
      data_dir: "" is TFDS's default, $TFDS_DATA_DIR or ~/tensorflow_datasets.
    Raises:
      ValueError: an unknown name, no data, or data that are damaged or of another shape.
      ModuleNotFoundError: what reads a prepared folder is not installed.
    """
    if name == "digits":
        return _digits()
    if name not in TABLE:
        raise ValueError(f"`dataset` must be one of {('digits', *TABLE)}, got {name!r}.")
    entry = TABLE[name]
    file = prepared.expanded(data_dir, "data_dir")
    if file.suffix != ".npz":
        file = prepared.root(data_dir) / f"{name}.npz"
    if file.is_file():
        parts, origin = _read_npz(file), str(file)
    elif Path(data_dir).suffix == ".npz":
        raise ValueError(f"`data_dir` names a file that does not exist: {file}")
    elif (folder := prepared.find(name, data_dir)) is not None:
        parts, origin = _read_folder(folder, entry), str(folder)
    else:
        raise prepared.missing(name, data_dir)
    train, test = (_check(images, labels, entry, origin) for images, labels in parts)
    scaled = ([255 * value for value in values] for values in (entry.mean, entry.deviation))
    return Dataset(train, test, entry.num_classes, *map(tuple, scaled))


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


def _digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits of 8x8 pixels, 0 to 16, split for good.

    Every third image (index % 3 == 2) is a test image: 1,198 to train on, 599 to test. The file is ordered
    by writer, and within a writer by digit in runs of ten, so that this takes each writer's hand and each
    digit into both parts.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this dataset needs it

    source: Any = load_digits()
    examples = Examples(source.images.astype(np.uint8)[..., None], source.target.astype(np.int32))
    in_test = np.arange(len(examples)) % 3 == 2
    train = examples.where(~in_test)
    mean, deviation = float(train.images.mean()), float(train.images.std())
    return Dataset(train, examples.where(in_test), 10, (mean,), (deviation,))


def _read_npz(file: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        with file.open("rb") as opened, np.load(opened) as archive:
            found = sorted(archive)
            arrays = {name: archive[name] for name in NPZ_ARRAYS if name in archive}
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        what = str(error).splitlines()[0]
        raise ValueError(f"`data_dir`: {file} is not a whole .npz file: {what}") from error
    lost = [name for name in NPZ_ARRAYS if name not in arrays]
    if lost:
        raise ValueError(
            f"`data_dir`: {file} must hold the arrays {NPZ_ARRAYS}, {lost} are missing; it has {found}."
        )
    return [(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]


def _read_folder(folder: Path, entry: Entry) -> list[tuple[np.ndarray, np.ndarray]]:
    builder = prepared.open_folder(folder)
    return [
        _read_split(prepared.Split(folder, builder, split, entry.image), entry)
        for split in (entry.train_split, entry.test_split)
    ]


def _read_split(split: prepared.Split, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    import cv2  # ten times as fast on these as what TFDS decodes with

    images = np.empty((len(split), *entry.shape), np.uint8)
    labels = np.empty(len(split), np.int32)
    flag = cv2.IMREAD_GRAYSCALE if entry.shape[-1] == 1 else cv2.IMREAD_COLOR
    for start in range(0, len(split), CHUNK):
        indices = range(start, min(start + CHUNK, len(split)))
        for i, record in zip(indices, split.records(indices), strict=True):
            image = cv2.imdecode(np.frombuffer(record[entry.image], np.uint8), flag)
            if image is None or image.shape[:2] != entry.shape[:2]:
                found = "no image" if image is None else f"an image of {image.shape[:2]}"
                raise split.broken(f"record {i} holds {found}, not one of {entry.shape}")
            images[i] = image.reshape(entry.shape)[..., ::-1]  # OpenCV's colours start with blue
            labels[i] = record[entry.label]
    return images, labels


def _check(images: np.ndarray, labels: np.ndarray, entry: Entry, origin: str) -> Examples:
    """Return the arrays as examples if they are what the table says; both ends may lack an axis of 1."""
    if images.dtype != np.uint8 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"`data_dir`: {origin} must hold uint8 images and integer labels, got {images.dtype} and "
            f"{labels.dtype}."
        )
    n = len(images)
    allowed = {entry.shape, entry.shape[:2]} if entry.shape[-1] == 1 else {entry.shape}
    if images.shape[1:] not in allowed:
        raise ValueError(
            f"`data_dir`: {origin} must hold images of shape {('n', *entry.shape)}, got {images.shape}."
        )
    if labels.shape not in ((n,), (n, 1)) or not n:
        raise ValueError(
            f"`data_dir`: {origin} must hold a label for each of its images, at least one; got shapes "
            f"{images.shape} and {labels.shape}."
        )
    if labels.min() < 0 or labels.max() >= entry.num_classes:
        raise ValueError(
            f"`data_dir`: the labels of {origin} must be 0 to {entry.num_classes - 1}, got "
            f"{labels.min()} to {labels.max()}."
        )
    return Examples(images.reshape(n, *entry.shape), labels.reshape(n).astype(np.int32))
