"""Which checkpoints stay, and which are set aside."""

import errno
import shutil

import jax
import numpy as np
import pytest

from train import checkpoints

STATE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
LIKE = jax.eval_shape(lambda: STATE)


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def opened(tmp_path, warnings):
    """Opens the checkpoints of one folder; all are closed at the end."""
    managers = []

    def create():
        managers.append(checkpoints.Checkpoints(tmp_path / "checkpoints", 2, warnings.append))
        return managers[-1]

    yield create
    for manager in managers:
        manager.close()


def test_the_best_one_of_before_a_resume_stays(opened, warnings):
    first = opened()
    for step, accuracy in ((1, 0.9), (2, 0.5), (3, 0.5), (4, 0.5)):
        first.save(step, STATE, {}, accuracy)
    first.wait()
    assert first.steps() == [1, 3, 4]
    second = opened()
    assert second.restore(LIKE) is not None
    for step in (5, 6):
        second.save(step, STATE, {}, 0.6)
        second.save(step, STATE, {})  # a second time: nothing happens
    second.wait()
    assert second.steps() == [1, 5, 6]
    second.save(7, STATE, {})  # between two evaluations
    second.save(8, STATE, {}, 0.95)
    second.save(9, STATE, {}, 0.1)
    second.save(10, STATE, {}, 0.2)
    second.wait()
    assert second.steps() == [8, 9, 10]
    assert not warnings


def test_an_evaluation_that_was_owed_is_noted_beside_its_checkpoint(opened, warnings):
    first = opened()
    first.save(4, STATE, {"owed": True})
    first.close()
    second = opened()
    second.save(4, STATE, {"owed": False}, 0.7)
    third = opened()
    restored = third.restore(LIKE)
    assert restored is not None
    assert restored[1]["owed"] is False
    np.testing.assert_array_equal(restored[0]["a"], STATE["a"])
    for step, accuracy in ((5, 0.1), (6, 0.2), (7, 0.3)):
        third.save(step, STATE, {"owed": False}, accuracy)
    third.wait()
    assert third.steps() == [4, 6, 7]
    assert not warnings


def whole(opened):
    first = opened()
    first.save(1, STATE, {"owed": False})
    first.save(2, STATE, {"owed": False})
    first.wait()


# The permission of whoever tests may be denied nowhere: the file is a link that leads to itself.
@pytest.mark.parametrize("file", ["state/d/*", "meta/metadata"])
def test_a_file_that_cannot_be_read_sets_nothing_aside(opened, warnings, tmp_path, file):
    whole(opened)
    path = max((tmp_path / "checkpoints" / "2").glob(file), key=lambda path: path.stat().st_size)
    kept = path.rename(tmp_path / "kept")
    path.symlink_to(path)
    with pytest.raises(OSError, match="The checkpoints cannot be read now: ") as caught:
        opened().restore(LIKE)
    assert caught.value.errno == errno.ELOOP
    path.unlink()
    kept.rename(path)
    assert not warnings
    assert not (tmp_path / "damaged").exists()
    assert opened().restore(LIKE) is not None


def test_a_failure_that_passes_sets_nothing_aside(opened, warnings, tmp_path, monkeypatch):
    whole(opened)
    second = opened()
    read, calls = second._manager.restore, []

    def fail_at_first(*args, **kwargs):
        calls.append(args)
        if len(calls) % 2:
            raise OSError(errno.EIO, "no answer")
        return read(*args, **kwargs)

    monkeypatch.setattr(second._manager, "restore", fail_at_first)
    restored = second.restore(LIKE)
    assert restored is not None
    assert len(calls) == 4
    assert not warnings
    assert not (tmp_path / "damaged").exists()


def test_checkpoints_of_another_version_are_refused_and_left(opened, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 1)
        whole(opened)
    with pytest.raises(checkpoints.OtherRunError, match="written by another version"):
        opened().restore(LIKE)
    assert opened().steps() == [1, 2]


def test_other_arrays_are_refused(opened):
    first = opened()
    first.save(1, STATE, {})
    first.wait()
    other = {"a": np.zeros((2, 4))}
    with pytest.raises(checkpoints.OtherRunError, match="hold other arrays"):
        opened().restore(jax.eval_shape(lambda: other))


def test_checkpoints_that_are_there_need_no_more_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)

    def leave(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))

    state = {"a": np.zeros(2**18, np.float32)}  # 1 MiB
    leave(4 * 2**20)
    checkpoints.check_space(tmp_path, state, keep=2)
    leave(4 * 2**20 - 1)
    with pytest.raises(OSError, match=r"has 4 MiB left; .* need 4 MiB more"):
        checkpoints.check_space(tmp_path, state, keep=2)
    for step in (1, 2, 3):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    leave(2**20)
    checkpoints.check_space(tmp_path, state, keep=2)
    leave(2**20 - 1)
    with pytest.raises(OSError, match="need 1 MiB more"):
        checkpoints.check_space(tmp_path, state, keep=2)
