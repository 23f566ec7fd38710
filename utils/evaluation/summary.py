"""The lines that sum up an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from utils.evaluation.image_predictions import ImagePredictions
from utils.evaluation.per_class import PerClass
from utils.evaluation.statistics import accuracy_interval, expected_calibration_error
from utils.loggers.console import plain


def describe(predictions: ImagePredictions, table: PerClass, names: Sequence[str]) -> list[str]:
    """Lines on how certain, how calibrated and how even the figures are."""
    counted = predictions.target >= 0
    confidence, right = predictions.confidence[counted], predictions.right[counted]
    low, high = accuracy_interval(int(right.sum()), len(right))
    recall, precision, f1 = table.macro()
    lines = [f"interval of top1: {100 * low:.2f} to {100 * high:.2f} (95 %, Wilson's)",
             f"calibration: ECE {100 * expected_calibration_error(confidence, right):.2f} % (15 bins), mean confidence "
             f"{100 * confidence.mean() if len(confidence) else 0:.2f} %",
             f"mean over classes: recall {100 * recall:.2f} precision {100 * precision:.2f} F1 {100 * f1:.2f}"]
    worst = [i for i in table.worst() if table.correct[i] < table.images[i]]
    if worst:
        lines.append("worst classes: " + "; ".join(
            f"{_cut(names[i])}: {table.correct[i]} of {table.images[i]} right, mostly confused with {_cut(names[table.mistaken[i]])}"
            for i in worst))
    return lines


def _cut(name: str, length: int = 30) -> str:
    name = plain(name)  # a line break in it would make a line of its own
    return name if len(name) <= length else name[:length - 3] + "..."
