"""A run as one page that can be sent to anybody: no script, no other file."""

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from train.charts import Series, line_chart
from train.metrics import replace
from train.progress import duration

STYLE = Path(__file__).with_name("report.css")

Rows = Sequence[Mapping[str, Any]]


def write_report(
    path: Path,
    *,
    config: Mapping[str, Any],
    rows: Rows,
    environment: Mapping[str, Any],
    title: str,
    notes: Sequence[str] = (),
    command: str = "",
) -> None:
    """Write `report.html`: headline figures, curves, config, environment.

    Args:
      path: of the page; an older one is replaced as a whole.
      config: nested; `epochs` tells a run that ended early.
      rows: of metrics.jsonl, in any order; training and evaluation in one row an epoch or in several. Keys
        may be missing and values None. Beside those of the loop, `wall_seconds` is known: since the start of
        the run, pauses between its sessions left out.
      environment: of `metrics.environment()`.
      title: of the page.
      notes: what a reader should be warned of, such as images that could not be read.
      command: that made the run.
    Raises:
      OSError: the page cannot be written.
    """
    rows = sorted(rows, key=lambda row: _number(row.get("step")) or 0)
    x_name, positions = _positions(rows)
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(config, rows, environment))}</p>',
        _notes(notes),
        _headline(rows, environment),
        _charts(_as_curves(rows), positions, x_name),
        '<div class="columns">',
        f"<section><h2>Config</h2>{_table(_flat(config))}</section>",
        f"<section><h2>Environment</h2>{_table(environment.items())}</section>",
        "</div>",
        f"<h2>Command</h2><pre>{escape(command)}</pre>" if command else "",
        _epochs(rows),
        f"<footer>Written {datetime.datetime.now():%Y-%m-%d %H:%M} by the trainer of netdeconv_jax.</footer>",
    ]
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE.read_text()}</style>
</head>
<body><main>
{chr(10).join(part for part in sections if part)}
</main></body>
</html>
"""
    replace(path, page.encode())


def _as_curves(rows: Rows) -> Rows:
    """Return rows of which an evaluation's says nothing of training, where the rows between them say more.

    Its means are those of the whole epoch that ends there, and would be teeth in a curve.
    """
    ends = [row for row in rows if row.get("test_accuracy") is not None]
    if len(rows) < 2 * len(ends) + 1:
        return rows
    means = ("train_loss", "train_accuracy", "images_per_second", "input_wait_share")
    return [
        {k: v for k, v in row.items() if k not in means} if row in ends else row for row in rows
    ]


def _number(value: Any) -> float | None:
    """Return a finite number as it is, None for everything else."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def _column(rows: Rows, name: str) -> list[float]:
    return [value for row in rows if (value := _number(row.get(name))) is not None]


def _positions(rows: Rows) -> tuple[str, list[float | None]]:
    """Return what the horizontal axis shows, and where each row is on it: epochs, if that can be told."""
    ends = [row for row in rows if row.get("test_accuracy", row.get("test_loss")) is not None]
    ratios = sorted(
        step / epoch
        for row in ends or rows
        if (step := _number(row.get("step"))) and (epoch := _number(row.get("epoch")))
    )
    if ratios:  # evaluations are at ends of epochs, so that steps place what lies between
        steps = ratios[len(ratios) // 2]
        return "epoch", [
            step / steps
            if (step := _number(row.get("step"))) is not None
            else _number(row.get("epoch"))
            for row in rows
        ]
    if _column(rows, "step"):
        return "step", [_number(row.get("step")) for row in rows]
    return "epoch", [_number(row.get("epoch")) for row in rows]


def _lead(config: Mapping[str, Any], rows: Rows, environment: Mapping[str, Any]) -> str:
    names = [str(config[name]) for name in ("dataset", "network", "norm") if config.get(name)]
    done, planned = max(_column(rows, "epoch"), default=0), _number(config.get("epochs"))
    if planned is not None and done < planned:
        names.append(f"ended after {done:g} of {planned:g} epochs")
    return " · ".join([*names, *([str(environment["date"])] if environment.get("date") else [])])


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>'


def _headline(rows: Rows, environment: Mapping[str, Any]) -> str:
    tested = [row for row in rows if _number(row.get("test_accuracy")) is not None]
    figures: list[tuple[str, str]] = []
    if tested:
        best = max(tested, key=lambda row: row["test_accuracy"])
        at = f", epoch {best['epoch']:g}" if _number(best.get("epoch")) is not None else ""
        figures.append(("Final test accuracy", f"{100 * tested[-1]['test_accuracy']:.2f}%"))
        figures.append((f"Best{at}", f"{100 * best['test_accuracy']:.2f}%"))
    if epochs := _column(rows, "epoch"):
        figures.append(("Epochs", f"{max(epochs):g}"))
    seconds, what = _seconds(rows)
    if seconds:
        figures.append((what, duration(seconds)))
    if speeds := sorted(_column(rows, "images_per_second")):
        figures.append(("Images per second", f"{speeds[len(speeds) // 2]:,.0f}"))
    if environment.get("device"):
        count, name = environment.get("device_count", 1), str(environment["device"])
        if environment.get("platform") == "cpu" and environment.get("processor"):
            count, name = 1, str(environment["processor"])  # of which "cpu" says nothing
        figures.append(("Device", name if count == 1 else f"{count} × {name}"))  # noqa: RUF001
    cells = (
        f'<div class="figure{" first" if i == 0 and tested else ""}"><span>{escape(name)}</span>'
        f"<b>{escape(value)}</b></div>"
        for i, (name, value) in enumerate(figures)
    )
    return f'<div class="figures">{"".join(cells)}</div>' if figures else ""


def _seconds(rows: Rows) -> tuple[float, str]:
    """Return how long it took, and of what that is the time."""
    if walls := _column(rows, "wall_seconds"):
        return walls[-1], "Wall time"
    total, before = 0.0, 0.0
    for row in rows:
        step, seconds = _number(row.get("step")), _number(row.get("step_seconds"))
        if step is not None and seconds is not None:
            total, before = total + (step - before) * seconds, step
    return total, "Time in training steps"


def _charts(rows: Rows, positions: Sequence[float | None], x_name: str) -> str:
    def series(name: str, key: str) -> Series:
        points = [
            (x, _number(row[key]))
            for x, row in zip(positions, rows, strict=True)
            if x is not None and key in row
        ]
        return Series(name, points)

    def card(heading: str, lines: Sequence[Series], *, wide: bool = False, **settings: Any) -> str:
        lines = [one for one in lines if one.points]
        legend = ""
        if len(lines) > 1:
            names = (f'<span><i class="{one.name}"></i>{one.name}</span>' for one in lines)
            legend = f'<span class="legend">{"".join(names)}</span>'
        picture = line_chart(lines, label=f"{heading} by {x_name}", x_name=x_name, **settings)
        return (
            f'<section class="card{" wide" if wide else ""}"><header><h3>{heading}</h3>{legend}</header>'
            f"{picture}</section>"
        )

    both = [
        [series(name, f"{name}_{quantity}") for name in ("train", "test")]
        for quantity in ("accuracy", "loss")
    ]
    cards = [
        card("Accuracy", both[0], wide=True, show=_percent, ceiling=1),
        card("Loss", both[1], wide=True, show=_plain, floor=0, log=True),
        card("Learning rate", [series("line", "learning_rate")], show=_plain, include=[0]),
        card(
            "Images per second", [series("line", "images_per_second")], show=_thousands, include=[0]
        ),
        card(
            "Waiting for data",
            [series("line", "input_wait_share")],
            show=_percent,
            include=[0, 0.1],
        ),
    ]
    return f'<div class="charts">{"".join(cards)}</div>'


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _plain(value: float) -> str:
    return f"{value:.4g}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _table(entries: Iterable[tuple[str, Any]]) -> str:
    lines = (
        f"<tr><th>{escape(str(name))}</th><td>{escape(_shown(value))}</td></tr>"
        for name, value in entries
    )
    return f"<table>{''.join(lines)}</table>"


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value)) or "none"
    return "–" if value is None or value == "" or value == {} else str(value)  # noqa: RUF001


_EPOCH_COLUMNS = {
    "step": ("step", lambda v: f"{v:,.0f}"),
    "epoch": ("epoch", _plain),
    "train_loss": ("train loss", lambda v: f"{v:.4f}"),
    "test_loss": ("test loss", lambda v: f"{v:.4f}"),
    "train_accuracy": ("train accuracy", lambda v: f"{100 * v:.2f}%"),
    "test_accuracy": ("test accuracy", lambda v: f"{100 * v:.2f}%"),
    "learning_rate": ("learning rate", _plain),
    "images_per_second": ("images/s", _thousands),
}


def _epochs(rows: Rows) -> str:
    """Every figure of the curves, folded away: rows of one step are one line."""
    merged: dict[Any, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row.get("step", row.get("epoch")), {}).update(row)
    kept = [
        row for row in merged.values() if row.get("test_accuracy", row.get("test_loss")) is not None
    ]
    names = [name for name in _EPOCH_COLUMNS if _column(kept, name)]
    if not names:
        return ""
    head = "".join(f"<th>{_EPOCH_COLUMNS[name][0]}</th>" for name in names)
    body = []
    for row in kept:
        values = [_number(row.get(name)) for name in names]
        cells = (
            "" if value is None else _EPOCH_COLUMNS[name][1](value)
            for name, value in zip(names, values, strict=True)
        )
        body.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return (
        f'<details><summary>All figures by epoch</summary><div class="table"><table class="epochs">'
        f"<tr>{head}</tr>{''.join(body)}</table></div></details>"
    )
