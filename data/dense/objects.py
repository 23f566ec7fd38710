"""``ObjectSource``: images with boxes and outlines in flat arrays, which COCO's, VOC's and YOLO's files become once they are checked."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.dense.base import IGNORED, DenseOptions, DenseSource, Objects
from data.dense.faults import LEFT_OUT, FaultBook, sentence
from data.dense.painting import painted
from data.dense.shapes import ShapeList, Shapes, mask_library
from data.errors import DataError, UnreadableImage
from data.sources.folder import ImageFolder
from data.sources.packed_names import PackedNames

OUTSIDE = 1.0  # pixels by which a box may lie outside its image, as roundings do


@dataclass
class Annotations:
    """Objects as their files have them, before they are checked.

    Attributes:
        images: (n,) int64: positions of their images, -1 for an unknown one.
        labels: (n,) int64: positions of their classes, -1 for an unknown one.
        boxes: (n, 4) float64: x0, y0, x1, y1; NaN where one is broken.
        crowd: (n,) bool.
        areas: (n,) float64; NaN where they are not told.
        ids: (n,) int64.
        shapes: their outlines, or None where the data has none.
        boxless: (n,) bool: has no box at all, but maybe a shape to take it from; None: none of them.
    """

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    shapes: Shapes | None = None
    boxless: np.ndarray | None = None

    def take(self, order: np.ndarray) -> Annotations:
        """Those at the positions ``order``."""
        return Annotations(self.images[order], self.labels[order], self.boxes[order], self.crowd[order], self.areas[order], self.ids[order],
                           None if self.shapes is None else self.shapes.take(order))


class ObjectList:
    """Objects as small files have them, one after another."""

    def __init__(self) -> None:
        self.images, self.label_of, self.boxes, self.crowd = array("q"), array("q"), array("d"), bytearray()
        self.shapes, self.lines = ShapeList(), array("q")

    def add(self, image: int, label: int, box: Sequence[float] | None, line: int, crowd: bool = False,
            outline: Sequence[float] | None = None) -> None:
        """An object.

        Args:
            box: x0, y0, x1, y1; None where it is that of the outline.
            line: where it stands in its file, for messages.
            outline: x, y of its corners.
        """
        self.images.append(image)
        self.label_of.append(label)
        self.boxes.extend((np.nan,) * 4 if box is None else box)
        self.crowd.append(crowd)
        self.shapes.add(None if outline is None else [outline])
        self.lines.append(line)

    def annotations(self, sizes: np.ndarray) -> Annotations:
        """All of them; ``sizes``: (images, 2): height and width."""
        images, boxes = np.array(self.images, dtype=np.int64), np.array(self.boxes).reshape(-1, 4)
        owner_sizes = sizes[images] if len(images) else np.zeros((0, 2))
        crowd = np.frombuffer(bytes(self.crowd), dtype=np.uint8).astype(bool)
        return Annotations(images, np.array(self.label_of, dtype=np.int64), boxes, crowd, np.full(len(images), np.nan),
                           np.arange(1, len(images) + 1), Shapes(self.shapes, owner_sizes), np.isnan(boxes).all(axis=1))


def check(found: Annotations, sizes: np.ndarray, book: FaultBook, needs_masks: bool, names: Sequence[str],
          name: Callable[[int], str] | None = None) -> Annotations:
    """The usable annotations, in the order of their images; what is wrong with the others goes into ``book``.

    Args:
        sizes: (images, 2): height and width, zeros where they are not known.
        needs_masks: an object without a mask is of no use, unless none has one.
        names: of the images, for messages.
        name: what messages call an annotation, by its position; None: by its id and image.

    Raises:
        DataError: there are annotations, and none is usable.
    """
    boxes, shapes, known = found.boxes.copy(), found.shapes, found.images >= 0
    there = shapes.there() if shapes is not None else np.zeros(len(boxes), dtype=bool)
    if found.boxless is not None:
        for i in np.flatnonzero(found.boxless & there).tolist():
            boxes[i] = shapes.box(i)
    height, width = np.where(known[:, None], sizes[found.images], 0).astype(np.float64).T if len(sizes) else np.zeros((2, len(boxes)))
    height, width = np.where(height > 0, height, np.inf), np.where(width > 0, width, np.inf)
    keep = np.ones(len(boxes), dtype=bool)

    def by_id(i: int) -> str:
        return f"annotation {found.ids[i]}" + (f" of {names[int(found.images[i])]}" if known[i] else "")

    name = name or by_id
    needs_masks = needs_masks and bool(there.any())

    def drop(kind: str, broken: np.ndarray) -> None:
        book.add_where(kind, LEFT_OUT, keep & broken, name)
        keep[broken] = False

    drop("unknown image", ~known)
    drop("unknown class", found.labels < 0)
    drop("not a box", ~np.isfinite(boxes).all(axis=1) | (np.abs(np.nan_to_num(boxes)).max(axis=1, initial=0) > 1e9))
    x0, y0, x1, y1 = np.where(keep[:, None], boxes, 0).T
    drop("no area", (x1 <= x0) | (y1 <= y0))
    drop("outside", (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height))
    if shapes is not None and there.any():
        of_mask = shapes.runs_of >= 0
        mask_sizes = shapes.run_sizes[shapes.runs_of] if len(shapes.run_sizes) else np.zeros((len(boxes), 2))
        drop("mask of another size", of_mask & np.isfinite(height) & ((mask_sizes[:, 0] != height) | (mask_sizes[:, 1] != width)))
        if needs_masks:
            drop("no usable mask", ~there)
        book.add_where("odd outline", "not used; the rest of the object is", keep & shapes.odd, name)
    over = keep & ((x0 < -OUTSIDE) | (y0 < -OUTSIDE) | (x1 > width + OUTSIDE) | (y1 > height + OUTSIDE))
    book.add_where("partly outside", "clipped to the image", over, name)
    clipped = np.clip(boxes[over], 0, np.stack([width, height, width, height], axis=1)[over])
    boxes[over] = clipped
    areas, whole = found.areas.copy(), (found.boxes[over, 2:] - found.boxes[over, :2]).prod(axis=1)
    areas[over] = np.where(there[over], areas[over], areas[over] * (clipped[:, 2:] - clipped[:, :2]).prod(axis=1) / whole)
    order = np.argsort(np.where(keep, found.images, np.iinfo(np.int64).max), kind="stable")[:int(keep.sum())]
    if len(keep) and not len(order):
        raise DataError(f"{book.where}: none of its {len(keep):,} annotations is usable: {'; '.join(map(sentence, book.faults))}")
    return Annotations(found.images, found.labels, boxes, found.crowd, areas, _own_ids(found.ids, book), shapes).take(order)


def _own_ids(ids: np.ndarray, book: FaultBook) -> np.ndarray:
    """Ids that each annotation has alone."""
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        repeated = values[counts > 1]
        book.add("repeated id", "numbered anew", [f"annotation {value}" for value in repeated[:3].tolist()], int((counts - 1).sum()))
        return np.arange(1, len(ids) + 1)
    return ids


class ObjectSource(ImageFolder, DenseSource):
    """Images that are files, with checked annotations.

    Args:
        names: paths of the images, absolute or from the working directory.
        found: in the order of their images, by ``check``.
        book: what was wrong.
        has_masks: whether the masks of ``found`` are to be used; each must have one.

    Attributes:
        counts: (images,) int64: objects of each image, without crowds.
    """

    kind = "objects"

    def __init__(self, root: str, classes: list[str], names: PackedNames, sizes: np.ndarray, image_ids: np.ndarray,
                 category_ids: Sequence[int], found: Annotations, book: FaultBook, has_masks: bool):
        names = PackedNames.of([os.path.relpath(name, root) for name in names])  # what tells data apart does not hang on where they lie
        super().__init__(root, classes, names, rarest(found, len(names), len(classes)), book.notices())
        self.sizes = np.maximum(sizes, 1).astype(np.int32)  # of an image that cannot be read none is known
        self.image_ids, self.category_ids, self.faults = image_ids, list(category_ids), book.faults
        self.things, self.has_masks = [True] * len(classes), has_masks
        self.bounds = np.searchsorted(found.images, np.arange(len(names) + 1))
        self.counts = np.bincount(found.images[~found.crowd], minlength=len(names))
        self.boxes, self.label_of, self.crowd = found.boxes.astype(np.float32), found.labels.astype(np.int32), found.crowd
        self.areas, self.ids, self.shapes = found.areas.astype(np.float32), found.ids, found.shapes if has_masks else None

    def identity(self) -> bytes:
        digest = hashlib.sha256(super().identity())
        for values in (self.bounds, self.boxes, self.label_of, self.crowd):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.digest()

    def load(self, index: int) -> Image.Image:
        image = super().load(index)
        height, width = self.sizes[index].tolist()
        if image.size != (width, height):
            turned = "; if it is to be turned by its EXIF block, set DATA.EXIF True" if image.size == (height, width) else ""
            raise UnreadableImage.of(self.path(index), f"it has {image.size[0]}x{image.size[1]} pixels, and its annotations are of "
                                                       f"{width}x{height}{turned}")
        return image

    def objects(self, index: int) -> Objects:
        part = slice(int(self.bounds[index]), int(self.bounds[index + 1]))
        areas, boxes, masks = self.areas[part].copy(), self.boxes[part].copy(), None
        untold = np.isnan(areas)
        if self.shapes is not None:
            size = self.sizes[index].tolist()
            masks = [self.shapes.mask(i, size) for i in range(part.start, part.stop)]
            if untold.any():
                areas[untold] = mask_library().area([mask for mask, wanted in zip(masks, untold, strict=True) if wanted])
        areas[untold] = (boxes[untold, 2:] - boxes[untold, :2]).prod(axis=1) if masks is None else areas[untold]
        return Objects(boxes, self.label_of[part].astype(np.int64), self.crowd[part].copy(), areas, self.ids[part].copy(), masks)

    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        images = np.repeat(np.arange(len(self)), np.diff(self.bounds))
        return images[~self.crowd], self.label_of[~self.crowd].astype(np.int64)

    def index_map(self, index: int) -> np.ndarray:
        if self.shapes is None or len(self.classes) > IGNORED:
            raise DataError(f"{self.root}: makes no map of classes; that needs masks, of at most {IGNORED} classes")
        return painted(self.objects(index), *self.sizes[index].tolist())


def uses_masks(found: Annotations, options: DenseOptions) -> bool:
    """Whether the masks of checked annotations are there and of use: boxes alone need none, which take time and memory."""
    used = options.task != "detection" or options.data.DENSE.COPY_PASTE > 0
    return used and found.shapes is not None and bool(len(found.images)) and bool(found.shapes.there().all())


def rarest(found: Annotations, images: int, classes: int) -> np.ndarray:
    """(images,) int64: the rarest class of each image, ``classes`` for one without an object."""
    counts = np.bincount(found.labels, minlength=classes)
    rank = np.empty(classes + 1, dtype=np.int64)
    order = np.argsort(counts, kind="stable")
    rank[order], rank[classes] = np.arange(classes), classes
    best = np.full(images, classes, dtype=np.int64)
    np.minimum.at(best, found.images, rank[found.labels])
    return np.append(order, classes)[best]
