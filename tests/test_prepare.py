"""Preparing data: once, from what is checked to be there, and one line where it cannot be done."""

import contextlib
import importlib.util
import io
import socket
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from prepared_folders import encode, pixels, prepare_small

from train import prepare
from train.data import Streamed, prepared

ROOT = Path(__file__).parents[1]
PHOTOS = pixels(0, 12, 24, 32, 3)


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """A dataset that TFDS can prepare without TensorFlow; with `urls`, only after a download."""

    VERSION = tfds.core.Version("1.2.0")
    urls = ()

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(24, 32, 3)),
                    "label": tfds.features.ClassLabel(num_classes=3),
                }
            ),
        )

    @property
    def url_infos(self):
        return dict.fromkeys(self.urls)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(9), "test": self._generate_examples(3)}

    def _generate_examples(self, n):
        if n > len(PHOTOS):
            raise OSError("no space left\non this device")
        for i in range(n):
            yield i, {"image": io.BytesIO(encode(PHOTOS[i])), "label": i % 3}


@pytest.fixture
def tensorflow(monkeypatch):
    """A TensorFlow that is there, as far as the command can see; the tiny photos need none."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name == "tensorflow" else find(name)
    )


def run(capsys, *arguments):
    """Return exit status, and the last line of output and of errors."""
    status = prepare.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    last = [(text.strip().splitlines() or [""])[-1] for text in (out, err)]
    return status, *last


def test_a_dataset_is_prepared_once_and_can_be_streamed(tmp_path, tensorflow, capsys):
    status, out, _ = run(capsys, "tiny_photos", f"--data_dir={tmp_path}")
    assert status == 0
    folder = tmp_path / "tiny_photos" / "1.2.0"
    assert out == f"Prepared: {folder}, test 3, train 9"
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert [file for file in before if file.name.startswith("tiny_photos-train.array_record")]
    again = f"Already prepared: {folder}, test 3, train 9"
    assert run(capsys, "tiny_photos", f"--data_dir={tmp_path}") == (0, again, "")
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    sizes: dict[str, Any] = {"batch_size": 9, "eval_batch_size": 3, "image_size": 16, "resize": 16}
    source = Streamed("tiny_photos", str(tmp_path), test_split="test", **sizes)
    feed = next(iter(source.train_feeds(0, 0)))
    source.close()
    assert sorted(feed["labels"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_what_is_prepared_already_needs_no_tensorflow_and_if_damaged_is_named(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    labels = {"train": np.arange(6), "test": np.arange(6)}
    images = {"train": pixels(0, 6, 32, 32, 3), "test": pixels(0, 6, 32, 32, 3)}
    folder = prepare_small(tmp_path, "cifar10", images, labels)
    assert run(capsys, "cifar10", f"--data_dir={tmp_path}")[:2] == (
        0,
        f"Already prepared: {folder}, test 6, train 6",
    )
    (folder / "cifar10-test.array_record-00000-of-00001").unlink()
    status, _, err = run(capsys, "cifar10", f"--data_dir={tmp_path}")
    assert status == 1
    assert "is incomplete or damaged: 1 of 2 files are missing" in err


@pytest.mark.parametrize("package", ["tensorflow", "tensorflow_datasets"])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(tmp_path, package):
    program = f"""
import sys
sys.modules[{package!r}] = None
from train import prepare
sys.exit(prepare.main(["mnist", "--data_dir={tmp_path}"]))
"""
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert time.perf_counter() - start < 10
    assert result.returncode == 1
    assert result.stderr.splitlines()[0].startswith("prepare: preparing needs tensorflow")
    assert 'run: pip install ".[prepare]"' in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_dataset_that_tfds_does_not_know_is_named(tmp_path, tensorflow, capsys):
    status, _, err = run(capsys, "mnistt", f"--data_dir={tmp_path}")
    assert status == 1
    assert err == "prepare: TFDS cannot make 'mnistt': Dataset mnistt not found."


def test_without_a_network_it_is_one_line_at_once(tmp_path, tensorflow, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/photos.tar"
    monkeypatch.setattr(TinyPhotos, "urls", (url,))
    start = time.perf_counter()
    status, _, err = run(capsys, "tiny_photos", f"--data_dir={tmp_path}")
    assert time.perf_counter() - start < 5
    assert status == 1
    assert f"{url} cannot be reached" in err
    assert f"copy {tmp_path / 'tiny_photos' / '1.2.0'}" in err
    assert prepared.find("tiny_photos", str(tmp_path)) is None
    # What was downloaded before may be all that is needed.
    (tmp_path / "downloads").mkdir(exist_ok=True)
    (tmp_path / "downloads" / "photos.tar.INFO").touch()
    assert run(capsys, "tiny_photos", f"--data_dir={tmp_path}")[0] == 0


@pytest.mark.parametrize("answer", [200, 403])
def test_a_server_that_answers_anything_is_a_network(
    tmp_path, tensorflow, capsys, monkeypatch, answer
):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(answer)
            self.end_headers()

        def log_message(self, *args):
            del args

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(TinyPhotos, "urls", (f"http://127.0.0.1:{server.server_port}/a.tar",))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        status = run(capsys, "tiny_photos", f"--data_dir={tmp_path}")[0]
        server.shutdown()
        thread.join()
    assert asked == ["/a.tar"]
    assert status == 0


def test_what_fails_on_the_way_is_one_line_and_nothing_is_prepared(
    tmp_path, tensorflow, capsys, monkeypatch
):
    monkeypatch.setattr(
        TinyPhotos, "_split_generators", lambda self, _: {"train": self._generate_examples(99)}
    )
    status, _, err = run(capsys, "tiny_photos", f"--data_dir={tmp_path}")
    assert status == 1
    assert err == "prepare: tiny_photos could not be prepared: no space left"
    assert prepared.find("tiny_photos", str(tmp_path)) is None


def test_ctrl_c_is_130_and_nothing_is_prepared(tmp_path, tensorflow, capsys, monkeypatch):
    def interrupted(self, dl_manager):
        raise KeyboardInterrupt

    monkeypatch.setattr(TinyPhotos, "_split_generators", interrupted)
    status, _, err = run(capsys, "tiny_photos", f"--data_dir={tmp_path}")
    assert status == 130
    assert "run it again" in err
    assert prepared.find("tiny_photos", str(tmp_path)) is None


# --- ImageNet's archives ---

TRAIN, VAL = prepare.ARCHIVES


@pytest.mark.parametrize("there", [(), (TRAIN,), (VAL,)])
def test_missing_archives_are_named_with_where_to_get_them(tmp_path, capsys, there):
    for archive in there:
        (tmp_path / archive).touch()
    status, _, err = run(
        capsys, "imagenet2012", f"--data_dir={tmp_path}/data", f"--manual_dir={tmp_path}"
    )
    assert status == 1
    lost = " and ".join(archive for archive in (TRAIN, VAL) if archive not in there)
    assert err == (
        f"prepare: `manual_dir` lacks {lost}, looked in {tmp_path}; they are to be had at "
        "https://image-net.org/download-images for those who register."
    )


def test_the_default_manual_dir_is_that_of_tfds(tmp_path, capsys):
    _, _, err = run(capsys, "imagenet2012", f"--data_dir={tmp_path}")
    assert f"looked in {tmp_path / 'downloads' / 'manual'};" in err


def test_archives_that_are_cut_off_are_refused_unless_asked_for(tmp_path, capsys):
    for archive in prepare.ARCHIVES:
        (tmp_path / archive).write_bytes(b"abc")
    status, _, err = run(
        capsys, "imagenet2012", f"--data_dir={tmp_path}/data", f"--manual_dir={tmp_path}"
    )
    assert status == 1
    assert f"{tmp_path / TRAIN} has 3 bytes, the original 147897477120" in err
    prepare.check_archives(tmp_path, allow_partial=True)


def test_the_archives_sizes_are_those_that_tfds_has_recorded():
    path = Path(tfds.core.tfds_path("datasets/imagenet2012/checksums.tsv"))
    lines = [line.split() for line in path.read_text().splitlines()]
    recorded = {url.rpartition("/")[2]: int(size) for url, size, _ in lines}
    assert prepare.ARCHIVES.items() <= recorded.items()


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="TFDS's ImageNet builder needs TensorFlow, which only the extra `prepare` installs",
)
def test_imagenet_comes_out_of_its_archives(tmp_path, capsys):
    synsets = ["n01440764", "n01443537"]
    train = {
        f"{synset}_{i}.JPEG": encode(PHOTOS[4 * k + i], ".jpg")
        for k, synset in enumerate(synsets)
        for i in range(4)
    }
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": encode(PHOTOS[i], ".jpg") for i in (1, 2)}
    with tarfile.open(tmp_path / TRAIN, "w") as archive:
        for synset in synsets:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as of_synset:
                for name in train:
                    if name.startswith(synset):
                        add(of_synset, name, train[name])
            add(archive, f"{synset}.tar", inner.getvalue())
    with tarfile.open(tmp_path / VAL, "w") as archive:
        for name, content in val.items():
            add(archive, name, content)
    with contextlib.redirect_stderr(io.StringIO()):
        status, out, _ = run(
            capsys, "imagenet2012", f"--data_dir={tmp_path}", f"--manual_dir={tmp_path}", "--allow_partial"
        )  # fmt: skip
    assert status == 0
    assert out.endswith("train 8, validation 2")
    folder = prepared.find("imagenet2012", str(tmp_path))
    assert folder is not None
    split = prepared.Split(folder, prepared.open_folder(folder), "train")
    found = {record["file_name"].decode(): record for record in split.records(range(8))}
    assert {name: record["image"] for name, record in found.items()} == train
    assert {record["label"] for name, record in found.items() if name.startswith("n01443537")} == {
        1
    }
    source = Streamed("imagenet2012", str(tmp_path), batch_size=4, eval_batch_size=2)
    (feed,) = source.test_feeds()
    source.close()
    assert (feed["weights"] == 1).all()
