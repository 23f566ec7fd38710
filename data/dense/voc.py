"""Pascal VOC's format: an XML file an image. VOCdevkit/VOC2012 with its lists of splits, or images with an XML file beside each, as
LabelImg and Roboflow write them.

http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf, section 4.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from data.dense.base import DenseOptions
from data.dense.faults import LEFT_OUT, FaultBook
from data.dense.files import header_sizes, usable_name
from data.dense.objects import ObjectList, ObjectSource, check
from data.errors import DataError
from data.layouts.options import ALL, SPLIT_NAMES, find_entry
from data.messages import Notice
from data.sources.folder import visible_entries
from data.sources.listing_progress import tick
from data.sources.lists import lines_of, read_text
from data.sources.packed_names import PackedNames, is_image
from data.sources.regular_files import NotARegularFile, read_regular

VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
               "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
_LARGEST_XML = 4 << 20  # bytes
_DEEPEST, _LARGEST_SIDE = 20, 1 << 20
_YEAR = re.compile(r"VOC\d{4}", re.IGNORECASE)


class VocSplit(NamedTuple):
    """Where a split lies.

    Attributes:
        images, annotations: folders of them, maybe the same.
        list: the file that lists the names of its images; "" for all.
    """

    images: str
    annotations: str
    list: str = ""


class _BrokenXml(ValueError):
    """What is wrong with an XML file."""


# --------------------------------------------------------------------------------------------------
# Finding it
# --------------------------------------------------------------------------------------------------

def voc_splits(root: str) -> dict[str, VocSplit]:
    """The splits of VOC data at ``root``; empty where it is something else."""
    if not os.path.isdir(root):
        return {}
    for folder in (root, *_years(root), *_years(os.path.join(root, "VOCdevkit"))):
        images, annotations = (find_entry(folder, names, os.path.isdir) for names in (("JPEGImages", "images"), ("Annotations",)))
        if images and annotations and _holds_xml(annotations):
            sets = find_entry(folder, ("ImageSets",), os.path.isdir)
            lists = find_entry(sets, ("Main",), os.path.isdir) if sets else None
            found = {split: VocSplit(images, annotations, path) for split, names in SPLIT_NAMES.items()
                     if lists and (path := find_entry(lists, [f"{name}.txt" for name in names], os.path.isfile))}
            whole = find_entry(lists, ("trainval.txt",), os.path.isfile) if lists else None
            return found or {ALL: VocSplit(images, annotations, whole or "")}
    found = {}
    for split, names in SPLIT_NAMES.items():
        folder = find_entry(root, names, os.path.isdir)
        if folder and (pair := _pair(folder)):
            found[split] = pair
    if not found and (pair := _pair(root)):
        found[ALL] = pair
    return found


def _years(folder: str) -> list[str]:
    """VOC2012 and the like, the latest first."""
    if not os.path.isdir(folder):
        return []
    return sorted((e.path for e in visible_entries(folder) if _YEAR.fullmatch(e.name) and e.is_dir()), reverse=True)


def _pair(folder: str) -> VocSplit | None:
    """Images and XML files in one folder, or in two below it."""
    if _holds_xml(folder):
        return VocSplit(folder, folder)
    images, annotations = (find_entry(folder, names, os.path.isdir) for names in (("images", "JPEGImages"), ("annotations", "labels")))
    return VocSplit(images, annotations) if images and annotations and _holds_xml(annotations) else None


def _holds_xml(folder: str) -> bool:
    """Whether the first XML file of a folder is an annotation."""
    first = next((e.path for e in visible_entries(folder) if e.name.lower().endswith(".xml")), None)
    if first is None:
        return False
    try:
        with open(first, "rb") as file:
            return os.path.isfile(first) and b"<annotation" in file.read(4096)
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------
# XML
# --------------------------------------------------------------------------------------------------

def read_xml(path: str) -> ElementTree.Element:
    """The root of a small XML file without a document type, whose entities could grow without bound.

    Raises:
        _BrokenXml: it is not one.
    """
    builder, parser, depth = ElementTree.TreeBuilder(), expat.ParserCreate(), 0

    def refuse(*_: object) -> None:
        raise _BrokenXml("it has a document type, which annotations have not")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise _BrokenXml("it is nested too deeply")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser.StartDoctypeDeclHandler, parser.StartElementHandler, parser.EndElementHandler = refuse, start, end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(read_regular(path, _LARGEST_XML), True)
        return builder.close()
    except (OSError, NotARegularFile, expat.ExpatError, AssertionError, ValueError, LookupError) as error:
        raise _BrokenXml(str(getattr(error, "strerror", None) or error)) from None


def _text(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _number(element: ElementTree.Element, name: str) -> float:
    try:
        return float(_text(element, name))
    except ValueError:
        return np.nan


def _side(element: ElementTree.Element, name: str) -> int:
    number = _number(element, name)
    return int(number) if 0 < number < _LARGEST_SIDE else 0


# --------------------------------------------------------------------------------------------------
# Opening a split
# --------------------------------------------------------------------------------------------------

def open_voc(root: str, split: str, options: DenseOptions) -> ObjectSource:
    """A split of VOC data. Corners are pixels counted from 1, both inside the box; objects marked difficult are ignored as crowds are.

    Raises:
        DataError: it is not there, or nothing of it is usable.
    """
    place = voc_splits(root).get(split)
    if place is None:
        raise DataError(f"{root}: has no {split} split in Pascal VOC's format")
    book = FaultBook(place.list or place.annotations)
    images, files = _files(place, book)
    sizes, raw = np.zeros((len(images), 2), dtype=np.int32), []
    for index, file in enumerate(files):
        tick(place.annotations, index) if index % 1000 == 0 else None
        try:
            annotation = read_xml(file)
        except _BrokenXml as error:
            book.add("unreadable annotation", "its image has no objects; repair it, or remove both", [f"{file}: {error}"])
            continue
        size = annotation.find("size")
        if size is not None:
            sizes[index] = _side(size, "height"), _side(size, "width")
        raw += [(index, number, item) for number, item in enumerate(annotation.iterfind("object"), 1)]
    untold = np.flatnonzero((sizes == 0).any(axis=1)).tolist()
    if untold:
        sizes[untold] = header_sizes(lambda i: images[i], untold, options.data.EXIF, options.data.TIMEOUT)
    classes = _classes({name for _, _, item in raw if (name := _text(item, "name"))}, place)
    if not classes:
        raise DataError(f"{book.where}: none of its {len(images):,} images has an object with a name")
    found = ObjectList()
    position, difficult = {name: i for i, name in enumerate(classes)}, 0
    for index, number, item in raw:
        box = item.find("bndbox")
        corners = [np.nan] * 4 if box is None else [_number(box, name) for name in ("xmin", "ymin", "xmax", "ymax")]
        crowd = _text(item, "difficult") not in ("", "0")
        difficult += crowd
        found.add(index, position.get(_text(item, "name"), -1), (corners[0] - 1, corners[1] - 1, corners[2], corners[3]), number, crowd)
    annotations = found.annotations(sizes)
    checked = check(annotations, sizes, book, False, images,
                    lambda i: f"object {found.lines[i]} of {files[int(annotations.images[i])]}")
    ids = np.arange(1, len(images) + 1)
    packed = PackedNames.of([os.path.abspath(image) for image in images])
    source = ObjectSource(root, classes, packed, sizes, ids, range(1, len(classes) + 1), checked, book, False)
    if difficult:
        source.notices.append(Notice(f"{book.where}: {difficult:,} objects are marked difficult; they are not trained on, and evaluation "
                                     "ignores them as COCO's does crowds"))
    return source


def _files(place: VocSplit, book: FaultBook) -> tuple[list[str], list[str]]:
    """(images, annotations): the paths of those that have both."""
    images = {os.path.splitext(e.name)[0]: e.path for e in visible_entries(place.images) if is_image(e.name)}
    files = {os.path.splitext(e.name)[0]: e.path for e in visible_entries(place.annotations) if e.name.lower().endswith(".xml")}
    if place.list:
        names = dict.fromkeys(name for _, line in lines_of(read_text(place.list)) if (name := usable_name(line.split()[0])))
    else:
        names = dict.fromkeys(sorted({*images, *files}))
    book.add("image missing", f"{LEFT_OUT}; copy it to {place.images}, or remove its annotation", [n for n in names if n not in images])
    book.add("image without an annotation", f"{LEFT_OUT}; add an XML file, without objects for an empty image",
             [images[name] for name in names if name in images and name not in files])
    both = [name for name in names if name in images and name in files]
    if not both:
        raise DataError(f"{book.where}: none of its {len(names):,} images is there with an annotation; they should lie in {place.images} "
                        f"and {place.annotations}")
    return [images[name] for name in both], [files[name] for name in both]


def _classes(names: set[str], place: VocSplit) -> list[str]:
    """Sorted; of VOC itself all twenty, whichever of them a split shows."""
    own = any(_YEAR.fullmatch(part) for part in os.path.abspath(place.annotations).split(os.sep))
    return list(VOC_CLASSES) if own and names <= set(VOC_CLASSES) else sorted(names)
