"""The page of a run says what the rows say, stands alone, and is well formed whatever is in them."""

import doctest
import itertools
import math
import re
from html.parser import HTMLParser

import pytest

from train import charts, report
from train.charts import Series, even_ticks, line_chart, log_ticks
from train.report import write_report

CONFIG = {"dataset": "cifar10", "network": "resnet18", "norm": "deconv", "epochs": 3}
CONFIG |= {"model": {"widths": (8, 16), "spec": {}}, "data_dir": ""}
ENVIRONMENT = {"date": "2026-11-21", "device": "NVIDIA H200", "device_count": 2, "jax": "0.10.2"}
VOID = {"meta", "line", "polyline", "circle"}
ACCURACIES = (0.5, 0.75, 0.7)


def epoch_rows(accuracies=ACCURACIES):
    rows = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        step = 100 * epoch
        rows.append({"step": step, "epoch": epoch, "train_loss": 1 / epoch, "train_accuracy": 0.6})
        rows[-1] |= {"learning_rate": 0.1, "images_per_second": 1000.0 * epoch}
        rows[-1] |= {"step_seconds": 0.5, "input_wait_share": 0.03}
        rows.append({"step": step, "epoch": epoch, "test_loss": 0.8, "test_accuracy": accuracy})
    return rows


class Page(HTMLParser):
    """Checks that elements nest, and collects texts by the elements around them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.links = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag):
        return [text for around, text in self.texts if around == tag]


@pytest.fixture
def write(tmp_path):
    def write(rows, **changes):
        path = tmp_path / "report.html"
        settings = {"config": CONFIG, "environment": ENVIRONMENT, "title": "A run"} | changes
        write_report(path, rows=rows, **settings)
        text = path.read_text()
        return text, Page(text)

    return write


def headline(text):
    return dict(re.findall(r"<span>([^<]*)</span><b>([^<]*)</b>", text))


def test_the_headline_says_what_the_rows_say(write):
    text, page = write(epoch_rows(), command="python -m train.main --config=x")
    assert headline(text) == {
        "Final test accuracy": "70.00%",
        "Best, epoch 2": "75.00%",
        "Epochs": "3",
        "Time in training steps": "2 min 30 s",
        "Images per second": "2,000",
        "Device": "2 × NVIDIA H200",  # noqa: RUF001
    }
    assert page.all("h1") == ["A run"]
    assert page.all("p") == ["cifar10 · resnet18 · deconv · 2026-11-21"]
    assert page.all("pre") == ["python -m train.main --config=x"]


def test_wall_time_is_taken_where_it_is_known(write):
    text, _ = write([*epoch_rows(), {"step": 300, "wall_seconds": 7200.0}])
    assert headline(text)["Wall time"] == "2 h 0 min"


def test_a_processor_is_named_where_the_device_is_only_called_cpu(write):
    environment = {
        "device": "cpu",
        "platform": "cpu",
        "device_count": 8,
        "processor": "Zen, 2 cores",
    }
    assert headline(write(epoch_rows(), environment=environment)[0])["Device"] == "Zen, 2 cores"


def test_config_and_environment_are_tables_with_dotted_names(write):
    _, page = write(epoch_rows())
    table = dict(zip(page.all("th"), page.all("td"), strict=False))
    assert table["model.widths"] == "8, 16"
    assert table["network"] == "resnet18"
    assert table["jax"] == "0.10.2"


def test_a_run_that_ended_early_says_so(write):
    _, page = write(epoch_rows()[:4])
    assert "ended after 2 of 3 epochs" in page.all("p")[0]


def test_everything_is_escaped(write):
    evil = "<script>alert('&')</script>"
    text, page = write(
        epoch_rows(),
        title=evil,
        notes=[evil],
        command=evil,
        config={evil: {evil: evil}, "dataset": evil},
        environment={evil: evil, "device": evil},
    )
    assert "<script" not in text
    for tag in ("h1", "li", "pre", "title", "b"):
        assert "".join(page.all(tag)[:9]).startswith(evil) or evil in "".join(page.all(tag))


def test_the_page_needs_no_other_file_and_no_script(write):
    text, page = write(epoch_rows(), notes=["one"])
    assert page.links == []
    assert not re.search(r"<script|@import|url\(|http", text)
    assert text.count("<svg") == 5


def test_one_epoch_is_points_and_several_are_lines(write):
    one, _ = write(epoch_rows(ACCURACIES[:1]))
    assert one.count("<polyline") == 0
    assert one.count("<circle") == 7
    three, _ = write(epoch_rows())
    assert three.count("<polyline") == 7


def test_three_hundred_epochs_stay_below_300_kilobytes(write):
    text, page = write(epoch_rows([i / 301 for i in range(300)]))
    assert len(text) < 300_000
    assert text.count("<circle") == 0
    assert len(page.all("td")) > 300 * 6


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{}],
        [{"step": 5, "train_loss": 1.0}],
        [{"epoch": 1, "test_accuracy": 0.5}, {"epoch": 2, "test_accuracy": 0.6}],
        [{"step": 0, "epoch": 0, "test_accuracy": 0.1}, {"step": 9, "epoch": 1}],
        [{"step": 1, "epoch": 1, "train_loss": float("nan"), "test_loss": None}],
        [{"step": 1, "epoch": 1, "train_loss": float("inf"), "test_loss": 1e300}],
        [{"step": i, "epoch": i, "train_loss": 10.0**-i, "learning_rate": 0} for i in range(1, 40)],
        [{"step": 1, "epoch": 1, "test_accuracy": 1.0, "images_per_second": 0.0}],
        [{"step": 1, "epoch": 1, "test_accuracy": 0.0, "train_loss": 0.0}],
        [
            {"step": 1, "epoch": 1, "train_loss": -3.0},
            {"step": 2, "epoch": 2, "train_loss": 5e-324},
        ],
    ],
)
def test_rows_with_missing_or_strange_figures_make_a_page(write, rows):
    text, _ = write(rows, config={}, environment={})
    assert not re.search(r"\b(nan|inf)\b", text)


def test_a_loss_that_was_not_finite_leaves_a_gap(write):
    rows = epoch_rows((0.5, 0.6, 0.7, 0.7, 0.7))
    rows[4]["train_loss"] = None
    text, _ = write(rows)
    (loss,) = re.findall(r'<svg[^>]*aria-label="Loss by epoch">.*?</svg>', text, re.DOTALL)
    (train,) = re.findall(r'<g class="train">.*?</g>', loss)
    assert train.count("<polyline") == 2


def test_rows_within_an_epoch_stand_between_the_epochs():
    rows = [{"step": 50, "epoch": 0}, {"step": 100, "epoch": 1, "test_loss": 1.0}]
    rows += [{"step": 150, "epoch": 1}, {"step": 200, "epoch": 2, "test_loss": 1.0}]
    assert report._positions(rows) == ("epoch", [0.5, 1.0, 1.5, 2.0])
    assert report._positions([{"step": 50}]) == ("step", [50])


def test_a_point_is_where_its_value_belongs():
    svg = line_chart([Series("line", [(0, 0.0), (10, 1.0)])], label="x", show=str)
    (points,) = re.findall(r'points="([^"]*)"', svg)
    (x0, y0), (x1, y1) = ([float(n) for n in pair.split(",")] for pair in points.split())
    assert (x0, x1) == (charts.LEFT + 4, charts.WIDTH - charts.RIGHT - 4)
    assert (y0, y1) == (charts.HEIGHT - charts.BOTTOM, charts.TOP)


def test_a_wide_range_is_drawn_logarithmically():
    points = [(1, 10.0), (2, 1.0), (3, 0.1)]
    svg = line_chart([Series("line", points)], label="x", show=str, log=True)
    (drawn,) = re.findall(r'points="([^"]*)"', svg)
    ys = [float(pair.split(",")[1]) for pair in drawn.split()]
    assert ys[2] - ys[1] == pytest.approx(ys[1] - ys[0], abs=0.2)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.13, 0.14), (5, 5), (0, 0), (-2, 3), (1e-9, 3e-9), (1e5, 9e8)]
)
def test_ticks_are_few_even_and_enclose_the_values(low, high):
    ticks = even_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= low <= high <= ticks[-1]
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)


def test_ticks_of_a_logarithm_are_powers_of_ten():
    assert doctest.testmod(charts).failed == 0
    assert log_ticks(0.5, 20) == [0.1, 1, 10, 100]
    assert len(log_ticks(1e-40, 1)) <= 9
    assert even_ticks(0.2, 0.99, ceiling=1)[-1] == 1
