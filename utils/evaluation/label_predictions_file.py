"""The file of what a model said of every label of every image. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from utils.evaluation.label_figures import LabelFigures
from utils.evaluation.predictions_file import PredictionsFileError, packed, pictures_from, pictures_of, reading
from utils.runtime.files import write_atomically


@dataclass
class LabelPredictionsFile:
    """An evaluation, image by image, in the order of ``index``; images that could not be read are left out.

    Attributes:
        index: number of the image in the validation set, int64 (N,).
        target: 1 it has the label, 0 it has not, -1 it is not known, int8 (N, C).
        probability: of each label, float32 (N, C).
        thresholds: from which probability on a label is given, float64 (C,).
        paths: names of the images, below the data's folder where they lie there.
        classes: names of the labels.
        thumbnails: position (in these arrays) -> JPEG, of some mistakes.
    """

    index: np.ndarray
    target: np.ndarray
    probability: np.ndarray
    thresholds: np.ndarray
    paths: list[str]
    classes: list[str]
    thumbnails: dict[int, bytes]

    def write(self, path: str) -> None:
        """Write it, whole or not at all; ``numpy.load`` opens the file without pickle, names are UTF-8 JSON in arrays of bytes."""
        content = dict(index=self.index, target=self.target, probability=self.probability, thresholds=self.thresholds,
                       paths=packed(self.paths), classes=packed(self.classes), **pictures_of(self.thumbnails))
        write_atomically(path, lambda file: np.savez_compressed(file, **content))

    @classmethod
    def read(cls, path: str) -> LabelPredictionsFile:
        """
        Raises:
            PredictionsFileError: no such file, or it holds something else.
        """
        with reading(path) as found:
            made = cls(*(found[key] for key in ("index", "target", "probability", "thresholds")),
                       json.loads(found["paths"].tobytes()), json.loads(found["classes"].tobytes()), pictures_from(found))
            shape = (len(made.paths), len(made.classes))
            if not (made.target.shape == made.probability.shape == shape and made.index.shape == shape[:1]
                    and made.thresholds.shape == shape[1:] and all(0 <= position < shape[0] for position in made.thumbnails)):
                raise ValueError("parts that do not belong together")
        return made

    @property
    def given(self) -> np.ndarray:
        """Whether each label is given to each image, bool (N, C)."""
        return self.probability >= self.thresholds

    @property
    def right(self) -> np.ndarray:
        """Whether each image got just its labels, as far as they are known, bool (N,)."""
        return ((self.given == (self.target == 1)) | (self.target < 0)).all(axis=1)

    def figures(self) -> LabelFigures:
        return LabelFigures.of(self.target, self.probability, self.thresholds)

    def worst(self, count: int) -> list[int]:
        """Positions of the images with a label wrong, those first whose probability is farthest from the truth."""
        wrong = (self.given != (self.target == 1)) & (self.target >= 0)
        distance = np.where(wrong, np.abs(self.probability - (self.target == 1)), 0).max(axis=1, initial=0)
        return [position for position in np.argsort(-distance, kind="stable")[:count].tolist() if wrong[position].any()]


__all__ = ["LabelPredictionsFile", "PredictionsFileError"]
