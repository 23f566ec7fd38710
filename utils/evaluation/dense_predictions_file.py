"""What became of every image of an evaluation of objects, maps or segments: the file that a run keeps. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from utils.evaluation.predictions_file import packed, pictures_from, pictures_of, reading
from utils.runtime.files import write_atomically

SURE = 0.5  # score from which a detection counts as right or wrong in the figures of an image; the overlap from which it is right
SIZES = ("all", "small", "medium", "large")  # COCO's: up to 32 x 32 pixels, up to 96 x 96, beyond
OVERLAPS = tuple(0.5 + 0.05 * i for i in range(10))
MOST_PICTURES = 24


@dataclass(frozen=True)
class Curves:
    """COCO's figures of each of C classes, and of each of N images: shares lie between 0 and 1, NaN for a class without an object.

    Attributes:
        precision: (10, 101, C): at ``OVERLAPS``, at recalls from 0 to 1 in steps of 0.01.
        ap, ar: (C, 4): means over the overlaps, by size as in ``SIZES``.
        objects: (C, 4): objects that count, by size.
        found: (C,): detections.
        images: (N, 3): of each image the objects found, detections that are wrong, and objects missed, at an overlap of 0.5, detections of
            a score below ``SURE`` left aside.
    """

    precision: np.ndarray
    ap: np.ndarray
    ar: np.ndarray
    objects: np.ndarray
    found: np.ndarray
    images: np.ndarray

    def check(self, images: int, classes: int) -> None:
        """Raise ``ValueError`` unless the parts belong together."""
        wanted = dict(precision=((len(OVERLAPS), 101, classes), "f"), ap=((classes, 4), "f"), ar=((classes, 4), "f"),
                      objects=((classes, 4), "i"), found=((classes,), "i"), images=((images, 3), "i"))
        for name, (shape, kind) in wanted.items():
            _require(getattr(self, name), shape, kind)


@dataclass
class DenseFile:
    """An evaluation, image by image; images that could not be read are left out.

    Attributes:
        index: number of the image in the validation set, int64 (N,).
        score: how well it was done, between 0 and 1, NaN where there is nothing to do, float32 (N,): F1 of objects, by their masks
            where there are some; mean IoU of a map; PQ of segments.
        paths: names of the images, below the data's folder where they lie there.
        classes: names.
        pictures: position (in these arrays) -> JPEG of some of the worst images, the truth to the left, the answer to the right.
    """

    kind: ClassVar[str] = ""
    index: np.ndarray
    score: np.ndarray
    paths: list[str]
    classes: list[str]
    pictures: dict[int, bytes]

    def arrays(self) -> dict[str, np.ndarray]:
        """What a file of this kind has besides."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ``ValueError`` unless the parts belong together."""
        if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in (self.paths, self.classes)):
            raise ValueError("names that are no texts")
        _require(self.index, (len(self.paths),), "i")
        _require(self.score, (len(self.paths),), "f")
        if not all(0 <= position < len(self.paths) for position in self.pictures):
            raise ValueError("a picture of no image")

    def write(self, path: str) -> None:
        """Write it, whole or not at all; ``numpy.load`` opens the file without pickle, names are UTF-8 JSON in arrays of bytes."""
        content = dict(kind=packed([self.kind]), index=self.index, score=self.score, paths=packed(self.paths),
                       classes=packed(self.classes), **pictures_of(self.pictures), **self.arrays())
        write_atomically(path, lambda file: np.savez_compressed(file, **content))

    def worst(self, count: int) -> list[int]:
        """Positions of the images of the lowest score, of those that have one and are not perfect."""
        order = np.argsort(self.score, kind="stable")  # NaN comes last
        return order[self.score[order] < 1][:count].tolist()


@dataclass
class DetectionsFile(DenseFile):
    """Of objects.

    Attributes:
        curves: by kind, ``box`` and ``mask``, whichever there are.
    """

    kind = "objects"
    curves: Mapping[str, Curves]

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"{kind}.{name}": array for kind, curves in self.curves.items() for name, array in vars(curves).items()}

    def check(self) -> None:
        super().check()
        if not self.curves:
            raise ValueError("no figures")
        for curves in self.curves.values():
            curves.check(len(self.paths), len(self.classes))

    @property
    def errors(self) -> np.ndarray:
        """(N, 3) as ``Curves.images``, of the masks where there are some."""
        return self.curves["mask" if "mask" in self.curves else "box"].images

    def worst(self, count: int) -> list[int]:
        """As ``DenseFile.worst``, of equals those with the most mistakes first."""
        order = np.lexsort((-self.errors[:, 1:].sum(1), self.score))
        return order[self.score[order] < 1][:count].tolist()


@dataclass
class MapsFile(DenseFile):
    """Of maps of classes.

    Attributes:
        counts: (C, C) int64: pixels of each true class (row) taken for each class (column), of all images.
    """

    kind = "maps"
    counts: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(counts=self.counts)

    def check(self) -> None:
        super().check()
        _require(self.counts, (len(self.classes),) * 2, "i")


@dataclass
class PanopticFile(DenseFile):
    """Of segments.

    Attributes:
        sums: (C, 4) float64 of each class: overlaps of the matches added up, matches, segments that are not there, and segments missed.
        things: (C,) bool: classes whose objects are counted.
    """

    kind = "panoptic"
    sums: np.ndarray
    things: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(sums=self.sums, things=self.things)

    def check(self) -> None:
        super().check()
        _require(self.sums, (len(self.classes), 4), "f")
        _require(self.things, (len(self.classes),), "b")


def read_dense_predictions(path: str) -> DetectionsFile | MapsFile | PanopticFile:
    """The file at ``path``, of whichever kind.

    Raises:
        PredictionsFileError: no such file, or it holds something else.
    """
    with reading(path) as found:
        kind = json.loads(found["kind"].tobytes())
        common = (found["index"], found["score"], json.loads(found["paths"].tobytes()), json.loads(found["classes"].tobytes()),
                  pictures_from(found))
        if kind == [MapsFile.kind]:
            made = MapsFile(*common, found["counts"])
        elif kind == [PanopticFile.kind]:
            made = PanopticFile(*common, found["sums"], found["things"])
        elif kind == [DetectionsFile.kind]:
            made = DetectionsFile(*common, {
                which: Curves(*(found[f"{which}.{name}"] for name in Curves.__dataclass_fields__))
                for which in ("box", "mask") if f"{which}.ap" in found})
        else:
            raise ValueError("another kind of file")
        made.check()
    return made


def _require(array: np.ndarray, shape: tuple[int, ...], kind: str) -> None:
    """Raise ``ValueError`` unless ``array`` has the ``shape`` and holds numbers of the ``kind`` (numpy's letter)."""
    if array.shape != shape or array.dtype.kind != kind:
        raise ValueError("parts that do not belong together")
    if kind == "f" and (np.isinf(array).any() or (array < 0).any()):
        raise ValueError("a figure that can be none")


def f1(errors: np.ndarray) -> np.ndarray:
    """(N,) float32 of ``Curves.images``: NaN of an image without an object in which nothing was found."""
    right, extra, missed = errors.T.astype(np.float64)
    whole = right + (extra + missed) / 2
    return np.divide(right, whole, out=np.full(len(errors), np.nan), where=whole > 0).astype(np.float32)
