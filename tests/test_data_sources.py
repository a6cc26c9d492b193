"""Datasets in memory: the same pixels from every form that they come in, one line for what is wrong."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from prepared_folders import REAL, pixels, prepare_small

from train.data import hold_out, load_dataset, prepared, sources

ROOT = Path(__file__).parents[1]
IMAGES = {
    "cifar10": {"train": pixels(0, 60, 32, 32, 3), "test": pixels(1, 20, 32, 32, 3)},
    "mnist": {"train": pixels(2, 60, 28, 28, 1), "test": pixels(3, 20, 28, 28, 1)},
}
LABELS = {"train": np.arange(60) % 10, "test": np.arange(20) // 2}
ARRAYS = {
    "x_train": IMAGES["cifar10"]["train"],
    "y_train": LABELS["train"],
    "x_test": IMAGES["cifar10"]["test"],
    "y_test": LABELS["test"],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, images in IMAGES.items():
        prepare_small(folder, name, images, LABELS, num_shards=2)
    return folder


@pytest.fixture
def copy(data_dir, tmp_path):
    """A data folder with a prepared cifar10 to be damaged."""
    shutil.copytree(data_dir / "cifar10", tmp_path / "cifar10")
    return tmp_path


def check(dataset, images, labels):
    for part, name in ((dataset.train, "train"), (dataset.test, "test")):
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == np.int32
        np.testing.assert_array_equal(part.images, images[name])
        np.testing.assert_array_equal(part.labels, labels[name])


def message(name, data_dir):
    """Return the one line that loading is answered with."""
    start = time.perf_counter()
    with pytest.raises(ValueError, match="`data_dir`") as caught:
        load_dataset(name, str(data_dir))
    assert time.perf_counter() - start < 5
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_a_prepared_folder_gives_every_pixel_and_label(data_dir, name):
    dataset = load_dataset(name, str(data_dir))
    check(dataset, IMAGES[name], LABELS)
    assert dataset.num_classes == 10
    assert len(dataset.mean) == len(dataset.deviation) == dataset.train.images.shape[-1]


def test_the_newest_version_counts_and_one_that_was_cut_short_does_not(data_dir, copy):
    newer = {name: 255 - images for name, images in IMAGES["cifar10"].items()}
    prepare_small(copy, "cifar10", newer, LABELS, version="10.0.0")
    prepare_small(copy, "cifar10", IMAGES["cifar10"], LABELS, version="9.1.0")
    (copy / "cifar10" / "incomplete.A1B2C3_11.0.0").mkdir()
    check(load_dataset("cifar10", str(copy)), newer, LABELS)


def test_an_empty_data_dir_is_the_default_of_tfds(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    check(load_dataset("mnist"), IMAGES["mnist"], LABELS)
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert prepared.root("") == Path.home() / "tensorflow_datasets"


def test_an_npz_needs_numpy_alone(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **ARRAYS)
    blocked = [
        "tensorflow_datasets",
        "grain",
        "cv2",
        "ml_collections",
        "sklearn",
        "orbax",
        "tensorflow",
    ]
    program = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
from train.data import Streamed, load_dataset
dataset = load_dataset("cifar10", {str(tmp_path)!r})
print(dataset.train.images.sum(), dataset.test.labels.sum())
try:
    Streamed("imagenet2012", {str(tmp_path)!r}, batch_size=1, eval_batch_size=1)
except ValueError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=True,
    )
    total, error = result.stdout.splitlines()
    assert total == f"{ARRAYS['x_train'].sum()} {ARRAYS['y_test'].sum()}"
    assert "run: python -m train.prepare imagenet2012" in error


def test_a_prepared_folder_without_the_packages_says_what_to_install(data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'run: pip install "\.\[train\]"'):
        load_dataset("mnist", str(data_dir))


@pytest.mark.parametrize("where", ["folder", "file", "home"])
def test_an_npz_is_found_in_a_folder_or_by_its_name(tmp_path, where, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ("cifar10.npz" if where == "folder" else "mine.npz")
    np.savez(file, **ARRAYS)
    data_dir = {"folder": tmp_path, "file": file, "home": "~/mine.npz"}[where]
    check(load_dataset("cifar10", str(data_dir)), IMAGES["cifar10"], LABELS)


def test_an_npz_may_leave_out_a_single_channel_and_hold_labels_as_columns(tmp_path):
    images, labels = IMAGES["mnist"], LABELS
    np.savez_compressed(
        tmp_path / "mnist.npz",
        x_train=images["train"][..., 0],
        y_train=labels["train"][:, None].astype(np.uint8),
        x_test=images["test"][..., 0],
        y_test=labels["test"][:, None],
    )
    check(load_dataset("mnist", str(tmp_path)), IMAGES["mnist"], LABELS)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"x_train": None}, r"\['x_train'\] are missing"),
        ({"x_train": ARRAYS["x_train"] / 255}, "uint8 images and integer labels, got float64"),
        ({"x_train": ARRAYS["x_train"][..., :1]}, r"shape \('n', 32, 32, 3\), got \(60, 32, 32, 1\)"),
        ({"x_train": ARRAYS["x_train"].transpose(0, 3, 1, 2)}, r"got \(60, 3, 32, 32\)"),
        ({"y_train": ARRAYS["y_train"][:-1]}, r"a label for each.*\(59,\)"),
        ({"y_test": ARRAYS["y_test"] + 1}, "must be 0 to 9, got 1 to 10"),
        ({"x_test": ARRAYS["x_test"][:0], "y_test": ARRAYS["y_test"][:0]}, "at least one"),
    ],
)  # fmt: skip
def test_an_npz_with_other_arrays_is_told_what_would_be_right(tmp_path, change, expected):
    arrays = {name: value for name, value in (ARRAYS | change).items() if value is not None}
    file = tmp_path / "cifar10.npz"
    np.savez(file, **arrays)
    with pytest.raises(ValueError, match=expected):
        load_dataset("cifar10", str(tmp_path))
    assert str(file) in message("cifar10", tmp_path)


@pytest.mark.parametrize("kept", [0, 100, 100_000, "other bytes", "one array"])
def test_an_npz_that_is_none_or_is_cut_off_is_one_line(tmp_path, kept):
    file = tmp_path / "cifar10.npz"
    np.savez(file, **ARRAYS)
    if kept == "other bytes":
        file.write_bytes(b"abc" * 1000)
    elif kept == "one array":
        with file.open("wb") as opened:
            np.save(opened, LABELS["test"])
    else:
        os.truncate(file, kept)
    assert "not a whole .npz file" in message("cifar10", tmp_path)


def test_no_data_is_one_line_with_the_command_to_run(tmp_path):
    assert message("cifar10", tmp_path) == (
        f"`data_dir` holds no prepared cifar10, looked in {tmp_path}; run: "
        f"python -m train.prepare cifar10 --data_dir={tmp_path}"
    )
    assert "does not exist" in message("cifar10", tmp_path / "none.npz")


def test_an_unknown_dataset_is_told_those_that_are_known(tmp_path):
    with pytest.raises(
        ValueError, match=r"`dataset` must be one of \('digits', 'mnist'.*got 'svhn'"
    ):
        load_dataset("svhn", str(tmp_path))


def shard(folder):
    return folder / "cifar10-train.array_record-00001-of-00002"


def overwrite(file, at):
    content = bytearray(file.read_bytes())
    content[at : at + 400] = bytes(400)
    file.write_bytes(content)


DAMAGES = {
    "a shard is missing": (
        lambda folder: shard(folder).unlink(),
        "1 of 4 files are missing, cifar10-train.array_record-00001-of-00002 first",
    ),
    "a shard is cut off": (lambda folder: os.truncate(shard(folder), 100_000), "cannot be read"),
    "a shard is empty": (lambda folder: os.truncate(shard(folder), 0), "cannot be read"),
    "bytes are overwritten": (lambda folder: overwrite(shard(folder), 30_000), "cannot be read"),
    "a shard is another's": (
        lambda folder: shutil.copy(folder / "cifar10-test.array_record-00000-of-00002", shard(folder)),
        "cannot be read",
    ),
    "no description": (
        lambda folder: (folder / "dataset_info.json").unlink(),
        "dataset_info.json cannot be read",
    ),
    "half a description": (
        lambda folder: os.truncate(folder / "dataset_info.json", 40),
        "dataset_info.json cannot be read",
    ),
    "no features": (lambda folder: (folder / "features.json").unlink(), "Cannot restore"),
    "half of the features": (lambda folder: os.truncate(folder / "features.json", 40), ""),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line_that_names_it(copy, damage):
    folder = copy / "cifar10" / "1.0.0"
    harm, expected = DAMAGES[damage]
    harm(folder)
    text = message("cifar10", copy)
    assert f"{folder} is incomplete or damaged" in text
    assert expected in text
    assert f"run: python -m train.prepare cifar10 --data_dir={copy}" in text


def test_a_folder_in_another_format_is_sent_to_another_folder(copy):
    file = copy / "cifar10" / "1.0.0" / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fileFormat": "tfrecord"}))
    assert "is prepared as tfrecord, which needs TensorFlow" in message("cifar10", copy)


def test_images_of_another_size_or_no_images_are_named(tmp_path):
    small = {name: images[:, :28, :28] for name, images in IMAGES["cifar10"].items()}
    prepare_small(tmp_path, "cifar10", small, LABELS)
    assert "record 0 holds an image of (28, 28)" in message("cifar10", tmp_path)


def test_one_more_entry_of_the_table_is_a_dataset(tmp_path, monkeypatch):
    images = {"train": pixels(0, 12, 16, 20, 3), "test": pixels(1, 6, 16, 20, 3)}
    labels = {"train": np.arange(12) % 3, "test": np.arange(6) % 3}
    entry = sources.Entry((16, 20, 3), 3, (0.5, 0.5, 0.5), (0.2, 0.2, 0.4))
    monkeypatch.setitem(sources.TABLE, "mine", entry)
    prepare_small(tmp_path, "mine", images, labels)
    dataset = load_dataset("mine", str(tmp_path))
    check(dataset, images, labels)
    assert dataset.mean == (127.5, 127.5, 127.5)
    assert dataset.deviation == (51, 51, 102)


def test_the_digits_come_without_data_and_are_split_for_good(tmp_path):
    digits = load_dataset("digits", str(tmp_path))
    assert digits.train.images.shape == (1198, 8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.images.max() == 16
    assert np.bincount(digits.test.labels).min() >= 54
    assert digits.mean == (pytest.approx(digits.train.images.mean()),)
    assert digits.deviation == (pytest.approx(digits.train.images.std()),)
    held = [hold_out(digits, fold) for fold in range(4)]
    assert {(len(part.train), len(part.test)) for part in held} == {(897, 299)}
    assert {(part.mean, part.deviation) for part in held} == {(digits.mean, digits.deviation)}
    seen = np.concatenate([part.test.images for part in held])
    assert sorted(seen.reshape(1196, -1).tolist()) == sorted(
        digits.train.images[:1196].reshape(1196, -1).tolist()
    )


def test_a_dataset_cannot_be_changed_in_place():
    digits = load_dataset("digits")
    with pytest.raises(dataclasses.FrozenInstanceError):
        digits.num_classes = 3  # pyright: ignore[reportAttributeAccessIssue]


SIZES = {"mnist": (60000, 10000), "fashion_mnist": (60000, 10000), "cifar10": (50000, 10000)}


@pytest.mark.skipif(
    not REAL, reason="real datasets are not shipped: NETDECONV_DATA names their folder"
)
def test_the_real_datasets_are_read_in_seconds_and_have_the_constants_of_the_table():
    found = [name for name in SIZES if prepared.find(name, REAL)]
    assert found
    for name in found:
        start = time.process_time()
        dataset = load_dataset(name, REAL)
        assert time.process_time() - start < 20
        assert (len(dataset.train), len(dataset.test)) == SIZES[name]
        assert len(set(np.bincount(dataset.test.labels))) == 1 or name == "mnist"
        images = dataset.train.images
        for channel, (mean, deviation) in enumerate(
            zip(dataset.mean, dataset.deviation, strict=True)
        ):
            measured = images[..., channel]
            assert abs(measured.mean(dtype=np.float64) - mean) < 0.02
            assert abs(measured.std(dtype=np.float64) - deviation) < 0.02
