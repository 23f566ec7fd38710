"""YOLO's format: a data.yaml, and beside each image a text file with a line an object: its class and a box or an outline, as shares of the
image's width and height.

https://docs.ultralytics.com/datasets/detect/ and /segment/. Without data.yaml: images/ and labels/, with names in classes.txt.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import yaml

from data.dense.base import DenseOptions
from data.dense.faults import LEFT_OUT, FaultBook
from data.dense.files import Listing, header_sizes, usable_name
from data.dense.objects import ObjectList, ObjectSource, check, uses_masks
from data.errors import DataError
from data.layouts.options import ALL, SPLIT_NAMES, find_entry, names_of
from data.sources.classes import whole_number
from data.sources.folder import images_below, visible_entries
from data.sources.lists import lines_of, read_text
from data.sources.packed_names import PackedNames, is_image
from data.sources.regular_files import NotARegularFile, read_regular
from data.sources.threads import Hang, in_threads

_LARGEST_YAML, _LARGEST_LABELS = 1 << 20, 16 << 20  # bytes
_SHARE = 2.0  # no share of an image is larger, even of a box that lies outside
_CLASS_FILES = ("classes.txt", "obj.names", "labels.txt")


class YoloData(NamedTuple):
    """What a data.yaml, or folders without one, say.

    Attributes:
        file: data.yaml, or the folder.
        splits: folders and lists of images by split.
        names: class names by the numbers that label files have.
    """

    file: str
    splits: dict[str, list[str]]
    names: dict[int, str]


# --------------------------------------------------------------------------------------------------
# Finding it
# --------------------------------------------------------------------------------------------------

def yolo_splits(root: str) -> list[str]:
    """The splits of YOLO data at ``root``; empty where it is something else."""
    if path := _yaml_file(root):
        return [split for split in SPLIT_NAMES if _entries_of(_read_yaml(path) or {}, split)]
    if not os.path.isdir(root):
        return []
    images, labels = (find_entry(root, (name,), os.path.isdir) for name in ("images", "labels"))
    if not images or not labels or not _holds_text(labels):
        return []
    return [split for split, names in SPLIT_NAMES.items() if find_entry(images, names, os.path.isdir)] or [ALL]


def _holds_text(folder: str) -> bool:
    entries = visible_entries(folder)[:100]
    below = [e for entry in entries[:5] if entry.is_dir() for e in visible_entries(entry.path)[:100]]
    return any(e.name.endswith(".txt") for e in [*entries, *below])


def _yaml_file(root: str) -> str | None:
    """The file at ``root`` that names classes and the images of a split."""
    if os.path.isfile(root):
        paths = [root] if root.lower().endswith((".yaml", ".yml")) else []
    elif os.path.isdir(root):
        paths = [e.path for e in visible_entries(root) if e.name.lower().endswith((".yaml", ".yml"))]
        paths.sort(key=lambda path: not os.path.basename(path).lower().startswith("data"))
    else:
        paths = []
    for path in paths[:20]:
        found = _read_yaml(path)
        if found and ("names" in found or "nc" in found) and any(_entries_of(found, split) for split in SPLIT_NAMES):
            return path
    return None


def _read_yaml(path: str) -> dict[str, object] | None:
    """The mapping that a file holds, its scalars as texts (a class may be called no); None for anything else."""
    try:
        found = yaml.load(read_regular(path, _LARGEST_YAML).decode("utf-8-sig"), Loader=yaml.BaseLoader)  # which makes texts only
    except (OSError, NotARegularFile, ValueError, RecursionError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def _entries_of(found: dict[str, object], split: str) -> list[str]:
    """What a mapping gives for a split: a folder or list, or several."""
    value = next((found[name] for name in names_of(split) if found.get(name)), [])
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [text for item in values if isinstance(item, str) and (text := usable_name(item))]


def read_data_yaml(path: str) -> YoloData:
    """What a data.yaml says.

    Raises:
        DataError: its names are not usable.
    """
    found, folder = _read_yaml(path), os.path.dirname(path) or "."
    if found is None:
        raise DataError(f"{path}: is no YAML mapping with names, train and val")
    base = found.get("path") if isinstance(found.get("path"), str) else ""
    bases = [os.path.join(folder, os.path.expanduser(base)), folder, os.path.join(folder, os.path.basename(base.rstrip("/")))]
    splits = {}
    for split in SPLIT_NAMES:
        if entries := _entries_of(found, split):
            splits[split] = [_place(entry, bases) for entry in entries]
    return YoloData(path, splits, _names(found, path))


def _place(entry: str, bases: Sequence[str]) -> str:
    """Where the images of an entry lie. Roboflow writes ../train/images for train/images beside the file."""
    entry = entry.replace("\\", "/")
    inside = entry
    while inside.startswith(("../", "./")):
        inside = inside.partition("/")[2]
    tried = [os.path.normpath(os.path.join(base, spelled)) for spelled in (entry, inside) for base in bases]
    return next((path for path in tried if os.path.exists(path)), tried[0])


def _names(found: dict[str, object], path: str) -> dict[int, str]:
    """Class names by number, of a list, a mapping, or their count alone."""
    names = found.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    elif isinstance(names, dict):
        names = {whole_number(str(number)): name for number, name in names.items()}
    elif names in (None, "") and (count := whole_number(str(found.get("nc")))) and count <= 100_000:
        names = {number: str(number) for number in range(count)}
    if not isinstance(names, dict) or not names or None in names or not all(isinstance(name, str) and name for name in names.values()):
        raise DataError(f"{path}: names must be a list of class names, or a mapping from numbers to names")
    names = dict(sorted(names.items()))
    return _distinct(names, path)


def _distinct(names: dict[int, str], path: str) -> dict[int, str]:
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise DataError(f"{path}: two classes are called {twice!r}; give them different names")
    return names


def _read_folders(root: str) -> YoloData:
    """images/ and labels/ without a data.yaml."""
    images = find_entry(root, ("images",), os.path.isdir)
    splits = {split: [folder] for split, names in SPLIT_NAMES.items() if (folder := find_entry(images, names, os.path.isdir))}
    file = find_entry(root, _CLASS_FILES, os.path.isfile) or find_entry(os.path.join(root, "labels"), _CLASS_FILES, os.path.isfile)
    names = {i: line for i, (_, line) in enumerate(lines_of(read_text(file)))} if file else {}
    return YoloData(root, splits or {ALL: [images]}, _distinct(names, file or root))


# --------------------------------------------------------------------------------------------------
# Opening a split
# --------------------------------------------------------------------------------------------------

def open_yolo(root: str, split: str, options: DenseOptions) -> ObjectSource:
    """A split of YOLO data; an image without a label file has no objects.

    Raises:
        DataError: it is not there, or nothing of it is usable.
    """
    path = _yaml_file(root)
    data = read_data_yaml(path) if path else _read_folders(root)
    if split not in data.splits:
        raise DataError(f"{data.file}: names no {split} images")
    book, listing = FaultBook(data.file), Listing()
    images = _images(data, split, listing, book)
    labels = [_label_file(image, listing) for image in images]
    if not any(labels):
        raise DataError(f"{data.file}: none of the {len(images):,} images of {split} has a label file ({_beside(images[0])}); put labels/ "
                        "beside images/, with a .txt file for each")
    sizes = header_sizes(lambda i: images[i], range(len(images)), options.data.EXIF, options.data.TIMEOUT)
    texts = _read_labels(labels, options.data.TIMEOUT, book)
    names = data.names or _names_of_labels(texts)
    found = _parse(texts, labels, images, sizes, {number: i for i, number in enumerate(names)}, book)
    lines = found.lines
    annotations = found.annotations(sizes)
    checked = check(annotations, sizes, book, options.task != "detection", images,
                    lambda i: f"{labels[int(annotations.images[i])]}:{lines[i]}")
    root = root if os.path.isdir(root) else os.path.dirname(root) or "."
    return ObjectSource(root, list(names.values()), PackedNames.of([os.path.abspath(image) for image in images]), sizes,
                        np.arange(1, len(images) + 1), list(names), checked, book, uses_masks(checked, options))


def _images(data: YoloData, split: str, listing: Listing, book: FaultBook) -> list[str]:
    """The images of a split, each once, by name."""
    found: dict[str, None] = {}
    twice, missing = [], []
    for entry in data.splits[split]:
        if os.path.isdir(entry):
            paths = images_below(entry)
        elif os.path.isfile(entry) and not is_image(entry):
            paths = _listed(entry, data.file, listing, missing)
        else:
            raise DataError(f"{data.file}: the {split} images {entry} are not there; correct the path")
        twice += [path for path in paths if path in found]
        found |= dict.fromkeys(paths)
    book.add("image given twice", "taken once", twice)
    book.add("image missing", f"{LEFT_OUT}; copy it there, or take it off the list", missing)
    if not found:
        raise DataError(f"{data.file}: there are no images of {split} in {data.splits[split][0]}"
                        + (f"; {len(missing):,} that are listed are missing ({missing[0]})" if missing else ""))
    return list(found)


def _listed(path: str, file: str, listing: Listing, missing: list[str]) -> list[str]:
    """The images that a text file lists, by paths relative to it or to data.yaml."""
    folders, found = (os.path.dirname(path), os.path.dirname(file) or "."), []
    for _, line in lines_of(read_text(path)):
        name = usable_name(line)
        tried = [os.path.normpath(os.path.join(folder, name)) for folder in folders] if name else []
        there = next((spelled for candidate in tried if (spelled := listing.find(candidate))), "")
        (found if there else missing).append(there or line[:200])
    return found


def _beside(image: str) -> str:
    """Where the labels of an image should lie: in labels/ for images/."""
    stem = os.path.splitext(image)[0]
    above, middle, below = stem.replace(os.sep, "/").rpartition("/images/")
    return (f"{above}/labels/{below}" if middle else stem) + ".txt"


def _label_file(image: str, listing: Listing) -> str:
    """The label file of an image; "" for an image without objects."""
    return listing.find(_beside(image)) or listing.find(os.path.splitext(image)[0] + ".txt")


def _read_labels(paths: Sequence[str], timeout: float, book: FaultBook) -> list[str]:
    """The texts of label files."""
    unreadable = []

    def read(index: int) -> str:
        try:
            return read_regular(paths[index], _LARGEST_LABELS).decode("utf-8-sig", "replace") if paths[index] else ""
        except (OSError, NotARegularFile) as error:
            unreadable.append(f"{paths[index]}: {getattr(error, 'strerror', None) or error}")
            return ""

    try:
        texts = in_threads(read, range(len(paths)), timeout)
    except Hang as hang:
        raise DataError(f"{paths[hang.busy[0]] if hang.busy else book.where}: no label file came for {timeout:g} seconds (DATA.TIMEOUT); "
                        "check the disk that holds it") from None
    book.add("unreadable label file", "its image is taken to be empty; repair it", sorted(unreadable))
    return texts


def _names_of_labels(texts: Sequence[str]) -> dict[int, str]:
    """Classes called by the numbers that there are, where no file names them."""
    numbers = {number for text in texts for line in text.splitlines() if (number := whole_number(line.split(" ", 1)[0])) is not None}
    return {number: str(number) for number in range(max(numbers) + 1)} if numbers and max(numbers) < 10_000 else {0: "0"}


def _parse(texts: Sequence[str], labels: Sequence[str], images: Sequence[str], sizes: np.ndarray, position: dict[int, int],
           book: FaultBook) -> ObjectList:
    """The objects of label files."""
    found = ObjectList()
    odd, twice, pixels, sizeless = [], [], [], []
    for image, text in enumerate(texts):
        height, width = sizes[image].tolist()
        if text and not height:
            sizeless.append(images[image])
            continue
        seen = set()
        for number, line in lines_of(text):
            where = f"{labels[image]}:{number}"
            if line in seen:
                twice.append(where)
                continue
            seen.add(line)
            label, *words = line.split()
            numbers = _numbers(words)
            if numbers is None or len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2) or whole_number(label) is None:
                odd.append(where)
            elif max(map(abs, numbers)) > _SHARE:
                pixels.append(where)
            else:
                label = position.get(whole_number(label), -1)
                if len(numbers) == 4:
                    x, y, w, h = numbers
                    found.add(image, label, ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height), number)
                else:
                    outline = [value * side for value, side in zip(numbers, (width, height) * (len(numbers) // 2), strict=True)]
                    found.add(image, label, None, number, outline=outline)
    book.add("line that is neither a box nor an outline", LEFT_OUT, odd)
    book.add("line given twice", "taken once", twice)
    book.add("numbers that are no shares of the image", f"{LEFT_OUT}; divide them by its width and height", pixels)
    book.add("image whose size cannot be read", "its labels are left out; repair it", sizeless)
    if not len(found.images) and (odd or pixels):
        raise DataError(f"{book.where}: none of its labels is usable ({(odd or pixels)[0]}); a line is: class x-centre y-centre width "
                        "height, as shares of the image")
    return found


def _numbers(words: Sequence[str]) -> list[float] | None:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return None
    return numbers if all(abs(number) < np.inf for number in numbers) else None
