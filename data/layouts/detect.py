"""Recognising how data is laid out: from a path to the images of its splits.

``recognise`` looks at names only and opens nothing; each split is found on its own (folders, lists, zip and tar files may
stand for either), then what holds both (a single archive, a list, a saved Hugging Face data set, class folders without a
split).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from yacs.config import CfgNode

from config import ConfigError
from data.errors import DataError
from data.layouts import flat_labels as flat
from data.layouts import splits as selection
from data.messages import Notice
from data.sources import archives, huggingface, lists
from data.sources.base import Source
from data.sources.folder import LAYOUT, VAL_NAMES, entries, scan_flat, scan_folder
from data.sources.index_cache import cache_folder
from data.sources.packed_names import is_image

SPLIT_NAMES = {"train": ("train", "training"), "val": (*VAL_NAMES, "valid")}


def beside(path: str, root: str) -> str:
    """A file that a key names: as it is, or in the data's folder, where a checkpoint finds it from anywhere."""
    path, root = os.path.expanduser(path), os.path.expanduser(root)
    inside = os.path.join(root if os.path.isdir(root) else os.path.dirname(root), path)
    return inside if path and not os.path.exists(path) and os.path.exists(inside) else path


@dataclass(frozen=True)
class Options:
    """What of the config matters for finding images."""

    dataset: str = "imagenet"
    zip_mode: bool = False
    val_fraction: float = 0.0
    val_labels: str = ""
    cache: str | None = None

    @classmethod
    def of(cls, config: CfgNode) -> Options:
        data = config.DATA
        return cls(data.DATASET, data.ZIP_MODE, data.VAL_FRACTION, beside(data.VAL_LABELS, data.DATA_PATH), cache_folder(data.INDEX_CACHE))

    def labels(self, split: str) -> str:
        """The label file that is named for a flat folder or archive."""
        return self.val_labels if split == "val" else ""

    def allows(self, kind: str) -> bool:
        """Whether a layout of this kind is looked for."""
        if self.dataset == "imagenet22K":
            return kind in ("lists", "folder")
        return self.dataset in ("imagenet", "digits", kind) and (not self.zip_mode or kind == "zip")


@dataclass(frozen=True)
class Layout:
    """What was recognised: a name for each split, and how to open it."""

    names: dict[str, str]
    open: dict[str, Callable[[], Source]]

    @property
    def name(self) -> str:
        """One name for all splits that were looked for."""
        return " and ".join(dict.fromkeys(self.names.values()))


Found = tuple[str, Callable[[], Source]]


def recognise(root: str, options: Options, splits: Iterable[str] = ("train", "val")) -> Layout:
    """How the data at ``root`` is laid out; opens no more than is needed to tell.

    Args:
        splits: those that must be there, of "train" and "val".

    Raises:
        DataError: nothing that can be read, with advice from what is there instead.
    """
    if re.match(r"\w+://", root):
        raise DataError(f"{root}: is a stream, which training and evaluation alone can read; copy the data to a disk (shards "
                        "and parquet files can stay as they are: hf download --repo-type dataset, aws s3 sync, wget), and give that path")
    if not os.path.exists(root):
        raise DataError(f"{root}: no such data folder; give the folder that holds train/ and val/ with --data-path")
    find = _in_file if os.path.isfile(root) else _in_folder
    found = {split: find(root, split, options) for split in splits}
    if list(found) == ["val"] and found["val"] is None:
        found["val"] = _bare(root, options)
    for split, what in found.items():
        if what is None:
            raise _nothing(root, split, options)
    return Layout({s: f[0] for s, f in found.items()}, {s: f[1] for s, f in found.items()})


# --------------------------------------------------------------------------------------------------
# A folder
# --------------------------------------------------------------------------------------------------

def _in_folder(root: str, split: str, options: Options) -> Found | None:
    if options.allows("huggingface") and huggingface.is_saved(root):
        return _saved(root, split, options)
    if options.val_fraction and not _of_split(root, "val", options):
        return _without_split(root, split, options)
    return _of_split(root, split, options)


def _of_split(root: str, split: str, options: Options) -> Found | None:
    """A split that has a place of its own."""
    for kind, look in (("zip", _zip), ("folder", _folder), ("lists", _list), ("tar", _tars), ("huggingface", _parquet)):
        # train.zip beside train/ is what the folder was unpacked from, unless zip is asked for
        if kind == "zip" and not (options.zip_mode or options.dataset == "zip") and _split_folder(root, split):
            continue
        if options.allows(kind) and (found := look(root, split, options)):
            return found
    return None


def _split_folder(root: str, split: str) -> str | None:
    return next((path for name in SPLIT_NAMES[split] if os.path.isdir(path := os.path.join(root, name))), None)


def _folder(root: str, split: str, options: Options) -> Found | None:
    path = _split_folder(root, split)
    if path is None:
        return None
    inside = entries(path)
    folders = [e.name for e in inside if e.is_dir()]
    files = [e.name for e in inside if e.name not in folders]
    annotations = os.path.join(path, "val_annotations.txt")
    if folders == ["images"] and os.path.exists(annotations):
        return "folder of images with a list of labels", lambda: flat.label_flat(scan_flat(os.path.join(path, "images")), annotations)
    if folders:
        return "class folders", lambda: scan_folder(path, cache=options.cache)
    tars = sorted(os.path.join(path, name) for name in files if name.lower().endswith(".tar"))
    if tars and options.allows("tar"):
        return "tar files", lambda: _archives(tars, path, split, options)
    if any(map(is_image, files)):
        labels = options.labels(split) or flat.find_label_file(path, split)
        if labels:
            return "folder of images with a list of labels", lambda: flat.label_flat(scan_flat(path), labels)
        if _list(root, split, options):
            return None
    elif _list(root, split, options) or _parquet(root, split, options):
        return None
    return "class folders", lambda: scan_folder(path)  # which says what is missing


def _list(root: str, split: str, options: Options) -> Found | None:
    stems = [*SPLIT_NAMES[split], *(f"{name}{more}" for name in SPLIT_NAMES[split] for more in ("_list", "_labels", "-list")),
             f"ILSVRC2011fall_whole_map_{split}"]
    paths = [os.path.join(root, stem + extension) for stem in stems for extension in lists.LIST_EXTENSIONS]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        return None
    roots = [root, *(os.path.join(root, name) for name in (*SPLIT_NAMES[split], "images"))]
    return "list of images", lambda: lists.list_source(path, lists.read_list(path), roots)


def _zip(root: str, split: str, options: Options) -> Found | None:
    stem = next((s for name in SPLIT_NAMES[split] if os.path.isfile((s := os.path.join(root, name)) + ".zip")), None)
    if stem is None:
        return None
    path, listing = stem + ".zip", stem + "_map.txt"
    if os.path.isfile(listing):
        return "zip files with maps", lambda: lists.mapped_archive(archives.scan_archives([path], path, options.cache), listing)
    return "zip files", lambda: _archives([path], path, split, options)


def _tars(root: str, split: str, options: Options) -> Found | None:
    """train.tar, ILSVRC2012_img_train.tar, or shards such as imagenet1k-train-0000.tar."""
    names = [e.name for e in entries(root) if e.name.lower().endswith(".tar") and e.is_file()]
    word = re.compile(rf"(^|[^a-z])({'|'.join(SPLIT_NAMES[split])})([^a-z]|$)", re.IGNORECASE)
    chosen = [os.path.join(root, name) for name in names if word.search(name)]
    if not chosen:
        return None
    where = chosen[0] if len(chosen) == 1 else f"{root}/*{split}*.tar"
    return "tar files", lambda: _archives(chosen, where, split, options)


def _archives(files: list[str], where: str, split: str, options: Options, inside: Iterable[str] = ()) -> Source:
    """Images of archives; loose ones take their labels from a file beside the archive, shards their classes' names."""
    source = archives.scan_archives(files, where, options.cache, tuple(inside))
    folder = os.path.dirname(files[0])
    if source.classes == [""]:
        labels = options.labels(split) or flat.find_label_file(folder or ".", split)
        if not labels:
            raise DataError(f"{where}: its images lie loose, without labels; sort them into a folder a class, or give the file of "
                            "their labels with DATA.VAL_LABELS")
        return flat.label_flat(source, labels)
    if "" in source.classes:
        loose = source.path(int((source.targets == source.classes.index("")).argmax()))
        raise DataError(f"{loose}: lies outside the class folders of the archive; remove it, or sort it into one")
    listing = next((p for p in (os.path.join(d, "classes.txt") for d in (folder, os.path.dirname(folder))) if os.path.isfile(p)), None)
    if listing and all(name.isdecimal() for name in source.classes):
        names = lists.read_text(listing).splitlines()
        if len(names) < len(source.classes):
            raise DataError(f"{listing}: names {len(names)} classes, the archives have {len(source.classes)}")
        source.targets, source.classes = _renumber(source, len(names)), [name.partition("\t")[0].strip() for name in names]
    return source


def _renumber(source: Source, count: int):
    import numpy as np
    numbers = np.array([int(name) for name in source.classes], dtype=np.int64)
    if numbers.max() >= count:
        raise DataError(f"{source.root}: has class {numbers.max()}, its classes.txt names {count}")
    return numbers[source.targets]


def _parquet(root: str, split: str, options: Options) -> Found | None:
    files = huggingface.parquet_files(root, SPLIT_NAMES[split])
    if not files:
        return None
    return "Hugging Face data set (parquet)", lambda: huggingface.hub_source(root, huggingface.parquet_table(root, files))


def _saved(root: str, split: str, options: Options) -> Found | None:
    tables = huggingface.saved_splits(root)
    name = next((n for n in SPLIT_NAMES[split] if n in tables), None)
    if name is not None:
        return "Hugging Face data set", lambda: huggingface.hub_source(os.path.join(root, name), tables[name])
    if options.val_fraction and len(tables) == 1:
        (only, table), = tables.items()
        where = os.path.join(root, only) if only else root
        return "Hugging Face data set", lambda: selection.split(huggingface.hub_source(where, table), options.val_fraction, split)
    raise DataError(f"{root}: this Hugging Face data set has no {split} split (only {', '.join(n or 'one table' for n in tables)})"
                    + _fraction_advice())


def _without_split(root: str, split: str, options: Options) -> Found | None:
    """A training part alone, or everything in one place, shared out by fraction."""
    whole = _of_split(root, "train", options)
    if whole is None and options.allows("folder") and any(e.is_dir() and _holds_images(e.path) for e in entries(root)):
        whole = "class folders", lambda: scan_folder(root, cache=options.cache)
    tars = sorted(e.path for e in entries(root) if e.name.lower().endswith(".tar") and e.is_file())
    if whole is None and tars and options.allows("tar"):
        whole = "tar files", lambda: _archives(tars, root, split, options)
    if whole is None:
        return None
    name, opened = whole
    return f"{name} without a split", lambda: selection.split(opened(), options.val_fraction, split)


def _bare(root: str, options: Options) -> Found | None:
    """Class folders alone, as ImageNet-V2, -A, -R and -Sketch are handed out: all of them for evaluation."""
    splits = {name for names in SPLIT_NAMES.values() for name in names}
    if not os.path.isdir(root) or not options.allows("folder") or os.path.basename(os.path.abspath(root)) in splits:
        return None
    folders = [e for e in entries(root) if e.is_dir()]
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

def _in_file(root: str, split: str, options: Options) -> Found | None:
    lower = root.lower()
    if lower.endswith((".tar", ".zip")) and options.allows("zip" if lower.endswith(".zip") else "tar"):
        folders = archives.split_folders(root)
        names = [name for name in SPLIT_NAMES[split] if name in folders]
        kind = "zip file" if lower.endswith(".zip") else "tar file"
        if names:
            return kind, lambda: _archives([root], root, split, options, names)
        if options.val_fraction:
            return f"{kind} without a split", lambda: selection.split(_archives([root], root, split, options), options.val_fraction, split)
        raise DataError(f"{root}: holds no {' or '.join(n + '/' for n in SPLIT_NAMES[split][:2])} folder" + _fraction_advice())
    if lower.endswith(lists.LIST_EXTENSIONS) and options.allows("lists"):
        return "list of images", lambda: _table(root, split, options)
    return None


def _table(path: str, split: str, options: Options) -> Source:
    """A list of both splits: by its split column, or by fraction."""
    rows = lists.read_list(path)
    folder = os.path.dirname(path) or "."
    roots = [folder, os.path.join(folder, "images")]
    chosen = [row for row in rows if row.split in SPLIT_NAMES[split]]
    if chosen:
        return lists.list_source(path, chosen, roots)
    if any(row.split for row in rows):
        raise DataError(f"{path}: no line's split is {' or '.join(SPLIT_NAMES[split])}")
    if not options.val_fraction:
        raise DataError(f"{path}: has no split column" + _fraction_advice())
    return selection.split(lists.list_source(path, rows, roots), options.val_fraction, split)


# --------------------------------------------------------------------------------------------------
# Advice
# --------------------------------------------------------------------------------------------------

def _fraction_advice() -> str:
    return "; keep a part of each class for validation with --opts DATA.VAL_FRACTION 0.1"


def _nothing(root: str, split: str, options: Options) -> DataError | ConfigError:
    if os.path.isfile(root):
        return DataError(f"{root}: is a file; give the folder that holds train/ and val/ with --data-path "
                         "(or a .tar, .zip, .csv, .tsv, .txt or .json file)")
    if options.zip_mode or options.dataset == "zip":
        return DataError(f"{root}: holds no {split}.zip (with {split}_map.txt), which DATA.ZIP_MODE asks for{_advice(root)}")
    wanted = " or ".join(n + "/" for n in (("train",) if split == "train" else VAL_NAMES))
    return DataError(f"{root}: holds no {wanted} folder; {LAYOUT}{_advice(root)}")


def _advice(root: str) -> str:
    found = entries(root)
    folders = [e.name for e in found if e.is_dir()]
    if not found:
        return "; the folder is empty"
    splits = {"train", *VAL_NAMES}
    if os.path.basename(os.path.abspath(root)) in splits:
        return f"; this looks like one split, give its parent {os.path.dirname(os.path.abspath(root))}"
    if "train" in folders:
        return _fraction_advice()
    if below := _root_below(root):
        return f"; {below} holds them, give that"
    if not folders and any(is_image(e.name) for e in found):
        above = os.path.dirname(os.path.dirname(os.path.abspath(root)))
        inside = f", give {above}" if _split_folder(above, "train") else ""
        return f"; this folder holds images, not classes{inside}"
    for name in folders:
        if _holds_images(os.path.join(root, name)):
            return ("; its folders look like classes without a split: move them into train/ and a part of each class into val/, or"
                    + _fraction_advice()[1:])
    packed = [e.name for e in found if e.name.lower().endswith((".tar.gz", ".tgz", ".rar", ".7z"))]
    if packed:
        return f"; {packed[0]} must be unpacked first (plain .tar and .zip need not be)"
    return ""


def _root_below(root: str) -> str | None:
    """The folder with a train or val folder in it, one to three levels down (Kaggle's lies at ILSVRC/Data/CLS-LOC)."""
    level = [root]
    for _ in range(3):
        level = [e.path for folder in level for e in entries(folder) if e.is_dir()][:100]
        for folder in level:
            if _split_folder(folder, "train") or _split_folder(folder, "val"):
                return folder
    return None


def _holds_images(folder: str) -> bool:
    found = entries(folder)
    return any(is_image(e.name) for e in found) or any(
        is_image(below.name) for e in found[:20] if e.is_dir() for below in entries(e.path)[:20])
