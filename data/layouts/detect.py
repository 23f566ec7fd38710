"""Detects how data is laid out: from a path to the images of its splits.

``detect_layout`` mostly looks at names. First each split is looked for on its own (a folder, a list, zip, tar or parquet files), then
something that holds both: a single archive, a list, a saved Hugging Face data set, class folders without a split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from yacs.config import CfgNode

from data.errors import DataError
from data.layouts.flat_labels import find_label_file, label_flat
from data.layouts.splits import split_by_fraction
from data.messages import Notice
from data.sources import archives, huggingface, lists
from data.sources.base import Source
from data.sources.classes import whole_number
from data.sources.folder import EXPECTED, VAL_NAMES, scan_flat, scan_folder, visible_entries
from data.sources.index_cache import cache_folder
from data.sources.label_sets import ANY_LABELS, LabelRule
from data.sources.packed_names import is_image

SPLIT_NAMES = {"train": ("train", "training"), "val": (*VAL_NAMES, "valid")}


def resolve_data_file(path: str, root: str) -> str:
    """The path of a file that a config key names: as given, or, where that is not there, in the data's folder ``root``, so that a
    checkpoint finds it from any working directory."""
    path, root = os.path.expanduser(path), os.path.expanduser(root)
    inside = os.path.join(root if os.path.isdir(root) else os.path.dirname(root), path)
    return inside if path and not os.path.exists(path) and os.path.exists(inside) else path


@dataclass(frozen=True)
class Options:
    """The settings that matter for finding images and their labels; ``cache`` is the folder of the index cache."""

    dataset: str = "imagenet"
    zip_mode: bool = False
    val_fraction: float = 0.0
    val_labels: str = ""
    cache: str | None = None
    label_rule: LabelRule = ANY_LABELS

    @classmethod
    def of(cls, config: CfgNode) -> Options:
        data = config.DATA
        return cls(data.DATASET, data.ZIP_MODE, data.VAL_FRACTION, resolve_data_file(data.VAL_LABELS, data.DATA_PATH),
                   cache_folder(data.INDEX_CACHE), LabelRule(data.LABEL_SEPARATOR, config.TASK == "multilabel"))

    def labels(self, split: str) -> str:
        """The label file for a flat folder or archive, where a key names one."""
        return self.val_labels if split == "val" else ""

    def allows(self, kind: str) -> bool:
        """Whether layouts of this kind are looked for: folder, lists, zip, tar or huggingface."""
        if self.dataset == "imagenet22K":
            return kind in ("lists", "folder")
        return self.dataset in ("imagenet", "digits", kind) and (not self.zip_mode or kind == "zip")


@dataclass(frozen=True)
class Layout:
    """What was detected: for each split, the name of its layout and a function that lists its images."""

    names: dict[str, str]
    open: dict[str, Callable[[], Source]]

    @property
    def name(self) -> str:
        """The layout's name, for messages."""
        return " and ".join(dict.fromkeys(self.names.values()))


Found = tuple[str, Callable[[], Source]]


def detect_layout(root: str, options: Options, splits: Iterable[str] = ("train", "val")) -> Layout:
    """How the data at ``root`` is laid out; opens no more files than that takes.

    Args:
        splits: those that must be there, of "train" and "val".

    Raises:
        DataError: a split was not found; the message advises by what is there instead.
    """
    if re.match(r"\w+://", root):
        raise DataError(f"{root}: is a stream, which only training and evaluation can read; copy the data to a disk (shards "
                        "and parquet files can stay as they are: hf download --repo-type dataset, aws s3 sync, wget), and give that path")
    if not os.path.exists(root):
        raise DataError(f"{root}: no such data folder; give the folder that holds train/ and val/ with --data-path")
    find = _find_in_file if os.path.isfile(root) else _find_in_folder
    found = {split: find(root, split, options) for split in splits}
    if list(found) == ["val"] and found["val"] is None:
        found["val"] = _find_class_folders(root, options)
    for split, layout in found.items():
        if layout is None:
            raise _not_found(root, split, options)
    return Layout({s: f[0] for s, f in found.items()}, {s: f[1] for s, f in found.items()})


# --------------------------------------------------------------------------------------------------
# A folder
# --------------------------------------------------------------------------------------------------

def _find_in_folder(root: str, split: str, options: Options) -> Found | None:
    if options.allows("huggingface") and huggingface.is_saved(root):
        return _find_saved(root, split, options)
    if options.val_fraction and not _find_split(root, "val", options):
        return _find_without_split(root, split, options)
    return _find_split(root, split, options)


def _find_split(root: str, split: str, options: Options) -> Found | None:
    """A split that has a folder or file of its own."""
    for kind, find in (("zip", _find_zip), ("folder", _find_folder), ("lists", _find_list), ("tar", _find_tars),
                       ("huggingface", _find_parquet)):
        # a train.zip next to train/ is taken for the archive that the folder was unpacked from, unless zip is asked for
        if kind == "zip" and not (options.zip_mode or options.dataset == "zip") and _split_folder(root, split):
            continue
        if options.allows(kind) and (found := find(root, split, options)):
            return found
    return None


def _split_folder(root: str, split: str) -> str | None:
    return next((path for name in SPLIT_NAMES[split] if os.path.isdir(path := os.path.join(root, name))), None)


def _find_folder(root: str, split: str, options: Options) -> Found | None:
    path = _split_folder(root, split)
    if path is None:
        return None
    entries = visible_entries(path)
    folders = [e.name for e in entries if e.is_dir()]
    files = [e.name for e in entries if e.name not in folders]
    annotations = os.path.join(path, "val_annotations.txt")
    if folders == ["images"] and os.path.exists(annotations):
        return "folder of images with a list of labels", lambda: label_flat(
            scan_flat(os.path.join(path, "images")), annotations, options.label_rule)
    if folders:
        return "class folders", lambda: scan_folder(path, cache=options.cache)
    tars = sorted(os.path.join(path, name) for name in files if name.lower().endswith(".tar"))
    if tars and options.allows("tar"):
        return "tar files", lambda: _open_archives(tars, path, split, options)
    if any(map(is_image, files)):
        labels = options.labels(split) or find_label_file(path, split)
        if labels:
            return "folder of images with a list of labels", lambda: label_flat(scan_flat(path), labels, options.label_rule)
        if _find_list(root, split, options):
            return None
    elif _find_list(root, split, options) or _find_parquet(root, split, options):
        return None
    return "class folders", lambda: scan_folder(path)  # raises an error that says what is missing


def _find_list(root: str, split: str, options: Options) -> Found | None:
    stems = [*SPLIT_NAMES[split], *(f"{name}{more}" for name in SPLIT_NAMES[split] for more in ("_find_list", "_labels", "-list")),
             f"ILSVRC2011fall_whole_map_{split}"]
    paths = [os.path.join(root, stem + extension) for stem in stems for extension in lists.LIST_EXTENSIONS]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        return None
    roots = [root, *(os.path.join(root, name) for name in (*SPLIT_NAMES[split], "images"))]
    return "list of images", lambda: lists.list_source(path, lists.read_list(path), roots, options.label_rule)


def _find_zip(root: str, split: str, options: Options) -> Found | None:
    stem = next((s for name in SPLIT_NAMES[split] if os.path.isfile((s := os.path.join(root, name)) + ".zip")), None)
    if stem is None:
        return None
    path, map_file = stem + ".zip", stem + "_map.txt"
    if os.path.isfile(map_file):
        return "zip files with maps", lambda: lists.mapped_archive(archives.scan_archives([path], path, options.cache), map_file)
    return "zip files", lambda: _open_archives([path], path, split, options)


def _find_tars(root: str, split: str, options: Options) -> Found | None:
    """train.tar, ILSVRC2012_img_train.tar, or shards such as imagenet1k-train-0000.tar."""
    names = [e.name for e in visible_entries(root) if e.name.lower().endswith(".tar") and e.is_file()]
    word = re.compile(rf"(^|[^a-z])({'|'.join(SPLIT_NAMES[split])})([^a-z]|$)", re.IGNORECASE)
    chosen = [os.path.join(root, name) for name in names if word.search(name)]
    if not chosen:
        return None
    where = chosen[0] if len(chosen) == 1 else f"{root}/*{split}*.tar"
    return "tar files", lambda: _open_archives(chosen, where, split, options)


def _open_archives(files: list[str], where: str, split: str, options: Options, inside: Iterable[str] = ()) -> Source:
    """The images of archives. Loose ones get their labels, and numbered shards their class names, from a file in the archives' folder.

    Args:
        where: the name of all of them, for messages.
        inside: names of the split's folder inside the archives; empty: all images.
    """
    source = archives.scan_archives(files, where, options.cache, tuple(inside))
    folder = os.path.dirname(files[0])
    if source.classes == [""]:
        labels = options.labels(split) or find_label_file(folder or ".", split)
        if not labels:
            raise DataError(f"{where}: its images lie loose, without labels; sort them into a folder per class, or give the file of "
                            "their labels with DATA.VAL_LABELS")
        return label_flat(source, labels, options.label_rule)
    if "" in source.classes:
        loose = source.path(int((source.targets == source.classes.index("")).argmax()))
        raise DataError(f"{loose}: lies outside the class folders of the archive; remove it, or sort it into one")
    class_file = next((p for p in (os.path.join(d, "classes.txt") for d in (folder, os.path.dirname(folder))) if os.path.isfile(p)), None)
    positions = [whole_number(name) for name in source.classes]
    if class_file and None not in positions:
        names, numbers = lists.read_text(class_file).splitlines(), np.array(positions, dtype=np.int64)
        if len(names) < len(source.classes) or len(names) <= numbers.max():
            raise DataError(f"{class_file}: names {len(names)} classes, the archives have {max(len(numbers), numbers.max() + 1)}")
        source.targets, source.classes = numbers[source.targets], [name.partition("\t")[0].strip() for name in names]
    return source


def _find_parquet(root: str, split: str, options: Options) -> Found | None:
    files = huggingface.parquet_files(root, SPLIT_NAMES[split])
    if not files:
        return None
    return "Hugging Face data set (parquet)", lambda: huggingface.hub_source(root, huggingface.parquet_table(root, files))


def _find_saved(root: str, split: str, options: Options) -> Found | None:
    tables = huggingface.saved_splits(root)
    name = next((n for n in SPLIT_NAMES[split] if n in tables), None)
    if name is not None:
        return "Hugging Face data set", lambda: huggingface.hub_source(os.path.join(root, name), tables[name])
    if options.val_fraction and len(tables) == 1:
        (only, table), = tables.items()
        where = os.path.join(root, only) if only else root
        return "Hugging Face data set", lambda: split_by_fraction(huggingface.hub_source(where, table), options.val_fraction, split)
    raise DataError(f"{root}: this Hugging Face data set has no {split} split (only {', '.join(n or 'one table' for n in tables)})"
                    + _fraction_advice())


def _find_without_split(root: str, split: str, options: Options) -> Found | None:
    """A training part alone, or everything in one place: split by DATA.VAL_FRACTION."""
    whole = _find_split(root, "train", options)
    if whole is None and options.allows("folder") and any(e.is_dir() and _holds_images(e.path) for e in visible_entries(root)):
        whole = "class folders", lambda: scan_folder(root, cache=options.cache)
    tars = sorted(e.path for e in visible_entries(root) if e.name.lower().endswith(".tar") and e.is_file())
    if whole is None and tars and options.allows("tar"):
        whole = "tar files", lambda: _open_archives(tars, root, split, options)
    if whole is None:
        return None
    name, open_all = whole
    return f"{name} without a split", lambda: split_by_fraction(open_all(), options.val_fraction, split)


def _find_class_folders(root: str, options: Options) -> Found | None:
    """Class folders alone, as ImageNet-V2, -A, -R and -Sketch are published: all of them are evaluated."""
    splits = {name for names in SPLIT_NAMES.values() for name in names}
    if not os.path.isdir(root) or not options.allows("folder") or os.path.basename(os.path.abspath(root)) in splits:
        return None
    folders = [e for e in visible_entries(root) if e.is_dir()]
    if splits & {e.name for e in folders} or _root_below(root) or not any(_holds_images(e.path) for e in folders):
        return None

    def scan() -> Source:
        source = scan_folder(root, cache=options.cache)
        source.notices.insert(0, Notice(f"{root}: has no val/; all of its class folders are evaluated"))
        return source

    return "class folders", scan


# --------------------------------------------------------------------------------------------------
# A file
# --------------------------------------------------------------------------------------------------

def _find_in_file(root: str, split: str, options: Options) -> Found | None:
    lower = root.lower()
    if lower.endswith((".tar", ".zip")) and options.allows("zip" if lower.endswith(".zip") else "tar"):
        folders = archives.split_folders(root)
        names = [name for name in SPLIT_NAMES[split] if name in folders]
        kind = "zip file" if lower.endswith(".zip") else "tar file"
        if names:
            return kind, lambda: _open_archives([root], root, split, options, names)
        if options.val_fraction:
            return f"{kind} without a split", lambda: split_by_fraction(
                _open_archives([root], root, split, options), options.val_fraction, split)
        raise DataError(f"{root}: holds no {' or '.join(n + '/' for n in SPLIT_NAMES[split][:2])} folder" + _fraction_advice())
    if lower.endswith(lists.LIST_EXTENSIONS) and options.allows("lists"):
        return "list of images", lambda: _open_list(root, split, options)
    return None


def _open_list(path: str, split: str, options: Options) -> Source:
    """A split of a list of both: by its split column, or by DATA.VAL_FRACTION."""
    rows = lists.read_list(path)
    folder = os.path.dirname(path) or "."
    roots = [folder, os.path.join(folder, "images")]
    chosen = [row for row in rows if row.split in SPLIT_NAMES[split]]
    if chosen:
        return lists.list_source(path, chosen, roots, options.label_rule)
    if any(row.split for row in rows):
        raise DataError(f"{path}: no line's split is {' or '.join(SPLIT_NAMES[split])}")
    if not options.val_fraction:
        raise DataError(f"{path}: has no split column" + _fraction_advice())
    return split_by_fraction(lists.list_source(path, rows, roots, options.label_rule), options.val_fraction, split)


# --------------------------------------------------------------------------------------------------
# What to do where nothing was found
# --------------------------------------------------------------------------------------------------

def _fraction_advice() -> str:
    return "; keep a part of each class for validation with --opts DATA.VAL_FRACTION 0.1"


def _not_found(root: str, split: str, options: Options) -> DataError:
    if os.path.isfile(root):
        return DataError(f"{root}: is a file; give the folder that holds train/ and val/ with --data-path "
                         "(or a .tar, .zip, .csv, .tsv, .txt or .json file)")
    if options.zip_mode or options.dataset == "zip":
        return DataError(f"{root}: holds no {split}.zip (with {split}_map.txt), which DATA.ZIP_MODE asks for{_advice(root)}")
    wanted = " or ".join(n + "/" for n in (("train",) if split == "train" else VAL_NAMES))
    return DataError(f"{root}: holds no {wanted} folder; {EXPECTED}{_advice(root)}")


def _advice(root: str) -> str:
    entries = visible_entries(root)
    folders = [e.name for e in entries if e.is_dir()]
    if not entries:
        return "; the folder is empty"
    splits = {"train", *VAL_NAMES}
    if os.path.basename(os.path.abspath(root)) in splits:
        return f"; this looks like one split, give its parent {os.path.dirname(os.path.abspath(root))}"
    if "train" in folders:
        return _fraction_advice()
    if below := _root_below(root):
        return f"; {below} holds them, give that"
    if not folders and any(is_image(e.name) for e in entries):
        above = os.path.dirname(os.path.dirname(os.path.abspath(root)))
        inside = f", give {above}" if _split_folder(above, "train") else ""
        return f"; this folder holds images, not classes{inside}"
    for name in folders:
        if _holds_images(os.path.join(root, name)):
            return ("; its folders look like classes without a split: move them into train/ and a part of each class into val/, or"
                    + _fraction_advice()[1:])
    packed = [e.name for e in entries if e.name.lower().endswith((".tar.gz", ".tgz", ".rar", ".7z"))]
    if packed:
        return f"; {packed[0]} must be unpacked first (plain .tar and .zip need not be)"
    return ""


def _root_below(root: str) -> str | None:
    """The folder, one to three levels down, that holds a train or val folder (Kaggle's is ILSVRC/Data/CLS-LOC)."""
    level = [root]
    for _ in range(3):
        level = [e.path for folder in level for e in visible_entries(folder) if e.is_dir()][:100]
        for folder in level:
            if _split_folder(folder, "train") or _split_folder(folder, "val"):
                return folder
    return None


def _holds_images(folder: str) -> bool:
    entries = visible_entries(folder)
    return any(is_image(e.name) for e in entries) or any(
        is_image(below.name) for e in entries[:20] if e.is_dir() for below in visible_entries(e.path)[:20])
