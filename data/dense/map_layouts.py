"""Which image has which mask, in each of the layouts that maps of classes come in."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from data.dense.map_values import Legend
from data.errors import DataError
from data.layouts.options import ALL, find_entry, names_of
from data.sources.classes import first_few
from data.sources.folder import images_below, visible_entries
from data.sources.lists import lines_of, read_text
from data.sources.packed_names import is_image

MASKS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".webp")
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "img_dir", "JPEGImages")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "ann_dir", "annot", "gt", "segmentations", "SegmentationClass")
_BESIDE = ("_labels", "_masks", "_mask", "_label", "_annot", "annot", "_gt")  # train and train_labels, as CamVid has them
_ENDING = re.compile(r"[ _.-](masks?|labels?|l|gt|seg|segmentation|annot|annotation)$", re.IGNORECASE)
_LOOKED_AT = 200  # files by which a folder is judged

VOC_CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
               "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
# Cityscapes' classes that are trained on, in the order of its train ids, and the pixel values of labelIds.png.
CITYSCAPES = {"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19, "traffic sign": 20,
              "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31,
              "motorcycle": 32, "bicycle": 33}
_FIRST_THING = 11


@dataclass
class Pairs:
    """The images of a split with their masks.

    Attributes:
        layout: its name, for people.
        files: (image, mask) paths.
        without_mask, without_image: paths of what has no partner.
        near: folders where a file may say what the values stand for, the nearest first.
        legend: where the layout itself says so.
        reduce_zero: value 0 is no class and the others count from 1.
    """

    layout: str
    files: list[tuple[str, str]]
    without_mask: list[str] = field(default_factory=list)
    without_image: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    legend: Legend | None = None
    reduce_zero: bool = False


def splits_of_maps(root: str) -> list[str]:
    """The splits that ``root`` has of images with maps of classes, "all" alone for data without; empty where it is no such folder."""
    if not os.path.isdir(root):
        return []
    there = [split for split in ("train", "val", "test") if _locate(root, split) is not None]
    return there or [ALL] * (_locate(root, ALL) is not None)


def find_pairs(root: str, split: str) -> Pairs | None:
    """The images and masks of a split; None where the folder has none of the known layouts, or not this split.

    Raises:
        DataError: a folder cannot be read, or the images and the masks of the split have no name in common.
    """
    located = _locate(root, split)
    if located is None:
        return None
    pairs = located()
    if not pairs.files:
        few = first_few(pairs.without_mask or pairs.without_image, 2)
        raise DataError(f"{root}: none of its images for {split} has a mask of its name ({few}); name the masks as their images")
    return pairs


def _locate(root: str, split: str) -> Callable[[], Pairs] | None:
    """What lists the pairs of a split, after a look at a few folders."""
    return next((found for locate in (_cityscapes, _voc, _roboflow, _folders) if (found := locate(root, split)) is not None), None)


def _folder(parent: str, names: Sequence[str]) -> str | None:
    return find_entry(parent, names, os.path.isdir) if os.path.isdir(parent) else None


def _matched(layout: str, images: Iterable[str], masks: Iterable[str], image_key: Callable[[str], str],
             mask_keys: Callable[[str], Sequence[str]]) -> Pairs:
    """Pairs by keys; a mask goes to the image of the first of its keys that an image has."""
    by_key = {image_key(path): path for path in images}
    mask_of, lonely = {}, []
    for path in masks:
        key = next((key for key in mask_keys(path) if key in by_key), None)
        if key is None or key in mask_of and len(mask_of[key]) <= len(path):
            lonely += [path] if key is None else []
        else:
            mask_of[key] = path
    lacking = sorted(set(by_key) - set(mask_of))
    return Pairs(layout, [(by_key[key], mask_of[key]) for key in sorted(mask_of)], [by_key[key] for key in lacking], lonely)


def _keys(folder: str) -> Callable[[str], Sequence[str]]:
    """From a mask's path to what its image may be called below the folder, without the suffix."""
    def keys(path: str) -> Sequence[str]:
        name = os.path.splitext(os.path.relpath(path, folder))[0]
        return name, _ENDING.sub("", name)

    return keys


def _key(folder: str) -> Callable[[str], str]:
    return lambda path: os.path.splitext(os.path.relpath(path, folder))[0]


# --------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------

def _cityscapes(root: str, split: str) -> Callable[[], Pairs] | None:
    """leftImg8bit/<split>/<city>/*_leftImg8bit.png with gtFine/<split>/<city>/*_gtFine_labelTrainIds.png, or else _labelIds.png."""
    images, masks = (_folder(parent, names_of(split)) if (parent := _folder(root, [name])) else None for name in ("leftImg8bit", "gtFine"))
    return functools.partial(_cityscapes_pairs, images, masks) if images and masks else None


def _cityscapes_pairs(image_folder: str, mask_folder: str) -> Pairs:
    files = images_below(mask_folder)
    masks = [path for path in files if path.endswith("_labelTrainIds.png")]
    trained = bool(masks)
    masks = masks or [path for path in files if path.endswith("_labelIds.png")]
    pairs = _matched("Cityscapes", images_below(image_folder), masks,
                     lambda path: os.path.basename(path).rpartition("_leftImg8bit")[0],
                     lambda path: [os.path.basename(path).rpartition("_gtFine_")[0]])
    things = [at >= _FIRST_THING for at in range(len(CITYSCAPES))]
    values = [*range(len(CITYSCAPES))] if trained else [*CITYSCAPES.values()]
    pairs.legend = Legend([*CITYSCAPES], values, things=things, ignored=frozenset(() if trained else range(256)) - set(values))
    return pairs


def _voc(root: str, split: str) -> Callable[[], Pairs] | None:
    """JPEGImages, SegmentationClass and ImageSets/Segmentation/<split>.txt, of Pascal VOC or as CVAT exports; of several years the last."""
    parents = [path for path in (root, os.path.join(root, "VOCdevkit")) if os.path.isdir(path)]
    years = [e.path for parent in parents for e in visible_entries(parent) if e.is_dir() and e.name.startswith("VOC2")]
    for folder in (root, *sorted(years, reverse=True)):
        masks, images = _folder(folder, ["SegmentationClass"]), _folder(folder, ["JPEGImages"])
        lists = os.path.join(folder, "ImageSets", "Segmentation")
        names = ("default", "trainval", ALL) if split == ALL else names_of(split)
        if masks and images and os.path.isdir(lists) and (path := find_entry(lists, [f"{name}.txt" for name in names], os.path.isfile)):
            return functools.partial(_voc_pairs, path, images, masks, [folder, root])
    return None


def _voc_pairs(path: str, images: str, masks: str, near: list[str]) -> Pairs:
    stems = [line for _, line in lines_of(read_text(path))]
    if bad := next((stem for stem in stems if stem.startswith("/") or ".." in stem.split("/") or "\0" in stem), None):
        raise DataError(f"{path}: {bad[:80]!r} is not the name of an image without its suffix")
    pairs = Pairs("Pascal VOC", [], near=near,
                  legend=Legend([*VOC_CLASSES], [*range(len(VOC_CLASSES))], things=[False, *[True] * (len(VOC_CLASSES) - 1)]))
    image_of, mask_of = ({_key(below)(path): path for path in images_below(below)} for below in (images, masks))
    for stem in dict.fromkeys(stems):
        if stem in image_of and stem in mask_of:
            pairs.files.append((image_of[stem], mask_of[stem]))
        elif stem in image_of:
            pairs.without_mask.append(image_of[stem])
        else:
            pairs.without_image.append(os.path.join(images, f"{stem}.jpg"))
    return pairs


def _roboflow(root: str, split: str) -> Callable[[], Pairs] | None:
    """<split>/name.jpg, <split>/name_mask.png and <split>/_classes.csv."""
    folder = _folder(root, names_of(split))
    if folder is None or not os.path.isfile(os.path.join(folder, "_classes.csv")):
        return None
    names = [entry.path for entry in visible_entries(folder) if is_image(entry.name)]
    masks = [path for path in names if path.endswith("_mask.png")]
    return functools.partial(_roboflow_pairs, folder, set(names) - set(masks), masks) if masks else None


def _roboflow_pairs(folder: str, images: Iterable[str], masks: Sequence[str]) -> Pairs:
    pairs = _matched("Roboflow's masks", images, masks, _key(folder), _keys(folder))
    pairs.near = [folder]
    return pairs


def _folders(root: str, split: str) -> Callable[[], Pairs] | None:
    """images/<split> and masks/<split>, <split>/images and <split>/masks, or <split> and <split>_labels; ADE20K is the first of them."""
    for base in (root, os.path.join(root, "ADEChallengeData2016")):
        for images, masks in _folder_pairs(base, split):
            if _holds_masks(masks):
                return functools.partial(_folders_pairs, base, images, masks)
    return None


def _folders_pairs(base: str, images: str, masks: str) -> Pairs:
    ade = os.path.isfile(os.path.join(base, "objectInfo150.txt")) or "ADEChallengeData2016" in os.path.abspath(base)
    pairs = _matched("ADE20K" if ade else "folders of masks", images_below(images), filter(_is_mask, images_below(masks)), _key(images),
                     _keys(masks))
    pairs.reduce_zero, pairs.near = ade, [masks, os.path.dirname(masks), base]
    return pairs


def _folder_pairs(base: str, split: str) -> Iterable[tuple[str, str]]:
    """Folders that may be those of the images and the masks of a split."""
    names = names_of(split)
    inside = base if split == ALL else _folder(base, names)
    for image_name in IMAGE_FOLDERS if split != ALL else ():
        if (parent := _folder(base, [image_name])) and (images := _folder(parent, names)):
            yield from ((images, masks) for name in MASK_FOLDERS if (parent := _folder(base, [name])) and (masks := _folder(parent, names)))
    for image_name in IMAGE_FOLDERS if inside else ():
        if images := _folder(inside, [image_name]):
            yield from ((images, masks) for name in MASK_FOLDERS if (masks := _folder(inside, [name])))
    if inside and split != ALL:
        yield from ((inside, masks) for ending in _BESIDE if (masks := _folder(base, [os.path.basename(inside) + ending])))


def _is_mask(path: str) -> bool:
    return is_image(os.path.basename(path)) and path.lower().endswith(MASKS)


def _holds_masks(folder: str) -> bool:
    """Whether masks lie in a folder, or in the first of its folders; not YOLO's text files, XML or JSON."""
    entries = visible_entries(folder)
    if any(_is_mask(entry.name) for entry in entries[:_LOOKED_AT]):
        return True
    below = [entry.path for entry in entries if entry.is_dir()][:3]
    return any(_is_mask(entry.name) for path in below for entry in visible_entries(path)[:_LOOKED_AT])
