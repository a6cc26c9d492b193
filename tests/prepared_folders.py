"""Small datasets prepared for real: TFDS's own writer, array_record, images encoded by OpenCV."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

# Where all of some datasets lie prepared, for the tests that want them: NETDECONV_DATA=~/tensorflow_datasets.
REAL = os.environ.get("NETDECONV_DATA", "")


def encode(image: np.ndarray, extension: str = ".png") -> bytes:
    """Return an RGB or grayscale image as a file."""
    colours = image[..., ::-1] if image.ndim == 3 and image.shape[-1] == 3 else image
    done, encoded = cv2.imencode(extension, np.ascontiguousarray(colours))
    assert done
    return encoded.tobytes()


def prepare(
    data_dir: Path,
    name: str,
    features: dict[str, Any],
    splits: dict[str, list[dict[str, Any]]],
    version: str = "1.0.0",
    num_shards: int = 1,
    file_format: str = "array_record",
) -> Path:
    """Write records, in their order, as TFDS writes a dataset; return the folder of the version.

    Images are bytes of a file, which TFDS keeps as they are.
    """

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i, record in enumerate(splits[split]):
                yield i, record | {"image": io.BytesIO(record["image"])}

    Small.name = name
    config = tfds.download.DownloadConfig(num_shards=num_shards)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder = Small(data_dir=str(data_dir), file_format=file_format)
        builder.download_and_prepare(download_config=config)
    return data_dir / name / version


def pixels(seed: int, n: int, *shape: int) -> np.ndarray:
    """Return n random images."""
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def prepare_small(data_dir: Path, name: str, images: Any, labels: Any, **kwargs: Any) -> Path:
    """Write `images[split]`, uint8 [n, height, width, channels], and `labels[split]` as CIFAR's features."""
    shape = images["train"].shape[1:]
    return prepare(
        data_dir,
        name,
        {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(
                num_classes=int(max(map(np.max, labels.values()))) + 1
            ),
        },
        {
            split: [
                {"image": encode(image), "label": int(label)}
                for image, label in zip(images[split], labels[split], strict=True)
            ]
            for split in images
        },
        **kwargs,
    )


def prepare_photos(data_dir: Path, records: dict[str, list[dict[str, Any]]], **kwargs: Any) -> Path:
    """Write records of `image`, `label` and `file_name` with the features of ImageNet."""
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
        "file_name": tfds.features.Text(),
    }
    return prepare(data_dir, "imagenet2012", features, records, version="5.1.0", **kwargs)
