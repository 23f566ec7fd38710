"""Images and labels listed in a text file: CSV, TSV, text and JSON lists, and Swin's map files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.messages import Notice
from data.sources.archives import ArchiveImages
from data.sources.base import Source, View
from data.sources.classes import encode_labels, whole_number
from data.sources.folder import ImageFolder
from data.sources.packed_names import PackedNames, is_image

LIST_EXTENSIONS = (".csv", ".tsv", ".txt", ".lst", ".json")
_PATH_COLUMNS = ("path", "filepath", "file_path", "file", "filename", "file_name", "image", "image_path", "image_file", "img", "img_path",
                 "imageid", "image_id", "id", "name")
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "category", "target", "class_id", "label_id", "y",
                  "predictionstring")
_SPLIT_COLUMNS = ("split", "set", "subset", "partition", "fold")
_LARGEST = 2 << 30  # bytes of a list; that of ImageNet-22K has 0.9 GB


class Row(NamedTuple):
    """A line of a list: its number, counted from 1, and its cells."""

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
    one the first column is the path and the second the label. Text: path and label, separated by a tab or by the line's last
    blank or comma. JSON: a list of ``[path, label]``, as Swin's of ImageNet-22K.

    Raises:
        DataError: the list is empty, or has a line that cannot be used; the message names the line.
    """
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        rows = list(_json_rows(text, path))
    elif path.lower().endswith((".csv", ".tsv")):
        rows = list(_table_rows(text, path))
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
        if not (isinstance(entry, list) and len(entry) >= 2 and isinstance(entry[0], str) and type(entry[1]) in (int, str)):
            raise DataError(f"{path}: entry {number} is not a [path, label] pair")
        yield Row(number, entry[0], str(entry[1]))


def _table_rows(text: str, path: str) -> Iterator[Row]:
    first = text.split("\n", 1)[0]
    others = [mark for mark in "\t;" if mark in first and "," not in first]
    delimiter = "\t" if path.lower().endswith(".tsv") else others[0] if others else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns: tuple[int, int, int] | None = None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if columns is None:
                columns = _columns(cells)
                if columns is not None:
                    continue
                if not is_image(os.path.basename(cells[0])):
                    raise DataError(f"{path}:{reader.line_num}: neither a header with a path and a label column (such as path,label) "
                                    "nor an image's path")
                columns = (0, 1, -1)
            at_path, at_label, at_split = columns
            if len(cells) <= max(columns) or not cells[at_path] or not cells[at_label]:
                raise DataError(f"{path}:{reader.line_num}: has no path or no label ({delimiter.join(cells)[:80]!r})")
            yield Row(reader.line_num, cells[at_path], cells[at_label], cells[at_split].lower() if at_split >= 0 else "")
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is not a table ({error})") from None


def _columns(header: Sequence[str]) -> tuple[int, int, int] | None:
    """Positions of the path, label and split columns (-1: none), or None where the line is not a header."""
    words = [word.lower() for word in header]

    def find(names: Sequence[str]) -> int:
        return next((words.index(name) for name in names if name in words), -1)

    columns = find(_PATH_COLUMNS), find(_LABEL_COLUMNS), find(_SPLIT_COLUMNS)
    return columns if min(columns[:2]) >= 0 else None


def _text_rows(text: str, path: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, label = _split_line(line)
        if not name or not label:
            raise DataError(f"{path}:{number}: has no label ({line[:80]!r}); a line is a path, a tab or blank, and a label")
        yield Row(number, name, label)


def _split_line(line: str) -> tuple[str, str]:
    """(path, label) of a line; the path may contain blanks, and so may a label after a tab or a comma."""
    if "\t" in line:
        cells = line.split("\t")
        return cells[0].strip(), cells[1].strip()
    for separator in (",", None):
        cells = line.rsplit(separator, 1)
        if len(cells) == 2:
            return cells[0].strip(), cells[1].strip()
    return "", ""


# --------------------------------------------------------------------------------------------------
# Sources of listed images
# --------------------------------------------------------------------------------------------------

def list_source(path: str, rows: Sequence[Row], roots: Sequence[str]) -> ImageFolder:
    """The image files that ``rows`` of the list ``path`` name.

    Args:
        roots: folders that the rows' paths may be relative to; the first in which the first image is found counts.

    Raises:
        DataError: the first image is in none of them.
    """
    root = next((r for r in roots if os.path.exists(os.path.join(r, rows[0].path))), None)
    if root is None:
        raise DataError(f"{path}:{rows[0].line}: {rows[0].path} is not below {' or '.join(dict.fromkeys(roots))}; "
                        "paths are relative to the list's folder, or absolute")
    classes, targets = encode_labels([row.label for row in rows])
    return ImageFolder(root, classes, PackedNames.of([row.path for row in rows]), targets)


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
