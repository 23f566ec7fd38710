"""Recall, precision, F1 and confusions of each class in an evaluation. Imports no torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.runtime.files import csv_writer


@dataclass(frozen=True)
class PerClass:
    """Figures of each class, (C,) each.

    Attributes:
        images: images of the class.
        correct: those predicted rightly.
        answered: images, of whatever class, that were predicted as it.
        mistaken, times: the class it is most often confused with (-1: never), and how often.
    """

    images: np.ndarray
    correct: np.ndarray
    answered: np.ndarray
    mistaken: np.ndarray
    times: np.ndarray

    @classmethod
    def of(cls, target: np.ndarray, predicted: np.ndarray, classes: int) -> PerClass:
        """From the class of each image (N,), negative where it does not count, and the class predicted (N,)."""
        counted = target >= 0
        target, predicted = target[counted].astype(np.int64), predicted[counted]

        def count(values: np.ndarray) -> np.ndarray:
            return np.bincount(values, minlength=classes)

        mistaken, times = np.full(classes, -1), np.zeros(classes, dtype=np.int64)
        wrong = target != predicted
        pairs, often = np.unique(target[wrong] * classes + predicted[wrong], return_counts=True)
        for pair, number in zip(pairs[::-1].tolist(), often[::-1].tolist(), strict=True):  # of equals the first class
            if number >= times[pair // classes]:
                mistaken[pair // classes], times[pair // classes] = pair % classes, number
        return cls(count(target), count(target[~wrong]), count(predicted), mistaken, times)

    @property
    def recall(self) -> np.ndarray:
        """Share of a class's images answered rightly, its accuracy; nan without images."""
        return _share(self.correct, self.images, np.nan)

    @property
    def precision(self) -> np.ndarray:
        """Share of the images predicted as a class that are of it; 0 where none was."""
        return _share(self.correct, self.answered, 0.0)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall; nan without images."""
        return np.where(self.images > 0, _share(2 * self.correct, self.images + self.answered, 0.0), np.nan)

    def worst(self, count: int = 5) -> list[int]:
        """The classes with images of the lowest recall, lowest first."""
        order = np.argsort(np.where(self.images > 0, self.recall, np.inf), kind="stable")
        return [int(i) for i in order[:count] if self.images[i]]

    def macro(self) -> tuple[float, float, float]:
        """Means of recall, precision and F1 over the classes that have images."""
        some = self.images > 0
        return tuple(float(values[some].mean()) if some.any() else 0.0 for values in (self.recall, self.precision, self.f1))

    def csv(self, names: Sequence[str], classes: np.ndarray | None = None) -> str:
        """The table, a line a class, of all ``classes`` or those at the positions given."""
        text = io.StringIO()
        writer = csv_writer(text)
        writer.writerow(["class", "images", "correct", "recall", "precision", "f1", "answered", "mistaken_for", "times"])
        figures = np.stack([self.recall, self.precision, self.f1], axis=1)
        for i in range(len(names)) if classes is None else classes.tolist():
            shares = ["" if np.isnan(value) else f"{value:.6f}" for value in figures[i]]
            taken = names[self.mistaken[i]] if self.mistaken[i] >= 0 else ""
            writer.writerow([names[i], self.images[i], self.correct[i], *shares, self.answered[i], taken, self.times[i]])
        return text.getvalue()


def _share(part: np.ndarray, whole: np.ndarray, nothing: float) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), nothing), where=whole > 0)
