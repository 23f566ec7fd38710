"""What to do where no data were found: by what is there instead."""

from __future__ import annotations

import os
import re

from data.errors import DataError
from data.layouts.listed import FRACTION_ADVICE
from data.layouts.options import SPLIT_NAMES, Options, find_entry, names_of, split_folders_among
from data.sources.folder import EXPECTED, visible_entries
from data.sources.packed_names import is_image

_PANOPTIC = re.compile(r"(\w+_)?panoptic_\w+\.json")
_INSTANCES = re.compile(r"instances_\w+\.json|_annotations\.coco\.json")
_SPLIT_FOLDERS = {name for names in SPLIT_NAMES.values() for name in names}


def not_found(root: str, split: str, options: Options) -> DataError:
    """The error of a split that is not at ``root``, with the remedy."""
    if os.path.isfile(root):
        return DataError(f"{root}: is a file; give the folder that holds train/ and val/ with --data-path "
                         "(or a .tar, .zip, .csv, .tsv, .txt or .json file)")
    if options.zip_mode or options.dataset == "zip":
        return DataError(f"{root}: holds no {split}.zip (with {split}_map.txt), which DATA.ZIP_MODE asks for"
                         + _advice(root, split, options))
    there = split_folders_among([e.name for e in visible_entries(root) if e.is_dir()])
    if split not in ("train", "val") or (options.alone and there):
        return DataError(f"{root}: has no split {split}" + (f"; --split {' or '.join(n.lower() for n in there)} is there" if there else
                                                            "; --split all takes everything there is"))
    wanted = " or ".join(n + "/" for n in names_of(split)[:1 if split == "train" else 2])
    return DataError(f"{root}: holds no {wanted} folder; {EXPECTED}{_advice(root, split, options)}")


def _advice(root: str, split: str, options: Options) -> str:
    entries = visible_entries(root)
    folders = [e.name for e in entries if e.is_dir()]
    if not entries:
        return "; the folder is empty"
    if os.path.basename(os.path.abspath(root)).lower() in (*names_of("train"), *names_of("val")):
        return (f"; this looks like one split, give its parent {os.path.dirname(os.path.abspath(root))}"
                + (", or evaluate all of it with --split all" if options.alone else ""))
    if split == "val" and any(re.match(r"train(ing)?([^a-z]|$)", e.name.lower()) for e in entries):
        return FRACTION_ADVICE
    if below := root_below(root):
        return f"; {below} holds them, give that"
    if not folders and any(is_image(e.name) for e in entries):
        above = os.path.dirname(os.path.dirname(os.path.abspath(root)))
        inside = f", give {above}" if split_folder(above, "train") else ""
        return f"; this folder holds images, not classes{inside}"
    for name in folders:
        if holds_images(os.path.join(root, name)):
            return ("; its folders look like classes without a split: move them into train/ and a part of each class into val/, or"
                    + FRACTION_ADVICE[1:])
    packed = [e.name for e in entries if e.name.lower().endswith((".tar.gz", ".tgz", ".rar", ".7z"))]
    if packed:
        return f"; {packed[0]} must be unpacked first (plain .tar and .zip need not be)"
    return ""


def dense_hint(root: str) -> str:
    """Where a folder holds data of another task, by the names in it: which, and how to say so; "" where it does not."""
    if not os.path.isdir(root):
        return ""
    there = {e.name.lower(): e for e in visible_entries(root)[:10_000]}

    def inside(name: str) -> list[str]:
        return [e.name.lower() for e in visible_entries(there[name].path)[:1000]] if name in there and there[name].is_dir() else []

    splits = [name for name in there if name in (*names_of("train"), *names_of("val"))]
    if any(_PANOPTIC.fullmatch(name) for folder in (there, inside("annotations")) for name in folder) and not any(
            name.startswith("instances_") for name in inside("annotations")):
        return "holds panoptic segments in COCO's format, which TASK mask reads (semantic: classes of pixels); give --opts TASK mask"
    if any(_INSTANCES.fullmatch(name) for folder in ("annotations", *splits) for name in inside(folder)):
        return "holds boxes in COCO's format, which TASK detection reads (instance: their masks too); give --opts TASK detection"
    years = [inside(name) for name in there if re.fullmatch(r"voc\d{4}|vocdevkit", name)]
    if any(names is not None and {"jpegimages", "annotations"} <= set(names) for names in (there, *years)) or any(
            re.fullmatch(r"voc\d{4}", name) for name in inside("vocdevkit")):
        return "holds boxes in Pascal VOC's format, which TASK detection reads; give --opts TASK detection"
    labels = "labels" in there or any("labels" in inside(name) for name in splits)
    if labels and ("images" in there or splits) and any(name.endswith((".yaml", ".yml")) for name in there):
        return "holds boxes in YOLO's format, which TASK detection reads (instance: outlines too); give --opts TASK detection"
    if {"leftimg8bit", "gtfine"} <= set(there) or ("images" in there and any(
            set(inside("images")) & set(inside(masks)) & _SPLIT_FOLDERS for masks in ("masks", "annotations", "ann_dir"))):
        return "holds maps of classes, which TASK semantic reads; give --opts TASK semantic"
    return ""


def split_folder(root: str, split: str) -> str | None:
    """The folder of a split in ``root``."""
    return find_entry(root, names_of(split), os.path.isdir)


def root_below(root: str) -> str | None:
    """The folder, one to three levels down, that holds a train or val folder (Kaggle's is ILSVRC/Data/CLS-LOC)."""
    level = [root]
    for _ in range(3):
        level = [e.path for folder in level for e in visible_entries(folder) if e.is_dir()][:100]
        for folder in level:
            if split_folder(folder, "train") or split_folder(folder, "val"):
                return folder
    return None


def holds_images(folder: str) -> bool:
    """Whether images lie in a folder or in the first of its folders."""
    entries = visible_entries(folder)
    return any(is_image(e.name) for e in entries) or any(
        is_image(below.name) for e in entries[:20] if e.is_dir() for below in visible_entries(e.path)[:20])
