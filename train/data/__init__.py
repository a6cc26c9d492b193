"""Datasets, and how they reach the training step."""

from typing import TYPE_CHECKING

from train.data.input import Batch, Input
from train.data.prepared import DataError
from train.data.resident import Resident
from train.data.sources import TABLE, Dataset, Examples, hold_out, load_dataset
from train.data.streamed import Streamed

if TYPE_CHECKING:  # an .npz is read without what reads configs
    from train.config import Config

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Examples",
    "Input",
    "Resident",
    "Streamed",
    "create",
    "hold_out",
    "load_dataset",
]

# A photo dataset of your own in TFDS is one more: its name, and its splits to train on and to evaluate on.
STREAMED = {"imagenet2012": ("train", "validation")}


def create(config: "Config") -> Input:
    """Return what feeds a run of `config`: a dataset that lives on the device, or a stream of images.

    Raises:
      ValueError: an unknown dataset, no prepared data, or a batch that does not fit.
    """
    known = ("digits", *TABLE, *STREAMED)
    if config.dataset not in known:
        raise ValueError(f"`dataset` must be one of {known}, got {config.dataset!r}.")
    if config.dataset not in STREAMED:
        return Resident(load_dataset(config.dataset, config.data_dir), config)
    train_split, test_split = STREAMED[config.dataset]
    return Streamed(
        config.dataset,
        config.data_dir,
        train_split=train_split,
        test_split=test_split,
        batch_size=config.batch_size,
        eval_batch_size=config.eval_batch_size,
        image_size=config.augment.image_size,
        resize=config.augment.eval_resize,
        bad_images=config.bad_images,
    )
