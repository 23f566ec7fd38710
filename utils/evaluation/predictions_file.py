"""What became of every image of an evaluation: the file, and what follows from it. Imports no torch."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from config import require_regular
from data.sources.index_cache import NPZ_ERRORS
from utils.evaluation.statistics import BINS, bins_of, expected_calibration_error
from utils.runtime.files import write_atomically

FILE, MISTAKES = "predictions.npz", "mistakes.csv"
MOST_IMAGES = 200_000


class PredictionsFileError(ValueError):
    """A file of predictions cannot be used; one sentence."""


@dataclass
class PredictionsFile:
    """An evaluation, image by image, in the order of ``index``; images that could not be read are left out.

    Attributes:
        index: number of the image in the validation set, int64 (N,).
        target, predicted: positions in ``classes``, int32 (N,).
        probability: of the predicted class, float32 (N,).
        correct_probability: of the right class, float32 (N,).
        paths: names of the images, below the data's folder where they lie there.
        classes: names.
        thumbnails: position (in these arrays) -> JPEG, of some mistakes.
    """

    index: np.ndarray
    target: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    correct_probability: np.ndarray
    paths: list[str]
    classes: list[str]
    thumbnails: dict[int, bytes]

    @property
    def right(self) -> np.ndarray:
        """Whether each image was recognised, bool (N,)."""
        return self.target == self.predicted

    def write(self, path: str) -> None:
        """Write it, whole or not at all; ``numpy.load`` opens the file without pickle.

        Names are UTF-8 JSON in arrays of bytes: ``paths``, ``classes``.
        """
        content = dict(
            index=self.index, target=self.target, predicted=self.predicted, probability=self.probability,
            correct_probability=self.correct_probability, paths=packed(self.paths), classes=packed(self.classes),
            **pictures_of(self.thumbnails))
        write_atomically(path, lambda file: np.savez_compressed(file, **content))

    @classmethod
    def read(cls, path: str) -> PredictionsFile:
        """
        Raises:
            PredictionsFileError: no such file, or it holds something else.
        """
        with reading(path) as found:
            made = cls(*(found[key] for key in ("index", "target", "predicted", "probability", "correct_probability")),
                       json.loads(found["paths"].tobytes()), json.loads(found["classes"].tobytes()), pictures_from(found))
            made.check()
        return made

    def check(self) -> None:
        """Raise ``ValueError`` unless the parts belong together."""
        columns = (self.index, self.target, self.predicted, self.probability, self.correct_probability)
        if [column.dtype.kind for column in columns] != ["i", "i", "i", "f", "f"]:
            raise ValueError("columns of other kinds of numbers")
        if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in (self.paths, self.classes)):
            raise ValueError("names that are no texts")
        if any(((column < 0) | (column > 1.001) | np.isnan(column)).any() for column in (self.probability, self.correct_probability)):
            raise ValueError("a probability beyond 0 and 1")
        if {column.shape for column in columns} != {(len(self.paths),)}:
            raise ValueError("columns of different lengths")
        for column in (self.target, self.predicted):
            if len(column) and not 0 <= column.min() <= column.max() < len(self.classes):
                raise ValueError("a class that has no name")
        if not all(0 <= position < len(self.paths) for position in self.thumbnails):
            raise ValueError("a thumbnail of no image")

    def worst(self, count: int) -> list[int]:
        """Positions of the mistakes made with the greatest confidence."""
        wrong = np.flatnonzero(~self.right)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")][:count].tolist()


@contextlib.contextmanager
def reading(path: str) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of a file of predictions; what does not fit inside is raised as ``PredictionsFileError``."""
    try:
        require_regular(path)
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files}
        yield found
    except FileNotFoundError:
        raise PredictionsFileError(f"{path}: no such file") from None
    except NPZ_ERRORS as error:
        raise PredictionsFileError(f"{path}: no file of predictions, or damaged ({type(error).__name__})") from None


def packed(names: Sequence[str]) -> np.ndarray:
    """Names as JSON in an array of bytes; ASCII: undecodable file names come back as they were."""
    return np.frombuffer(json.dumps(list(names)).encode(), dtype=np.uint8)


def pictures_of(thumbnails: Mapping[int, bytes]) -> dict[str, np.ndarray]:
    """The arrays that hold ``thumbnails`` in a file."""
    return dict(thumbnail_of=np.array(list(thumbnails), dtype=np.int64), thumbnails=np.frombuffer(b"".join(thumbnails.values()), np.uint8),
                thumbnail_ends=np.cumsum([len(blob) for blob in thumbnails.values()], dtype=np.int64))


def pictures_from(found: Mapping[str, np.ndarray]) -> dict[int, bytes]:
    """``pictures_of``, back."""
    ends = found["thumbnail_ends"].tolist()
    blobs = [found["thumbnails"][start:end].tobytes() for start, end in zip([0, *ends], ends, strict=False)]
    return dict(zip(found["thumbnail_of"].tolist(), blobs, strict=True))


def names_of(source: Any, indices: Sequence[int]) -> list[str]:
    """What the images are called: below ``source.root`` where they lie there, so that two machines call them alike."""
    root = os.path.join(source.root, "")
    return [source.path(index).removeprefix(root) for index in indices]


def thumbnail(image: Any, side: int = 112) -> bytes:
    """A small JPEG of a PIL image."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=80)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------
# What follows from them
# --------------------------------------------------------------------------------------------------

def confusion(predictions: PredictionsFile) -> np.ndarray:
    """(target, predicted, times) of what occurs, in that order, int64 (K, 3): with many classes most pairs never do."""
    classes = len(predictions.classes)
    cells, times = np.unique(predictions.target.astype(np.int64) * classes + predictions.predicted, return_counts=True)
    return np.stack([*np.divmod(cells, classes), times], axis=1)


def confused_pairs(cells: np.ndarray, most: int = 20) -> list[tuple[int, int, int]]:
    """(target, predicted, times) of the commonest mistakes."""
    wrong = cells[cells[:, 0] != cells[:, 1]]
    return [tuple(cell) for cell in wrong[np.argsort(-wrong[:, 2], kind="stable")][:most].tolist()]


def reliability(predictions: PredictionsFile, bins: int = BINS) -> tuple[list[tuple[int, float, float]], float]:
    """([(images, mean confidence, accuracy) of each bin of confidence], expected calibration error in [0, 1])."""
    place = bins_of(predictions.probability, bins)
    images = np.bincount(place, minlength=bins)
    divisor = np.maximum(images, 1)
    confidence = np.bincount(place, predictions.probability, bins) / divisor
    accuracy = np.bincount(place, predictions.right, bins) / divisor
    error = expected_calibration_error(predictions.probability, predictions.right, bins)
    return list(zip(images.tolist(), confidence.tolist(), accuracy.tolist(), strict=True)), error
