"""Folders that TFDS has prepared as array_record: found, checked and opened, no network, no TensorFlow."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


class DataError(ValueError):
    """Data that is there and cannot be read."""


def expanded(path: str, argument: str) -> Path:
    """Return a path with its `~` filled in.

    Raises:
      ValueError: there is no such user or no home; the message names `argument`.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"`{argument}` {path} cannot be found: {error}") from error


def root(data_dir: str) -> Path:
    """Return the folder that `data_dir` means: TFDS's default if it is empty, as TFDS resolves it."""
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return expanded(data_dir, "data_dir").absolute()


def find(name: str, data_dir: str) -> Path | None:
    """Return the folder of the newest prepared version of `name` below `data_dir`, None if there is none.

    A preparation that was cut short lies in `incomplete.*`, which is none.
    """
    versions = [
        (tuple(map(int, match.groups())), folder)
        for folder in root(data_dir).joinpath(name).glob("*/")
        if (match := VERSION.fullmatch(folder.name))
    ]
    return max(versions)[1] if versions else None


def command(name: str, data_dir: str) -> str:
    """Return the command that prepares `name` into `data_dir`."""
    return f"python -m train.prepare {name} --data_dir={root(data_dir)}"


def missing(name: str, data_dir: str) -> ValueError:
    """Return the error that says that `name` is not prepared, where we looked, and what to run."""
    return ValueError(
        f"`data_dir` holds no prepared {name}, looked in {root(data_dir)}; run: "
        f"{command(name, data_dir)}"
    )


def open_folder(folder: Path) -> Any:
    """Return the TFDS builder of a version's folder, all of whose files are there.

    Args:
      folder: as `find` returns it.
    Raises:
      ValueError: its description is missing or cannot be read, or another file is missing, or it was
        prepared in another format than array_record.
      ModuleNotFoundError: the extra `train` is not installed.
    """
    try:
        written_as = json.loads(folder.joinpath("dataset_info.json").read_text())["fileFormat"]
    except (OSError, ValueError, KeyError) as error:
        raise broken(folder, f"dataset_info.json cannot be read ({_line(error)})") from error
    if written_as != "array_record":
        raise ValueError(
            f"`data_dir`: {folder} is prepared as {written_as}, which needs TensorFlow to be read; prepare "
            f"it as array_record in another folder: {command(_name(folder), '/another/folder')}"
        )
    try:
        import tensorflow_datasets as tfds  # slow to import; the folder was looked at first
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} is not installed, which reads {folder}; run: pip install ".[train]"'
        ) from error
    try:
        builder = tfds.builder_from_directory(folder)
        files = [Path(path) for split in builder.info.splits.values() for path in split.filepaths]
    except Exception as error:  # protobuf, JSON and TFDS each have their own
        raise broken(folder, _line(error)) from error
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise broken(folder, f"{len(lost)} of {len(files)} files are missing, {lost[0]} first")
    return builder


class Split:
    """The records of a split, at random access: dicts whose images are still encoded.

    Safe to read from several threads.

    Args:
      folder: as `find` returns it.
      builder: from `open_folder`.
      split: its name, or a part of one as TFDS writes it ("train[:10%]").
      image: the feature that is an image.
    Raises:
      ValueError: there is no such split, or nothing in it.
    """

    def __init__(self, folder: Path, builder: Any, split: str, image: str = "image"):
        import tensorflow_datasets as tfds

        self._folder, self._split = folder, split
        try:
            self._source = builder.as_data_source(
                split, decoders={image: tfds.decode.SkipDecoding()}
            )
        except Exception as error:  # TFDS raises what it likes
            has = {name: info.num_examples for name, info in builder.info.splits.items()}
            raise ValueError(
                f"{split!r} of {folder} is no split with examples, which are {has}: {_line(error)}"
            ) from error

    def __str__(self) -> str:
        return f"{self._split!r} of {self._folder}"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._source[index]
        except Exception as error:  # array_record has but a RuntimeError for everything
            raise self._unreadable(f"record {index}", error) from error

    def records(self, indices: range) -> Sequence[dict[str, Any]]:
        """Return several records, in less time than one by one.

        Raises:
          ValueError: the file is damaged; so does `[index]`.
        """
        try:
            return self._source.__getitems__(list(indices))
        except Exception as error:
            raise self._unreadable(f"records {indices[0]} to {indices[-1]}", error) from error

    def broken(self, what: str) -> DataError:
        """Return the error that says what is wrong with the split, and how to mend it."""
        return broken(self._folder, f"{self._split!r}: {what}")

    def _unreadable(self, which: str, error: Exception) -> DataError:
        return self.broken(f"{which} cannot be read ({_line(error)})")


def broken(folder: Path, what: str) -> DataError:
    """Return the error that says what is wrong with a version's folder and how to mend it."""
    again = command(_name(folder), str(folder.parent.parent))
    return DataError(
        f"`data_dir`: {folder} is incomplete or damaged: {what}; remove it and run: {again}"
    )


def _name(folder: Path) -> str:
    return folder.parent.name


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
