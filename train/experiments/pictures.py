"""The pictures of the page, each drawn from figures alone and named in one line of Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from netdeconv_jax.analysis import figures
from train.curves import COLOURS, FAINT, INK, NORMS, draw_curves

FIRST = 100  # iterations that a picture of losses shows


class Pictures:
    """Draws into `<page's folder>/images/reproduction/`.

    Args:
      page: of the Markdown file that shows them.
    """

    def __init__(self, page: Path):
        self._folder = page.parent / "images" / "reproduction"
        self._folder.mkdir(parents=True, exist_ok=True)

    def _place(self, name: str, title: str) -> tuple[Path, str]:
        return self._folder / f"{name}.png", f"![{title}](images/reproduction/{name}.png)"

    def matrices(self, name: str, matrices: Mapping[str, Any], *, block: int, title: str) -> str:
        """Draw covariances side by side."""
        path, line = self._place(name, title)
        figures.save_matrices(path, matrices, block=block)
        return line

    def images(self, name: str, images: Mapping[str, Any], *, title: str) -> str:
        """Draw images side by side."""
        path, line = self._place(name, title)
        figures.save_images(path, images)
        return line

    def densities(self, name: str, panels: Mapping[str, Any], *, title: str) -> str:
        """Draw densities, a panel for each set of data."""
        path, line = self._place(name, title)
        figures.save_densities(path, panels)
        return line

    def filters(
        self, name: str, rows: Mapping[str, Any], *, title: str, columns: Sequence[str] = ()
    ) -> str:
        """Draw rows of filters."""
        path, line = self._place(name, title)
        figures.save_filters(path, rows, titles=columns)
        return line

    def loss_curves(
        self,
        name: str,
        curves: Mapping[str, tuple[str, Sequence[Sequence[tuple[float, float]]]]],
        *,
        title: str,
        line: tuple[str, float] | None = None,
        ceiling: float,
    ) -> str:
        """Draw the loss of the first iterations: mean over seeds as a line, their range as a band.

        Args:
          name: of the file.
          curves: by label, the norm and for each seed `(step, loss)`.
          title: above the picture.
          line: label and height of a horizontal line.
          ceiling: losses above it are cut off.
        """
        path, markdown = self._place(name, title)
        figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
        draw_losses(figure.subplots(), curves, line=line, ceiling=ceiling)
        figure.suptitle(title, fontsize=11, weight="bold", color=INK, x=0.02, ha="left")
        FigureCanvasAgg(figure).print_png(path)
        return markdown

    def accuracies(
        self, name: str, curves: Mapping[str, list[list[float]]], *, title: str, caption: str
    ) -> str:
        """Draw test accuracy by epoch: by norm, for each epoch that of every seed in percent."""
        path, markdown = self._place(name, title)
        draw_curves(curves, path, caption=caption)
        return markdown

    def ends(
        self,
        name: str,
        runs: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
        *,
        title: str,
        mark: float,
    ) -> str:
        """Draw what whole runs end with over the minutes that they take.

        Args:
          name: of the file.
          runs: by norm, for each length of a run its minutes and the accuracy of every seed in percent.
          title: above the picture.
          mark: a dashed line, in percent.
        """
        path, markdown = self._place(name, title)
        figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
        axes = figure.subplots()
        for norm, lengths in runs.items():
            minutes = [minute for minute, _ in lengths]
            means = [float(np.mean(values)) for _, values in lengths]
            axes.plot(minutes, means, "o-", color=COLOURS[norm], lw=1.8, ms=5, label=NORMS[norm])
            for minute, values in lengths:
                axes.plot([minute] * len(values), values, ".", color=COLOURS[norm], ms=5, alpha=0.6)
        axes.axhline(mark, color=INK, lw=0.9, ls="--")
        axes.set_xlabel("minutes of training steps, a dot a run", fontsize=9, color=INK)
        axes.set_ylabel("test accuracy at its end, %", fontsize=9, color=INK)
        axes.legend(fontsize=8.5, frameon=False, loc="lower right")
        _plain(axes)
        figure.suptitle(title, fontsize=11, weight="bold", color=INK, x=0.02, ha="left")
        FigureCanvasAgg(figure).print_png(path)
        return markdown

    def dots(self, name: str, rows: Sequence[Mapping[str, Any]], *, title: str, what: str) -> str:
        """Draw a line for each row with a dot for every figure, ours full and the published hollow.

        Args:
          name: of the file.
          rows: `label`, and by norm `ours` (a list, one a seed) and `published` (a number or None).
          title: above the picture.
          what: the horizontal axis measures.
        """
        path, markdown = self._place(name, title)
        figure = Figure(figsize=(7, 1.25 + 0.33 * len(rows)), dpi=150, layout="constrained")
        draw_dots(figure.subplots(), rows, what)
        figure.suptitle(title, fontsize=11, weight="bold", color=INK, x=0.02, ha="left")
        FigureCanvasAgg(figure).print_png(path)
        return markdown


def draw_losses(axes: Axes, curves: Any, *, line: Any = None, ceiling: float) -> None:
    """Draw losses by iteration, see `Pictures.loss_curves`."""
    for label, (norm, runs) in curves.items():
        least = min(len(run) for run in runs)
        steps = np.array([step for step, _ in runs[0][:least]])[:FIRST]
        losses = np.array([[loss for _, loss in run[:least]] for run in runs])[:, :FIRST]
        losses = np.minimum(losses, 10 * ceiling)
        colour = COLOURS[norm]
        axes.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.15, lw=0)
        # On grey images channel deconvolution is plain SGD, nearly: dashes show what is below them.
        style = "--" if norm == "channel" else "-"
        axes.plot(steps, losses.mean(0), style, color=colour, lw=1.8, label=label)
    if line is not None:
        axes.axhline(line[1], color=INK, lw=0.9, ls="--", label=line[0])
    axes.set_ylim(0, ceiling)
    axes.set_xlabel("iteration", fontsize=9, color=INK)
    axes.set_ylabel("training loss", fontsize=9, color=INK)
    axes.legend(fontsize=8.5, frameon=False, loc="upper right")
    _plain(axes)


def draw_dots(axes: Axes, rows: Sequence[Mapping[str, Any]], what: str) -> None:
    """Draw accuracies by row, see `Pictures.dots`."""
    named: dict[str, None] = {}
    rings = any(row.get(norm, {}).get("published") is not None for row in rows for norm in COLOURS)
    for y, row in enumerate(rows):
        for norm, colour in COLOURS.items():
            cell = row.get(norm)
            if cell is None:
                continue
            ours, published = list(cell.get("ours", ())), cell.get("published")
            label = None if norm in named else NORMS[norm]
            named[norm] = None
            axes.plot(
                ours, [y] * len(ours), "o", color=colour, ms=6, alpha=0.85, zorder=3, label=label
            )
            if published is not None:
                axes.plot([published], [y], "o", mfc="none", mec=colour, ms=9, mew=1.3, zorder=2)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    marks = "\nfull: ours, a dot a seed; ring: published" if rings else ", a dot a seed"
    axes.set_xlabel(what + marks, fontsize=8.5, color=INK)
    if len(named) > 1:
        axes.legend(
            fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(named)
        )
    _plain(axes, grid="x")


def _plain(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    axes.grid(axis=grid, color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK, labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
