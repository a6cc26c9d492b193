"""TensorBoard finds every scalar once, after resuming and after a full disk too."""

import struct

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from train import tensorboard
from train.tensorboard import Events

Event, SessionLog = (getattr(event_pb2, name) for name in ("Event", "SessionLog"))


def records(path):
    """The records of one event file, checksums checked: u64 length, its CRC, data, its CRC."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        header = content[at : at + 8]
        (length,) = struct.unpack("<Q", header)
        data = content[at + 12 : at + 12 + length]
        sums = content[at + 8 : at + 12] + content[at + 12 + length : at + 16 + length]
        assert struct.unpack("<2I", sums) == (masked_crc32c(header), masked_crc32c(data))
        yield Event.FromString(data)
        at += 16 + length


def scalars_of(folder):
    """What TensorBoard shows: files in the order of their making, a restart hides what it repeats."""
    shown = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in records(path):
            if event.session_log.status == SessionLog.START:
                shown = [row for row in shown if row[0] < event.step]
            shown += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return shown


def test_scalars_are_on_disk_when_they_are_written(tmp_path):
    events = Events(tmp_path / "events")
    events.scalars(3, {"train/loss": 0.5, "train/accuracy": 0.25, "missing": None})
    assert scalars_of(tmp_path / "events") == [
        (3, "train/loss", 0.5),
        (3, "train/accuracy", 0.25),
    ]
    events.close()


def test_a_resumed_run_hides_what_came_after_its_checkpoint(tmp_path):
    with Events(tmp_path) as events:
        for step in (10, 20, 30):
            events.scalars(step, {"loss": step})
    with Events(tmp_path, resume_step=20) as events:
        events.scalars(30, {"loss": 31})
    assert len(list(tmp_path.iterdir())) == 2
    assert scalars_of(tmp_path) == [(10, "loss", 10), (20, "loss", 20), (30, "loss", 31)]


def test_only_the_active_process_touches_the_disk(tmp_path):
    with Events(tmp_path / "events", resume_step=3, active=False) as events:
        events.scalars(4, {"loss": 1.0})
    assert not (tmp_path / "events").exists()


@pytest.fixture
def told(monkeypatch):
    messages = []
    for level in ("error", "warning"):
        monkeypatch.setattr(
            tensorboard.logging, level, lambda message, *args: messages.append(message % args)
        )
    return messages


def test_a_folder_that_cannot_be_made_is_told_of_once_and_tried_again(tmp_path, told):
    folder = tmp_path / "events"
    folder.write_text("in the way")
    events = Events(folder, resume_step=0)
    events.scalars(1, {"loss": 1.0})
    events.scalars(2, {"loss": 2.0})
    assert len(told) == 1
    assert str(folder) in told[0]
    folder.unlink()
    events.scalars(3, {"loss": 3.0})
    events.close()
    assert scalars_of(folder) == [(1, "loss", 1), (2, "loss", 2), (3, "loss", 3)]
    assert "none is missing" in told[1]


def test_a_disk_that_fills_up_costs_nothing_but_the_file_it_filled(tmp_path, told, monkeypatch):
    events = Events(tmp_path)
    events.scalars(1, {"loss": 1.0})

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensorboard.RecordWriter, "flush", full)
        events.scalars(2, {"loss": 2.0})
        assert "No space left" in told[0]
    events.scalars(3, {"loss": 3.0})
    events.close()
    files = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    last = [
        (event.step, v.simple_value) for event in records(files[-1]) for v in event.summary.value
    ]
    assert last == [(2, 2.0), (3, 3.0)]
