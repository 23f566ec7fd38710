"""Average precision, F1 and thresholds of labels of which an image may have several. Imports no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluation.per_class import _share

UNDECIDED = 0.5  # the threshold of a label that no image has


@dataclass(frozen=True)
class LabelFigures:
    """Figures of each label over the images where it is known, (C,) each.

    Attributes:
        images: images that have the label.
        answered: images, with it or not, whose probability of it reaches the threshold.
        correct: those of them that have it.
        precision_area: average precision, the area under precision over recall in steps; nan where no image has the label.
        thresholds: from which probability on an image is taken to have it.
    """

    images: np.ndarray
    answered: np.ndarray
    correct: np.ndarray
    precision_area: np.ndarray
    thresholds: np.ndarray

    @classmethod
    def of(cls, truth: np.ndarray, probability: np.ndarray, thresholds: np.ndarray) -> LabelFigures:
        """From what each image has (N, C), 1, 0, or -1 for not known, and its probabilities (N, C)."""
        has, over = truth == 1, (probability >= thresholds) & (truth >= 0)
        areas = [average_precision(*_known(truth, probability, label)) for label in range(truth.shape[1])]
        return cls(has.sum(0), over.sum(0), (has & over).sum(0), np.array(areas, dtype=np.float64), np.asarray(thresholds, np.float64))

    @property
    def recall(self) -> np.ndarray:
        """Share of the label's images that are answered; nan without images."""
        return _share(self.correct, self.images, np.nan)

    @property
    def precision(self) -> np.ndarray:
        """Share of the images answered that have the label; nan where none was answered."""
        return _share(self.correct, self.answered, np.nan)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall; nan without images."""
        return np.where(self.images > 0, _share(2 * self.correct, self.images + self.answered, 0.0), np.nan)

    def mean_average_precision(self) -> float:
        """Over the labels that have images; nan if none has."""
        return _mean(self.precision_area)

    def macro_f1(self) -> float:
        """Mean over the labels that have images; nan if none has."""
        return _mean(self.f1)

    def micro_f1(self) -> float:
        """Of all labels' answers together; nan where there is neither an image nor an answer."""
        whole = int(self.images.sum() + self.answered.sum())
        return 2 * int(self.correct.sum()) / whole if whole else float("nan")

    def worst(self) -> list[int]:
        """The labels with images by their average precision, lowest first."""
        order = np.argsort(np.where(self.images > 0, self.precision_area, np.inf), kind="stable")
        return [int(label) for label in order if self.images[label]]

    def csv(self, names: Sequence[str]) -> str:
        """The table, a line a label."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["class", "images", "answered", "correct", "average_precision", "threshold", "precision", "recall", "f1"])
        figures = np.stack([self.precision_area, self.thresholds, self.precision, self.recall, self.f1], axis=1)
        for label, name in enumerate(names):
            writer.writerow([name, self.images[label], self.answered[label], self.correct[label],
                             *("" if np.isnan(value) else f"{value:.6f}" for value in figures[label])])
        return text.getvalue()


def average_precision(has: np.ndarray, probability: np.ndarray) -> float:
    """The sum over falling probabilities of precision times the recall gained, equal ones taken together; nan where none has it (N,)."""
    _, answered, right = _by_threshold(has, probability)
    if not len(right) or not right[-1]:
        return float("nan")
    return float((np.diff(right, prepend=0) * right / answered).sum() / right[-1])


def best_thresholds(truth: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """For each label (C,) the threshold of the greatest F1, half way between two probabilities; arguments as of ``LabelFigures.of``."""
    return np.array([_best_threshold(*_known(truth, probability, label)) for label in range(truth.shape[1])], dtype=np.float64)


def _best_threshold(has: np.ndarray, probability: np.ndarray) -> float:
    values, answered, right = _by_threshold(has, probability)
    if not len(right) or not right[-1]:
        return UNDECIDED
    best = int(np.argmax(2 * right / (answered + right[-1])))
    return float((values[best] + np.append(values, 0.0)[best + 1]) / 2)


def _by_threshold(has: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(probabilities that occur, falling; images that reach each; those of them that have the label)."""
    values, place, times = np.unique(-probability, return_inverse=True, return_counts=True)
    right = np.bincount(place.reshape(-1), has, minlength=len(values))
    return -values, np.cumsum(times), np.cumsum(right)


def _known(truth: np.ndarray, probability: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray]:
    known = truth[:, label] >= 0
    return truth[known, label] == 1, probability[known, label]


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
