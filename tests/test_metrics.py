"""What a run writes about itself survives kills, resumption and full disks."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from train import metrics
from train.totals import Totals


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def told(monkeypatch):
    """What was logged, as text."""
    messages = []
    for level in ("error", "warning"):
        monkeypatch.setattr(
            metrics.logging, level, lambda message, *args: messages.append(message % args)
        )
    return messages


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_each_row_is_in_the_file_when_write_returns(path):
    log = metrics.JsonLines(path)
    for step in (1, 2):
        log.write({"step": step, "test_loss": 0.5})
        assert rows_of(path)[-1] == {"step": step, "test_loss": 0.5}
    assert len(rows_of(path)) == 2


def test_a_new_run_begins_anew(path):
    metrics.JsonLines(path).write({"step": 1})
    metrics.JsonLines(path).write({"step": 7})
    assert rows_of(path) == [{"step": 7}]


def test_resuming_drops_the_rows_after_the_checkpoint_and_no_other(path):
    log = metrics.JsonLines(path)
    for step in (10, 20, 30):
        log.write({"step": step})
    log.write({"note": "no step"})
    metrics.JsonLines(path, resume_step=20).write({"step": 25})
    assert rows_of(path) == [{"step": 10}, {"step": 20}, {"note": "no step"}, {"step": 25}]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_resuming_where_there_is_no_file_makes_one(path):
    metrics.JsonLines(path, resume_step=20).write({"step": 25})
    assert rows_of(path) == [{"step": 25}]


@pytest.mark.parametrize("tail", ['{"step": 3, "tra', '{"step": 3', "\0\0\0\0", '{"step": 3}\n12'])
def test_a_line_that_a_kill_cut_in_half_is_dropped(path, tail, told):
    path.parent.mkdir()
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    metrics.JsonLines(path, resume_step=2).write({"step": 3, "whole": True})
    assert rows_of(path) == [{"step": 1}, {"step": 2}, {"step": 3, "whole": True}]
    assert len(told) == 1
    assert "is not a JSON object" in told[0]


def test_a_last_line_that_lacks_only_its_end_is_kept(path):
    path.parent.mkdir()
    path.write_text('{"step": 1}\n{"step": 2}')
    metrics.JsonLines(path, resume_step=2).write({"step": 3})
    assert rows_of(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_kill_while_the_file_is_replaced_leaves_the_old_one(path, monkeypatch):
    metrics.JsonLines(path).write({"step": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.JsonLines(path, resume_step=0)
    assert rows_of(path) == [{"step": 1}]
    assert len(list(path.parent.iterdir())) == 1


def test_a_file_that_cannot_be_read_stops_the_resumption_instead_of_being_replaced(path):
    path.mkdir(parents=True)  # permissions do not stop the superuser; a folder stops everybody
    with pytest.raises(IsADirectoryError):
        metrics.JsonLines(path, resume_step=0)


def test_a_folder_in_the_way_is_told_of_once_and_training_goes_on(path, told):
    path.mkdir(parents=True)
    log = metrics.JsonLines(path)
    for step in (1, 2, 3):
        log.write({"step": step})
    assert len(told) == 1
    assert str(path) in told[0]
    path.rmdir()
    log.write({"step": 4})
    assert rows_of(path) == [{"step": step} for step in (1, 2, 3, 4)]
    assert "no row is missing" in told[1]


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="this system has no /dev/full to write to"
)
def test_a_full_disk_is_told_of_and_raises_nothing(tmp_path, told):
    path = tmp_path / "metrics.jsonl"
    log = metrics.JsonLines(path)
    path.unlink()
    path.symlink_to("/dev/full")
    log.write({"step": 1})
    assert len(told) == 1
    assert "No space left" in told[0]
    path.unlink()
    log.write({"step": 2})
    assert rows_of(path) == [{"step": 1}, {"step": 2}]


def test_what_a_full_disk_left_of_a_line_is_overwritten(path, told, monkeypatch):
    log = metrics.JsonLines(path)
    log.write({"step": 1})
    opened = Path.open

    def half(self, mode):
        with opened(self, mode) as file:
            file.write(b'{"ste')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", half)
        log.write({"step": 2})
    assert "No space left" in told[0]
    assert path.read_bytes().endswith(b'{"ste')
    log.write({"step": 3})
    assert rows_of(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_only_the_active_process_touches_the_disk(path):
    log = metrics.JsonLines(path, active=False)
    log.write({"step": 1})
    assert not path.parent.exists()


def test_rows_are_strict_json_whatever_is_in_them(path):
    row = {"loss": float("nan"), "all": [np.float32(0.5), -np.inf], "step": np.int64(3)}
    metrics.JsonLines(path).write(row | {"counts": np.arange(2)})
    text = path.read_text()
    assert text == '{"loss": null, "all": [0.5, null], "step": 3, "counts": [0, 1]}\n'
    assert metrics.read_rows(path) == [
        {"loss": None, "all": [0.5, None], "step": 3, "counts": [0, 1]}
    ]


def test_the_environment_names_device_and_versions():
    environment = metrics.environment()
    assert environment["platform"] == "cpu"
    assert environment["device_count"] == 8
    assert environment["processor"].endswith("cores")
    assert {"date", "device", "python", "jax", "flax", "optax"} <= set(environment)


def test_what_a_checkpoint_holds_of_an_epoch_does_not_change_while_it_is_written():
    totals = Totals(8)
    row = {"train_loss": 1.0, "train_accuracy": 0.5, "learning_rate": 0.1}
    totals.add(row, 0.0)
    saved = totals.saved()
    totals.add(row, 0.0)
    again = Totals(8)
    again.load(saved)
    again.add(row, 0.0)
    assert again.row()["train_accuracy"] == 0.5
    assert again.steps == 2
