"""A picture of medians with their spread, in the look of the trainer's curves; needs matplotlib."""

from pathlib import Path


def draw(
    values: dict[str, tuple[float, float, float]],
    path: Path,
    *,
    title: str,
    caption: str,
    notes: dict[str, str],
    unit: str,
) -> None:
    """Draw one bar for each name, the first one on top.

    Args:
      values: by name, the (median, least, most).
      path: of the PNG.
      title, caption: what it is, and what it was measured on.
      notes: by name, a few words beside the bar.
      unit: of the values.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from train.curves import COLOURS, FAINT, INK

    height = 1.6 + 0.46 * len(values)
    figure = Figure(figsize=(8, height), dpi=160)
    axes = figure.add_axes((0.30, 0.62 / height, 0.66, 1 - 1.55 / height))
    right = max(most for _, _, most in values.values())
    for place, (name, (median, least, most)) in enumerate(values.items()):
        colour = COLOURS[name.partition(":")[0]]
        axes.barh(place, median, height=0.62, color=colour)
        axes.plot([least, most], [place, place], color=INK, lw=1.2, solid_capstyle="butt")
        axes.text(most + 0.012 * right, place, notes[name], va="center", fontsize=9.5, color=INK)
    axes.set_yticks(range(len(values)), list(values), fontsize=10, color=INK)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(0, 1.6 * right)
    axes.set_xlabel(unit, color=INK, fontsize=10)
    axes.grid(axis="x", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK, labelsize=9.5)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color("#bbbbbb")
    figure.text(0.02, 1 - 0.40 / height, title, fontsize=14, weight="bold", color=INK)
    figure.text(0.02, 1 - 0.68 / height, caption, fontsize=8.5, color=FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
