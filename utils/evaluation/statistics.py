"""How sure a figure is: intervals by the bootstrap, the exact paired test, calibration. All from counts, all repeatable.

Sources: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), percentile intervals; Q. McNemar, Psychometrika 12
(1947), in its exact binomial form; C. Guo et al., On Calibration of Modern Neural Networks (ICML 2017), section 2.
"""

from __future__ import annotations

import math

import numpy as np

LEVEL = 0.95  # of the intervals
BINS = 15  # of confidence, equally wide
_DRAWS = 10_000


def bootstrap_interval(correct: int, total: int) -> tuple[float, float]:
    """The interval (low, high) of a share ``correct / total``, between 0 and 1, by the percentile bootstrap.

    Drawing images with replacement makes the number of right ones binomial, so that the counts are all that is needed. Where
    all are right, or none, every draw is the same and the interval has no width.
    """
    if total <= 0:
        return 0.0, 1.0
    drawn = np.random.default_rng(0).binomial(total, correct / total, _DRAWS) / total
    return _percentiles(drawn)


def bootstrap_difference(only_a: int, only_b: int, total: int) -> tuple[float, float]:
    """The interval of accuracy of A minus accuracy of B on the same ``total`` images, each between -1 and 1, drawn in pairs.

    Args:
        only_a, only_b: images that A alone, or B alone, gets right; the others do not matter for the difference.
    """
    if total <= 0:
        return -1.0, 1.0
    shares = np.array([only_a, only_b, total - only_a - only_b]) / total
    drawn = np.random.default_rng(0).multinomial(total, shares, _DRAWS)
    return _percentiles((drawn[:, 0] - drawn[:, 1]) / total)


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of McNemar's test: how likely so uneven a split is where A and B are equally good.

    Of the images that one of the two alone gets right, each then goes to either with probability a half. Computed with
    logarithms, so that a million of them do not overflow.
    """
    total, fewer = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        return 1.0
    i = np.arange(1, fewer + 1, dtype=np.float64)
    ways = np.concatenate([[0.0], np.cumsum(np.log(total - i + 1) - np.log(i))])  # log of (total choose i), i = 0 .. fewer
    largest = float(ways.max())
    log_tail = largest + math.log(float(np.exp(ways - largest).sum())) - total * math.log(2)
    return min(1.0, 2 * math.exp(log_tail))


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Mean distance, between 0 and 1, of confidence and accuracy over equal bins of confidence, weighed by their images.

    Args:
        confidence: probability of the class predicted, (N,).
        correct: whether it was right, (N,).
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if not len(confidence):
        return 0.0
    which = bins_of(confidence, bins)
    gaps = np.bincount(which, correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def bins_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each confidence (N,), from 0: a bin holds its upper edge, (0, 1/bins], (1/bins, 2/bins], ...; NaN is in the first."""
    return np.clip(np.ceil(np.nan_to_num(confidence) * bins).astype(np.int64) - 1, 0, bins - 1)
