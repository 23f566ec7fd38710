"""Two evaluations image by image: do they differ by more than chance? Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from utils.evaluation.predictions_file import PredictionsFile
from utils.evaluation.statistics import accuracy_interval, bootstrap_difference, mcnemar

if TYPE_CHECKING:
    from utils.evaluation.image_predictions import ImagePredictions


def report(names: Sequence[str], a: ImagePredictions, b: ImagePredictions) -> list[str]:
    """The lines of a comparison of the predictions of A and B."""
    counted = (a.target >= 0) & (b.target >= 0)
    total, right_a, right_b = int(counted.sum()), a.right & counted, b.right & counted
    lines = []
    for letter, name, predictions in zip("AB", names, (a, b), strict=True):
        result = predictions.evaluation(counted)
        low, high = accuracy_interval(int((predictions.right & counted).sum()), total)
        lines.append(f"{letter} {name}: {result.line}, 95 % interval {100 * low:.2f} to {100 * high:.2f}")
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    both = int((right_a & right_b).sum())
    low, high = bootstrap_difference(only_a, only_b, total)
    p = mcnemar(only_a, only_b)
    lines.append(f"right: both {both}, A alone {only_a}, B alone {only_b}, neither {total - both - only_a - only_b}, of {total} images")
    lines.append(f"difference A - B: {100 * (only_a - only_b) / max(1, total):+.2f} points, 95 % interval {100 * low:+.2f} to "
                 f"{100 * high:+.2f} (bootstrap over the images, in pairs)")
    lines.append(f"McNemar's exact test: p = {p:.3g}; " + _verdict(p, only_a, only_b))
    return lines


def _verdict(p: float, only_a: int, only_b: int) -> str:
    if p >= 0.05:
        return "the difference may be chance"
    return f"{'A' if only_a > only_b else 'B'} is better on such images by more than chance (of runs with other seeds this says nothing)"


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same images.

    Attributes:
        images: that both were evaluated on.
        accuracies: of each, between 0 and 1.
        only_first, only_second: images that one alone predicts rightly.
        p: two-sided p value of McNemar's exact test: of so uneven a split, or a more uneven one, were both equally good.
        interval: 95 % bootstrap interval of the second's accuracy minus the first's.
    """

    images: int
    accuracies: tuple[float, float]
    only_first: int
    only_second: int
    p: float
    interval: tuple[float, float]


def compare(first: PredictionsFile, second: PredictionsFile) -> Paired | None:
    """The two on the images that both name alike and under the same class; None where there are none."""
    keys = [{(path, p.classes[target]): right for path, target, right in zip(p.paths, p.target.tolist(), p.right.tolist(), strict=True)}
            for p in (first, second)]
    common = keys[0].keys() & keys[1].keys()
    if not common:
        return None
    a, b = (np.array([of[key] for key in common]) for of in keys)
    only_first, only_second, images = int((a & ~b).sum()), int((b & ~a).sum()), len(common)
    return Paired(images, (float(a.mean()), float(b.mean())), only_first, only_second, mcnemar(only_first, only_second),
                  bootstrap_difference(only_second, only_first, images))
