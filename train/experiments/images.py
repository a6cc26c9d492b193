"""Images to measure: the datasets, and one photo that may be shown."""

import base64
import itertools
import zlib
from typing import Any

import numpy as np

from train.data.sources import Dataset, Examples, load_dataset

MOST = 2000  # photos
PHOTO = "china.jpg, by danielbuechele, CC BY 2.0, from scikit-learn"


def load_images(name: str, data_dir: str) -> Dataset:
    """Return a dataset by name; of "imagenet2012" the training photos as evaluation would crop them.

    Raises:
      ValueError: an unknown name, or no data.
    """
    if name != "imagenet2012":
        return load_dataset(name, data_dir)
    from train.data.streamed import DEVIATION, MEAN, Streamed

    photos = Streamed(name, data_dir, batch_size=1, eval_batch_size=20, test_split="train")
    feeds = list(itertools.islice(photos.test_feeds(), MOST // 20))
    photos.close()
    images, labels, weights = (
        np.concatenate([np.asarray(feed[key]) for feed in feeds])
        for key in ("images", "labels", "weights")
    )
    examples = Examples(images, labels).where(weights > 0)
    return Dataset(examples, examples, photos.num_classes, MEAN, DEVIATION)


def normalized(examples: Examples, data: Dataset, count: int) -> np.ndarray:
    """Return the first `count` images as a network sees them, float32."""
    images = np.asarray(examples.images[:count], np.float32)
    return (images - np.asarray(data.mean, np.float32)) / np.asarray(data.deviation, np.float32)


def photo(shrink: int = 3) -> np.ndarray:
    """Return the photo that may be shown, uint8 [height, width, 3], `shrink` times as small."""
    from sklearn.datasets import load_sample_image

    image = np.asarray(load_sample_image("china.jpg"))
    height, width = (side // shrink * shrink for side in image.shape[:2])
    tiles = image[:height, :width].reshape(height // shrink, shrink, width // shrink, shrink, 3)
    return np.round(tiles.mean((1, 3))).astype(np.uint8)


def pack(image: Any) -> dict[str, Any]:
    """Return an image in [0, 1] as JSON can hold it, in 256 steps."""
    pixels = np.round(255 * np.clip(np.asarray(image, np.float64), 0, 1)).astype(np.uint8)
    text = base64.b64encode(zlib.compress(pixels.tobytes(), 9)).decode()
    return {"shape": list(pixels.shape), "zlib": text}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """Return what `pack` packed, in [0, 1]."""
    pixels = np.frombuffer(zlib.decompress(base64.b64decode(packed["zlib"])), np.uint8)
    return pixels.reshape(packed["shape"]) / 255


def stretched(image: Any) -> np.ndarray:
    """Return an image from its least to its largest value in [0, 1], as the paper shows them.

    A thousandth of the pixels at either end is cut off, which a single bright one would otherwise decide.
    """
    image = np.asarray(image, np.float64)
    low, high = np.quantile(image, (0.001, 0.999))
    return np.clip((image - low) / (high - low), 0, 1)
