"""The picture of test accuracy by epoch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NORMS = {
    "batch": "batch norm",
    "channel": "channel deconvolution",
    "deconv": "deconvolution",
    "none": "no norm",
}
COLOURS = {"batch": "#c4622d", "channel": "#2b8a5b", "deconv": "#14639e", "none": "#6f6f6f"}
INK, FAINT = "#222222", "#6f6f6f"
TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)
NO_ERROR = 0.05  # percent: where a perfect score is drawn


def draw_curves(curves: Mapping[str, list[list[float]]], path: Path, *, caption: str) -> None:
    """Draw test accuracy by epoch: the mean over seeds as a line, their range as a band.

    The axis is logarithmic in the error, so that 90 to 95 and 99 to 99.5 percent are as far apart: the
    beginning of the training can be read as well as its end.

    Args:
      curves: by norm, for each epoch the accuracy of every seed in percent.
      path: of the PNG.
      caption: what was trained.
    """
    figure = Figure(figsize=(8, 4.8), dpi=160)
    axes = figure.add_axes((0.085, 0.125, 0.875, 0.715))
    errors = {norm: np.maximum(100 - np.array(rows), NO_ERROR) for norm, rows in curves.items()}
    for norm, error in errors.items():
        epochs, colour = np.arange(1, len(error) + 1), COLOURS[norm]
        axes.fill_between(epochs, error.min(1), error.max(1), color=colour, alpha=0.13, lw=0)
        axes.plot(epochs, error.mean(1), color=colour, lw=2.4, marker="o", ms=4.5, zorder=3)
    _scale(axes, errors)
    _label(axes, errors)
    figure.text(0.03, 0.925, "Test accuracy by epoch", fontsize=15, weight="bold", color=INK)
    caption = f"{caption}; the scale is logarithmic in the error"
    figure.text(0.03, 0.872, caption, fontsize=9, color=FAINT)
    FigureCanvasAgg(figure).print_png(path)


def _scale(axes: Axes, errors: Mapping[str, np.ndarray]) -> None:
    highest = max(error.max() for error in errors.values()) * 1.3
    lowest = min(error.min() for error in errors.values()) / 1.25
    epochs = max(len(error) for error in errors.values())
    axes.set_yscale("log")
    axes.set_ylim(highest, lowest)  # upside down: less error is higher
    shown = [tick for tick in TICKS if lowest <= 100 - tick <= highest]
    axes.yaxis.set_major_locator(ticker.FixedLocator([100 - tick for tick in shown]))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda error, _: f"{100 - error:g}%"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    # Room on the left for the accuracies after the first epoch.
    axes.set_xlim(1 - 0.1 * max(epochs, 2), epochs + 0.02 * max(epochs, 2))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**6) if epochs <= 12 * n or n == 10**6)
    every = 5 if 12 < epochs <= 30 else every
    axes.set_xticks(sorted({1, *range(every, epochs + 1, every)}))
    axes.set_xlabel("epoch", color=INK, fontsize=10.5)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK, labelsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def _label(axes: Axes, errors: Mapping[str, np.ndarray]) -> None:
    """Write each accuracy after the first epoch beside it, and name each line where the lines differ."""
    means = {norm: error.mean(1) for norm, error in errors.items()}
    best = min(means, key=lambda norm: means[norm][: len(means[norm]) // 2 + 1].mean())
    for norm, mean in means.items():
        style: dict[str, Any] = {"color": COLOURS[norm], "weight": "bold"}
        style |= {"textcoords": "offset points", "zorder": 4}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        value = f"{100 - mean[0]:.1f}%"
        axes.annotate(
            value, (1, mean[0]), xytext=(-8, 0), ha="right", va="center", fontsize=10, **style
        )
        at = min(1, len(mean) - 1)
        if norm == best:  # above all that the first epochs hold
            place = (at + 1, min(error[:4].min() for error in errors.values()))
            axes.annotate(
                NORMS[norm], place, xytext=(0, 6), ha="center", va="bottom", fontsize=12.5, **style
            )
        else:
            place = (at + 1, mean[at])
            axes.annotate(
                NORMS[norm], place, xytext=(14, -10), ha="left", va="top", fontsize=12.5, **style
            )
