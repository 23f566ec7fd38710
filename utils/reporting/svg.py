"""Diagrams as inline SVG, drawn in the colours of the page around them: lines, a confusion matrix, a reliability diagram."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from utils.loggers.console import printable

WIDTH, HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 10, 40
_COLUMNS = 400  # points of a line at most; more steps share one, with a band from their least to their largest value
COLOURS = 6  # the page has classes c0 to c5


@dataclass
class Line:
    """A curve: its values ``ys`` (None: there is none) over ``xs``, rising; ``colour`` of the page's, ``dots`` marks every point."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int = 0
    dashed: bool = False
    dots: bool = False


def text_of(value: object) -> str:
    """``value`` as text that neither steers a terminal nor a browser."""
    return escape(printable(str(value)), quote=True)


def shortened(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[:most - 1] + "…"


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, marks: Sequence[tuple[float, str]] = ()) -> str:
    """Curves over one pair of axes, with dashed upright lines at ``marks`` of (x, what happened); "" without a single point."""
    drawn = [(line, _reduced(line)) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    xs = [x for _, points in drawn for x, *_ in points]
    x_ticks, y_ticks = _ticks(0, max(xs), 6), _ticks(*_range([point for _, points in drawn for point in points]), 5)
    # the x axis ends with the curves, the y axis with a round number
    frame = _Frame(0, max(xs), y_ticks[0], y_ticks[-1])
    body = [_axes(frame, [x for x in x_ticks if x <= max(xs)], y_ticks, x_label, y_label)]
    for x, meaning in marks:
        if 0 <= x <= max(xs):
            at = f"{frame.x(x):.1f}"
            body.append(f'<g class="mark"><line x1="{at}" x2="{at}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
                        f"<title>{text_of(meaning)}</title></g>")
    for line, points in drawn:
        body.append(f'<g class="c{line.colour % COLOURS}">{_curve(line, points, frame)}</g>')
    return _svg(WIDTH, HEIGHT, "".join(body), f"{y_label} over {x_label}")


@dataclass(frozen=True)
class _Frame:
    """Where values lie in the picture."""

    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left or 1) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        value = min(max(value, self.bottom), self.top)
        return HEIGHT - _BOTTOM - (value - self.bottom) / (self.top - self.bottom or 1) * (HEIGHT - _TOP - _BOTTOM)


def _reduced(line: Line) -> list[tuple[float, float, float, float]]:
    """(x, mean, least, largest) of so many groups of neighbours as the picture has columns."""
    points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if y is not None and math.isfinite(y)]
    groups = [part for part in np.array_split(np.array(points), min(len(points), _COLUMNS)) if len(part)] if points else []
    return [(float(part[-1, 0]), float(part[:, 1].mean()), float(part[:, 1].min()), float(part[:, 1].max())) for part in groups]


def _range(points: Sequence[tuple[float, float, float, float]]) -> tuple[float, float]:
    """(low, high) that hold all means and all but the outermost hundredths of the bands: a spike must not flatten the rest."""
    _, means, least, largest = np.array(points).T
    return min(means.min(), np.quantile(least, 0.01)), max(means.max(), np.quantile(largest, 0.99))


def _curve(line: Line, points: list[tuple[float, float, float, float]], frame: _Frame) -> str:
    body = []
    if any(least < largest for *_, least, largest in points):
        upper = [f"{frame.x(x):.1f},{frame.y(largest):.1f}" for x, _, _, largest in points]
        lower = [f"{frame.x(x):.1f},{frame.y(least):.1f}" for x, _, least, _ in reversed(points)]
        body.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y, *_ in points)
    body.append(f'<polyline class="line{" dashed" if line.dashed else ""}" points="{path}"/>')
    if line.dots or len(points) == 1:
        body += [f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5"><title>{text_of(line.label)} at {x:g}: {y:.4g}</title>'
                 "</circle>" for x, y, *_ in points]
    return "".join(body)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers, evenly apart, from at or below ``low`` to at or above ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def number(value: float) -> str:
    """Short: ``0.05``, ``2.5e-4``, ``125k``."""
    if abs(value) >= 10_000:
        return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value / 1e3:.4g}k"
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.4g}"
    digits, power = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def _axes(frame: _Frame, x_ticks: Iterable[float], y_ticks: Iterable[float], x_label: str, y_label: str) -> str:
    body = []
    for value in y_ticks:
        y = f"{frame.y(value):.1f}"
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
                    f'<text x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end">{number(value)}</text>')
    for value in x_ticks:
        x = f"{frame.x(value):.1f}"
        body.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{HEIGHT - _BOTTOM}" y2="{HEIGHT - _BOTTOM + 4}"/>'
                    f'<text x="{x}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{number(value)}</text>')
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    body.append(f'<text x="{(WIDTH + _LEFT - _RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{text_of(x_label)}</text>'
                f'<text transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">{text_of(y_label)}</text>')
    return "".join(body)


def confusion_matrix(cells: np.ndarray, names: Sequence[str]) -> str:
    """(target, predicted, times) as shares of the target's images; the diagonal in one colour, mistakes in another."""
    classes = len(names)
    side = 30 if classes <= 20 else max(11, 600 // classes)
    labels = [shortened(printable(name)) for name in names]
    room = 7 * max(map(len, labels)) + 14
    totals, body = np.bincount(cells[:, 0], cells[:, 2], classes), []
    for number, label in enumerate(labels):
        middle = room + (number + 0.5) * side
        body.append(f'<text x="{room - 6}" y="{middle:.0f}" dy="4" text-anchor="end">{escape(label)}</text>'
                    f'<text transform="translate({middle + 4:.0f} {room - 6}) rotate(-90)">{escape(label)}</text>')
    for target, predicted, times in cells.tolist():
        x, y, share = room + predicted * side, room + target * side, times / totals[target]
        kind, opacity = ("right", 0.1 + 0.6 * share) if target == predicted else ("wrong", 0.15 + 0.85 * share)
        body.append(f'<g><rect class="{kind}" x="{x}" y="{y}" width="{side}" height="{side}" fill-opacity="{opacity:.2f}"/>'
                    + (f'<text x="{x + side / 2}" y="{y + side / 2}" dy="4" text-anchor="middle">{times}</text>' if classes <= 20 else "")
                    + f"<title>{text_of(names[target])} taken for {text_of(names[predicted])}: {times} of {totals[target]:.0f}</title></g>")
    size = classes * side
    body.append(f'<rect class="frame" x="{room}" y="{room}" width="{size}" height="{size}"/>')
    return _svg(room + size + 2, room + size + 2, "".join(body), "confusion matrix: rows are true classes, columns predictions", fixed=True)


def reliability_diagram(bins: Sequence[tuple[int, float, float]]) -> str:
    """Share right over confidence, a bar a bin of (images, confidence, share right), against the line where the two are equal."""
    frame, width, most = _Frame(0, 1, 0, 1), 1 / len(bins), max(images for images, *_ in bins)
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    body = [_axes(frame, ticks, ticks, "confidence", "share right")]
    for place, (images, confidence, accuracy) in enumerate(bins):
        if not images:
            continue
        x, bar = frame.x(place * width), frame.x(width) - frame.x(0)
        top, expected = frame.y(accuracy), frame.y(confidence)
        body.append(f'<g><rect class="bar" x="{x + 1:.1f}" y="{top:.1f}" width="{bar - 2:.1f}" height="{frame.y(0) - top:.1f}" '
                    f'fill-opacity="{0.25 + 0.6 * (images / most) ** 0.5:.2f}"/>'
                    f'<line class="expected" x1="{x + 1:.1f}" x2="{x + bar - 1:.1f}" y1="{expected:.1f}" y2="{expected:.1f}"/>'
                    f"<title>{images} images: confidence {confidence:.3f}, right {accuracy:.3f}</title></g>")
    body.append(f'<line class="diagonal" x1="{frame.x(0)}" y1="{frame.y(0)}" x2="{frame.x(1)}" y2="{frame.y(1)}"/>')
    return _svg(WIDTH, HEIGHT, f'<g class="c0">{"".join(body)}</g>', "share right over confidence")


def _svg(width: float, height: float, body: str, label: str, fixed: bool = False) -> str:
    size = f' style="width:{width:.0f}px"' if fixed else ""
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{text_of(label)}"{size}>{body}</svg>'
