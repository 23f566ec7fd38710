"""Labels for images that lie loose in one folder, as in ImageNet's validation set, Tiny-ImageNet's and Kaggle's."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np

from data.errors import DataError
from data.layouts.options import SPLIT_NAMES
from data.messages import Caution, Notice
from data.sources.base import Source
from data.sources.classes import encode_labels, first_few, whole_number
from data.sources.columns import NO_KEYS, ListKeys
from data.sources.folder import visible_entries
from data.sources.label_sets import find_label_sets
from data.sources.lists import Row, checked_row, lines_of, marks_of, read_list, read_text, require_labels, split_line
from data.sources.packed_names import is_image

_TABLES, _MORE = r"\.(txt|csv|tsv)", r"([_-]?(labels?|map|gt|list))?"
_LABEL_FILES = {
    "train": rf"LOC_train_solution\.csv|train(ing)?{_MORE}{_TABLES}",
    "val": r"val_annotations\.txt|LOC_val_solution\.csv|.*validation_synset_labels\.txt"
           rf"|ILSVRC201\d(_clsloc)?_validation_ground_truth\.txt|val(id|idation)?{_MORE}{_TABLES}"}
_ANY_LABELS = r"(labels?|metadata|annotations?)\.(txt|csv|tsv|jsonl)"
_DEVKITS = re.compile(r"ILSVRC201\d_devkit.*|devkit|data", re.IGNORECASE)


def find_label_file(folder: str, split: str) -> str | None:
    """The file with the labels of a split whose images lie in ``folder``: there, in the folder above, in a devkit in either, or up to
    four levels above, as on Kaggle; None where there is none."""
    own = _LABEL_FILES.get(split, rf"{re.escape(split)}{_MORE}{_TABLES}")
    patterns = re.compile(own, re.IGNORECASE), re.compile(_ANY_LABELS, re.IGNORECASE)
    parent = os.path.dirname(os.path.abspath(folder))
    places = [folder, parent]
    for above in places[::-1]:
        for entry in visible_entries(above):
            if entry.is_dir() and _DEVKITS.fullmatch(entry.name):
                places += [entry.path, os.path.join(entry.path, "data")]
    for pattern in patterns:
        for place in filter(os.path.isdir, places):
            path = next((e.path for e in visible_entries(place) if pattern.fullmatch(e.name) and e.is_file()), None)
            if path:
                return path
    for _ in range(3):  # Kaggle's images lie three folders below its lists
        parent = os.path.dirname(parent)
        if os.path.exists(path := os.path.join(parent, f"LOC_{split}_solution.csv")):
            return path
    return None


def label_flat(source: Source, path: str, keys: ListKeys = NO_KEYS) -> Source:
    """``source``, a flat folder or archive, with the classes and targets that a label file gives its images.

    The file has a path and a label per line (also Tiny-ImageNet's val_annotations.txt, Kaggle's LOC_val_solution.csv, Caffe's
    val.txt), or a label per line in the order of the images' names (the devkit's ground truth, TensorFlow's synset labels).

    Args:
        keys: what the config says of the file's columns.

    Raises:
        DataError: an image has no label, or several; or the number of labels is not that of the images.
    """
    lines = [line for _, line in lines_of(read_text(path))]
    names = [os.path.basename(source.path(i)) for i in range(len(source))]
    if lines and not any(c in lines[0] for c in ",\t ;{"):
        if len(lines) != len(names):
            raise DataError(f"{path}: has {len(lines)} labels for the {len(names)} images of {source.root}; a line is a label, in the "
                            "order of the images' names, or an image's name and its label")
        labels = _wordnet_ids(lines, path) if "ground_truth" in os.path.basename(path) else lines
        order = np.argsort(np.array(names), kind="stable")
        rows = [Row(i, source.path(at), label) for i, at, label in zip(range(len(lines)), order.tolist(), labels, strict=True)]
    else:
        # Kaggle's label column contains boxes as well: the class is its first word.
        first_word = os.path.basename(path).lower().startswith("loc_")
        rows = _label_rows(path, keys)
        if first_word:
            rows = [row._replace(label="".join(row.label.split()[:1])) for row in rows]
    return _labelled(source, path, rows, keys)


def _labelled(source: Source, path: str, rows: Sequence[Row], keys: ListKeys) -> Source:
    """``source`` with the labels of rows that name its images, with or without a suffix."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(_base(row.path), []).append(row)
    found, missing, own = [], [], _split_of(os.path.abspath(source.root).split(os.sep)[-2:])
    for i in range(len(source)):
        image = source.path(i)
        name = os.path.basename(image)
        of_image = [row for row in by_name.get(name) or by_name.get(os.path.splitext(name)[0], [])
                    if not own or _split_of(row.path.replace("\\", "/").split("/")[:-1]) in ("", own)]  # train/1.jpg is not val/1.jpg
        if len({row.label for row in of_image}) > 1:  # train/1.jpg and val/1.jpg in one list: the folder tells
            above = os.path.basename(os.path.dirname(image))
            of_image = [row for row in of_image if _base(os.path.dirname(row.path.replace("\\", "/"))) == above] or of_image
        if len({row.label for row in of_image}) > 1:
            raise DataError(f"{path}:{of_image[1].line}: {name} has another label in line {of_image[0].line} ({of_image[0].label}, "
                            f"{of_image[1].label}); keep one")
        missing += [] if of_image else [name]
        found += of_image[:1]
    if missing:
        require_labels(source, path, rows)
        raise DataError(f"{path}: has no label for {len(missing)} of the {len(source)} images of {source.root} ({first_few(missing, 3)}); "
                        "take them out, or use the images that the list names alone with --data-set lists")
    source.classes, source.targets = encode_labels([row.label for row in found])
    source = find_label_sets(source, keys)
    require_labels(source, path, found)
    source.marks = marks_of(found)
    source.notices.append(Notice(f"{source.root}: labels from {path}"))
    if len(rows) > len(found):
        source.notices.append(Caution(f"{path}: {len(rows) - len(found)} of its images are not in {source.root}"))
    return source


def _split_of(folders: Sequence[str]) -> str:
    """The split that the last of ``folders`` is called after; "" where none is."""
    return next((split for folder in reversed(folders) for split, names in SPLIT_NAMES.items() if folder.lower() in names), "")


def _base(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def _label_rows(path: str, keys: ListKeys) -> list[Row]:
    """As ``read_list``; in text files the label is what follows the first word, without the numbers behind it (boxes)."""
    if path.lower().endswith((".csv", ".tsv", ".jsonl")):
        return read_list(path, keys)
    rows = []
    for number, line in lines_of(read_text(path)):
        if not line.startswith("#"):
            name, label = split_line(line)
            if "\t" not in line:
                name, label = (name, label) if is_image(name) else (*re.split(r"[\s,;]+", line, maxsplit=1), "")[:2]
                box = re.fullmatch(r"(\S+?)(?:[\s,;]+[-+.\d]+)+", label)
                label = box[1] if box else label
            rows.append(checked_row(path, number, name, label))
    return rows


def _wordnet_ids(labels: list[str], path: str) -> list[str]:
    """The WordNet ids of the devkit's class numbers (1 to 1000, in an order of its own), from the table in the same folder."""
    folder, table = os.path.dirname(path), {}
    if os.path.exists(table_path := os.path.join(folder, "map_clsloc.txt")):
        for line in read_text(table_path).splitlines():
            if len(words := line.split()) >= 2:
                table[words[1]] = words[0]
    elif os.path.exists(table_path := os.path.join(folder, "meta.mat")):
        table = _read_meta_mat(table_path)
    else:
        raise DataError(f"{path}: numbers classes in the devkit's own order; put the devkit's meta.mat or map_clsloc.txt into its folder")
    numbers = [str(whole_number(label)) for label in labels]
    if unknown := sorted(set(numbers) - set(table)):
        raise DataError(f"{table_path}: lacks class {labels[numbers.index(unknown[0])]} of {path}")
    return [table[number] for number in numbers]


def _read_meta_mat(path: str) -> dict[str, str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{path}: needs scipy to be read; pip install scipy") from None
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {str(int(number)): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    except Exception as error:  # a damaged file: loadmat raises what it likes
        raise DataError(f"{path}: is not the devkit's meta.mat ({type(error).__name__})") from None
