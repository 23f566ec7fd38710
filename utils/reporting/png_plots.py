"""The report's curves as PNG files, by matplotlib (optional)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from utils.evaluation.predictions_file import confusion, reliability
from utils.loggers.console import plain
from utils.reporting.charts import charts
from utils.reporting.run_reader import Run

MOST_CLASSES = 50
_COLOURS = ("#2f6fde", "#d9622b", "#2a9d6a", "#8a5cd1", "#c23b6b", "#8a7a1f")


def plot(runs: Sequence[Run], folder: str) -> list[str]:
    """Write the curves, and of a single run the confusion matrix and the reliability diagram; the names of the files.

    Raises:
        OSError: they cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters of class names that its font lacks
        return _plot(runs, folder)


def _plot(runs: Sequence[Run], folder: str) -> list[str]:
    names = []
    for chart in charts(runs):
        figure = Figure(figsize=(6.4, 3.6), dpi=130, layout="constrained")
        axes = figure.add_subplot(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
        for line in chart.lines:
            ys = [np.nan if y is None else y for y in line.ys]
            axes.plot(line.xs, ys, color=_COLOURS[line.colour % len(_COLOURS)], linestyle="--" if line.dashed else "-",
                      marker="o" if line.dots else None, markersize=3, linewidth=1.3, label=_plain(line.label) or None)
        for x, _ in chart.marks:
            axes.axvline(x, color="0.5", linestyle=":", linewidth=1)
        if any(line.label for line in chart.lines):
            axes.legend(frameon=False, fontsize=8)
        names.append(_save(figure, folder, chart.name))
    if len(runs) == 1 and (predictions := runs[0].predictions) is not None and len(predictions.target):
        if len(predictions.classes) <= MOST_CLASSES:
            names.append(_save(_confusion(confusion(predictions), predictions.classes), folder, "confusion"))
        names.append(_save(_reliability(*reliability(predictions)), folder, "reliability"))
    return names


def _plain(text: str) -> str:
    """On one line, without what matplotlib would take for formulas or cannot draw (bytes of names that are no UTF-8)."""
    return plain(text).replace("$", r"\$")


def _save(figure: Figure, folder: str, name: str) -> str:
    figure.savefig(os.path.join(folder, f"{name}.png"))
    return f"{name}.png"


def _confusion(cells: np.ndarray, classes: Sequence[str]) -> Figure:
    counts = np.zeros((len(classes), len(classes)))
    counts[cells[:, 0], cells[:, 1]] = cells[:, 2]
    side = 2.5 + 0.18 * len(classes)
    figure = Figure(figsize=(side, side), dpi=130, layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(counts / np.maximum(1, counts.sum(1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
    shown = [_plain(name[:20]) for name in classes]
    axes.set_xticks(range(len(classes)), shown, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)), shown, fontsize=7)
    return figure


def _reliability(bins: Sequence[tuple[int, float, float]], error: float) -> Figure:
    figure = Figure(figsize=(4.2, 4), dpi=130, layout="constrained")
    axes = figure.add_subplot(xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1), title=f"ECE {100 * error:.2f} %")
    places = [place for place, (images, *_) in enumerate(bins) if images]
    axes.bar([(place + 0.5) / len(bins) for place in places], [bins[place][2] for place in places], 0.9 / len(bins), color=_COLOURS[0])
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1)
    return figure
