"""However the work is shared out, a run has the same numbers: devices, jit or pmap, processes."""

import signal
import socket
from typing import Any

import jax
import numpy as np
import pytest
from prepared_folders import encode, prepare_photos
from trainer_process import TrainerProcess, checkpoints, figures, rows

from netdeconv_jax.interop.weights import load_weights
from train import config as configs
from train import data, loop, parallel
from train.output import Output

# Rounding that flips a ReLU changes a gradient by a thousandth, and each such step makes more of them flip: a
# cascade, at a rate of 0.001 already. At this rate it dies out, while whatever is shared out wrongly shows
# in the statistics at any rate, and in the parameters by the size of their steps.
RATE = 1e-4
SETTINGS = {
    "epochs": 1,
    "batch_size": 56,  # 21 steps an epoch
    "eval_batch_size": 104,  # six batches, the last of them with 25 examples of padding
    "whitening.block_size": 4,
    "optimizer.learning_rate": RATE,
}
STEPS = 20


class Watch(Output):
    """Keeps the state after 20 steps."""

    saves = True

    def checkpoint_due(self, step):
        return step == STEPS

    def save(self, step, state, meta, row):
        if step == STEPS:
            self.state = state


def trained(norm="deconv", devices=None, **settings):
    config = configs.load(f"configs/digits.py:lenet,{norm}", SETTINGS | settings)
    trainer = loop.Trainer(config, data.create(config), devices)
    trainer.compile()
    watch = Watch()
    (row,) = trainer.run(0, watch)
    return watch.state, row


@pytest.fixture(scope="module")
def alone():
    return {norm: trained(norm, jax.devices()[:1]) for norm in ("batch", "deconv")}


def assert_same(one, other, tolerance=1e-5):
    """Parameters, statistics and momenta agree, and so do the evaluations."""
    (state, row), (other_state, other_row) = one, other
    learnt, other_learnt = ((s.params, s.batch_stats) for s in (state, other_state))
    for a, b in zip(jax.tree.leaves(learnt), jax.tree.leaves(other_learnt), strict=True):
        scale = max(1.0, float(np.abs(a).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)
    momenta = zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(other_state.opt_state), strict=True
    )
    for a, b in momenta:  # sums of gradients, flips included
        scale = float(np.abs(a).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=1000 * tolerance * scale)
    assert abs(row["test_loss"] - other_row["test_loss"]) < tolerance
    assert abs(row["test_accuracy"] - other_row["test_accuracy"]) < 2 / 599


@pytest.mark.parametrize("norm", ["batch", "deconv"])
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_eight_devices_train_as_one_does(alone, norm, parallel):
    assert_same(alone[norm], trained(norm, parallel=parallel))


@pytest.mark.parametrize("statistics", ["global", pytest.param("device", marks=pytest.mark.slow)])
def test_steps_that_reuse_whiteners_are_the_same_under_jit_and_pmap(alone, statistics):
    changes: Any = {"whitening.update_every": 3, "whitening.update_warmup_steps": 5}
    one, other = (
        trained(statistics=statistics, parallel=kind, **changes) for kind in ("jit", "pmap")
    )
    assert_same(one, other)
    with pytest.raises(AssertionError):
        assert_same(alone["deconv"], one, tolerance=1e-3)


def test_statistics_of_each_device_are_the_same_under_jit_and_pmap_and_not_the_global_ones(alone):
    jit = trained(statistics="device")
    assert_same(jit, trained(statistics="device", parallel="pmap"))
    with pytest.raises(AssertionError):
        assert_same(alone["deconv"], jit, tolerance=1e-3)


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_what_is_restored_may_be_donated_as_it_lies_in_memory_of_its_own(kind):
    raw = np.zeros(4096 + 64, np.uint8)
    start = -raw.ctypes.data % 64  # where JAX would not have to copy it
    array = raw[start : start + 4096].view(np.float32)
    placed = parallel.create(kind, "global").everywhere(array)
    places = [shard.data.unsafe_buffer_pointer() for shard in placed.addressable_shards]
    assert len({*places, array.ctypes.data}) == len(jax.devices()) + 1


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_what_is_saved_lies_in_memory_of_its_own(kind):
    placement = parallel.create(kind, "global")
    placed = placement.everywhere(np.ones(1024, np.float32))
    saved = placement.host(placed)
    assert saved.base is None
    assert saved.flags.owndata


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(
        ValueError, match="`batch_size` must be a multiple of the 8 devices, got 60"
    ):
        trained(batch_size=60)


STREAMED = {
    "network": "configs/imagenet.py:cnn",
    "batch_size": 8,
    "eval_batch_size": 4,
    "augment__image_size": 32,
    "augment__eval_resize": 36,
}


def plain_photos(count):
    """Records of ImageNet, each of one shade of grey and a width of its own."""
    images = (np.full((40, 50 + i, 3), 9 * i, np.uint8) for i in range(count))
    return [
        {"image": encode(image), "label": i, "file_name": f"{i}.png"}
        for i, image in enumerate(images)
    ]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def two_processes(workdir, cache, second=None, devices=(2, 2), elsewhere=None, **config):
    """Start two; `second` is what only the other one is given, `elsewhere` its workdir."""
    port = free_port()
    return [
        TrainerProcess(
            (elsewhere or workdir) if index else workdir,
            cache,
            environment={"JAX_NUM_CPU_DEVICES": str(devices[index])},
            flags=(
                f"--coordinator=127.0.0.1:{port}",
                "--num_processes=2",
                f"--process_id={index}",
            ),
            **(config | (second or {}) if index else config),
        )
        for index in (0, 1)
    ]


# Of seeds 0 to 2 this one and 2 flip no ReLU; with 0 one does in step 7 under pmap, which shows as 2e-5.
SHARED = {"epochs": 2, "optimizer__learning_rate": RATE, "eval_batch_size": 200, "seed": 1}
FOUR = {"JAX_NUM_CPU_DEVICES": "4"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, cache):
    """The workdir of a run in one process with four devices."""
    folder = tmp_path_factory.mktemp("one")
    TrainerProcess(folder, cache, environment=FOUR, **SHARED).succeed()
    return folder


def assert_same_model(workdir, expected):
    trees = [load_weights(folder / "model.safetensors")[0] for folder in (expected, workdir)]
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        scale = max(1.0, float(np.abs(a).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)
    (*_, first), (*_, second) = figures(expected), figures(workdir)
    assert second["test_loss"] == pytest.approx(first["test_loss"], abs=1e-5)


@pytest.mark.parametrize("parallel", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(tmp_path, cache, one_process, parallel):
    for process in two_processes(tmp_path, cache, parallel=parallel, **SHARED):
        process.succeed()
    assert_same_model(tmp_path, one_process)
    steps = [row["step"] for row in rows(tmp_path) if "test_loss" not in row]
    assert steps == list(range(4, 37, 4)), "one process writes, the other does not"


def test_a_run_goes_on_in_two_processes_of_which_one_sees_the_workdir(tmp_path, cache, one_process):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    begun = TrainerProcess(run, cache, environment=FOUR, **SHARED)
    begun.signal_after(9, signal.SIGTERM)
    assert begun.finish()[0] == 128 + signal.SIGTERM
    both = two_processes(run, cache, elsewhere=elsewhere, **SHARED)
    first, _ = (process.succeed() for process in both)
    assert "Resuming at step" in first
    assert not elsewhere.exists()
    assert_same_model(run, one_process)

    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    both = two_processes(run, cache, elsewhere=elsewhere, **SHARED)
    ends = [process.finish(60) for process in both]
    assert [status for status, _, _ in ends] == [1, 1]
    assert "train: No checkpoint in" in ends[0][2]
    assert "train: process 0: No checkpoint in" in ends[1][2]
    assert "Traceback" not in ends[1][2]


@pytest.mark.slow
def test_two_processes_train_on_streamed_photos_under_pmap(tmp_path):
    shades = plain_photos(25)
    prepare_photos(tmp_path, {"train": shades, "validation": shades[:9]})
    settings = {
        **STREAMED,
        "data_dir": tmp_path,
        "epochs": 2,
        "optimizer__learning_rate": RATE,
        "log__diagnostics_every_steps": 2,
    }
    cache = tmp_path / "cache"
    one = TrainerProcess(tmp_path / "one", cache, **settings)
    one.succeed()
    for process in two_processes(tmp_path / "two", cache, parallel="pmap", **settings):
        process.succeed()
    (*_, expected), (*_, got) = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert got["test_loss"] == pytest.approx(expected["test_loss"], abs=1e-4)
    assert got["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            {"second": {"epochs": 6, "optimizer__learning_rate": 0.1}},
            [
                "processes must be given the same: process 1 has epochs=6, optimizer.learning_rate=0.1,"
            ]
            * 2,
        ),
        (
            {"second": {"batch_size": 4000}},
            [
                "process 1: `batch_size` must be at most the 1198 training examples, got 4000.",
                "`batch_size` must be at most the 1198 training examples, got 4000.",
            ],
        ),
        ({"devices": (1, 3)}, ["All processes must have as many devices, got 1, 3."] * 2),
    ],
)
def test_a_mistake_on_one_process_is_told_by_both(tmp_path, options, lines):
    both = two_processes(tmp_path / "run", tmp_path / "cache", **options)
    for process, line in zip(both, lines, strict=True):
        status, _, error = process.finish()
        assert status == 2, error
        assert f"train: {line}" in error
        assert "Traceback" not in error


def test_what_goes_wrong_on_one_process_ends_both_at_once(tmp_path):
    photos = plain_photos(24)
    broken = [record | {"image": record["image"][:60]} for record in photos]
    prepare_photos(tmp_path / "whole", {"train": photos, "validation": photos[:4]})
    prepare_photos(tmp_path / "broken", {"train": broken, "validation": photos[:4]})
    settings = {
        **STREAMED,
        "data_dir": tmp_path / "whole",
        "second": {"data_dir": tmp_path / "broken"},
    }
    both = two_processes(tmp_path / "run", tmp_path / "cache", **settings)
    (status, _, error), (other_status, _, reason) = (process.finish(60) for process in both)
    assert (status, other_status) == (1, 1)
    assert "if another process has ended, it says why." in error
    assert "cannot be decoded" in reason
    assert "Traceback" not in reason


def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    settings = {"epochs": 1000, "checkpoint__every_steps": 0}
    both = two_processes(tmp_path / "run", tmp_path / "cache", **settings)
    both[1].workdir = tmp_path / "run"
    both[1].signal_after(5, signal.SIGTERM)
    outcomes = [process.finish() for process in both]
    assert [status for status, _, _ in outcomes] == [128 + signal.SIGTERM] * 2, outcomes
    newest = checkpoints(tmp_path / "run")[-1]
    assert f"Stopped after step {newest}." in outcomes[0][1]
