"""Whether two classifiers differ on the same images: McNemar's exact test and the bootstrap. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from utils.predictions import Predictions

RESAMPLES = 10_000


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


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p value of McNemar's exact test: binomial with chance 1/2 over the images that one alone recognised."""
    total = only_first + only_second
    if not total:
        return 1.0
    def log_probability(k: int) -> float:
        return math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
    tail = math.fsum(math.exp(log_probability(k)) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail)


def compare(first: Predictions, second: Predictions) -> Paired | None:
    """The two on the images that both name alike and under the same class; None where there are none."""
    keys = [{(path, p.classes[target]): right for path, target, right in zip(p.paths, p.target.tolist(), p.right.tolist(), strict=True)}
            for p in (first, second)]
    common = keys[0].keys() & keys[1].keys()
    if not common:
        return None
    a, b = (np.array([of[key] for key in common]) for of in keys)
    only_first, only_second, images = int((a & ~b).sum()), int((b & ~a).sum()), len(common)
    return Paired(images, (float(a.mean()), float(b.mean())), only_first, only_second, mcnemar(only_first, only_second),
                  bootstrap(only_first, only_second, images))


def bootstrap(only_first: int, only_second: int, images: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the difference of the accuracies (second minus first), images drawn anew.

    A draw of images with replacement is a multinomial draw of how many only the first, only the second, and both or none recognise.
    """
    shares = np.array([only_first, only_second, images - only_first - only_second]) / images
    draws = np.random.default_rng(seed).multinomial(images, shares, RESAMPLES)
    low, high = np.percentile((draws[:, 1] - draws[:, 0]) / images, (2.5, 97.5))
    return float(low), float(high)


def accuracy_interval(right: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of an accuracy in [0, 1]; ``right`` bool (N,), N above 0."""
    draws = np.random.default_rng(seed).binomial(len(right), right.mean(), RESAMPLES) / len(right)
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)
