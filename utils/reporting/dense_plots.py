"""Charts of an evaluation of objects, maps of classes or segments, as those in ``plots``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.evaluation.dense_figures import MapFigures, class_quality, mean
from utils.evaluation.dense_predictions_file import OVERLAPS, Curves, DenseFile, DetectionsFile, MapsFile, PanopticFile
from utils.loggers.console import plain
from utils.reporting.plots import COLORS, MOST_BARS, TEXT, Plot, framed, matrix, shortened, styled

MOST_CLASSES = 40  # of a confusion matrix that is drawn
_RECALLS = np.linspace(0, 1, 101)
HALF, THREE_QUARTERS = (min(range(len(OVERLAPS)), key=lambda i, at=at: abs(OVERLAPS[i] - at)) for at in (0.5, 0.75))


def of_dense(predictions: DenseFile) -> list[Plot]:
    """Precision over recall and AP of each class; or IoU of each class and the confusion matrix; or PQ of each class."""
    classes = predictions.classes
    if isinstance(predictions, DetectionsFile):
        curves = [plot for kind, one in predictions.curves.items() for plot in _precision(kind, one, classes)]
        return [*curves, *(_bars(f"{kind}_ap_classes", f"{kind} AP of each class", "AP", one.ap[:, 0], classes)
                           for kind, one in predictions.curves.items())]
    if isinstance(predictions, MapsFile):
        bars = _bars("iou_classes", "IoU of each class", "IoU", MapFigures(predictions.counts).iou, classes)
        return [bars, *([_confusion(predictions.counts, classes)] if len(classes) <= MOST_CLASSES else [])]
    if isinstance(predictions, PanopticFile):
        return [_bars("pq_classes", "PQ of each class", "PQ", class_quality(predictions.sums)[:, 0], classes)]
    return []


def _precision(kind: str, curves: Curves, classes: Sequence[str]) -> list[Plot]:
    """Over all classes at overlaps of 0.5, 0.75 and over all overlaps; and at 0.5 of the classes with most objects."""
    at = np.stack([curves.precision[HALF], curves.precision[THREE_QUARTERS], curves.precision.mean(0)])  # (3, 101, C)
    there = ~np.isnan(at).any((0, 1))
    if not there.any():
        return []
    lines = at[:, :, there].mean(2)
    labels = [f"{name}: AP {100 * line.mean():.1f}" for name, line in zip(("IoU 0.5", "IoU 0.75", "mean of IoU 0.5 to 0.95"), lines,
                                                                          strict=True)]
    overall = _lines(f"{kind}_precision_recall", f"Precision and recall, {kind}, mean over classes", labels, lines)
    order = [i for i in np.argsort(-curves.objects[:, 0], kind="stable").tolist() if there[i]][:len(COLORS)]
    if there.sum() == 1:
        return [overall]
    single = _lines(f"{kind}_precision_recall_classes", f"At IoU 0.5, {kind}: the classes with most objects",
                    [f"{shortened(plain(classes[i]))}: {100 * at[0, :, i].mean():.1f}" for i in order], at[0][:, order].T)
    return [overall, single]


@styled
def _lines(name: str, title: str, labels: Sequence[str], lines: np.ndarray) -> Plot:
    """(L, 101) precisions over ``_RECALLS``."""
    plot, axes = framed(name, title, "recall", "precision")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    for number, (label, line) in enumerate(zip(labels, lines, strict=True)):
        axes.plot(_RECALLS, line.clip(0, 1), color=COLORS[number % len(COLORS)], label=label, gid=plot.tip(label), clip_on=False)
    axes.legend(loc="best", handlelength=1.5, fontsize=11)
    return plot


@styled
def _bars(name: str, title: str, label: str, figures: np.ndarray, classes: Sequence[str]) -> Plot:
    """A figure of each class, the highest first, of many classes the lowest; a class without one is left out."""
    order = [i for i in np.argsort(-figures, kind="stable").tolist() if not np.isnan(figures[i])]
    cut = f" (the {MOST_BARS} lowest of {len(order)})" if len(order) > MOST_BARS else ""
    order = order[-MOST_BARS:]
    names, side = [shortened(plain(classes[i])) for i in order], 16
    plot, axes = framed(name, title + cut, f"{label} (%)", "",
                        room=72 + side * max(2, len(order)), left=20 + 7 * max(map(len, names), default=0))
    axes.grid(False)
    axes.set(xlim=(0, 110), ylim=(len(order) - 0.4, -0.6), xticks=range(0, 101, 20))
    axes.set_yticks(range(len(order)), names)
    axes.tick_params(axis="y", labelcolor=TEXT)
    for place, i in enumerate(order):
        share = 100 * min(1.0, float(figures[i]))
        bar = axes.barh(place, share, 0.72, color=COLORS[0], alpha=0.75)
        bar[0].set_gid(plot.tip(f"{classes[i]}: {share:.2f}"))
        axes.text(share + 1, place, f"{share:.1f}", va="center_baseline", color=TEXT, fontsize=10)
    overall = 100 * mean(figures)
    if order:
        axes.axvline(min(100, overall), color=COLORS[1], linestyle=(0, (4, 3)), linewidth=1, gid=plot.tip(f"mean {overall:.2f}"))
    return plot


def _confusion(counts: np.ndarray, classes: Sequence[str]) -> Plot:
    target, predicted = np.nonzero(counts > 0)
    return matrix(np.stack([target, predicted, counts[target, predicted]], axis=1), classes, "pixels", as_share=True)
