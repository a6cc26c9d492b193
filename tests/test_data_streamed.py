"""Streamed photos: the same examples whatever the number of processes, each counted once, errors by name."""

import collections
import io
import itertools
import os
import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import cv2
import jax
import numpy as np
import pytest
from PIL import Image
from prepared_folders import REAL, encode, prepare_photos

from train.data import Streamed, crops, prepared
from train.data.streamed import DEVIATION, MEAN

TRAIN, TEST = 23, 10
SMALL: dict[str, Any] = {
    "batch_size": 6,
    "eval_batch_size": 4,
    "image_size": 32,
    "resize": 36,
    "num_threads": 2,
}


def colour(label):
    return np.array([10 * label, 250 - 10 * label, 40 + (70 * label) % 150])


def photo(label, height=60, width=80):
    """A smooth image whose mean is its label's colour."""
    y, x = np.mgrid[:height, :width]
    wave = 9 * np.sin(y / 9 + label) * np.cos(x / 7)
    return np.clip(colour(label) + wave[..., None], 0, 255).astype(np.uint8)


def record(label, split="train"):
    image = photo(label, 60 + 3 * label, 110 - 2 * label)
    return {"image": encode(image, ".jpg"), "label": label, "file_name": f"{split}_{label}.JPEG"}


RECORDS = {
    "train": [record(i) for i in range(TRAIN)],
    "validation": [record(i, "val") for i in range(TEST)],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_photos(folder, RECORDS, num_shards=2)
    return str(folder)


@pytest.fixture
def stream(data_dir):
    """Make inputs; none leaves a thread behind."""
    before = set(threading.enumerate())
    made = []

    def make(folder=data_dir, **changes):
        made.append(Streamed("imagenet2012", folder, **(SMALL | changes)))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert set(threading.enumerate()) <= before


def damaged(tmp_path, split, *labels):
    """A folder in which the images of `labels` are cut off."""
    records = RECORDS | {
        split: [
            r | {"image": r["image"][:200]} if r["label"] in labels else r for r in RECORDS[split]
        ]
    }
    prepare_photos(tmp_path, records)
    return str(tmp_path)


def train(source, first, n, seed=0):
    return list(itertools.islice(source.train_feeds(seed, first), n))


def joined(feeds):
    """Put what several processes hold together, as the devices see it."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*feeds, strict=True)
    ]


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert sorted(a) == sorted(b) == ["images", "labels", "weights"]
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_it_says_what_it_holds(stream):
    source = stream()
    assert (source.train_size, source.test_size, source.num_classes) == (TRAIN, TEST, 1000)
    assert source.image_shape == (32, 32, 3)
    assert source.arrays is None


def test_every_epoch_shows_each_example_once_in_another_order_and_with_other_crops(stream):
    feeds = train(stream(), 0, TRAIN)  # six epochs
    labels = np.concatenate([feed["labels"] for feed in feeds]).reshape(6, TRAIN)
    images = np.concatenate([feed["images"] for feed in feeds]).reshape(6, TRAIN, 32, 32, 3)
    for epoch in labels:
        assert sorted(epoch) == list(range(TRAIN))
    assert len({tuple(epoch) for epoch in labels}) == 6
    first, second = (images[epoch][np.argsort(labels[epoch])] for epoch in (0, 1))
    assert (first != second).any(axis=(1, 2, 3)).sum() > TRAIN * 0.9
    assert all((feed["weights"] == 1).all() for feed in feeds)


def test_images_are_rgb_and_keep_their_labels(stream):
    source = stream()
    for feed in [*train(source, 0, 4), *source.test_feeds()]:
        real = feed["weights"] > 0
        expected = np.stack([colour(label) for label in feed["labels"][real]])
        means = feed["images"][real].mean(axis=(1, 2))
        assert np.abs(means - expected).max() < 14  # the wave's height, and what a JPEG loses


@pytest.mark.parametrize("processes", [2, 3])
def test_global_batches_are_the_same_on_several_processes(stream, processes):
    whole = stream(batch_size=6, eval_batch_size=6)
    parts = [
        stream(batch_size=6, eval_batch_size=6, process_index=i, process_count=processes, num_threads=i + 1)
        for i in range(processes)
    ]  # fmt: skip
    assert_same(train(whole, 0, 9), joined([train(part, 0, 9) for part in parts]))
    assert_same(list(whole.test_feeds()), joined([list(part.test_feeds()) for part in parts]))


def test_it_resumes_at_any_step_with_the_same_examples(stream):
    source = stream()
    feeds = train(source, 0, 12)
    for first in (1, 5, 11):
        assert_same(train(stream(prefetch=3), first, 12 - first), feeds[first:])
    assert_same(train(source, 0, 3), feeds[:3])  # iterators do not disturb each other


def test_another_seed_is_another_order(stream):
    source = stream()
    orders = [
        np.concatenate([feed["labels"] for feed in train(source, 0, 4, seed)]).tolist()
        for seed in (0, 1, 2**32 - 1)
    ]
    assert len(set(map(tuple, orders))) == 3
    with pytest.raises(ValueError, match=r"`seed` must be 0 to 2\^32 - 1, got -1"):
        source.train_feeds(-1, 0)


def test_a_late_step_is_reached_without_reading_what_comes_before_it(stream, monkeypatch):
    reads = []
    read = prepared.Split.__getitem__
    monkeypatch.setattr(
        prepared.Split, "__getitem__", lambda self, index: reads.append(index) or read(self, index)
    )
    source = stream(prefetch=2)
    start = time.perf_counter()
    (feed,) = train(source, 10**12, 1)
    source.close()
    assert time.perf_counter() - start < 5
    assert len(feed["labels"]) == 6
    assert len(reads) <= 3 * 6


@pytest.mark.parametrize(("size", "processes"), [(4, 1), (4, 2), (6, 3), (10, 1), (64, 2)])
def test_evaluation_counts_each_example_once_over_all_processes(stream, size, processes):
    feeds = [
        list(stream(eval_batch_size=size, process_index=i, process_count=processes).test_feeds())
        for i in range(processes)
    ]
    assert {len(part) for part in feeds} == {-(-TEST // size)}
    rows = [feed for part in feeds for feed in part]
    assert {len(feed["labels"]) for feed in rows} == {size // processes}
    weights = np.concatenate([feed["weights"] for feed in rows])
    labels = np.concatenate([feed["labels"] for feed in rows])
    assert sorted(labels[weights == 1]) == list(range(TEST))
    assert set(weights[weights != 1]) <= {0}


def test_evaluation_images_are_the_central_crops(stream):
    expected = np.empty((32, 32, 3), np.uint8)
    for feed in stream().test_feeds():
        for image, label, weight in zip(
            *(feed[n] for n in ("images", "labels", "weights")), strict=True
        ):
            if weight:
                crops.central_crop(
                    RECORDS["validation"][label]["image"], 32, resize=36, out=expected
                )
                np.testing.assert_array_equal(image, expected)  # fmt: skip


def test_batches_are_normalized_inside_jit(stream):
    source = stream()
    (feed,) = train(source, 0, 1)
    *_, last = source.test_feeds()
    for batch, of in (
        (jax.jit(source.train_batch)(None, feed, jax.random.key(0), 0), feed),
        (jax.jit(source.test_batch)(None, last), last),
    ):
        assert batch.images.dtype == batch.weights.dtype == np.float32
        assert batch.labels.dtype == np.int32
        expected = (of["images"] - np.array(MEAN)) / np.array(DEVIATION)
        np.testing.assert_allclose(batch.images, expected, atol=1e-5)
        np.testing.assert_array_equal(batch.labels, of["labels"])
        np.testing.assert_array_equal(batch.weights, of["weights"])
    assert last["weights"].sum() == TEST % 4


def test_a_batch_over_eight_devices_needs_no_communication(stream):
    source = stream(batch_size=16)
    (feed,) = train(source, 0, 1)
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    feed = jax.device_put(feed, jax.NamedSharding(mesh, jax.P("data")))
    compiled = jax.jit(source.train_batch).lower(None, feed, jax.random.key(0), 0).compile()
    batch = compiled(None, feed, jax.random.key(0), 0)
    np.testing.assert_array_equal(batch.labels, feed["labels"])
    program = compiled.as_text() or ""
    assert "f32[2,32,32,3]" in program
    for word in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert word not in program


def test_a_bad_training_image_is_an_error_that_names_it(stream, tmp_path):
    source = stream(damaged(tmp_path, "train", 7))
    with pytest.raises(
        ValueError, match=r"image 'train_7.JPEG', record 7 of 'train'.*bad_images=\"skip\""
    ):
        train(source, 0, 5)


def test_a_bad_evaluation_image_is_an_error_that_names_it(stream, tmp_path):
    source = stream(damaged(tmp_path, "validation", 9))
    with pytest.raises(ValueError, match=r"image 'val_9.JPEG', record 9 of 'validation'"):
        list(source.test_feeds())


def test_skipped_training_images_are_replaced_by_the_next_and_counted(stream, tmp_path):
    folder = damaged(tmp_path, "train", 7, 8, 22)
    source = stream(folder, batch_size=TRAIN, bad_images="skip", prefetch=1)
    clean = stream(batch_size=TRAIN)
    feeds = source.train_feeds(0, 0)
    for reference in train(clean, 0, 3):
        feed = next(feeds)
        next_good = {7: 9, 8: 9, 22: 0}
        expected = [next_good.get(label, label) for label in reference["labels"]]
        assert feed["labels"].tolist() == expected
        assert (feed["weights"] == 1).all()
        good = ~np.isin(reference["labels"], list(next_good))
        np.testing.assert_array_equal(feed["images"][good], reference["images"][good])
        assert np.abs(feed["images"].mean(axis=(1, 2)) - [colour(x) for x in expected]).max() < 14
    source.close()
    assert set(source.skipped) == {"train_7.JPEG", "train_8.JPEG", "train_22.JPEG"}
    assert source.skipped["train_8.JPEG"] > source.skipped["train_22.JPEG"] >= 3


def test_skipping_is_the_same_on_two_processes(stream, tmp_path):
    folder = damaged(tmp_path, "train", 7, 8, 22)
    whole = stream(folder, bad_images="skip")
    parts = [stream(folder, bad_images="skip", process_index=i, process_count=2) for i in range(2)]
    assert_same(train(whole, 3, 8), joined([train(part, 3, 8) for part in parts]))


def test_skipped_evaluation_images_weigh_nothing_and_are_counted(stream, tmp_path):
    source = stream(damaged(tmp_path, "validation", 0, 9), bad_images="skip")
    feeds = list(source.test_feeds())
    counted = [label for f in feeds for label in f["labels"][f["weights"] == 1]]
    assert counted == list(range(1, 9))
    assert source.skipped == collections.Counter({"val_0.JPEG": 1, "val_9.JPEG": 1})


def test_a_set_without_a_single_good_image_ends(stream, tmp_path):
    source = stream(damaged(tmp_path, "train", *range(TRAIN)), bad_images="skip")
    with pytest.raises(ValueError, match="holds no image that can be decoded"):
        train(source, 0, 1)


def test_a_damaged_file_is_one_line_even_where_bad_images_are_skipped(stream, tmp_path):
    folder = prepare_photos(tmp_path, RECORDS)
    os.truncate(folder / "imagenet2012-train.array_record-00000-of-00001", 70_000)
    source = stream(str(tmp_path), bad_images="skip")
    with pytest.raises(ValueError, match="is incomplete or damaged: 'train': record") as caught:
        train(source, 0, 5)
    assert "\n" not in str(caught.value)


def test_no_data_is_one_line_with_the_command_to_run(tmp_path):
    with pytest.raises(
        ValueError, match=r"run: python -m train.prepare imagenet2012 --data_dir="
    ) as caught:
        Streamed("imagenet2012", str(tmp_path), **SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch_size": 7, "process_count": 2}, "`batch_size` must be a multiple of the 2 processes"),
        ({"eval_batch_size": 0}, "`eval_batch_size` must be"),
        ({"process_count": 2, "process_index": 2}, "`process_index` must be 0 to 1, got 2"),
        ({"image_size": 0}, "`image_size` must be at least 1"),
        ({"num_threads": 0}, "`num_threads` must be at least 1"),
        ({"prefetch": 0}, "`prefetch` must be at least 1"),
        ({"resize": 31}, "`resize` must be at least `image_size`, 32, got 31"),
        ({"scale": (0.5, 1.5)}, r"`scale` must be .*got \(0.5, 1.5\)"),
        ({"ratio": (2, 1)}, r"`ratio` must be .*got \(2, 1\)"),
        ({"bad_images": "drop"}, '`bad_images` must be "raise" or "skip", got \'drop\''),
        ({"test_split": "test"}, "'test' of .*is no split with examples, which are .*'validation': 10"),
        ({"train_split": "train[:0]"}, r"'train\[:0\]' of .*is no split with examples"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named(data_dir, changes, expected):
    with pytest.raises(ValueError, match=expected):
        Streamed("imagenet2012", data_dir, **(SMALL | changes))


def test_part_of_a_split_will_do(stream):
    source = stream(train_split="train[5:8]", test_split="train[:2]")
    assert (source.train_size, source.test_size) == (3, 2)
    assert set(train(source, 0, 1)[0]["labels"]) == {5, 6, 7}


def test_close_ends_the_threads_in_the_middle_of_everything(data_dir):
    before = set(threading.enumerate())
    source = Streamed("imagenet2012", data_dir, **{**SMALL, "batch_size": 512, "prefetch": 4})
    feeds = source.train_feeds(0, 0)
    next(feeds)
    assert len(set(threading.enumerate()) - before) == 2
    source.close()
    source.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises((RuntimeError, CancelledError)):
        collections.deque(feeds)


def test_opencv_starts_no_threads_of_its_own(stream):
    stream()
    assert cv2.getNumThreads() == 1


# --- crops ---


def as_file(image, mode, extension, **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, extension, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "extension", "tolerance"),
    [
        ("RGB", "JPEG", 2), ("CMYK", "JPEG", 4), ("L", "JPEG", 2), ("RGB", "PNG", 0), ("RGBA", "PNG", 0),
        ("L", "PNG", 0), ("P", "PNG", 12), ("RGB", "BMP", 0),
    ],
)  # fmt: skip
def test_whatever_imagenet_has_becomes_rgb(mode, extension, tolerance):
    image = photo(5, 224, 300)
    if mode == "L":
        image = np.repeat(np.asarray(Image.fromarray(image).convert("L"))[..., None], 3, axis=-1)
    options = {"quality": 95} if extension == "JPEG" else {}
    encoded = as_file(image, mode, extension, **options)
    out = np.empty((224, 224, 3), np.uint8)
    assert crops.central_crop(encoded, 224, resize=224, out=out)
    assert np.abs(out.astype(int) - image[:, 38:262]).mean() <= tolerance
    rng = np.random.default_rng(0)
    assert crops.training_crop(
        encoded, 64, rng, scale=(1, 1), ratio=(1, 1.5), out=out[:64, :64].copy()
    )


def test_a_progressive_jpeg_and_one_with_a_noted_orientation_are_read_as_they_lie():
    image = photo(5, 90, 120)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    plain, turned, progressive = (
        as_file(image, "RGB", "JPEG", **options) for options in ({}, {"exif": exif}, {"progressive": True})
    )  # fmt: skip
    assert crops.jpeg_shape(plain) == crops.jpeg_shape(turned) == (90, 120)
    assert crops.jpeg_shape(progressive) == (90, 120)
    assert crops.jpeg_shape(as_file(image, "RGB", "PNG")) is None
    out = [np.empty((64, 64, 3), np.uint8) for _ in range(2)]
    for encoded, to in zip((plain, turned), out, strict=True):
        assert crops.central_crop(encoded, 64, resize=64, out=to)
    np.testing.assert_array_equal(out[0], out[1])


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 20, 300, -100, -2])
def test_what_is_cut_off_is_no_image(kept):
    encoded = as_file(photo(3, 100, 100), "RGB", "JPEG")[:kept]
    out = np.full((32, 32, 3), 77, np.uint8)
    rng = np.random.default_rng(0)
    assert not crops.central_crop(encoded, 32, resize=32, out=out)
    assert not crops.training_crop(encoded, 32, rng, scale=(0.5, 1), ratio=(1, 1), out=out)
    assert (out == 77).all()


@pytest.mark.parametrize(
    ("side", "factor"),
    [(40, 1), (63, 1), (64, 2), (127, 2), (128, 4), (255, 4), (256, 8), (700, 8)],
)
def test_a_crop_is_decoded_smaller_only_where_it_is_that_much_larger(monkeypatch, side, factor):
    seed = next(seed for seed in range(9) if not _mirrors(seed))
    flags = []
    decode = crops.decode
    monkeypatch.setattr(crops, "decode", lambda e, f: flags.append(f) or decode(e, f))
    y, x = np.mgrid[:side, :side] / side
    image = np.stack([255 * y, 255 * x, 100 + 0 * x], -1).astype(np.uint8)
    out = np.empty((32, 32, 3), np.uint8)
    encoded = as_file(image, "RGB", "JPEG", quality=95)
    rng = np.random.default_rng(seed)
    assert crops.training_crop(encoded, 32, rng, scale=(1, 1), ratio=(1, 1), out=out)
    assert flags == [crops.REDUCED.get(factor, crops.FULL)]
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX))
    assert np.abs(out.astype(int) - expected).max() <= 8


def _mirrors(seed):
    """Whether the generator of `seed` mirrors the first crop, found on an image with a dark left half."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = 255
    out = np.empty((32, 32, 3), np.uint8)
    rng = np.random.default_rng(seed)
    crops.training_crop(encode(image), 32, rng, scale=(1, 1), ratio=(1, 1), out=out)
    return bool(out[0, 0, 0] > 128)


def test_half_of_the_images_are_mirrored():
    assert 170 < sum(_mirrors(seed) for seed in range(400)) < 230


def test_crops_have_the_areas_and_shapes_asked_for_and_lie_everywhere():
    rng = np.random.default_rng(0)
    drawn = np.array([crops.draw(rng, (300, 400), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    top, left, height, width = drawn.T
    assert top.min() == left.min() == 0
    assert (top + height).max() == 300
    assert (left + width).max() == 400
    area, shape = height * width / 120_000, width / height
    assert 0.079 < area.min() < 0.1
    assert area.max() > 0.95
    assert 0.74 < shape.min() < 0.76
    assert 1.32 < shape.max() < 1.345
    small = area < 0.5  # these always fit, so that what was drawn is what came
    assert abs(np.log(shape[small]).mean()) < 0.02
    assert abs(area[small].mean() - 0.29) < 0.01
    assert abs((left / (400 - width))[small].mean() - 0.5) < 0.02


@pytest.mark.parametrize("shape", [(10, 400), (400, 10), (1, 1)])
def test_where_no_crop_fits_the_largest_central_one_is_taken(shape):
    crop = crops.draw(np.random.default_rng(0), shape, (1, 1), (3 / 4, 4 / 3))
    height, width = shape
    assert 3 / 4 - 0.1 <= crop.width / crop.height <= 4 / 3 + 0.1
    assert min(crop.height, crop.width) == min(shape) or min(crop.height, crop.width) >= 0.7 * min(
        shape
    )
    assert abs(2 * crop.top + crop.height - height) <= 1
    assert abs(2 * crop.left + crop.width - width) <= 1


@pytest.mark.skipif(
    not REAL, reason="real datasets are not shipped: NETDECONV_DATA names their folder"
)
def test_real_photos_are_cropped_as_pil_does_it():
    source = Streamed("imagenet2012", REAL, batch_size=16, eval_batch_size=8)
    feeds = list(source.test_feeds())
    (training,) = train(source, 0, 1)
    source.close()
    assert training["images"].shape == (16, 224, 224, 3)
    assert sum(feed["weights"].sum() for feed in feeds) == source.test_size
    folder = prepared.find("imagenet2012", REAL)
    assert folder is not None
    split = prepared.Split(folder, prepared.open_folder(folder), "validation")
    for index in range(source.test_size):
        image = Image.open(io.BytesIO(split[index]["image"])).convert("RGB")
        sides = [256 * side // min(image.size) for side in image.size]
        image = image.resize(sides, Image.Resampling.BILINEAR)
        left, top = (round((side - 224) / 2) for side in image.size)
        expected = np.asarray(image)[top : top + 224, left : left + 224]
        got = feeds[index // 8]["images"][index % 8]
        assert np.abs(got.astype(int) - expected).mean() < 4
