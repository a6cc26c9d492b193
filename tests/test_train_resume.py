"""A run is never lost: real processes, killed, stopped, and given broken disks."""

import json
import random
import resource
import shutil
import signal
import time
from typing import Any

import numpy as np
import pytest
from flax import traverse_util
from trainer_process import (
    STEPS_PER_EPOCH,
    TrainerProcess,
    checkpoints,
    figures,
    last_step,
)

from netdeconv_jax.interop.weights import load_weights

TOTAL = 5 * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that nobody interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    TrainerProcess(workdir, cache).succeed()
    assert last_step(workdir) == TOTAL
    return workdir


def weights(workdir):
    """Every bit of every array, by name."""
    variables, _ = load_weights(workdir / "model.safetensors")
    flat = traverse_util.flatten_dict(variables)
    return {name: np.asarray(leaf).tobytes() for name, leaf in flat.items()}


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))]
)
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(whole, cache, tmp_path, seed):
    chance = random.Random(seed)
    for step in sorted(chance.sample(range(1, TOTAL - 8), 2)):
        run = TrainerProcess(tmp_path, cache)
        run.signal_after(step, signal.SIGKILL)
        assert run.finish()[0] == -signal.SIGKILL
    TrainerProcess(tmp_path, cache).succeed()
    assert weights(tmp_path) == weights(whole)
    assert figures(tmp_path) == figures(whole)
    assert figures(tmp_path, between=True) == figures(whole, between=True)


def test_sigterm_saves_the_step_and_exits_with_143(whole, cache, tmp_path):
    run = TrainerProcess(tmp_path, cache)
    run.signal_after(STEPS_PER_EPOCH + 3, signal.SIGTERM)
    status, out, _ = run.finish(seconds=20)
    assert status == 128 + signal.SIGTERM
    newest = checkpoints(tmp_path)[-1]
    assert newest > STEPS_PER_EPOCH
    assert f"Stopped after step {newest}." in out
    out = TrainerProcess(tmp_path, cache).succeed()
    assert f"Resuming at step {newest} of {TOTAL}." in out
    assert weights(tmp_path) == weights(whole)
    assert figures(tmp_path) == figures(whole)


def broken_in_the_middle(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_compiles_ends_it_quietly(tmp_path, number):
    run = TrainerProcess(tmp_path, tmp_path / "cache")
    assert run.process.stdout is not None
    assert "compiling" in run.process.stdout.readline()
    time.sleep(1)
    run.process.send_signal(number)
    status, _, err = run.finish(seconds=20)
    assert status == -number, "which a shell shows as 128 + number"
    assert err == ""


@pytest.mark.parametrize(
    "breaking",
    [
        broken_in_the_middle,
        pytest.param(lambda content: content[: len(content) // 2], marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, cache, tmp_path, breaking):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    *_, before, newest = checkpoints(tmp_path)
    files = [path for path in (tmp_path / "checkpoints" / str(newest)).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(breaking(largest.read_bytes()))
    out = TrainerProcess(tmp_path, cache).succeed()
    assert f"the checkpoint of step {newest} is damaged" in out
    assert f"Resuming at step {before} of {TOTAL}." in out
    assert (tmp_path / "damaged" / str(newest)).is_dir()
    assert weights(tmp_path) == weights(whole)
    assert figures(tmp_path) == figures(whole)


def test_with_every_checkpoint_damaged_nothing_is_started_anew(whole, cache, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    # Nor the second time, as a scheduler would have it.
    for _ in range(2):
        status, _, err = TrainerProcess(tmp_path, cache).finish()
        assert status == 1
        assert "No checkpoint in " in err
        assert weights(tmp_path) == weights(whole)
        assert figures(tmp_path) == figures(whole)


def test_a_run_resumes_on_another_number_of_devices(cache, tmp_path):
    run = TrainerProcess(tmp_path, cache, environment={"JAX_NUM_CPU_DEVICES": "4"})
    run.signal_after(20, signal.SIGTERM)
    assert run.finish()[0] == 128 + signal.SIGTERM
    newest = checkpoints(tmp_path)[-1]
    out = TrainerProcess(tmp_path, cache, environment={"JAX_NUM_CPU_DEVICES": "2"}).succeed()
    assert f"Resuming at step {newest} of {TOTAL}." in out
    assert figures(tmp_path)[-1]["test_accuracy"] > 0.8


def test_the_best_and_the_newest_checkpoints_are_kept(whole):
    evaluations = figures(whole)
    best = max(evaluations, key=lambda row: (row["test_accuracy"], row["step"]))
    kept = checkpoints(whole)
    assert kept[-1] == TOTAL
    assert best["test_accuracy"] == max(
        row["test_accuracy"] for row in evaluations if row["step"] in kept
    )
    assert len(kept) in (2, 3)


def test_another_config_on_the_same_workdir_is_refused_and_the_difference_shown(whole, cache):
    before = weights(whole)
    status, _, err = TrainerProcess(whole, cache, optimizer__momentum=0.8, seed=3).finish()
    assert status == 2
    assert "optimizer.momentum: was 0.9, is now 0.8; seed: was 0, is now 3" in err
    assert err.count("\n") == 1
    assert weights(whole) == before


def test_a_finished_run_is_left_as_it_is(whole, cache):
    before = weights(whole), figures(whole)
    TrainerProcess(whole, cache).succeed()
    assert (weights(whole), figures(whole)) == before


def test_a_disk_that_takes_no_more_does_not_stop_the_training(whole, cache, tmp_path):
    # No file may grow beyond 20 kB: checkpoints and weights do not fit, rows of figures do.
    code = f"import resource, os, sys; resource.setrlimit({resource.RLIMIT_FSIZE}, (20000, 20000))"
    code += "; os.execv(sys.argv[1], sys.argv[1:])"
    wrap = ("python3", "-c", code)
    run = TrainerProcess(tmp_path, cache, wrap=wrap, log__every_steps=10**6)
    status, _, err = run.finish()
    assert "WARNING: the checkpoint of step 7 could not be written" in err
    assert "Traceback" not in err
    assert checkpoints(tmp_path) == []
    assert status == 1
    assert err.endswith(
        "train: model.safetensors and report.html could not be written; the same command tries again.\n"
    )
    assert figures(tmp_path) == figures(whole)
    # With room again, the run is done anew from the start: there is no half of a checkpoint to trip over.
    TrainerProcess(tmp_path, cache, log__every_steps=10**6).succeed()
    assert weights(tmp_path) == weights(whole)


@pytest.mark.parametrize("workdir", ["/proc/run", "/dev/null/run", "/dev/null"])
def test_a_workdir_that_cannot_be_written_to_is_refused_at_once(cache, workdir):
    from pathlib import Path

    status, _, err = TrainerProcess(Path(workdir), cache).finish()
    assert status == 2
    assert err.startswith(f"train: `--workdir` {workdir} cannot be made: ")
    assert err.count("\n") == 1


def test_a_diverging_run_names_the_step_and_the_layers_and_keeps_the_last_good_checkpoint(
    cache, tmp_path
):
    run = TrainerProcess(tmp_path, cache, optimizer__learning_rate=1e10, checkpoint__every_steps=1)
    status, _, err = run.finish()
    assert status == 1
    told = json.loads((tmp_path / "nonfinite.json").read_text())
    assert f"at step {told['step']}." in err
    assert told["layers"] or "Not finite are" not in err
    assert all(step < told["step"] for step in checkpoints(tmp_path))


def test_other_data_on_the_same_workdir_is_refused_and_the_difference_shown(cache, tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("large", 200), ("small", 100)):
        arrays: Any = {}
        for part in ("train", "test"):
            arrays[f"x_{part}"] = rng.integers(0, 255, (size, 28, 28), np.uint8)
            arrays[f"y_{part}"] = rng.integers(0, 10, size)
        np.savez(tmp_path / f"{name}.npz", **arrays)
    settings = {"dataset": "mnist", "epochs": 1, "batch_size": 50, "eval_batch_size": 50}
    run = tmp_path / "run"
    TrainerProcess(run, cache, data_dir=tmp_path / "large.npz", **settings).succeed()
    before = weights(run)
    moved = (tmp_path / "large.npz").rename(tmp_path / "moved.npz")
    TrainerProcess(run, cache, data_dir=moved, **settings).succeed()
    status, _, err = TrainerProcess(
        run, cache, data_dir=tmp_path / "small.npz", **settings
    ).finish()
    assert status == 2
    assert "test_size: was 200, is now 100; train_size: was 200, is now 100" in err
    assert err.count("\n") == 1
    assert weights(run) == before
