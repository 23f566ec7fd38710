"""How certain a figure is: Wilson's interval, the exact paired test, calibration. All from counts, all repeatable. Imports no torch.

Sources: E. B. Wilson, JASA 22 (1927); B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), percentile intervals;
Q. McNemar, Psychometrika 12 (1947), in its exact binomial form; C. Guo et al., On Calibration of Modern Neural Networks (ICML 2017),
section 2. scipy is imported where it is needed: training imports this module.
"""

from __future__ import annotations

import numpy as np

LEVEL = 0.95  # of the intervals
BINS = 15  # of confidence, equally wide
_DRAWS = 10_000


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's interval (low, high) of an accuracy ``correct / total``, between 0 and 1; also where all images are right, or none."""
    if total <= 0:
        return 0.0, 1.0
    from scipy.stats import binomtest
    interval = binomtest(correct, total).proportion_ci(LEVEL, "wilson")
    return float(interval.low), float(interval.high)


def bootstrap_difference(only_a: int, only_b: int, total: int) -> tuple[float, float]:
    """The interval of accuracy of A minus accuracy of B on the same ``total`` images, each between -1 and 1.

    By the bootstrap over pairs (percentiles), since scipy has no interval for a paired difference of shares.

    Args:
        only_a, only_b: images that A alone, or B alone, gets right; the others do not matter for the difference.
    """
    if total <= 0:
        return -1.0, 1.0
    shares = np.array([only_a, only_b, total - only_a - only_b]) / total
    drawn = np.random.default_rng(0).multinomial(total, shares, _DRAWS)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / total, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of McNemar's test: how likely so uneven a split is where A and B are equally good.

    Of the images that one of the two alone gets right, each then goes to either with probability a half.
    """
    if only_a == only_b:
        return 1.0
    from scipy.stats import binomtest
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


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
