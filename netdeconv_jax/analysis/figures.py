"""Pictures of covariances, filters and distributions. Needs matplotlib, which the library does not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, FAINT = "#222222", "#6f6f6f"
BEFORE, AFTER, REFERENCE = "#c4622d", "#14639e", "#999999"


def save_matrices(path: Path, matrices: Mapping[str, Any], *, block: int | None = None) -> None:
    """Draw symmetric matrices side by side, each on a colour scale of its own around zero.

    Args:
      path: of the PNG.
      matrices: by title, [d, d].
      block: draw a line after every so many rows and columns.

    Source: Ye et al. 2020, figure 2.
    """
    figure = Figure(figsize=(3.1 * len(matrices), 3.3), dpi=150, layout="constrained")
    for axes, (title, matrix) in zip(
        figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items(), strict=True
    ):
        matrix = np.asarray(matrix)
        most = np.abs(matrix).max()
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-most, vmax=most)
        for line in range(block or len(matrix), len(matrix), block or len(matrix)):
            axes.axhline(line - 0.5, color=INK, lw=0.5)
            axes.axvline(line - 0.5, color=INK, lw=0.5)
        axes.set_title(title, fontsize=9.5, color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)
        bar.ax.tick_params(labelsize=7, length=0)
        bar.outline.set_visible(False)
    FigureCanvasAgg(figure).print_png(path)


def save_filters(
    path: Path, rows: Mapping[str, Sequence[Any]], *, titles: Sequence[str] = ()
) -> None:
    """Draw rows of small filters: red is positive, blue negative, every filter on a scale of its own.

    Args:
      path: of the PNG.
      rows: by label, filters [height, width].
      titles: of the columns.

    Source: ours.
    """
    columns = max(len(filters) for filters in rows.values())
    height = 0.86 * len(rows) + 0.3
    figure = Figure(figsize=(0.82 * columns + 1.9, height), dpi=150)
    left = 1.85 / figure.get_figwidth()
    grid = figure.subplots(len(rows), columns, squeeze=False)
    figure.subplots_adjust(
        left=left,
        right=0.995,
        top=1 - (0.28 if titles else 0.03) / height,
        bottom=0.03 / height,
        wspace=0.08,
        hspace=0.12,
    )
    for number, (line, (label, filters)) in enumerate(zip(grid, rows.items(), strict=True)):
        for axes in line:
            axes.set_axis_off()
        for i, (axes, one) in enumerate(zip(line, filters, strict=False)):
            most = np.abs(one).max() or 1.0
            axes.imshow(np.asarray(one), cmap="RdBu_r", vmin=-most, vmax=most)
            if number == 0 and i < len(titles):
                axes.set_title(titles[i], fontsize=8, color=INK)
        box = line[0].get_position()
        figure.text(
            left - 0.015,
            (box.y0 + box.y1) / 2,
            label,
            ha="right",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    FigureCanvasAgg(figure).print_png(path)


def save_densities(
    path: Path, panels: Mapping[str, Mapping[str, tuple[Any, Any]]], *, reference: bool = True
) -> None:
    """Draw densities of standardized values on a logarithmic axis, where tails can be seen.

    Args:
      path: of the PNG.
      panels: by title, by name a density [n] and its edges [n + 1]; the first one is drawn as "before".
      reference: draw the normal density too.

    Source: ours.
    """
    figure = Figure(figsize=(3.6 * len(panels), 3.1), dpi=150, layout="constrained")
    for axes, (title, densities) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for (name, (density, edges)), colour in zip(
            densities.items(), (BEFORE, AFTER, "#2b8a5b"), strict=False
        ):
            density, edges = np.asarray(density), np.asarray(edges)
            middle = (edges[1:] + edges[:-1]) / 2
            axes.plot(
                middle, np.where(density > 0, density, np.nan), color=colour, lw=1.8, label=name
            )
        if reference:
            normal = np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi)
            axes.plot(middle, normal, color=REFERENCE, lw=1, ls=":", label="normal")
        axes.set_yscale("log")
        axes.set_ylim(3e-4, 5)
        axes.set_title(title, fontsize=9.5, color=INK)
        axes.set_xlabel("standard deviations", fontsize=8.5, color=INK)
        axes.tick_params(labelsize=8, length=0)
        axes.legend(fontsize=8, frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)


def save_images(path: Path, images: Mapping[str, Any]) -> None:
    """Draw images beside each other, as they are.

    Args:
      path: of the PNG.
      images: by title, [height, width] or [height, width, 3], in [0, 1].

    Source: Ye et al. 2020, figures 3 and 9.
    """
    shape = np.shape(next(iter(images.values())))
    figure = Figure(
        figsize=(3.0 * len(images), 3.0 * shape[0] / shape[1] + 0.3), dpi=130, layout="constrained"
    )
    for axes, (title, image) in zip(
        figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True
    ):
        axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=9.5, color=INK)
        axes.set_axis_off()
    FigureCanvasAgg(figure).print_png(path)
