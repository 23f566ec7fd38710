"""The report's charts, drawn by matplotlib: a function a chart, whose figure becomes SVG in the page or a PNG file."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

from utils.evaluation.predictions_file import PredictionsFile, confusion, reliability
from utils.loggers.console import plain
from utils.reporting.charts import Chart, charts
from utils.reporting.run_reader import Run

MOST_CLASSES = 50  # of a confusion matrix that is drawn
MOST_BARS = 40
COLORS = ("#2f6fde", "#d9622b", "#2a9d6a", "#8a5cd1", "#c23b6b", "#8a7a1f")
TEXT, _SOFT, _RULE = "#1c2127", "#5e6873", "#dfe3e8"
# The page has a value of each for light and for dark.
_VARIABLES = {color: f"var(--c{number})" for number, color in enumerate(COLORS)} | {
    TEXT: "var(--fg)", _SOFT: "var(--soft)", _RULE: "var(--line)"}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 280, 62, 12, 28, 40  # in units of the SVG, which are points
_TICKS = (1, 2, 2.5, 5, 10)  # that they are apart
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# Names may hold dollar signs, so no formulas; the salt makes the ids of the SVG, and so the file, the same each time.
_STYLE = {
    "text.parse_math": False, "text.usetex": False, "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 12,
    "font.family": "DejaVu Sans", "text.color": _SOFT, "axes.labelcolor": _SOFT, "axes.edgecolor": _RULE, "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": _RULE, "xtick.color": _RULE, "ytick.color": _RULE,
    "xtick.labelcolor": _SOFT, "ytick.labelcolor": _SOFT, "ytick.major.size": 0, "legend.frameon": False, "lines.linewidth": 1.7,
    "lines.markersize": 5, **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")}}
styled = matplotlib.rc_context(_STYLE)

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its cache of fonts, and letters they lack, are no matter of the run
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


@dataclass
class Plot:
    """A drawn chart.

    Attributes:
        name: of its file.
        label: what it shows, for who cannot see it.
        tips: gid of an artist -> what is told of it where the pointer rests, or of each of its markers.
        scales: whether the page may draw it smaller or larger.
        caption, note: what the page says above and below it.
    """

    name: str
    label: str
    figure: Figure
    tips: dict[str, str | list[str]] = field(default_factory=dict)
    scales: bool = True
    caption: str = ""
    note: str = ""

    def tip(self, text: str | list[str]) -> str:
        """The gid for an artist of which ``text`` is told."""
        self.tips[gid := f"tip{len(self.tips)}"] = text
        return gid

    @styled
    def _save(self, file: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about letters of names that its font lacks
            self.figure.savefig(file, **options)

    def png(self, folder: str) -> str:
        """Write it; the file's name. Raises ``OSError``."""
        self._save(os.path.join(folder, f"{self.name}.png"), dpi=130)
        return f"{self.name}.png"

    def svg(self) -> str:
        """An SVG element in the colors of the page around it, without font, ids that clash or anything to fetch."""
        file = io.StringIO()
        self._save(file, format="svg", transparent=True, metadata={"Date": None})
        root = ElementTree.fromstring(file.getvalue())
        width = root.get("viewBox", "").split()[2]
        for element in (root, *root.findall(f"{{{_SVG}}}defs")):  # matplotlib's version, and a style that would hold for the whole page
            for child in [child for child in element if child.tag.endswith(("}metadata", "}style"))]:
                element.remove(child)
        for element in list(root.iter()):
            _shorten(element)
            if element.tag == f"{{{_SVG}}}g" and (tip := self.tips.get(element.attrib.pop("id", ""))):
                marked = [element] if isinstance(tip, str) else element.findall(f".//{{{_SVG}}}use")
                for part, text in zip(marked, [tip] if isinstance(tip, str) else tip, strict=True):
                    title = ElementTree.Element(f"{{{_SVG}}}title")
                    title.text = plain(text)
                    part.insert(0, title)
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": plain(self.label)}
        if not self.scales:
            root.set("style", f"width:{width}px")
        return ElementTree.tostring(root, encoding="unicode")


def _shorten(element: ElementTree.Element) -> None:
    """Colors and font of the page; what a tenth of a unit makes no difference to is left out."""
    element.tail = None
    if not element.tag.endswith("}text"):
        element.text = None
    if style := element.get("style"):
        style = re.sub(r"font-family: [^;]*(; )?", "", style)
        element.set("style", re.sub("#[0-9a-f]{6}", lambda color: _VARIABLES.get(color[0], color[0]), style))
    for name in ("d", "x", "y", "width", "height", "transform"):
        if value := element.get(name):
            element.set(name, re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), " ".join(value.split())))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]


def curves(runs: Sequence[Run]) -> list[Plot]:
    """What changed over the steps of ``runs``, a plot a chart."""
    return [_curves(chart) for chart in charts(runs)]


def of_predictions(predictions: PredictionsFile) -> list[Plot]:
    """The confusion matrix, unless there are too many classes, and the reliability diagram."""
    confused = [matrix(confusion(predictions), predictions.classes)] if len(predictions.classes) <= MOST_CLASSES else []
    return [*confused, _reliability(*reliability(predictions))]


@styled
def _curves(chart: Chart) -> Plot:
    lines = [line for line in chart.lines if line.label] if len(chart.lines) > 1 else []
    columns = max(1, (_WIDTH - _LEFT) // (30 + 7 * max((len(line.label) for line in lines), default=0)))
    plot, axes = framed(chart.name, chart.title, chart.x_label, chart.y_label, 18 * math.ceil(len(lines) / columns))
    drawn, all_points = [], [line.thinned() for line in chart.lines]
    for line, points in zip(chart.lines, all_points, strict=True):
        x, mean, least, largest = points.T
        color = COLORS[line.color % len(COLORS)]
        if (least < largest).any():
            axes.fill_between(x, least, largest, color=color, alpha=0.16, linewidth=0)
        dots = line.dots or len(x) == 1
        tips = [f"{line.label} at {at:g}: {y:.4g}" for at, y in zip(x, mean, strict=True)]
        drawn += axes.plot(x, mean, "o-" if dots else "-", color=color, clip_on=False, gid=plot.tip(tips) if dots else None)
        if line.dashed:
            drawn[-1].set_linestyle((0, (4, 2.5)))
    _, means, least, largest = np.concatenate(all_points).T
    # All means, and all but the outermost hundredths of the bands: a spike must not flatten the rest.
    low, high = min(means.min(), np.quantile(least, 0.01)), max(means.max(), np.quantile(largest, 0.99))
    if low == high:  # a flat line
        low, high = low - 0.1 * abs(low), low + 0.1 * abs(low) or 1
    ticks = MaxNLocator(5, steps=_TICKS).tick_values(low, high)
    right = max(points[-1, 0] for points in all_points) or 1
    axes.set(xlim=(0, right), ylim=(ticks[0], ticks[-1]), yticks=ticks)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_TICKS, integer=True))
    for axis, most in ((axes.xaxis, right), (axes.yaxis, abs(ticks).max())):
        axis.set_major_formatter(EngFormatter(sep="") if most >= 10_000 else "{x:g}")
    for x, meaning in chart.marks:
        if 0 <= x <= right:
            axes.axvline(x, color=_SOFT, linestyle=(0, (3, 3)), linewidth=1, gid=plot.tip(meaning))
    if lines:
        handles = [handle for handle, line in zip(drawn, chart.lines, strict=True) if line.label]
        plot.figure.legend(handles, [plain(line.label) for line in lines], loc="upper left", borderaxespad=0, borderpad=0, ncols=columns,
                           bbox_to_anchor=(_LEFT / _WIDTH, 1 - 22 / _height(plot)), handlelength=1.5, columnspacing=1.2)
    return plot


def framed(name: str, title: str, x_label: str, y_label: str, head: int = 0, *, room: int = _HEIGHT,
           left: int = _LEFT) -> tuple[Plot, matplotlib.axes.Axes]:
    """A pair of axes, ``room`` units high with their labels, under a title and a ``head`` of so many units."""
    height = room + head
    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    axes = figure.add_axes((left / _WIDTH, _BOTTOM / height, (_WIDTH - left - _RIGHT) / _WIDTH, (room - _TOP - _BOTTOM) / height))
    figure.text(_LEFT / _WIDTH, 1 - 14 / height, plain(title), color=TEXT, weight="bold")
    figure.text((left + _WIDTH - _RIGHT) / 2 / _WIDTH, 6 / height, plain(x_label), ha="center")
    figure.text(14 / _WIDTH, (_BOTTOM + room - _TOP) / 2 / height, plain(y_label), ha="center", va="center", rotation=90)
    return Plot(name, f"{title}: {y_label or name} over {x_label}", figure), axes


def _height(plot: Plot) -> float:
    return 72 * plot.figure.get_figheight()


@styled
def matrix(cells: np.ndarray, classes: Sequence[str], of: str = "images", as_share: bool = False) -> Plot:
    """(target, predicted, times) as shares of the target's images; the diagonal in one color, mistakes in another.

    Args:
        of: what is counted.
        as_share: write percents into the cells, not counts.
    """
    count = len(classes)
    side = 30 if count <= 20 else max(12, 600 // count)
    font = min(12, side - 2)
    labels = [shortened(plain(name)) for name in classes]
    room = 0.62 * font * max(map(len, labels)) + 14
    size = room + count * side + 20  # beside it is what rows and columns are
    figure = Figure(figsize=(size / 72, size / 72))
    plot = Plot("confusion", "confusion matrix: rows are true classes, columns predictions", figure, scales=False,
                caption="Confusion: true classes in rows, predictions in columns" + (f", percent of a row's {of}" if as_share else ""))
    axes = figure.add_axes((room / size, 20 / size, count * side / size, count * side / size))
    axes.grid(False)
    axes.spines[:].set_visible(True)
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
    axes.set_xlabel("predicted", labelpad=2)
    axes.set_ylabel("true", labelpad=2)
    axes.yaxis.set_label_position("right")
    axes.tick_params(length=0, labelcolor=TEXT, labelsize=font, labeltop=True, labelbottom=False)
    axes.set_xticks(range(count), labels, rotation=90)
    axes.set_yticks(range(count), labels)
    totals = np.bincount(cells[:, 0], cells[:, 2], count)
    for target, predicted, times in cells.tolist():
        share, right = times / totals[target], target == predicted
        tip = plot.tip(f"{classes[target]} predicted as {classes[predicted]}: {times:,} of {totals[target]:,.0f} {of}")
        axes.add_patch(Rectangle((predicted - 0.5, target - 0.5), 1, 1, color=COLORS[0 if right else 1], linewidth=0, gid=tip,
                                 alpha=0.1 + 0.6 * share if right else 0.15 + 0.85 * share))
        if count <= 20:
            text = f"{100 * share:.0f}" if as_share else str(times)
            axes.text(predicted, target, text, ha="center", va="center_baseline", color=TEXT, gid=tip)
    return plot


@styled
def _reliability(bins: Sequence[tuple[int, float, float]], error: float) -> Plot:
    """Accuracy over confidence, a bar a bin of (images, confidence, accuracy), against the line where the two are equal."""
    plot, axes = framed("reliability", f"Reliability: expected calibration error {100 * error:.2f} %", "confidence", "accuracy")
    plot.note = ("Bars: accuracy on images of that confidence, darker where there are many; short lines: their mean confidence; equal on "
                 "the dashed diagonal.")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    width, most = 1 / len(bins), max(images for images, *_ in bins)
    for place, (images, confidence, accuracy) in enumerate(bins):
        if images:
            tip = plot.tip(f"{images} images: confidence {confidence:.3f}, accuracy {accuracy:.3f}")
            bar = axes.bar((place + 0.5) * width, accuracy, 0.92 * width, color=COLORS[0], alpha=0.25 + 0.6 * (images / most) ** 0.5)
            bar[0].set_gid(tip)
            axes.hlines(confidence, (place + 0.04) * width, (place + 0.96) * width, color=TEXT, gid=tip)
    axes.plot([0, 1], [0, 1], color=_SOFT, linestyle=(0, (4, 3)), linewidth=1)
    return plot


def shortened(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[:most - 1] + "…"
