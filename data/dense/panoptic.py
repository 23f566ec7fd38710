"""Panoptic data in COCO's format: segments of things and of stuff that cover an image, as COCO, ADE20K and Cityscapes have them.

A JSON file tells the category of each segment, a PNG file a segment of each pixel: its id is red + 256 green + 65536 blue, 0 for none.
https://cocodataset.org/#format-data
"""

from __future__ import annotations

import io
import os
import re
from array import array
from typing import Any

import numpy as np
from PIL import Image

from data.decoding.pillow import Reading
from data.dense.base import IGNORED, DenseOptions, DenseSource, Objects
from data.dense.coco import whole
from data.dense.faults import LEFT_OUT, FaultBook
from data.dense.files import Listing, header_sizes, place_images, usable_name
from data.dense.json_stream import read_arrays
from data.dense.painting import objects_of_masks
from data.errors import DataError, UnreadableImage
from data.layouts.options import SPLIT_NAMES, names_of
from data.sources.folder import ImageFolder, images_below, visible_entries
from data.sources.listing_progress import tick
from data.sources.packed_names import PackedNames
from data.sources.threads import Hang, in_threads

_NAME = re.compile(r"(?:.*[_-])?panoptic[_-]([a-z]+)[_-]?\d*\.json", re.IGNORECASE)
_SIDE = 1 << 20  # pixels
_COMPARED = 2000  # PNG files that are compared with the JSON file before a run: COCO's 118,000 would take minutes


def panoptic_files(root: str) -> dict[str, str]:
    """The JSON file of each split at ``root``, by "train", "val", "test"; empty where there is none."""
    found: dict[str, str] = {}
    for folder in (os.path.join(root, name) for name in ("annotations", "", "gtFine")):
        for entry in visible_entries(folder) if os.path.isdir(folder) else ():
            if (name := _NAME.fullmatch(entry.name)) and entry.is_file():
                split = next((split for split, names in SPLIT_NAMES.items() if name[1].lower() in names), None)
                if split:
                    found.setdefault(split, entry.path)
    return found


class _Collector:
    """Takes the elements of a file, in whatever order they come."""

    def __init__(self, path: str):
        self.path = path
        self.images: dict[object, tuple[str, int, int]] = {}
        self.categories: dict[int, tuple[str, bool]] = {}
        self.masks: list[tuple[object, str]] = []  # the image and the PNG file of each annotation
        self.ends, self.ids, self.category_of, self.areas, self.crowd = array("q"), array("q"), array("q"), array("d"), bytearray()
        self.odd: list[str] = []

    def image(self, item: Any) -> None:
        if type(item) is not dict or not (name := usable_name(item.get("file_name"))):
            self.odd.append(f"image {str(item)[:40]}")
            return
        height, width = (side if (side := whole(item.get(key))) and 0 < side <= _SIDE else 0 for key in ("height", "width"))
        self.images[_key(item.get("id"))] = name, height, width

    def category(self, item: Any) -> None:
        number, name = (whole(item.get("id")), item.get("name")) if type(item) is dict else (None, None)
        if number is None or not isinstance(name, str) or not name.strip():
            raise DataError(f"{self.path}: a category has no whole number as its id or no name ({str(item)[:60]!r}); add it")
        self.categories[number] = name, whole(item.get("isthing")) != 0

    def annotation(self, item: Any) -> None:
        segments = item.get("segments_info") if type(item) is dict else None
        if type(segments) is not list or not (name := usable_name(item.get("file_name"))):
            self.odd.append(f"annotation {str(item)[:40]}")
            return
        self.masks.append((_key(item.get("image_id")), name))
        for segment in segments:
            number, category = (whole(segment.get(key)) for key in ("id", "category_id")) if type(segment) is dict else (None, None)
            if number is None or category is None or not 0 < number < 1 << 24:
                self.odd.append(f"segment {str(segment)[:40]}")
                continue
            area = whole(segment.get("area"))
            self.ids.append(number)
            self.category_of.append(category)
            self.areas.append(np.nan if area is None else area)
            self.crowd.append(segment.get("iscrowd") in (1, "1"))
        self.ends.append(len(self.ids))
        if not len(self.ends) % 10_000:
            tick(self.path, len(self.ends))


def _key(value: object) -> object:
    """An image's id to look it up by: Cityscapes' are texts."""
    number = whole(value)
    return number if number is not None else value if isinstance(value, str) else None


class PanopticFolder(ImageFolder, DenseSource):
    """Image files with a PNG file of segments each.

    Args:
        names, masks: of the image files and of the PNG files, below ``root``.
        bounds: (images + 1,) int64: where the segments of each image begin in ``ids``, ``label_of``, ``areas`` and ``crowd``; those of an
            image are in the order of their ids.
    """

    kind = "panoptic"
    has_masks = True

    def __init__(self, root: str, classes: list[str], names: PackedNames, masks: PackedNames, sizes: np.ndarray, image_ids: np.ndarray,
                 category_ids: list[int], things: list[bool], bounds: np.ndarray, ids: np.ndarray, label_of: np.ndarray, areas: np.ndarray,
                 crowd: np.ndarray):
        super().__init__(root, classes, names, np.zeros(len(names), dtype=np.int64))
        self.masks = ImageFolder(root, classes, masks, self.targets)
        self.sizes, self.image_ids, self.category_ids, self.things, self.faults = sizes, image_ids, category_ids, things, []
        self.bounds, self.ids, self.label_of, self.areas, self.crowd = bounds, ids, label_of, areas, crowd

    def configure(self, reading: Reading, patience: float) -> None:
        super().configure(reading, patience)
        self.masks.configure(reading, patience)

    def identity(self) -> bytes:
        return super().identity() + self.ids.tobytes() + self.label_of.tobytes() + self.crowd.tobytes()

    def segments(self, index: int) -> np.ndarray:
        """(H, W) int64: for each pixel of an image the position of its segment among the image's, -1 where none.

        Raises:
            UnreadableImage: the PNG file cannot be read, or is of another size than the image.
        """
        pixels, ids = self.pixel_ids(index), self.ids[self.bounds[index]:self.bounds[index + 1]]
        if pixels.shape != tuple(self.sizes[index].tolist()):
            (height, width), own = pixels.shape, self.sizes[index].tolist()
            raise UnreadableImage.of(self.masks.path(index), f"it has {width}x{height} pixels, its image {own[1]}x{own[0]}")
        if not len(ids):
            return np.full(pixels.shape, -1, dtype=np.int64)
        at = np.searchsorted(ids, pixels).clip(max=len(ids) - 1)
        return np.where(ids[at] == pixels, at, -1)

    def pixel_ids(self, index: int) -> np.ndarray:
        """(H, W) int32: the ids in an image's PNG file, whatever its size.

        Raises:
            UnreadableImage: it cannot be read.
        """
        name = self.masks.path(index)
        try:
            with Image.open(io.BytesIO(self.masks.read(index)), formats=("PNG",)) as image:
                if image.mode not in ("RGB", "RGBA"):
                    raise ValueError(f"its pixels are of mode {image.mode}, ids are three bytes: RGB")
                pixels = np.asarray(image, dtype=np.int32)
        except UnreadableImage:
            raise
        except Exception as error:  # Pillow's decoders raise anything
            raise UnreadableImage.of(name, error) from None
        return pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]

    def objects(self, index: int) -> Objects:
        segments, part = self.segments(index), slice(int(self.bounds[index]), int(self.bounds[index + 1]))
        there = np.flatnonzero(np.bincount(segments.ravel() + 1, minlength=part.stop - part.start + 1)[1:])
        found = objects_of_masks([segments == at for at in there.tolist()], self.label_of[part][there], self.ids[part][there],
                                 self.crowd[part][there])
        told = self.areas[part][there]
        found.areas = np.where(np.isnan(told), found.areas, told).astype(np.float32)
        return found

    def shown(self) -> tuple[np.ndarray, np.ndarray]:
        images = np.repeat(np.arange(len(self)), np.diff(self.bounds))
        return images[~self.crowd], self.label_of[~self.crowd].astype(np.int64)

    def index_map(self, index: int) -> np.ndarray:
        if len(self.classes) > IGNORED:
            raise DataError(f"{self.root}: has {len(self.classes)} classes, and a map of classes at most {IGNORED}")
        part = slice(int(self.bounds[index]), int(self.bounds[index + 1]))
        classes = np.append(np.where(self.crowd[part], IGNORED, self.label_of[part]), IGNORED)  # the last is that of -1
        return classes[self.segments(index)].astype(np.uint8)


def open_panoptic(root: str, split: str, options: DenseOptions) -> PanopticFolder:
    """A split of the data at ``root``; broken entries are left out and told.

    Raises:
        DataError: no such split, a file that cannot be read, or nothing usable in it.
    """
    files = panoptic_files(root)
    if split not in files:
        raise DataError(f"{root}: has no panoptic annotations of {split}; expected annotations/panoptic_{split}2017.json and a folder of "
                        "PNG files of the same name")
    path = files[split]
    raw, book = _Collector(path), FaultBook(path)
    members = read_arrays(path, dict(images=raw.image, annotations=raw.annotation, categories=raw.category))
    missing = [name for name in ("images", "annotations", "categories") if name not in members]
    if missing or not raw.masks or not raw.categories:
        raise DataError(f"{path}: has no {' and no '.join(missing) or 'segments_info or no categories'}, as COCO's panoptic format has")
    book.add("entry that is no image, annotation or segment", LEFT_OUT, raw.odd)
    source = _source(root, split, path, raw, book, options)
    _compare(source, book, options.data.TIMEOUT)
    source.faults, source.notices = book.faults, list(book.notices())
    return source


def _source(root: str, split: str, path: str, raw: _Collector, book: FaultBook, options: DenseOptions) -> PanopticFolder:
    """The images that have everything."""
    known = [image in raw.images for image, _ in raw.masks]
    book.add("annotation of an unknown image", LEFT_OUT, [name for (_, name), there in zip(raw.masks, known, strict=True) if not there])
    images = [raw.images.get(image, ("", 0, 0)) for image, _ in raw.masks]
    image_paths = _find_images(root, split, path, [name for name, _, _ in images])
    beside, stem = os.path.dirname(path), os.path.splitext(os.path.basename(path))[0]
    mask_paths = place_images([name for _, name in raw.masks], [os.path.join(beside, stem), os.path.join(root, stem), beside])
    listing = Listing()
    image_paths, mask_paths = ([listing.find(name) if name else "" for name in names] for names in (image_paths, mask_paths))
    book.add("image missing", f"{LEFT_OUT}; copy it there, or remove it from the file",
             [name for (name, _, _), there, ok in zip(images, image_paths, known, strict=True) if ok and not there])
    book.add("mask missing", f"{LEFT_OUT}; unpack the PNG files into {stem}/",
             [name for (_, name), there, ok in zip(raw.masks, mask_paths, known, strict=True) if ok and not there])
    kept = [i for i, both in enumerate(zip(image_paths, mask_paths, strict=True)) if all(both)]
    if not kept:
        raise DataError(f"{path}: none of its {len(raw.masks):,} images is there with its PNG file; " + "; ".join(
            f"{fault.kind}: {fault.examples[0]}" for fault in book.faults))
    sizes = np.array([images[i][1:] for i in kept], dtype=np.int32)
    unknown = np.flatnonzero((sizes == 0).any(axis=1)).tolist()
    if unknown:
        sizes[unknown] = header_sizes(lambda at: image_paths[kept[at]], unknown, options.data.EXIF, options.data.TIMEOUT)
    numbers = sorted(raw.categories)
    names = [raw.categories[number][0] for number in numbers]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{path}: two categories are called {twice!r}; give them different names, or one id")
    segments = _segments(raw, kept, numbers, book)
    ids = [raw.masks[i][0] for i in kept]
    image_ids = np.array(ids if all(isinstance(i, int) for i in ids) else range(1, len(ids) + 1), dtype=np.int64)
    return PanopticFolder(root, names, PackedNames.of([os.path.relpath(image_paths[i], root) for i in kept]),
                          PackedNames.of([os.path.relpath(mask_paths[i], root) for i in kept]), sizes, image_ids, numbers,
                          [raw.categories[number][1] for number in numbers], *segments)


def _find_images(root: str, split: str, path: str, names: list[str]) -> list[str]:
    """Paths of the image files: in the folder of the split, or, as Cityscapes has them, in folders below it."""
    year = re.sub(r".*panoptic[_-]", "", os.path.splitext(os.path.basename(path))[0])
    tops = [root, os.path.join(root, "images"), os.path.dirname(path)]
    folders = [folder for top in tops for name in (year, *names_of(split)) if os.path.isdir(folder := os.path.join(top, name))]
    cities = next((folder for name in names_of(split) if os.path.isdir(folder := os.path.join(root, "leftImg8bit", name))), None)
    if cities is not None:
        below = {os.path.basename(image): image for image in images_below(cities)}
        return [below.get(os.path.basename(name), name) for name in names]
    return place_images(names, [*folders, root])


def _segments(raw: _Collector, kept: list[int], numbers: list[int], book: FaultBook) -> tuple[np.ndarray, ...]:
    """(bounds, ids, labels, areas, crowd) of the segments of the images ``kept``, each image's in the order of its ids."""
    bounds = np.concatenate([[0], np.array(raw.ends, dtype=np.int64)])
    counts = np.diff(bounds)
    place = np.full(len(counts), -1, dtype=np.int64)
    place[kept] = np.arange(len(kept))
    owner, ids = np.repeat(place, counts), np.array(raw.ids, dtype=np.int64)
    category_of, known = np.array(raw.category_of, dtype=np.int64), np.array(numbers, dtype=np.int64)
    labels = np.searchsorted(known, category_of).clip(max=len(known) - 1)
    order = np.lexsort((ids, owner))
    order = order[owner[order] >= 0]

    def name(at: int) -> str:
        return f"segment {ids[order[at]]} of {raw.masks[kept[owner[order[at]]]][1]}"

    lost = known[labels[order]] != category_of[order]
    book.add_where("unknown category", LEFT_OUT, lost, name)
    order = order[~lost]
    again = np.zeros(len(order), dtype=bool)
    again[1:] = (owner[order][1:] == owner[order][:-1]) & (ids[order][1:] == ids[order][:-1])
    book.add_where("segment given twice", "taken once", again, name)
    order = order[~again]
    areas, crowd = np.array(raw.areas, dtype=np.float32), np.frombuffer(bytes(raw.crowd), dtype=np.uint8).astype(bool)
    return np.searchsorted(owner[order], np.arange(len(kept) + 1)), ids[order], labels[order], areas[order], crowd[order]


def _compare(source: PanopticFolder, book: FaultBook, timeout: float) -> None:
    """Faults of PNG files that disagree with the JSON file, in up to 2,000 of them that lie evenly over the set."""
    places = np.unique(np.linspace(0, len(source) - 1, min(len(source), _COMPARED)).round().astype(np.int64)).tolist()
    among = f" (of {len(places):,} files compared)" if len(places) < len(source) else ""

    def look(index: int) -> dict[str, list[str]]:
        """Examples of each kind of fault of one file."""
        name = source.masks.path(index)
        try:
            pixels = source.pixel_ids(index)
        except UnreadableImage as error:
            return {"mask unreadable": [f"{name}: {error.reason}"]}
        (height, width), (own_height, own_width) = pixels.shape, source.sizes[index].tolist()
        if pixels.shape != (own_height, own_width):
            return {"mask of another size": [f"{name} is {width}x{height}, its image {own_width}x{own_height}"]}
        there, told = np.unique(pixels), source.ids[source.bounds[index]:source.bounds[index + 1]]
        return {"segment without a category": [f"segment {i} of {name}" for i in np.setdiff1d(there, [0, *told.tolist()]).tolist()],
                "segment without a pixel": [f"segment {i} of {name}" for i in np.setdiff1d(told, there).tolist()]}

    remedies = {"mask unreadable": "its image counts as unreadable; repair it",
                "mask of another size": "its image counts as unreadable; make it as large as that",
                "segment without a category": "its pixels are ignored", "segment without a pixel": LEFT_OUT}
    try:
        for found in in_threads(look, places, timeout):
            for kind, examples in found.items():
                book.add(kind, remedies[kind] + among, examples)
    except Hang as hang:
        busy = ", ".join(source.masks.path(index) for index in hang.busy)
        raise DataError(f"no mask came for {timeout:g} seconds (DATA.TIMEOUT); being read at that moment: {busy}; check the disk or "
                        "network share that holds it") from None
