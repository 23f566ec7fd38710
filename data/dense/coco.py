"""COCO's format of boxes and masks, as COCO itself, Roboflow, CVAT, Label Studio and most tools write it.

https://cocodataset.org/#format-data
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.dense.base import DenseOptions
from data.dense.faults import LEFT_OUT, FaultBook
from data.dense.files import Listing, header_sizes, place_images, usable_name
from data.dense.json_stream import read_arrays
from data.dense.objects import Annotations, ObjectSource, check, uses_masks
from data.dense.shapes import ShapeList, Shapes
from data.errors import DataError
from data.layouts.options import ALL, SPLIT_NAMES, find_entry, names_of
from data.sources.classes import first_few
from data.sources.folder import visible_entries
from data.sources.listing_progress import tick
from data.sources.packed_names import PackedNames

_PREFIX = re.compile(r"(coco|person_keypoints|instances?|annotations?|lvis_v1)_", re.IGNORECASE)
_MARK = re.compile(r'"(images|annotations|categories)"\s*:\s*\[')
_INSIDE = ("_annotations.coco.json", "annotations.json", "instances.json", "labels.json", "coco.json")
_ALONE = ("instances_default.json", "result.json", *_INSIDE)
_SNIFFED = 1 << 16
_LARGEST_SIDE = 1 << 20
_NUMBERED = -(1 << 62)  # ids that annotations without one have until they are numbered


# --------------------------------------------------------------------------------------------------
# Finding the files
# --------------------------------------------------------------------------------------------------

def annotation_files(root: str) -> dict[str, str]:
    """The JSON file of each split at ``root``, by "train", "val", "test", or "all" for data without splits; empty where there is none."""
    if os.path.isfile(root):
        return {ALL: root} if is_coco(root) else {}
    if not os.path.isdir(root):
        return {}
    found: dict[str, str] = {}
    folders = [path for name in ("annotations", "") if os.path.isdir(path := os.path.join(root, name))]
    for folder in folders:
        named = [(e.name, e.path) for e in visible_entries(folder) if e.name.lower().endswith(".json")]
        named.sort(key=lambda pair: (not pair[0].startswith("instances"), -_year(pair[0]), pair[0]))
        for name, path in named:
            split = _split_of(name)
            if split and split not in found and not os.path.basename(name).startswith(("panoptic", "captions", "stuff")) and is_coco(path):
                found[split] = path
    for split, names in SPLIT_NAMES.items():
        folder = find_entry(root, names, os.path.isdir)
        path = find_entry(folder, _INSIDE, os.path.isfile) if folder else None
        if split not in found and path and is_coco(path):
            found[split] = path
    for folder in folders if not found else ():
        path = find_entry(folder, _ALONE, is_coco)
        if path:
            return {ALL: path}
    return found


def _split_of(name: str) -> str | None:
    """The split that a file is named for: instances_train2017.json, val.json."""
    stem = _PREFIX.sub("", os.path.splitext(name)[0]).lower()
    return next((split for split, names in SPLIT_NAMES.items() for n in names if re.fullmatch(rf"{n}[_-]?\d*", stem)), None)


def _year(name: str) -> int:
    digits = re.search(r"\d{4}", name)
    return int(digits[0]) if digits else 0


def is_coco(path: str) -> bool:
    """Whether a file begins as COCO's JSON does."""
    try:
        if not os.path.isfile(path):
            return False
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            text = file.read(_SNIFFED)
    except (OSError, ValueError):
        return False
    return text.lstrip().startswith("{") and bool(_MARK.search(text)) and '"segments_info"' not in text


def _image_folders(root: str, file: str, split: str) -> list[str]:
    """Where the images of a JSON file may lie, likeliest first."""
    beside, stem = os.path.dirname(file) or ".", _PREFIX.sub("", os.path.splitext(os.path.basename(file))[0])
    above = [beside] if os.path.basename(os.path.abspath(beside)).lower() != "annotations" else []
    root = root if os.path.isdir(root) else beside if above else os.path.dirname(os.path.abspath(beside))
    names = [stem, *names_of(split)]
    folders = [*above, *(os.path.join(root, name) for name in names), *(os.path.join(root, "images", name) for name in names),
               os.path.join(beside, "images"), os.path.join(beside, "data"), os.path.join(root, "images"), os.path.join(root, "data"), root]
    return [folder for folder in folders if os.path.isdir(folder)] or [root]


# --------------------------------------------------------------------------------------------------
# Reading one
# --------------------------------------------------------------------------------------------------

class _Collector:
    """Takes the elements of a file, in whatever order they come."""

    def __init__(self, path: str):
        self.path = path
        self.images: list[tuple[object, str, int, int]] = []
        self.categories: dict[int, tuple[str, str]] = {}
        self.image_of: list[object] = []
        self.category_of, self.ids, self.areas, self.boxes = array("q"), array("q"), array("d"), array("d")
        self.crowd, self.boxless, self.shapes = bytearray(), bytearray(), ShapeList()
        self.odd = dict(images=0, annotations=0)

    def image(self, item: Any) -> None:
        if type(item) is not dict:
            self.odd["images"] += 1
            return
        name = next((n for key in ("file_name", "coco_url", "flickr_url", "url") if (n := usable_name(item.get(key)))), "")
        height, width = (side if (side := whole(item.get(key))) and 0 < side <= _LARGEST_SIDE else 0 for key in ("height", "width"))
        self.images.append((_key(item.get("id")), name, height if width else 0, width if height else 0))
        if not len(self.images) % 10_000:
            tick(self.path, len(self.images))

    def category(self, item: Any) -> None:
        number, name = (whole(item.get("id")), item.get("name")) if type(item) is dict else (None, None)
        if number is None or not isinstance(name, str) or not name.strip():
            raise DataError(f"{self.path}: a category has no whole number as its id or no name ({str(item)[:60]!r}); add it")
        if self.categories.get(number, (name,))[0] != name:
            raise DataError(f"{self.path}: category id {number} has two names, {self.categories[number][0]!r} and {name!r}; give each its "
                            "own id")
        heading = item.get("supercategory")
        self.categories[number] = name, heading if isinstance(heading, str) else ""

    def annotation(self, item: Any) -> None:
        if type(item) is not dict:
            self.odd["annotations"] += 1
            return
        get, start = item.get, len(self.boxes)
        self.image_of.append(_key(get("image_id")))
        self.category_of.append(_or(whole(get("category_id")), -1 << 62))
        self.ids.append(_or(whole(get("id")), _NUMBERED - len(self.ids)))
        self.areas.append(_number(get("area")))
        self.crowd.append(get("iscrowd") in (1, "1"))
        box = get("bbox")
        self.boxless.append(not box)
        try:
            if type(box) is list and len(box) == 4:
                self.boxes.extend(box)
        except (TypeError, OverflowError):
            del self.boxes[start:]
        if len(self.boxes) == start:
            self.boxes.extend((np.nan,) * 4)
        self.shapes.add(get("segmentation"))


def whole(value: object) -> int | None:
    """The whole number that an id or a side is, also as text or as a float; None for anything else."""
    if (type(value) is float and value.is_integer()) or (type(value) is str and value.isascii() and value.isdecimal() and len(value) < 19):
        value = int(value)
    return value if type(value) is int and abs(value) < 1 << 62 else None


def _key(value: object) -> object:
    """An image's id to look it up by."""
    number = whole(value)
    return number if number is not None else value if isinstance(value, str) else None


def _or(value: int | None, other: int) -> int:
    return other if value is None else value


def _number(value: object) -> float:
    try:
        number = float(value) if type(value) in (int, float) else np.nan
    except OverflowError:
        return np.nan
    return number if 0 <= number < np.inf else np.nan


def read_coco(path: str, folders: Sequence[str], options: DenseOptions) -> ObjectSource:
    """The images and objects of a file in COCO's format; broken ones are left out and told.

    Args:
        folders: where its images may lie.

    Raises:
        DataError: it cannot be read, or holds nothing usable.
        ConfigError: its masks need a package that is not installed.
    """
    raw, book = _Collector(path), FaultBook(path)
    names = read_arrays(path, dict(images=raw.image, annotations=raw.annotation, categories=raw.category))
    missing = [name for name in ("images", "annotations", "categories") if name not in names]
    if missing:
        raise DataError(f"{path}: has no {' and no '.join(missing)}, as COCO's format has; export it again with annotations")
    for kind, count in raw.odd.items():
        book.add(f"entry of {kind} that is no object", LEFT_OUT, ["see the file"], count)
    images, places = _images(raw, folders, book)
    classes, category_ids = _classes(raw)
    position = {number: i for i, number in enumerate(category_ids)}
    labels = np.array([position.get(number, -1) for number in raw.category_of], dtype=np.int64)
    owners = np.array([places.get(key, -2) for key in raw.image_of], dtype=np.int64)
    of_left_out = owners == -1  # their image was told
    sizes = np.array([image[2:] for image in images], dtype=np.int32).reshape(-1, 2)
    packed = PackedNames.of([os.path.abspath(image[1]) for image in images])
    unknown = np.flatnonzero((sizes == 0).any(axis=1)).tolist()
    if unknown:
        sizes[unknown] = header_sizes(lambda i: packed[i], unknown, options.data.EXIF, options.data.TIMEOUT)
    boxes = np.frombuffer(raw.boxes, dtype=np.float64).reshape(-1, 4).copy() if raw.boxes else np.zeros((0, 4))
    with np.errstate(invalid="ignore", over="ignore"):
        boxes[:, 2:] += boxes[:, :2]
    owner_sizes = np.where((owners >= 0)[:, None], sizes[np.maximum(owners, 0)], 0)
    raw.image_of.clear()
    shapes = Shapes(raw.shapes, owner_sizes)
    del raw.shapes
    found = Annotations(np.maximum(owners, -1), labels, boxes, np.frombuffer(bytes(raw.crowd), dtype=np.uint8).astype(bool),
                        np.array(raw.areas), np.array(raw.ids, dtype=np.int64), shapes,
                        np.frombuffer(bytes(raw.boxless), dtype=np.uint8).astype(bool))
    if (found.ids <= _NUMBERED).any():
        found.ids = np.where(found.ids <= _NUMBERED, np.arange(1, len(owners) + 1) + max(0, int(found.ids.max(initial=0))), found.ids)
    found = found.take(np.flatnonzero(~of_left_out)) if of_left_out.any() else found
    if not len(owners):
        raise DataError(f"{path}: has no annotations; export it again with them")
    checked = check(found, sizes, book, options.task != "detection", packed)
    ids = _image_ids(images, book)
    return ObjectSource(os.path.dirname(path) or ".", classes, packed, sizes, ids, category_ids, checked, book,
                        uses_masks(checked, options))


def _images(raw: _Collector, folders: Sequence[str],
            book: FaultBook) -> tuple[list[tuple[object, str, int, int]], dict[object, int]]:
    """(the images that are there, each file once; the position of each id, -1 of those left out)."""
    paths = place_images([image[1] for image in raw.images], folders)
    listing, kept, places, at = Listing(), [], {}, {}
    missing, nameless, twice = [], [], []
    for (key, name, height, width), path in zip(raw.images, paths, strict=True):
        there = listing.find(path) if path else ""
        if key in places or key is None:
            twice.append(name or f"image {key}")
            continue
        places[key] = -1
        if not there:
            (missing if name else nameless).append(path or f"image {key}")
        elif there in at:
            twice.append(name)
            places[key] = at[there]
        else:
            at[there] = places[key] = len(kept)
            kept.append((key, there, height, width))
    places.pop(None, None)
    book.add("image without a file name", f"{LEFT_OUT} with its annotations", nameless)
    book.add("image given twice", "taken as one", twice)
    if missing and not kept:
        raise DataError(f"{raw.path}: none of its {len(missing):,} images is there ({missing[0]}); put them into "
                        f"{first_few(list(dict.fromkeys(folders)), 3)}, or unpack them")
    book.add("image missing", f"{LEFT_OUT} with its annotations; copy it there, or remove it from the file", missing)
    if not kept:
        raise DataError(f"{raw.path}: lists no images; export it again")
    return kept, places


def _classes(raw: _Collector) -> tuple[list[str], list[int]]:
    """(names, category ids), by id; without Roboflow's category 0, which is the heading of all others and has no objects."""
    if not raw.categories:
        raise DataError(f"{raw.path}: has no categories; export it again with them")
    numbers = sorted(raw.categories)
    head, others = raw.categories[numbers[0]][0], numbers[1:]
    if others and all(raw.categories[number][1] == head for number in others) and numbers[0] not in set(raw.category_of):
        numbers = others
    names = [raw.categories[number][0] for number in numbers]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{raw.path}: two categories are called {twice!r}; give them different names, or one id")
    return names, numbers


def _image_ids(images: Sequence[tuple[object, str, int, int]], book: FaultBook) -> np.ndarray:
    """(images,) int64: their ids; 1, 2, ... where those are texts."""
    texts = [image[0] for image in images if not isinstance(image[0], int)]
    if texts:
        book.add("image id that is no whole number", "all images are numbered anew", texts[:3], len(texts))
        return np.arange(1, len(images) + 1)
    return np.array([image[0] for image in images], dtype=np.int64)


def open_coco(root: str, split: str, options: DenseOptions) -> ObjectSource:
    """A split of the data at ``root``; "all" for those without.

    Raises:
        DataError: no such split, or as ``read_coco``.
        ConfigError: as ``read_coco``.
    """
    files = annotation_files(root)
    if split not in files:
        raise DataError(f"{root}: has no annotations of {split} in COCO's format")
    return read_coco(files[split], _image_folders(root, files[split], split), options)


