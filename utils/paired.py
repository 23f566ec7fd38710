"""Two evaluations image by image: do they differ by more than chance? Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils.outcomes import Outcomes
from utils.statistics import bootstrap_difference, mcnemar


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same images.

    Attributes:
        images: that both were judged on.
        accuracies: share right of each.
        only_first, only_second: images that one alone recognised.
        p: two-sided p value of McNemar's exact test: of so uneven a split, or a more uneven one, were both equally good.
        interval: 95 % bootstrap interval of the second's accuracy minus the first's.
    """

    images: int
    accuracies: tuple[float, float]
    only_first: int
    only_second: int
    p: float
    interval: tuple[float, float]


def compare(first: Outcomes, second: Outcomes) -> Paired | None:
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
