"""Images and labels listed in a text file: CSV, TSV, text and JSON lists, and Swin's map files."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from data.messages import Notice
from data.sources.archives import ArchiveImages
from data.sources.base import Source, View
from data.sources.classes import encode_labels, whole_number
from data.sources.folder import ImageFolder
from data.sources.label_sets import LabelRule, find_label_sets, marks_of
from data.sources.packed_names import IMAGE_EXTENSIONS, PackedNames, is_image

LIST_EXTENSIONS = (".csv", ".tsv", ".txt", ".lst", ".json")
_PATH_COLUMNS = ("path", "filepath", "file_path", "file", "filename", "file_name", "image", "image_path", "image_file", "img", "img_path",
                 "imageid", "image_id", "id", "name")
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "category", "target", "class_id", "label_id", "y",
                  "predictionstring")
_SPLIT_COLUMNS = ("split", "set", "subset", "partition", "fold")
_LARGEST = 2 << 30  # bytes of a list; that of ImageNet-22K has 0.9 GB
_IMAGE_FIRST = re.compile(rf"(.*?(?:{'|'.join(map(re.escape, IMAGE_EXTENSIONS))}))[\s,;]+(.+)", re.IGNORECASE)


class Row(NamedTuple):
    """A line of a list: its number, counted from 1, and its cells; the label may be several, joined, or none."""

    line: int
    path: str
    label: str
    split: str = ""


# --------------------------------------------------------------------------------------------------
# Reading lists
# --------------------------------------------------------------------------------------------------

def read_text(path: str) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: unreadable, too large, or in another encoding.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > _LARGEST:
                raise DataError(f"{path}: is larger than any list of images")
            return file.read().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text at byte {error.start}; save it as UTF-8") from None


def read_list(path: str) -> list[Row]:
    """The rows of a CSV, TSV, text or JSON list.

    CSV and TSV may begin with a header (path, label and optionally split, in any order and under their usual names); without
    one the first column is the path and the second the label. In place of a label column there may be a column of 0 and 1 for each
    label. Text: path and label, separated by a tab or by the line's last blank or comma, or by the first behind an image's name. JSON: a
    list of ``[path, label]``, as Swin's of ImageNet-22K, or of ``[path, [label, ...]]``.

    Raises:
        DataError: the list is empty, or has a line that cannot be used; the message names the line.
    """
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        rows = list(_json_rows(text, path))
    elif path.lower().endswith((".csv", ".tsv")):
        rows = _marked_rows(text, path) or list(_table_rows(text, path))
    else:
        rows = list(_text_rows(text, path))
    if not rows:
        raise DataError(f"{path}: lists no images")
    return rows


def _json_rows(text: str, path: str) -> Iterator[Row]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error})") from None
    for number, entry in enumerate(entries, 1):
        labels = entry[1] if isinstance(entry, list) and len(entry) >= 2 else None
        labels = labels if isinstance(labels, list) else [labels]
        if not all(type(label) in (int, str) for label in labels) or not isinstance(entry[0], str):
            raise DataError(f"{path}: entry {number} is not a [path, label] pair")
        yield Row(number, entry[0], "|".join(map(str, labels)))


def _table_rows(text: str, path: str) -> Iterator[Row]:
    reader, delimiter = _reader(text, path)
    columns: tuple[int, int, int] | None = None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if columns is None:
                columns, width = _columns(cells), len(cells)
                if columns is not None:
                    continue
                if not is_image(os.path.basename(cells[0])):
                    raise DataError(f"{path}:{reader.line_num}: neither a header with a path and a label column (such as path,label) "
                                    "nor an image's path")
                columns, width = (0, 1, -1), max(2, min(len(row) for row in _reader(text, path)[0] if any(row)))
            at_path, at_label, at_split = columns
            if len(cells) <= max(at_path, at_split) or not cells[at_path]:
                raise DataError(f"{path}:{reader.line_num}: has no path or no label ({delimiter.join(cells)[:80]!r})")
            label = cells[at_label] if at_label < len(cells) else ""
            if any(cells[width:]) and at_label == width - 1:  # labels that the delimiter joins, without quotes
                label = ("|" if delimiter == "\t" else delimiter).join(filter(None, cells[at_label:]))
            elif any(cells[width:]):
                raise DataError(f"{path}:{reader.line_num}: has {len(cells)} cells, the first line {width}; put a label that holds "
                                f"{delimiter!r} into quotes")
            yield Row(reader.line_num, cells[at_path], label, cells[at_split].lower() if at_split >= 0 else "")
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is not a table ({error})") from None


def _reader(text: str, path: str) -> tuple[Any, str]:
    """(rows of cells, the delimiter) of a table."""
    first = text.split("\n", 1)[0]
    others = [mark for mark in "\t;" if mark in first and "," not in first]
    delimiter = "\t" if path.lower().endswith(".tsv") else others[0] if others else ","
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), delimiter


def _columns(header: Sequence[str]) -> tuple[int, int, int] | None:
    """Positions of the path, label and split columns (-1: none), or None where the line is not a header."""
    columns = _find(_PATH_COLUMNS, header), _find(_LABEL_COLUMNS, header), _find(_SPLIT_COLUMNS, header)
    return columns if min(columns[:2]) >= 0 else None


def _find(names: Sequence[str], header: Sequence[str]) -> int:
    words = [word.lower() for word in header]
    return next((words.index(name) for name in names if name in words), -1)


def _marked_rows(text: str, path: str) -> list[Row]:
    """The rows of a table that has a column of 0 and 1 for each label in place of a label column; else none."""
    reader, _ = _reader(text, path)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        at_path, at_split = _find(_PATH_COLUMNS, header), _find(_SPLIT_COLUMNS, header)
        if at_path < 0 or _find(_LABEL_COLUMNS, header) >= 0 or len(header) < 3:
            return []
        numbered = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except csv.Error:
        return []  # told where the table is read as any other
    labels = marks_of(header, [cells for _, cells in numbered], (at_path, at_split))
    if labels is None or not all(len(cells) > max(at_path, at_split) and cells[at_path] for _, cells in numbered):
        return []
    return [Row(line, cells[at_path], label, cells[at_split].lower() if at_split >= 0 else "")
            for (line, cells), label in zip(numbered, labels, strict=True)]


def _text_rows(text: str, path: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, label = _split_line(line)
        if not name:
            raise DataError(f"{path}:{number}: has no label ({line[:80]!r}); a line is a path, a tab or blank, and a label")
        yield Row(number, name, label)


def _split_line(line: str) -> tuple[str, str]:
    """(path, label) of a line; the path may contain blanks, and so may a label after a tab or a comma."""
    if "\t" in line:
        cells = line.split("\t")
        return cells[0].strip(), cells[1].strip()
    for separator in (",", None):
        cells = [cell.strip() for cell in line.rsplit(separator, 1)]
        if len(cells) == 2:
            break
    if not is_image(os.path.basename(cells[0])) or len(cells) < 2:
        if image := _IMAGE_FIRST.fullmatch(line):
            return image[1], image[2].strip()
        if is_image(os.path.basename(line)):
            return line, ""
    return (cells[0], cells[1]) if len(cells) == 2 else ("", "")


# --------------------------------------------------------------------------------------------------
# Sources of listed images
# --------------------------------------------------------------------------------------------------

def list_source(path: str, rows: Sequence[Row], roots: Sequence[str], rule: LabelRule) -> Source:
    """The image files that ``rows`` of the list ``path`` name.

    Args:
        roots: folders that the rows' paths may be relative to; the first in which the first image is found counts.

    Raises:
        DataError: the first image is in none of them, or one has no label where each must have one.
    """
    root = next((r for r in roots if os.path.exists(os.path.join(r, rows[0].path))), None)
    if root is None:
        raise DataError(f"{path}:{rows[0].line}: {rows[0].path} is not below {' or '.join(dict.fromkeys(roots))}; "
                        "paths are relative to the list's folder, or absolute")
    classes, targets = encode_labels([row.label for row in rows])
    source = find_label_sets(ImageFolder(root, classes, PackedNames.of([row.path for row in rows]), targets), rule)
    if source.labels is None and "" in source.classes:
        bare = next(row for row in rows if not row.label)
        raise DataError(f"{path}:{bare.line}: has no path or no label ({bare.path[:80]!r})")
    return source


def mapped_archive(archive: ArchiveImages, path: str) -> Source:
    """The images of an archive that a map file lists (lines ``path<TAB>number``), with the file's labels.

    A class is named by its images' folder where each number has a folder of its own, else by its number.

    Raises:
        DataError: a bad line, or an image that the archive lacks; the message names the line.
    """
    rows = [row for row in read_list(path) if row.label]
    for row in rows:
        if whole_number(row.label) is None:
            raise DataError(f"{path}:{row.line}: the label {row.label!r} is not a number")
    position = {name: i for i, name in enumerate(archive.names)}
    tops = ["", *(f"{top}/" for top in sorted({name.split("/")[0] for name in position if "/" in name})[:3])]
    top = next((t for t in tops if t + rows[0].path in position), "")
    for row in rows:
        if top + row.path not in position:
            raise DataError(f"{path}:{row.line}: {row.path} is not in {archive.files[0]}")
    indices = np.array([position[top + row.path] for row in rows], dtype=np.int64)
    numbers, targets = encode_labels([row.label for row in rows])
    notices = archive.notices
    if len(rows) < len(archive):
        notices = [*notices, Notice(f"{path} lists {len(rows)} of the {len(archive)} images in {archive.files[0]}; the rest is left out")]
    return View(archive, indices, _folder_names(rows, numbers), targets, notices)


def _folder_names(rows: Sequence[Row], numbers: list[str]) -> list[str]:
    """Class names for ``numbers``: the folders of their images, where each number has one of its own, else the numbers."""
    folders: dict[str, str] = {}
    for row in rows:
        folder = row.path.rpartition("/")[0].rpartition("/")[2]
        if not folder or folders.setdefault(row.label, folder) != folder:
            return numbers
    if len(set(folders.values())) < len(folders):
        return numbers
    return [folders.get(number, number) for number in numbers]
