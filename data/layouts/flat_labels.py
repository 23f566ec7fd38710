"""Labels for images that lie loose in one folder, as in ImageNet's validation set, Tiny-ImageNet's and Kaggle's."""

from __future__ import annotations

import os
import re

import numpy as np

from data.errors import DataError
from data.messages import Caution, Notice
from data.sources.base import Source
from data.sources.classes import encode_labels, first_few, whole_number
from data.sources.folder import visible_entries
from data.sources.label_sets import ANY_LABELS, LabelRule, find_label_sets
from data.sources.lists import Row, read_list, read_text
from data.sources.packed_names import is_image

_LABEL_FILES = {
    "train": r"LOC_train_solution\.csv|train(ing)?([_-]?(labels?|map|gt|list))?\.(txt|csv|tsv)",
    "val": r"val_annotations\.txt|LOC_val_solution\.csv|.*validation_synset_labels\.txt"
           r"|ILSVRC201\d(_clsloc)?_validation_ground_truth\.txt|val(id|idation)?([_-]?(labels?|map|gt|list))?\.(txt|csv|tsv)"}
_ANY_LABELS = r"labels?\.(txt|csv|tsv)"
_DEVKITS = re.compile(r"ILSVRC201\d_devkit.*|devkit|data", re.IGNORECASE)


def find_label_file(folder: str, split: str) -> str | None:
    """The file with the labels of a split whose images lie in ``folder``: there, in the folder above, in a devkit in either, or up to
    four levels above, as on Kaggle; None where there is none."""
    patterns = re.compile(_LABEL_FILES[split], re.IGNORECASE), re.compile(_ANY_LABELS, re.IGNORECASE)
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


def label_flat(source: Source, path: str, rule: LabelRule = ANY_LABELS) -> Source:
    """``source``, a flat folder or archive, with the classes and targets that a label file gives its images.

    The file has a path and a label per line (also Tiny-ImageNet's val_annotations.txt, Kaggle's LOC_val_solution.csv, Caffe's
    val.txt), or a label per line in the order of the images' names (the devkit's ground truth, TensorFlow's synset labels).

    Raises:
        DataError: an image has no label, or the number of labels is not that of the images.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    names, bare = [os.path.basename(source.path(i)) for i in range(len(source))], None
    if lines and not any(c in lines[0].strip() for c in ",\t ;"):
        if len(lines) != len(names):
            raise DataError(f"{path}: has {len(lines)} labels for the {len(names)} images of {source.root}; a line is a label, in the "
                            "order of the images' names, or an image's name and its label")
        labels = [line.strip() for line in lines]
        if "ground_truth" in os.path.basename(path):
            labels = _wordnet_ids(labels, path)
        order = np.argsort(np.array(names), kind="stable")
        by_name = {names[i]: label for i, label in zip(order.tolist(), labels, strict=True)}
    else:
        # Kaggle's label column contains boxes as well: the class is its first word.
        first_word = os.path.basename(path).lower().startswith("loc_")
        by_name = {}
        for row in _label_rows(path):
            name = os.path.basename(row.path)
            label = row.label.split()[0] if first_word and row.label else row.label
            bare = bare if label or bare else row
            by_name[name if is_image(name) else name + ".JPEG"] = label
    unlabelled = DataError(f"{path}:{bare.line}: has no label ({bare.path[:80]!r})") if bare else None
    missing = [name for name in names if name not in by_name]
    if missing and unlabelled:
        raise unlabelled
    if missing:
        raise DataError(f"{path}: has no label for {len(missing)} of the {len(names)} images of {source.root} ({first_few(missing, 3)})")
    source.classes, source.targets = encode_labels([by_name[name] for name in names])
    source = find_label_sets(source, rule)
    if source.labels is None and unlabelled:
        raise unlabelled
    source.notices.append(Notice(f"{source.root}: labels from {path}"))
    if len(by_name) > len(names):
        source.notices.append(Caution(f"{path}: {len(by_name) - len(names)} of its images are not in {source.root}"))
    return source


def _label_rows(path: str) -> list[Row]:
    """As ``read_list``; in text files the label is what follows the first word, without numbers behind it (boxes)."""
    if path.lower().endswith((".csv", ".tsv")):
        return read_list(path)
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = [w.strip() for w in (line.split("\t") if "\t" in line else re.split(r"[\s,;]+", line.strip(), maxsplit=1))]
        if not any(words) or line.startswith("#"):
            continue
        label = words[1] if len(words) > 1 else ""
        if "\t" not in line and (box := re.fullmatch(r"(\S+?)(?:[\s,;]+[-+.\d]+)+", label)):
            label = box[1]
        rows.append(Row(number, words[0], label))
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
