"""Detects how data is laid out: from a path to the images of its splits.

``detect_layout`` mostly looks at names. First each split is looked for on its own (a folder, a list, zip, tar or parquet files), then
something that holds both: a single archive, a list, a saved Hugging Face data set, class folders without a split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import DataError
from data.layouts.advice import dense_hint, holds_images, not_found, root_below, split_folder
from data.layouts.flat_labels import find_label_file, label_flat
from data.layouts.listed import FRACTION_ADVICE, find_split_list, find_whole_list, open_list, open_split_list
from data.layouts.options import ALL, SPLIT_NAMES, Options, find_entry, names_of, split_folders_among
from data.messages import Caution, Notice
from data.sources import archives, huggingface, lists
from data.sources.base import Source
from data.sources.classes import join_names, whole_number
from data.sources.folder import scan_flat, scan_folder, visible_entries
from data.sources.packed_names import is_image
from data.sources.regular_files import kind_of


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
    if not os.path.isdir(root) and (what := kind_of(os.stat(root).st_mode)):
        raise DataError(f"{root}: is {what}; give a folder, an archive or a list with --data-path")
    find = _find_in_file if os.path.isfile(root) else _find_in_folder
    found = {}
    for name in splits:
        split = options.judged if name == "val" else name
        layout = find(root, split, options)
        if (layout is None or layout[0].startswith("class folders")) and (hint := dense_hint(root)):
            raise DataError(f"{root}: {hint}")  # whose folders of images and annotations are no classes
        if layout is None:
            raise not_found(root, split, options)
        found[name] = layout
    return Layout({s: f[0] for s, f in found.items()}, {s: f[1] for s, f in found.items()})


# --------------------------------------------------------------------------------------------------
# A folder
# --------------------------------------------------------------------------------------------------

def _find_in_folder(root: str, split: str, options: Options) -> Found | None:
    if options.allows("huggingface") and huggingface.is_saved(root):
        return _find_saved(root, split, options)
    if options.divides(split) and (options.fold or not _find_split(root, "val", options)):
        return _find_without_split(root, split, options)
    if split == ALL:
        if there := [name for name in SPLIT_NAMES if _find_split(root, name, options)]:
            raise DataError(f"{root}: has splits ({', '.join(there)}); --split all is for data without, lists and archives; evaluate one "
                            f"after the other with --split {there[0]}")
    elif found := _find_split(root, split, options):
        return found
    if not options.whole(split) and _find_split(root, "train", options):
        return None
    listed, doubt = _find_whole_list(root, split, options)
    return listed or (_find_class_folders(root, options, doubt) if options.whole(split) else None)


def _find_split(root: str, split: str, options: Options) -> Found | None:
    """A split that has a folder or file of its own."""
    for kind, find in (("zip", _find_zip), ("folder", _find_folder), ("lists", _find_list), ("tar", _find_tars),
                       ("huggingface", _find_parquet)):
        # a train.zip next to train/ is taken for the archive that the folder was unpacked from, unless zip is asked for
        if kind == "zip" and not (options.zip_mode or options.dataset == "zip") and split_folder(root, split):
            continue
        if options.allows(kind) and (found := find(root, split, options)):
            return found
    return None


def _find_folder(root: str, split: str, options: Options) -> Found | None:
    path = split_folder(root, split)
    if path is None:
        return None
    if options.allows("lists") and (listed := _find_metadata(path, options)):
        return listed
    entries = visible_entries(path)
    folders = [e.name for e in entries if e.is_dir()]
    files = [e.name for e in entries if e.name not in folders]
    annotations = os.path.join(path, "val_annotations.txt")
    if folders == ["images"] and os.path.exists(annotations):
        images = os.path.join(path, "images")
        return "folder of images with a list of labels", lambda: label_flat(scan_flat(images), annotations, options.keys)
    if folders:
        return "class folders", lambda: scan_folder(path, cache=options.cache)
    tars = sorted(os.path.join(path, name) for name in files if name.lower().endswith(".tar"))
    if tars and options.allows("tar"):
        return "tar files", lambda: _open_archives(tars, path, split, options)
    if any(map(is_image, files)):
        labels = options.labels(split) or find_label_file(path, split)
        if labels:
            return "folder of images with a list of labels", lambda: label_flat(scan_flat(path), labels, options.keys)
        if _find_list(root, split, options):
            return None
    elif _find_list(root, split, options) or _find_parquet(root, split, options):
        return None
    return "class folders", lambda: scan_folder(path)  # raises an error that says what is missing


def _find_metadata(folder: str, options: Options) -> Found | None:
    """Hugging Face's metadata.csv or metadata.jsonl beside the images of a split, where it has labels."""
    path = find_entry(folder, ("metadata.csv", "metadata.jsonl"), os.path.isfile)
    if path is None:
        return None
    try:
        rows = lists.read_list(path, options.keys)
    except DataError:
        if _holds_classes(folder):
            return None  # it says something else of images whose folders are their classes
        raise
    return "list of images", lambda: lists.list_source(path, rows, [folder], options.keys)


def _holds_classes(folder: str) -> bool:
    return sum(e.is_dir() and holds_images(e.path) for e in visible_entries(folder)[:100]) > 1


def _find_list(root: str, split: str, options: Options) -> Found | None:
    path = find_split_list(root, split)
    return ("list of images", lambda: open_split_list(path, split, options)) if path else None


def _find_zip(root: str, split: str, options: Options) -> Found | None:
    path = find_entry(root, [f"{name}.zip" for name in names_of(split)], os.path.isfile)
    if path is None:
        return None
    map_file = path[:-len(".zip")] + "_map.txt"
    if os.path.isfile(map_file):
        return "zip files with maps", lambda: lists.mapped_archive(archives.scan_archives([path], path, options.cache), map_file)
    return "zip files", lambda: _open_archives([path], path, split, options)


def _find_tars(root: str, split: str, options: Options) -> Found | None:
    """train.tar, ILSVRC2012_img_train.tar, or shards such as imagenet1k-train-0000.tar."""
    names = [e.name for e in visible_entries(root) if e.name.lower().endswith(".tar") and e.is_file()]
    word = re.compile(rf"(^|[^a-z])({'|'.join(map(re.escape, names_of(split)))})([^a-z]|$)", re.IGNORECASE)
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
        return label_flat(source, labels, options.keys)
    if "" in source.classes:
        loose = source.path(int((source.targets == source.classes.index("")).argmax()))
        raise DataError(f"{loose}: lies outside the class folders of the archive; remove it, or sort it into one")
    class_file = next((p for p in (os.path.join(d, "classes.txt") for d in (folder, os.path.dirname(folder))) if os.path.isfile(p)), None)
    positions = [whole_number(name) for name in source.classes]
    if class_file and None not in positions:
        names, numbers = [line.partition("\t")[0].strip() for line in lists.read_text(class_file).splitlines()], np.array(positions)
        if archives.named_by_folders(source):  # a folder 01 is the class 01, while the labels of shards are positions
            numbers = join_names(source.classes, names)[0]
        if len(names) < len(source.classes) or len(names) <= numbers.max() or numbers.min() < 0:
            raise DataError(f"{class_file}: names {len(names)} classes, the archives have {max(len(numbers), max(positions) + 1)}")
        source.targets, source.classes = numbers[source.targets], names
    return source


def _find_parquet(root: str, split: str, options: Options) -> Found | None:
    files = huggingface.parquet_files(root, names_of(split))
    if not files:
        return None
    return "Hugging Face data set (parquet)", lambda: huggingface.hub_source(root, huggingface.parquet_table(root, files))


def _find_saved(root: str, split: str, options: Options) -> Found | None:
    tables = huggingface.saved_splits(root)
    name = next((n for n in tables if n.lower() in names_of(split)), None)
    divided = options.divides(split) and (bool(options.fold) or not any(n.lower() in names_of("val") for n in tables))
    if divided or (len(tables) == 1 and options.whole(split)):
        only = next((n for n in tables if n.lower() in names_of("train")), next(iter(tables)) if len(tables) == 1 else None)
        if only is not None:
            where = os.path.join(root, only) if only else root
            return "Hugging Face data set", lambda: (options.part(huggingface.hub_source(where, tables[only]), split) if divided
                                                     else _all_of(huggingface.hub_source(where, tables[only])))
    elif name is not None:
        return "Hugging Face data set", lambda: huggingface.hub_source(os.path.join(root, name), tables[name])
    raise DataError(f"{root}: this Hugging Face data set has no {split} split (only {', '.join(n or 'one table' for n in tables)})"
                    + (FRACTION_ADVICE if split in ("train", "val") else ""))


def _find_without_split(root: str, split: str, options: Options) -> Found | None:
    """A training part alone, or everything in one place: split by DATA.FOLD or DATA.VAL_FRACTION."""
    whole = _find_split(root, "train", options)
    aside = options.fold and whole is not None and _find_split(root, "val", options) is not None
    listed, doubt = _find_whole_list(root, split, options) if whole is None else (None, [])
    if listed:
        return listed
    if whole is None and options.allows("folder") and any(e.is_dir() and holds_images(e.path) for e in visible_entries(root)):
        whole = "class folders", lambda: _class_folders(root, options, doubt)
    tars = sorted(e.path for e in visible_entries(root) if e.name.lower().endswith(".tar") and e.is_file())
    if whole is None and tars and options.allows("tar"):
        whole = "tar files", lambda: _open_archives(tars, root, split, options)
    if whole is None:
        return None
    name, open_all = whole

    def open_part() -> Source:
        source = options.part(open_all(), split)
        if aside:
            source.notices.append(Notice(f"{root}: the folds are made of its training images; its own validation images are left out"))
        return source

    return f"{name} without a split", open_part


def _find_whole_list(root: str, split: str, options: Options) -> tuple[Found | None, list[Caution]]:
    """(one list of all images, what speaks against it). Where images lie in folders that may be classes, it must be readable, and its
    labels not be those folders."""
    path = find_whole_list(root) if options.allows("lists") else None
    if path is None:
        return None, []
    opened = "list of images", lambda: open_list(path, split, options)
    folders = {e.name for e in visible_entries(root) if e.is_dir() and holds_images(e.path)}
    if len(folders) < 2 or options.keys.image or options.keys.label:
        return opened, []
    try:
        return None if {row.label for row in lists.read_list(path, options.keys)} <= folders else opened, []
    except DataError as error:
        return None, [Caution(f"the folders of {root} are taken for the classes, not what a list beside them says: {error}")]


def _find_class_folders(root: str, options: Options, doubt: Sequence[Caution]) -> Found | None:
    """Class folders alone, as ImageNet-V2, -A, -R and -Sketch are published: all of them are evaluated."""
    if not options.allows("folder"):
        return None
    folders = [e for e in visible_entries(root) if e.is_dir()]
    one_split = os.path.basename(os.path.abspath(root)).lower() in (*names_of("train"), *names_of("val"))
    if split_folders_among([e.name for e in folders]) or (one_split and options.judged != ALL) or root_below(root) \
            or not any(holds_images(e.path) for e in folders):
        return None
    return "class folders", lambda: _all_of(_class_folders(root, options, doubt))


def _class_folders(root: str, options: Options, doubt: Sequence[Caution]) -> Source:
    source = scan_folder(root, cache=options.cache)
    if len(source.classes) == 1 and options.allows("lists") and (listed := _find_metadata(os.path.join(root, source.classes[0]), options)):
        return listed[1]()  # data/metadata.csv: the only folder is no class
    source.notices += doubt
    return source


def _all_of(source: Source) -> Source:
    source.notices.insert(0, Notice(f"{source.root}: has no val/; all of its {len(source)} images are evaluated"))
    return source


# --------------------------------------------------------------------------------------------------
# A file
# --------------------------------------------------------------------------------------------------

def _find_in_file(root: str, split: str, options: Options) -> Found | None:
    lower = root.lower()
    if lower.endswith((".tar", ".zip")) and options.allows("zip" if lower.endswith(".zip") else "tar"):
        return _find_in_archive(root, split, options, "zip file" if lower.endswith(".zip") else "tar file")
    if lower.endswith(lists.LIST_EXTENSIONS) and options.allows("lists"):
        return "list of images", lambda: open_list(root, split, options)
    return None


def _find_in_archive(root: str, split: str, options: Options, kind: str) -> Found | None:
    there = archives.split_folders(root, {name for names in SPLIT_NAMES.values() for name in names} | set(names_of(split)))
    names = [name for name in names_of(split) if name in there]
    if options.divides(split) and (options.fold or not there & set(names_of("val"))):
        inside = [name for name in names_of("train") if name in there]
        return f"{kind} without a split", lambda: options.part(_open_archives([root], root, split, options, inside), split)
    if names:
        return kind, lambda: _open_archives([root], root, split, options, names)
    if options.whole(split) and (split == ALL or not there):
        return kind, lambda: _all_of(_open_archives([root], root, split, options))
    if there and options.alone:
        raise DataError(f"{root}: holds no {' or '.join(n + '/' for n in names_of(split)[:2])} folder; evaluate another with "
                        f"--split {sorted(there)[0]}, or all of it with --split all")
    raise DataError(f"{root}: holds no {' or '.join(n + '/' for n in names_of(split)[:2])} folder{FRACTION_ADVICE}")
