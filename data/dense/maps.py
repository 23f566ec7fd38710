"""Folders of images with maps of classes: ADE20K, Cityscapes, Pascal VOC's and CVAT's, Roboflow's, and people's own.

What the masks hold is found once, over all of them: values that no class has end the run before it begins, not after hours.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from yacs.config import CfgNode

from data.decoding.pillow import Reading
from data.dense.base import IGNORED, DenseOptions, DenseSource, Fault, Objects
from data.dense.faults import LEFT_OUT, FaultBook
from data.dense.files import header_size
from data.dense.map_layouts import Pairs, find_pairs
from data.dense.map_values import MOST_CLASSES, Legend, find_legend, read_values
from data.dense.painting import objects_of_map
from data.errors import DataError, UnreadableImage
from data.messages import Notice
from data.sources.folder import ImageFolder
from data.sources.listing_progress import tick
from data.sources.packed_names import PackedNames
from data.sources.threads import Hang, in_threads

_THREADS = 8
REDUCE = "DATA.DENSE.REDUCE_ZERO_LABEL"


class MapFolder(ImageFolder, DenseSource):
    """Image files with a mask file each.

    Args:
        pairs: (image, mask) paths below ``root``.
        legend: what the values of the masks stand for.
        sizes: (images, 2) int32: height and width.
        values: of each mask, which values it has.
    """

    kind = "maps"
    has_masks = True

    def __init__(self, root: str, pairs: Sequence[tuple[str, str]], legend: Legend, sizes: np.ndarray,
                 values: Sequence[Collection[int]], faults: Sequence[Fault], notices: Sequence[str]):
        targets = np.zeros(len(pairs), dtype=np.int64)
        below = [[os.path.relpath(path, root) for path in paths] for paths in zip(*pairs, strict=True)]
        super().__init__(root, list(legend.names), PackedNames.of(below[0]), targets, notices)
        self.masks = ImageFolder(root, self.classes, PackedNames.of(below[1]), targets)
        self.legend, self.table, self.sizes, self.faults = legend, legend.table(), sizes, list(faults)
        self.image_ids = np.arange(1, len(pairs) + 1)
        of_values = [np.setdiff1d(self.table[sorted(there)], [IGNORED]) for there in values]
        self.there = np.repeat(np.arange(len(pairs)), [len(part) for part in of_values]), np.concatenate(of_values).astype(np.int64)
        self.category_ids, self.things = list(legend.values), list(legend.things or [True] * len(legend.names))

    def configure(self, reading: Reading, patience: float) -> None:
        super().configure(reading, patience)
        self.masks.configure(reading, patience)

    def identity(self) -> bytes:
        return super().identity() + self.masks.identity() + self.table.tobytes()

    def index_map(self, index: int) -> np.ndarray:
        name = self.masks.path(index)
        try:
            values = read_values(self.masks.read(index), name, self.legend.colours)
        except UnreadableImage:
            raise
        except DataError as error:
            raise UnreadableImage(str(error), name, "changed since the start") from None
        if values.shape != tuple(self.sizes[index].tolist()):
            raise UnreadableImage.of(name, f"{_size(values.shape)} pixels, its image {_size(self.sizes[index])}")
        return self.table[values]

    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        return self.there

    def objects(self, index: int) -> Objects:
        return objects_of_map(self.index_map(index))


def _size(size: Sequence[int]) -> str:
    """Height and width as people write them: width x height."""
    return f"{size[1]}x{size[0]}"


def open_maps(root: str, split: str, options: DenseOptions) -> MapFolder:
    """The images of a split with their maps of classes.

    Classes are those of a file beside the masks (``map_values.NAME_FILES``), else the layout's own, else the values found in the masks,
    which are then their names.

    Raises:
        DataError: nothing usable; a mask with a value or a colour that no class has, or of too many classes; the message names it.
    """
    pairs = find_pairs(root, split)
    if pairs is None:
        raise DataError(f"{root}: holds no images with maps of classes for {split}; expected images/{split}/*.jpg and masks/{split}/*.png "
                        "(or ADE20K's, Cityscapes' or Pascal VOC's folders)")
    data = options.data
    legend = find_legend([*pairs.near, root]) or pairs.legend
    reduce = data.DENSE.REDUCE_ZERO_LABEL
    reduce = pairs.reduce_zero if reduce is None else reduce
    if legend is not None and reduce:
        legend = replace(legend, values=[value + 1 for value in legend.values], ignored=frozenset([0]))
    colours = legend.colours if legend is not None else None
    looks = _look_at_all(root, pairs, colours, data)
    book, usable = _usable(root, pairs, looks)
    if not usable:
        first = book.faults[0] if book.faults else None
        raise DataError(f"{root}: no usable image for {split}" + (f"; {first.kind}: {first.examples[0]}; {first.remedy}" if first else ""))
    found = sorted(set().union(*(looks[i].values for i in usable)))
    notices = list(book.notices())
    if legend is None:
        legend = _legend_of(root, split, found, reduce, data, notices)
    for i in usable:
        _check_values(pairs, pairs.files[i][1], looks[i].values, legend)
    sizes = np.array([looks[i].size for i in usable], dtype=np.int32)
    return MapFolder(root, [pairs.files[i] for i in usable], legend, sizes, [looks[i].values for i in usable], book.faults,
                     notices)


# --------------------------------------------------------------------------------------------------
# One look at every file
# --------------------------------------------------------------------------------------------------

class _Look(NamedTuple):
    """What was found in an image's header and in its mask.

    Attributes:
        size: height and width of the image as it is trained on.
        mask_size: of the mask.
        values: that the mask has.
        fault: what is wrong: a kind, and where.
    """

    size: tuple[int, int] = (0, 0)
    mask_size: tuple[int, int] = (0, 0)
    values: frozenset[int] = frozenset()
    fault: tuple[str, str] | None = None


def _look_at_all(root: str, pairs: Pairs, colours: np.ndarray | None, data: CfgNode) -> list[_Look]:
    masks = ImageFolder("", [], PackedNames.of([os.path.abspath(mask) for _, mask in pairs.files]), np.zeros(len(pairs.files), np.int64))
    masks.configure(masks.reading, data.READ_PATIENCE)
    seen = [0]

    def look(i: int) -> _Look:
        image, mask = pairs.files[i]
        size = header_size(image, data.EXIF)
        if not min(size):
            return _Look(fault=("image unreadable", image))
        try:
            values = read_values(masks.read(i), mask, colours)
        except UnreadableImage as error:
            return _Look(fault=("mask unreadable", f"{mask}: {error.reason}"))
        seen[0] += 1
        if seen[0] % 100 == 0:
            tick(root, seen[0])
        found = frozenset(np.flatnonzero(np.bincount(values.ravel(), minlength=256)).tolist())
        return _Look(size, values.shape, found)

    try:
        return in_threads(look, range(len(pairs.files)), data.TIMEOUT, _THREADS)
    except Hang as hang:
        busy = ", ".join(pairs.files[i][1] for i in hang.busy)
        raise DataError(f"no mask came for {data.TIMEOUT:g} seconds (DATA.TIMEOUT); being read at that moment: {busy}; check the disk "
                        "or network share that holds it, or raise DATA.TIMEOUT") from None


def _usable(root: str, pairs: Pairs, looks: Sequence[_Look]) -> tuple[FaultBook, list[int]]:
    """(what is wrong, positions of the pairs that are not left out)."""
    book, usable = FaultBook(root), []
    book.add("mask missing", f"{LEFT_OUT}; name a mask as its image", pairs.without_mask)
    book.add("image missing", f"{LEFT_OUT}; name a mask as its image", pairs.without_image)
    for i, look in enumerate(looks):
        if look.fault is not None:
            book.add(look.fault[0], f"{LEFT_OUT}; repair it or remove it", [look.fault[1]])
        elif look.size != look.mask_size:
            turned = "; the image may be stored rotated: --opts DATA.EXIF True" if look.size == look.mask_size[::-1] else ""
            book.add("mask of another size", f"{LEFT_OUT}; make each mask as large as its image{turned}",
                     [f"{pairs.files[i][1]} is {_size(look.mask_size)}, its image {_size(look.size)}"])
        else:
            usable.append(i)
    return book, usable


# --------------------------------------------------------------------------------------------------
# Values and classes
# --------------------------------------------------------------------------------------------------

def _legend_of(root: str, split: str, found: Sequence[int], reduce: bool, data: CfgNode, notices: list[str]) -> Legend:
    """Classes by the values ``found`` in the masks, where nothing names them."""
    ignored = frozenset([0] if reduce else [])
    values = [value for value in found if value != IGNORED and value not in ignored]
    if IGNORED in found and not set(values) - {0} and _only_black_and_white(root, split, data):
        notices.append(Notice(f"{root}: its masks are black and white; white, 255, is a class, which is ignored in masks of other values"))
        values = [*values, IGNORED]
    if not values:
        raise DataError(f"{root}: its masks hold no class, only {' and '.join(map(str, found))}; 255 is ignored"
                        + (f", and 0 by {REDUCE}" if reduce else ""))
    if len(values) > MOST_CLASSES:
        raise DataError(f"{root}: its masks hold {len(values)} values; maps of classes can have {MOST_CLASSES}; "
                        "save masks without smoothing, as PNG")
    return Legend([str(value) for value in values], values, ignored=ignored)


def _only_black_and_white(root: str, split: str, data: CfgNode) -> bool:
    """Whether the training masks have no value but 0 and 255, so that what evaluation calls a class does not hang on its masks."""
    pairs = find_pairs(root, "train") if split != "train" else None
    return pairs is None or not set().union(*(look.values for look in _look_at_all(root, pairs, None, data))) - {0, IGNORED}


def _check_values(pairs: Pairs, path: str, values: frozenset[int], legend: Legend) -> None:
    odd = sorted(values - {IGNORED, *legend.values} - legend.ignored)
    if not odd:
        return
    by = os.path.basename(legend.path) if legend.path else pairs.layout
    span = f"{min(legend.values)} to {max(legend.values)}"
    zero = f", or, where 0 is no class, --opts {REDUCE} True" if not legend.ignored and odd == [len(legend.names)] else ""
    raise DataError(f"{path}: has the value {odd[0]}, and {by} names {len(legend.names)} classes ({span}; 255 is ignored); name it there, "
                    f"or paint it with 255{zero}")
