"""Between the masks of objects and maps of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data.dense.base import IGNORED, DenseSource, Objects
from data.dense.shapes import decode_mask, mask_library
from data.dense.view import DenseView

BACKGROUND = "background"


def painted(objects: Objects, height: int, width: int, background: int = IGNORED) -> np.ndarray:
    """The class of each pixel (H, W) uint8, ``background`` where none: the largest objects first, so that the smaller ones lie on top.

    What only a crowd covers is ``IGNORED``: its outline is a rough one around many.

    Raises:
        ValueError: the objects have no masks.
        ConfigError: pycocotools is not installed.
    """
    if objects.masks is None:
        raise ValueError("objects without masks")
    classes = np.full((height, width), background, dtype=np.uint8)
    for index in sorted(range(len(objects)), key=lambda i: (not objects.crowd[i], -objects.areas[i])):
        classes[decode_mask(objects.masks[index])] = IGNORED if objects.crowd[index] else objects.labels[index]
    return classes


def objects_of_map(classes: np.ndarray) -> Objects:
    """One object a class that is in a map (H, W), its mask all pixels of the class.

    Raises:
        ConfigError: pycocotools is not installed.
    """
    labels = np.flatnonzero(np.bincount(classes.ravel(), minlength=256)[:IGNORED])
    return objects_of_masks([classes == label for label in labels], labels, labels + 1)


def objects_of_masks(masks: Sequence[np.ndarray], labels: np.ndarray, ids: np.ndarray, crowd: np.ndarray | None = None) -> Objects:
    """Objects with boxes and areas by their ``masks``, (H, W) bool each, none of them empty.

    Raises:
        ConfigError: pycocotools is not installed.
    """
    library = mask_library()
    runs = [library.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    boxes = library.toBbox(runs).astype(np.float32).reshape(-1, 4) if runs else np.zeros((0, 4), dtype=np.float32)
    boxes[:, 2:] += boxes[:, :2]
    areas = np.array([mask.sum() for mask in masks], dtype=np.float32)
    crowd = np.zeros(len(runs), dtype=bool) if crowd is None else crowd
    return Objects(boxes, np.asarray(labels, dtype=np.int64), crowd, areas, np.asarray(ids, dtype=np.int64), runs)


class WithBackground(DenseView):
    """A source of objects as one of maps: what no object covers is class 0, background; crowds are ignored.

    Raises:
        ConfigError: pycocotools is not installed.
    """

    def __init__(self, source: DenseSource):
        mask_library()  # not only when the first image is read
        super().__init__(source, np.arange(len(source)), source.targets, source.notices)
        self.kind, self.classes = "maps", [BACKGROUND if BACKGROUND not in source.classes else f"no {BACKGROUND}", *source.classes]
        taken = int(0 in source.category_ids)  # as YOLO's, which count from 0
        self.category_ids, self.things = [0, *(number + taken for number in source.category_ids)], [False, *source.things]

    def index_map(self, index: int) -> np.ndarray:
        found = self.source.objects(index)
        return painted(replace(found, labels=found.labels + 1), *self.sizes[index].tolist(), background=0)

    def objects(self, index: int) -> Objects:
        return objects_of_map(self.index_map(index))
