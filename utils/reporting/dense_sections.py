"""What the page shows of an evaluation of objects, maps of classes or segments. Imports no torch."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.evaluation.dense_figures import MapFigures, class_quality, mean
from utils.evaluation.dense_predictions_file import SIZES, SURE, DenseFile, DetectionsFile, MapsFile, PanopticFile
from utils.reporting.dense_plots import HALF, MOST_CLASSES, THREE_QUARTERS
from utils.reporting.tables import MOST_ROWS, Table, count, percent

MOST_IMAGES = 12
_PAIRS = 20
_BEYOND = ("objects up to 32 x 32 pixels are small, up to 96 x 96 medium", "an object's area is that of its mask where it has one")


def sections(predictions: DenseFile) -> list[dict[str, Any]]:
    """Of each: ``title``, ``summary``, ``tables`` of (caption, table, whether it may be long), ``note``."""
    of = {DetectionsFile: _objects, MapsFile: _maps, PanopticFile: _segments}[type(predictions)]
    return of(predictions)


def worst(predictions: DenseFile) -> dict[str, Any]:
    """The worst images as cards, and ``how`` they were chosen."""
    ranked = {
        DetectionsFile: f"lowest first by F1 of what is found at a score of {SURE:g} or more, right at an overlap of 0.5; of equals those "
                        "with the most mistakes first",
        MapsFile: "lowest first by mean IoU over the classes in the image or its answer",
        PanopticFile: "lowest first by mean PQ over the classes in the image or its answer"}[type(predictions)]
    cards = []
    for position in predictions.worst(MOST_IMAGES):
        told = f"{100 * float(predictions.score[position]):.1f} %"
        if isinstance(predictions, DetectionsFile):
            right, extra, missed = predictions.errors[position].tolist()
            told = f"F1 {told}: {right} found, {extra} wrong, {missed} missed"
        else:
            told = f"{'mean IoU' if isinstance(predictions, MapsFile) else 'PQ'} {told}"
        cards.append(dict(path=predictions.paths[position].removeprefix("../"), told=told,
                          picture=base64.b64encode(predictions.pictures.get(position, b"")).decode()))
    missing = sum(not card["picture"] for card in cards)
    lost = f" {missing} could not be read again when they were drawn, and are left out." if missing else ""
    return dict(cards=[card for card in cards if card["picture"]], some=bool(cards),
                how=f"The truth is to the left, the answer to the right; {ranked}.{lost}")


def headlines(predictions: DenseFile) -> dict[str, float]:
    """The figures over all classes, shares by name."""
    if isinstance(predictions, DetectionsFile):
        figures = {}
        for kind, curves in predictions.curves.items():
            figures |= {f"{kind} AP": mean(curves.ap[:, 0]), f"{kind} AP50": mean(curves.precision[HALF].mean(0)),
                        f"{kind} AP75": mean(curves.precision[THREE_QUARTERS].mean(0)), f"{kind} AR100": mean(curves.ar[:, 0])}
        return figures
    if isinstance(predictions, MapsFile):
        names = dict(miou="mIoU", pixel_accuracy="pixel accuracy", mean_accuracy="mean accuracy")
        return {names[name]: value / 100 for name, value in MapFigures(predictions.counts).values().items()}
    return dict(zip(("PQ", "SQ", "RQ"), map(mean, class_quality(predictions.sums).T), strict=True))


def class_figures(predictions: DenseFile) -> tuple[str, np.ndarray]:
    """(name, (C,) shares) of the figure that tells of a class."""
    if isinstance(predictions, DetectionsFile):
        kind = "mask" if "mask" in predictions.curves else "box"
        return f"{kind} AP", predictions.curves[kind].ap[:, 0]
    if isinstance(predictions, MapsFile):
        return "IoU", MapFigures(predictions.counts).iou
    return "PQ", class_quality(predictions.sums)[:, 0]


def _summary(predictions: DenseFile) -> str:
    told = ", ".join(f"{name} {percent(share)[1]} %" for name, share in headlines(predictions).items())
    return f"{told} on {len(predictions.paths):,} images of the last evaluation."


def _order(predictions: DenseFile) -> list[int]:
    """Classes, those of the lowest figure first, those without one last."""
    return np.argsort(class_figures(predictions)[1], kind="stable").tolist()


def _cut(rows: Sequence[Any], classes: int) -> str:
    return f"The {len(rows):,} worst of {classes:,} classes." if len(rows) < classes else ""


def _objects(predictions: DetectionsFile) -> list[dict[str, Any]]:
    curves, classes = predictions.curves, predictions.classes
    first = next(iter(curves.values()))
    rows = [[classes[i], count(first.objects[i, 0]), count(first.found[i]),
             *(cell for one in curves.values() for cell in (
                 percent(one.ap[i, 0]), percent(one.precision[HALF, :, i].mean()), percent(one.precision[THREE_QUARTERS, :, i].mean()),
                 percent(one.ar[i, 0])))] for i in _order(predictions)[:MOST_ROWS]]
    head = ["class", "objects", "found", *(f"{kind} {name}" for kind in curves for name in ("AP", "AP50", "AP75", "AR100"))]
    sizes = [[size, count(int(first.objects[:, number].sum())),
              *(percent(mean(figures[:, number])) for one in curves.values() for figures in (one.ap, one.ar))]
             for number, size in enumerate(SIZES)]
    by_size = Table(["size", "objects", *(f"{kind} {name} (%)" for kind in curves for name in ("AP", "AR100"))], sizes,
                    numeric=range(1, 2 + 2 * len(curves)))
    return [dict(title="Objects", summary=_summary(predictions), note="; ".join(_BEYOND).capitalize() + ".", tables=[
        ("By size", by_size, False), ("Classes (%)", Table(head, rows, numeric=range(1, len(head)), sortable=True), True)],
        cut=_cut(rows, len(classes)))]


def _maps(predictions: MapsFile) -> list[dict[str, Any]]:
    counts, classes = predictions.counts, predictions.classes
    figures = MapFigures(counts)
    wrong, iou, accuracy = counts * (1 - np.eye(len(counts), dtype=np.int64)), figures.iou, figures.accuracy
    rows = []
    for i in _order(predictions)[:MOST_ROWS]:
        taken = int(wrong[i].argmax())
        mistaken = f"{classes[taken]} ({_of_class(wrong[i, taken], figures.pixels[i])[1]} %)" if wrong[i, taken] > 0 else ""
        rows.append([classes[i], count(figures.pixels[i]), percent(iou[i]), percent(accuracy[i]), mistaken])
    tables = [("Classes", Table(["class", "pixels", "IoU (%)", "accuracy (%)", "mostly taken for"], rows, numeric=(1, 2, 3),
                                sortable=True), True)]
    if len(classes) > MOST_CLASSES:
        places = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
        cells = [(*divmod(int(place), len(classes)), int(wrong.flat[place])) for place in places if wrong.flat[place] > 0]
        pairs = [[classes[a], classes[b], count(times), _of_class(times, figures.pixels[a])] for a, b, times in cells]
        tables.append(("Most pixels confused", Table(["true", "taken for", "pixels", "of the class (%)"], pairs, numeric=(2, 3),
                                                     sortable=True), False))
    return [dict(title="Classes", summary=_summary(predictions), note="", tables=tables, cut=_cut(rows, len(classes)))]


def _of_class(pixels: float, whole: float) -> tuple[float, str]:
    return percent(pixels / whole if whole > 0 else float("nan"))


def _segments(predictions: PanopticFile) -> list[dict[str, Any]]:
    quality, classes, things = class_quality(predictions.sums), predictions.classes, predictions.things
    numbers = np.nan_to_num(predictions.sums[:, 1:])
    rows = [[classes[i], "thing" if things[i] else "stuff", *map(percent, quality[i].tolist()), *map(count, numbers[i])]
            for i in _order(predictions)[:MOST_ROWS]]
    groups = [[name, count(int(group.sum())), *(percent(mean(column)) for column in quality[group].T)]
              for name, group in (("all", np.ones(len(things), dtype=bool)), ("things", things), ("stuff", ~things))]
    figures = ["PQ (%)", "SQ (%)", "RQ (%)"]
    return [dict(title="Segments", summary=_summary(predictions), note="", cut=_cut(rows, len(classes)), tables=[
        ("Things and stuff", Table(["", "classes", *figures], groups, numeric=(1, 2, 3, 4)), False),
        ("Classes", Table(["class", "kind", *figures, "matched", "extra", "missed"], rows, numeric=range(2, 8), sortable=True), True)])]


# --------------------------------------------------------------------------------------------------
# Two runs beside each other
# --------------------------------------------------------------------------------------------------

def comparison(first: DenseFile, second: DenseFile, a: str, b: str) -> dict[str, Any]:
    """The two on the same images, as ``html_page`` has it of classification; a ``problem`` where that cannot be."""
    scores = [dict(zip(one.paths, one.score.tolist(), strict=True)) for one in (first, second)]
    if scores[0].keys() != scores[1].keys():
        return dict(problem=f"{a} and {b} were evaluated on different images.")
    better = [sum(one[path] > other[path] for path in one) for one, other in (scores, scores[::-1])]
    figures = [headlines(one) for one in (first, second)]
    rows = [[f"{name} (%)", *(percent(value) for value in values), _points(values[1] - values[0])] for name, values in (
        (name, (figures[0][name], figures[1][name])) for name in figures[0] if name in figures[1])]
    rows.append([f"images better in {a}, in {b}", count(better[0]), count(better[1]), ""])
    (name, shares), (other, others) = class_figures(first), class_figures(second)
    after = dict(zip(second.classes, others.tolist(), strict=True)) if name == other else {}
    changes = [(after[label] - share, label, share) for label, share in zip(first.classes, shares.tolist(), strict=True) if label in after]
    changes = sorted((row for row in changes if not np.isnan(row[0])), key=lambda row: (-abs(row[0]), row[1]))[:MOST_ROWS]
    return dict(problem="", title=f"{a} and {b} on {len(first.paths):,} images",
                figures=Table(["", a, b, "difference"], rows, numeric=(1, 2, 3)), of_classes=f"{name} of each class",
                classes=Table(["class", f"{a} (%)", f"{b} (%)", "difference"], [
                    [label, percent(share), percent(after[label]), _points(change)] for change, label, share in changes],
                    numeric=(1, 2, 3), sortable=True))


def _points(difference: float) -> tuple[float, str]:
    return (0.0, "–") if np.isnan(difference) else (difference, f"{100 * difference:+.1f}")
