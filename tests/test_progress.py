"""The bar tells the time left of this session, and a log file gets a line an epoch and nothing else."""

import doctest
import fcntl
import io
import os
import pty
import re
import select
import struct
import termios

import pytest

from train import progress
from train.progress import Progress, duration, epoch_line

ROW = {"step": 30, "epoch": 3, "train_loss": 1.5, "test_loss": 1.25, "test_accuracy": 0.5}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal: what tqdm writes can be read."""

    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def test_time_left_counts_the_steps_and_seconds_of_this_session_only(clock):
    with Progress(1000, 900, 100, 32, stream=io.StringIO(), clock=clock) as shown:
        assert shown.seconds_left is None
        clock.now += 60  # compilation
        shown.update(901, waited_seconds=0.0)
        assert shown.seconds_left is None
        for step in range(902, 912):
            clock.now += 2
            shown.update(step, waited_seconds=0.0)
        assert shown.seconds_left == pytest.approx((1000 - 911) * 2)


def test_throughput_and_waiting_are_those_of_the_last_seconds(clock):
    with Progress(10_000, 0, 100, 32, stream=io.StringIO(), clock=clock) as shown:
        for step in range(1, 101):
            clock.now += 1
            shown.update(step, waited_seconds=0.75)
        assert shown.images_per_second == pytest.approx(32)
        assert shown.input_wait_share == pytest.approx(0.75)
        for step in range(101, 161):
            clock.now += 0.5
            shown.update(step, waited_seconds=0.0)
        assert shown.images_per_second == pytest.approx(64)
        assert shown.input_wait_share == 0


def test_evaluation_between_epochs_does_not_count_as_slow_training(clock):
    with Progress(1000, 0, 10, 32, stream=io.StringIO(), say=[].append, clock=clock) as shown:
        for step in range(1, 11):
            clock.now += 1
            shown.update(step, waited_seconds=0.0)
        clock.now += 500
        shown.line(ROW)
        assert shown.images_per_second is None
        for step in range(11, 13):
            clock.now += 1
            shown.update(step, waited_seconds=0.25)
        assert shown.images_per_second == pytest.approx(32)
        assert shown.input_wait_share == pytest.approx(0.25)
        # The time left does count it: there will be as many evaluations as epochs.
        assert shown.seconds_left == pytest.approx((1000 - 12) * (9 + 500 + 2) / 11)


def test_a_stream_that_is_no_terminal_gets_lines_and_no_bar(clock):
    stream, lines = io.StringIO(), []
    with Progress(100, 0, 10, 32, stream=stream, say=lines.append, clock=clock) as shown:
        for step in range(1, 11):
            shown.update(step, loss=1.0, accuracy=0.5, learning_rate=0.1, waited_seconds=0.0)
        shown.line(ROW)
    assert stream.getvalue() == ""
    assert lines == ["epoch  3/10   train loss 1.5000   test loss 1.2500   test accuracy 50.00%"]


def test_the_default_prints_to_standard_output(capsys):
    with Progress(100, 0, 10, 32, stream=io.StringIO()) as shown:
        shown.line(ROW)
        shown.note("saved")
    assert capsys.readouterr().out.splitlines()[1:] == ["saved"]


def test_an_inactive_process_shows_nothing(clock):
    stream, lines = Terminal(), []
    with Progress(100, 0, 10, 32, active=False, stream=stream, say=lines.append) as shown:
        shown.update(1, loss=1.0, waited_seconds=0.0)
        shown.line(ROW)
    assert (stream.getvalue(), lines) == ("", [])


def test_a_terminal_shows_every_figure_and_is_left_clean(clock):
    stream = Terminal()
    with Progress(200, 100, 20, 32, stream=stream, say=stream.write, clock=clock) as shown:
        for step in range(101, 151):
            clock.now += 1
            shown.update(step, loss=0.1234, accuracy=0.456, learning_rate=0.05, waited_seconds=0.25)
        bar = shown._bar
        assert bar is not None
        text = str(bar)
        shown.line(ROW)
    assert text.startswith("epoch 8/10  75%|")
    figures = "50 s left · 32 img/s · loss 0.123 · acc 45.6% · lr 0.05 · data 25%"
    assert text.endswith(f"| {figures}")
    # The line begins where the bar was wiped off, and nothing of the bar is left at the end.
    assert re.search(r"\r +\repoch  3/10   train loss", stream.getvalue())
    assert re.search(r"\r +\r$", stream.getvalue())


def test_the_last_step_belongs_to_the_last_epoch():
    with Progress(20, 0, 10, 32, stream=Terminal()) as shown:
        shown.update(20, waited_seconds=0.0)
        assert str(shown._bar).startswith("epoch 2/2 100%|")


def test_a_real_terminal_is_recognized():
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(follower, "w") as stream:
        with Progress(20, 0, 10, 32, stream=stream) as shown:
            shown.update(5, loss=0.5, waited_seconds=0.0)
        seen = b""
        while b"epoch 1/2" not in seen:  # what is written arrives in pieces
            assert select.select([leader], [], [], 10)[0], seen
            seen += os.read(leader, 10_000)
    os.close(leader)


def test_figures_that_are_missing_are_left_out():
    assert epoch_line({"epoch": 1, "train_loss": None}, 5) == "epoch 1/5"
    row = {"learning_rate": 0.05, "images_per_second": 12345.6, "input_wait_share": 0.031}
    assert epoch_line(row | {"step_seconds": 0.0125}, 5) == (
        "lr 0.05   12,346 img/s   12.5 ms a step   data 3%"
    )


def test_durations_are_said_as_a_person_says_them():
    assert doctest.testmod(progress).failed == 0
    assert [duration(s) for s in (0, 59.4, 59.6, 3600, 86399.9)] == [
        *("0 s", "59 s", "1 min 0 s", "1 h 0 min", "1 d 0 h")
    ]
