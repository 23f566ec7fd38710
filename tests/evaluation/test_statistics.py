"""Intervals, the paired test and calibration against figures worked out by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from utils.evaluation.statistics import accuracy_interval, bootstrap_difference, expected_calibration_error, mcnemar


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(7, 7) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32) and mcnemar(5, 0) == mcnemar(0, 5)
    exact = 2 * sum(math.comb(40, i) for i in range(13)) / 2 ** 40
    assert mcnemar(12, 28) == pytest.approx(exact, rel=1e-12)
    assert 0 < mcnemar(499_000, 501_000) < 0.06  # two deviations of a million tosses
    assert mcnemar(0, 100_000) < 1e-300


def test_intervals_have_the_width_that_theory_gives() -> None:
    low, high = accuracy_interval(40_000, 50_000)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 50_000)
    assert low == pytest.approx(0.8 - half, abs=2e-4) and high == pytest.approx(0.8 + half, abs=2e-4)
    assert accuracy_interval(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)  # all right is not certain
    assert accuracy_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4) and accuracy_interval(0, 0) == (0.0, 1.0)
    assert bootstrap_difference(600, 500, 10_000) == bootstrap_difference(600, 500, 10_000)
    low, high = bootstrap_difference(600, 500, 10_000)
    half = 1.96 * math.sqrt((0.11 - 0.01 ** 2) / 10_000)
    assert low == pytest.approx(0.01 - half, abs=5e-4) and high == pytest.approx(0.01 + half, abs=5e-4)


def test_calibration_of_two_bins_by_hand() -> None:
    confidence, correct = np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, True, True, False])
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
    # 1/15 belongs to the first bin, what is above to the second: apart they err by 1/15 and 0.9, together by less
    assert expected_calibration_error(np.array([1 / 15, 0.1]), np.array([False, True])) == pytest.approx((1 / 15 + 0.9) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(expected_calibration_error(np.array([np.nan, 0.5]), np.array([False, True])))  # an overflow in fp16
