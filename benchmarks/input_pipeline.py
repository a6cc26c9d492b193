"""How many photos a second are read, decoded and cropped: benchmarks/results/input_pipeline.json.

    python -m benchmarks.input_pipeline --data_dir=~/tensorflow_datasets [--rounds=7] [--images=1024]

Runs `Streamed` on the training photos of a prepared imagenet2012 (a few are written out again and again until
they are thousands), and beside it the same reading and cropping through grain's own iterator, and with
OpenCV's threads on. The variants take turns, round after round; each is warm before it is timed. Images a
second depend on what else the machine is doing: the seconds of processor time are kept too, and the load.
Then each stage alone, in one thread.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from train import metrics
from train.data import Streamed, crops, prepared

RESULTS = Path(__file__).parent / "results" / "input_pipeline.json"
PACKAGES = ("opencv-python-headless", "grain", "array_record", "tensorflow-datasets")
NAME, SIZE, BATCH = "imagenet2012", 224, 128
ENOUGH = 2048
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@contextlib.contextmanager
def streamed(data_dir: str, threads: int) -> Iterator[Callable[[], Any]]:
    source = Streamed(NAME, data_dir, batch_size=BATCH, eval_batch_size=BATCH, num_threads=threads)
    feeds = source.train_feeds(0, 0)
    try:
        yield lambda: next(feeds)
    finally:
        source.close()


@contextlib.contextmanager
def opencv_threads(data_dir: str, threads: int) -> Iterator[Callable[[], Any]]:
    with streamed(data_dir, threads) as take:
        cv2.setNumThreads(threads)
        try:
            yield take
        finally:
            cv2.setNumThreads(0)


@contextlib.contextmanager
def through_grain(data_dir: str, threads: int) -> Iterator[Callable[[], Any]]:
    split = training_photos(data_dir)

    def example(index: int, rng: np.random.Generator) -> dict[str, Any]:
        record = split[index]
        out = np.empty((SIZE, SIZE, 3), np.uint8)
        crops.training_crop(record["image"], SIZE, rng, scale=SCALE, ratio=RATIO, out=out)
        return {"images": out, "labels": np.int32(record["label"]), "weights": np.float32(1)}

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * BATCH)
    order = grain.MapDataset.range(len(split)).seed(0).shuffle().repeat()
    iterator: Any = iter(order.random_map(example).to_iter_dataset(options).batch(BATCH))
    try:
        yield lambda: next(iterator)
    finally:
        iterator.close()


VARIANTS = {
    "Streamed": streamed,
    "grain's iterator": through_grain,
    "Streamed, OpenCV's threads on": opencv_threads,
}


def training_photos(data_dir: str) -> prepared.Split:
    folder = folder_of(data_dir)
    return prepared.Split(folder, prepared.open_folder(folder), "train")


def folder_of(data_dir: str) -> Path:
    folder = prepared.find(NAME, data_dir)
    if folder is None:
        raise prepared.missing(NAME, data_dir)
    return folder


def repeated(folder: Path, data_dir: Path) -> int:
    """Write a dataset of at least `ENOUGH` training photos, those of `folder` in turns; return how often.

    grain's shuffle walks through at least 2^16 indices for those in range: 0.3 ms a draw of 60 photos, which
    no set of the size of ImageNet has.
    """
    files = prepared.open_folder(folder).info.splits["train"].filepaths
    records = list(ArrayRecordDataSource([os.fspath(file) for file in files]))
    times = -(-ENOUGH // len(records))
    to = data_dir / NAME / folder.name
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*-train.array_record*"))
    to.chmod(0o755)
    info = json.loads((folder / "dataset_info.json").read_text())
    for split in info["splits"]:
        if split["name"] == "train":
            split["shardLengths"] = [str(times * len(records))]
    (to / "dataset_info.json").unlink()
    (to / "dataset_info.json").write_text(json.dumps(info))
    writer = ArrayRecordWriter(
        os.fspath(to / f"{NAME}-train.array_record-00000-of-00001"), "group_size:1"
    )
    for record in times * records:
        writer.write(record)
    writer.close()
    return times


def measure(take: Callable[[], Any], images: int) -> dict[str, float]:
    """Time batches until `images` are there; what is prefetched is full before and after."""
    take()
    took, cpu, start = 0, time.process_time(), time.perf_counter()
    while took < images:
        took += len(take()["labels"])
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"images_per_second": took / seconds, "images_per_core_second": took / cpu}


def stages(split: prepared.Split) -> dict[str, float]:
    """Return the milliseconds of one thread's processor time that an image spends in each stage."""
    encoded = [record["image"] for record in split.records(range(min(len(split), 256)))]
    images: list[Any] = [crops.decode(data) for data in encoded]
    rng = np.random.default_rng(0)
    rectangles = [crops.draw(rng, image.shape[:2], SCALE, RATIO) for image in images]
    parts = [
        image[r.top : r.top + r.height, r.left : r.left + r.width]
        for image, r in zip(images, rectangles, strict=True)
    ]
    out = np.empty((SIZE, SIZE, 3), np.uint8)

    def resize(image: np.ndarray, method: int, size: tuple[int, int] = (SIZE, SIZE)) -> None:
        cv2.resize(image, size, interpolation=method)

    def whole(image: np.ndarray, part: np.ndarray) -> None:
        height, width = (
            round(side * SIZE / cropped)
            for side, cropped in zip(image.shape[:2], part.shape[:2], strict=True)
        )
        resize(image, cv2.INTER_LINEAR, (width, height))

    work: dict[str, Callable[[int], object]] = {
        "read the record": lambda i: split[i],
        "decode": lambda i: crops.decode(encoded[i]),
        "decode at half the resolution": lambda i: crops.decode(encoded[i], crops.REDUCED[2]),
        "draw the crop": lambda i: crops.draw(rng, images[i].shape[:2], SCALE, RATIO),
        "resize the crop, INTER_LINEAR": lambda i: resize(parts[i], cv2.INTER_LINEAR),
        "resize the crop, INTER_AREA": lambda i: resize(parts[i], cv2.INTER_AREA),
        "resize the image, then crop": lambda i: whole(images[i], parts[i]),
        "decode and crop, all of it": lambda i: crops.training_crop(
            encoded[i], SIZE, rng, scale=SCALE, ratio=RATIO, out=out
        ),
    }
    result = {}
    for name, call in work.items():
        seconds = []
        for _ in range(5):
            start = time.thread_time()
            for i in range(len(encoded)):
                call(i)
            seconds.append(time.thread_time() - start)
        result[name] = round(1e3 * statistics.median(seconds) / len(encoded), 4)
    return result


def summary(values: list[float]) -> dict[str, Any]:
    rounded = [round(value, 1) for value in values]
    return {
        "median": round(statistics.median(values), 1),
        "least": min(rounded),
        "most": max(rounded),
        "rounds": rounded,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=1024)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as data_dir:
        times = repeated(folder_of(args.data_dir), Path(data_dir))
        result = run(data_dir, args.rounds, args.images)
    result["photos"]["each_written_times"] = times
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def run(data_dir: str, rounds: int, images: int) -> dict[str, Any]:
    split = training_photos(data_dir)
    photos = [split[i]["image"] for i in range(min(len(split), 256))]
    shapes = [crops.jpeg_shape(photo) or (0, 0) for photo in photos]
    threads = len(os.sched_getaffinity(0))
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    load = []
    for turn in range(rounds):
        load.append(round(os.getloadavg()[0], 1))
        for name in list(VARIANTS)[:: 1 if turn % 2 == 0 else -1]:
            with VARIANTS[name](data_dir, threads) as take:
                measured[name].append(measure(take, images))
            sys.stdout.write(f"round {turn + 1}: {name}: {measured[name][-1]}\n")
            sys.stdout.flush()
    return {
        "what": "read, decode, random-resized crop to 224x224, flip, batch; one process, threads",
        "command": "python -m benchmarks.input_pipeline --data_dir=DATA",
        "environment": metrics.environment() | {name: version(name) for name in PACKAGES},
        "photos": {
            "count": len(split),
            "mean_kilobytes": round(float(np.mean([len(photo) for photo in photos])) / 1e3, 1),
            "mean_pixels": round(float(np.mean([h * w for h, w in shapes]))),
        },
        "threads": threads,
        "batch_size": BATCH,
        "images_a_round": images,
        "load_average_before_each_round": load,
        "variants": {
            name: {key: summary([row[key] for row in rows]) for key in rows[0]}
            for name, rows in measured.items()
        },
        "stages_milliseconds_of_one_core": stages(split),
    }


if __name__ == "__main__":
    main()
