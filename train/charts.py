"""Line charts as inline SVG: coloured by the page's style sheet, readable at the width of a phone."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TypeGuard

WIDTH, HEIGHT = 460, 258
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 46
FEW = 30  # up to so many points each gets a dot
MOST = 400  # points of a line: what is more than a pixel can show is thinned
LOG_RANGE = 30.0  # from this ratio of its extremes on, a positive quantity is drawn logarithmically


@dataclasses.dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
      name: in tooltips; its first word is its class in the style sheet.
      points: (x, y) in the order of x; a y that is None or not finite leaves a gap.
    """

    name: str
    points: Sequence[tuple[float, float | None]]


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Values on their way to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        warp = math.log if self.log else float
        share = (warp(value) - warp(self.low)) / (warp(self.high) - warp(self.low))
        return round(self.start + share * (self.end - self.start), 1)


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    show: Callable[[float], str],
    x_name: str = "epoch",
    floor: float | None = None,
    ceiling: float | None = None,
    include: Sequence[float] = (),
    log: bool = False,
) -> str:
    """Return an `<svg>`, or a line of text if there is no point to draw.

    Args:
      series: lines, the most important one last: it is drawn on top.
      label: what a screen reader says of the picture.
      show: a value as text, for axis and tooltips.
      x_name: of the horizontal axis.
      floor, ceiling: limits that the vertical axis does not pass.
      include: values that it shows in any case, so that small changes look small.
      log: draw logarithmically where the values are positive and spread widely.
    """
    points = [(x, y) for one in series for x, y in one.points if _drawable(y)]
    if not points:
        return '<p class="empty">Not recorded.</p>'
    xs, ys = [x for x, _ in points], [*(y for _, y in points), *include]
    log = log and min(ys) > 0 and max(ys) / min(ys) > LOG_RANGE
    ticks = log_ticks(min(ys), max(ys)) if log else even_ticks(min(ys), max(ys), floor, ceiling)
    low, high = min(*ticks, *ys), max(*ticks, *ys)
    across = _x_scale(min(xs), max(xs))
    up = _Scale(low, high, HEIGHT - BOTTOM, TOP, log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        *_axes(ticks, up, across, (min(xs), max(xs)), show, x_name),
        *(_line(one, across, up) for one in series),
        *_tooltips(series, across, show, x_name),
        "</svg>",
    ]
    return "\n".join(parts)


def even_ticks(
    low: float, high: float, floor: float | None = None, ceiling: float | None = None
) -> list[float]:
    """Return three to seven round values that enclose `low` and `high`.

    Example:
      >>> even_ticks(0.13, 0.92, floor=0, ceiling=1)
      [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-200):
        margin = max(abs(high) / 2, 1e-9) if high else 1.0
        low, high = low - margin, high + margin
    if floor is not None:
        low = max(low, floor)
    if ceiling is not None:
        high = min(high, ceiling)
    if high - low <= 1e-200:  # the limits left nothing, as with an accuracy above 1 by mistake
        low, high = min(low, high) - 0.5, max(low, high) + 0.5
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = size * next(n for n in (1, 2, 2.5, 5, 10) if (high - low) / (n * size) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten that enclose `low` and `high`, thinned to at most eight.

    Example:
      >>> log_ticks(0.02, 3.0)
      [0.01, 0.1, 1.0, 10.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 7))
    return [10.0**i for i in range(first, last + every, every) if -308 < i < 308]


def _drawable(y: float | None) -> TypeGuard[float]:
    return isinstance(y, (int, float)) and math.isfinite(y)


def _x_scale(low: float, high: float) -> _Scale:
    if high == low:  # one epoch: its point is in the middle
        low, high = low - 1, high + 1
    return _Scale(low, high, LEFT + 4, WIDTH - RIGHT - 4)


def _axes(ticks, up, across, ends, show, x_name):
    for tick in ticks:
        y = up(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(show(tick))}</text>'
    for tick in even_ticks(across.low, across.high):
        if tick == round(tick) and ends[0] <= tick <= ends[1]:
            yield (
                f'<text class="tick" x="{across(tick)}" y="{HEIGHT - BOTTOM + 19}" '
                f'text-anchor="middle">{tick:,.0f}</text>'
            )
    x = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text class="tick" x="{x}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>'


def _line(one: Series, across: _Scale, up: _Scale) -> str:
    css = escape(one.name.split()[0])
    pieces, piece = [], []
    for x, y in thinned(one.points):
        if _drawable(y):
            piece.append((across(x), up(y)))
        elif piece:
            pieces.append(piece)
            piece = []
    pieces.append(piece)
    paths = "".join(
        f'<polyline points="{" ".join(f"{x:g},{y:g}" for x, y in piece)}"/>'
        for piece in pieces
        if len(piece) > 1
    )
    # A piece of one point is no line: it would not be seen.
    few = len(one.points) <= FEW
    dots = "".join(
        f'<circle cx="{x:g}" cy="{y:g}" r="{4 if len(piece) == 1 else 3}"/>'
        for piece in pieces
        for x, y in piece
        if few or len(piece) == 1
    )
    return f'<g class="{css}">{paths}{dots}</g>'


def thinned(
    points: Sequence[tuple[float, float | None]],
) -> Sequence[tuple[float, float | None]]:
    """Return at most about `MOST` of the points, the last one among them; peaks between may be lost."""
    every = math.ceil(len(points) / MOST)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def _tooltips(series, across, show, x_name):
    """A strip for each x with what was measured there: browsers show its `<title>`, without a script."""
    values: dict[float, list[str]] = {}
    for one in reversed(series):
        for x, y in thinned(one.points):
            if _drawable(y):
                values.setdefault(x, []).append(f"{one.name} {show(y)}")
    xs = sorted(values)
    edges = [LEFT, *((across(a) + across(b)) / 2 for a, b in itertools.pairwise(xs))]
    for x, left, right in zip(xs, edges, [*edges[1:], WIDTH - RIGHT], strict=True):
        yield (
            f'<rect x="{left:g}" y="{TOP}" width="{right - left:.3g}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{escape(f'{x_name} {x:g}: ' + ', '.join(values[x]))}</title></rect>"
        )
