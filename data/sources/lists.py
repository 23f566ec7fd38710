"""Images and labels listed in a text file: CSV, TSV, text and JSON lists, and Swin's map files."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from data.messages import Caution, Notice
from data.sources.archives import ArchiveImages
from data.sources.base import Source, View
from data.sources.classes import class_positions, encode_labels, first_few, whole_number
from data.sources.columns import NO_KEYS, YES_OR_NO, Columns, ListKeys, find_columns, known_header
from data.sources.folder import ImageFolder
from data.sources.label_sets import MultiHot, find_label_sets
from data.sources.list_paths import find_listed
from data.sources.packed_names import IMAGE_EXTENSIONS, PackedNames, is_image, natural_key
from data.sources.regular_files import NotARegularFile, read_regular

LIST_EXTENSIONS = (".csv", ".tsv", ".txt", ".lst", ".json", ".jsonl")
_LARGEST = 2 << 30  # bytes of a list; that of ImageNet-22K has 0.9 GB
_SAMPLE = 1000  # rows by which the columns are told apart
_JUDGED = 100_000  # rows by which a list is judged before it is read
_LONGEST_PATH, _LONGEST_LABEL = 4096, 10_000  # characters
_UNPRINTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")
_JSON_LIST = re.compile(r'\s*\[\s*[\[{"]')
_NAMED_FIRST = re.compile(rf'"?(.*(?:{"|".join(map(re.escape, IMAGE_EXTENSIONS))}))"?(?:\s*[,;]\s*|\s+)(\S.*)', re.IGNORECASE)


class Row(NamedTuple):
    """A line of a list: its number, counted from 1, and its cells; "" for a column that the list does not have.

    The label may be several, joined or as columns of 0 and 1, or none.
    """

    line: int
    path: str
    label: str
    split: str = ""
    fold: str = ""
    group: str = ""


Cells = tuple[int, list[str]]  # a line's number and its cells

# --------------------------------------------------------------------------------------------------
# Reading lists
# --------------------------------------------------------------------------------------------------

def read_text(path: str) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        DataError: unreadable, no regular file, too large, or in another encoding.
    """
    try:
        content = read_regular(path, _LARGEST)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except NotARegularFile as error:
        raise DataError(f"{path!r}: {error}; give a text file") from None
    try:
        return content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text at byte {error.start}; save it as UTF-8") from None


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line without the blanks around it) of the lines that are not empty; a line ends where an editor ends it."""
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line := line.strip():
            yield number, line


def read_list(path: str, keys: ListKeys = NO_KEYS) -> list[Row]:
    """The rows of a CSV, TSV, text or JSON list.

    CSV and TSV may begin with a header, whose columns ``find_columns`` tells apart; without one the first column is the path and the
    second the label. Text: path and label, separated by a tab, or by the blank or comma behind the image's suffix. JSON: a list of
    ``[path, label]``, as Swin's of ImageNet-22K, a mapping from paths to labels, or records, also a line each (Hugging Face's
    metadata.jsonl). An image may have several labels, or none (``find_label_sets``).

    Args:
        keys: what the config says of the columns.

    Raises:
        DataError: the list is empty, or has a line that cannot be used; the message names the line.
    """
    text, extension = read_text(path), os.path.splitext(path)[1].lower()
    if extension in (".json", ".jsonl") or (extension not in (".csv", ".tsv") and _JSON_LIST.match(text)):
        rows = _json_rows(text, path, extension == ".jsonl", keys)
    elif extension in (".csv", ".tsv") or known_header(re.split("[,;\t]", next(lines_of(text), (0, ""))[1])):
        rows = _table_rows(text, path, keys)
    else:
        rows = _text_rows(text, path)
    rows = list(itertools.islice(rows, _JUDGED if keys.unseen else None))
    if not rows:
        raise DataError(f"{path}: lists no images")
    return rows


def checked_row(path: str, line: int, image: str, label: str, *others: str) -> Row:
    """A checked row.

    Raises:
        DataError: no path, or a path or label that no file and no class can have.
    """
    if not image:
        raise DataError(f"{path}:{line}: has no path or no label ({', '.join((image, label))[:80]!r})")
    if "\0" in image or len(image) > _LONGEST_PATH or not _encodable(image):
        raise DataError(f"{path}:{line}: {image[:80]!r} cannot be the name of a file")
    if len(label) > _LONGEST_LABEL or _UNPRINTABLE.search(label):
        raise DataError(f"{path}:{line}: {label[:80]!r} cannot be a label: it is too long or has control characters")
    return Row(line, image, label, *others)


def _encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _json_rows(text: str, path: str, by_line: bool, keys: ListKeys) -> Iterator[Row]:
    try:
        entries = [json.loads(line) for _, line in lines_of(text)] if by_line else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error})") from None
    if isinstance(entries, dict):
        entries = [list(pair) for pair in entries.items()]
    if isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries):
        header = list(dict.fromkeys(name for entry in entries[:_SAMPLE] for name in entry))
        yield from _rows_of(path, path, header, ((number, [_cell(entry.get(name)) for name in header])
                                                 for number, entry in enumerate(entries, 1)), keys)
        return
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        labels = entry[1] if isinstance(entry, list) and len(entry) >= 2 and isinstance(entry[0], str) else None
        if not all(type(label) in (int, str) for label in (labels if isinstance(labels, list) else [labels])):
            raise DataError(f"{path}: entry {number} is not a [path, label] pair")
        yield checked_row(path, number, entry[0], _cell(entry[1]))


def _cell(value: Any) -> str:
    """A value of a JSON record as it would stand in a table; "" for nested ones but lists of labels, which no column that counts has."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return "|".join(filter(None, map(_cell, value)))
    try:
        return json.dumps(value) if isinstance(value, (bool, int, float)) else ""
    except ValueError:  # more digits than Python writes
        return ""


def _table_rows(text: str, path: str, keys: ListKeys) -> Iterator[Row]:
    if text[:4].lower() == "sep=":  # what Excel puts before the header
        text = text.partition("\n")[2]
    first = next(lines_of(text), (0, ""))[1]
    delimiter = next((mark for mark in ("\t," if path.lower().endswith(".tsv") else ",\t") + ";|" if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)

    def cells_of_lines() -> Iterator[Cells]:
        for cells in reader:
            if any(cells := [cell.strip() for cell in cells]):
                yield reader.line_num, cells

    lines = cells_of_lines()
    try:
        line, cells = next(lines, (0, []))
        images = [i for i, cell in enumerate(cells) if is_image(os.path.basename(cell))]
        if cells and images:
            columns, first = Columns(images[0], 1 if images[0] == 0 else 0), [(line, cells), *itertools.islice(lines, _SAMPLE)]
            yield from _filled(path, columns, max(2, min(len(cells) for _, cells in first)), first, lines)
        elif cells:
            yield from _rows_of(path, f"{path}:{line}", cells, lines, keys)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is not a table ({error})") from None


def _rows_of(path: str, where: str, header: Sequence[str], lines: Iterator[Cells], keys: ListKeys) -> Iterator[Row]:
    """The rows of a table with a header; ``where`` names the header in messages."""
    first = list(itertools.islice(lines, _SAMPLE))
    columns = find_columns(where, header, [cells for _, cells in first], keys)
    yield from _filled(path, columns, len(header), first, lines, header)


def _filled(path: str, columns: Columns, width: int, first: Sequence[Cells], lines: Iterable[Cells],
            header: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of ``first`` and the further ``lines``, ``width`` cells each, or more where several labels stand last without quotes."""
    label_of = _label_reader(path, columns, [cells for _, cells in first], header) if columns.labels else None
    for line, cells in itertools.chain(first, lines):
        if any(cells[width:]):
            if columns.label != width - 1:
                raise DataError(f"{path}:{line}: has {len(cells)} cells, the first line {width}; put labels that hold the separator into "
                                "quotes")
            cells = [*cells[:columns.label], "|".join(filter(None, cells[columns.label:]))]
        cells = [*cells[:width], *[""] * (columns.highest + 1 - len(cells)), ""]  # the last is that of columns that are not there (-1)
        split = columns.split_of(cells[columns.split])
        label = "" if label_of is not None else cells[columns.label]
        row = checked_row(path, line, cells[columns.image], label, split, cells[columns.fold], cells[columns.group])
        yield row if label_of is None else row._replace(label=label_of(line, cells))


def _label_reader(path: str, columns: Columns, sample: Sequence[Sequence[str]],
                  header: Sequence[str]) -> Callable[[int, Sequence[str]], MultiHot]:
    """From a row's number and cells to what its columns of 0 and 1 say.

    Where there is no 0 in the ``sample``, -1 is it (as in CelebA's list); else -1, as an empty cell, says that the label is not known (as
    in CheXpert's).
    """
    words, known = YES_OR_NO, dict[tuple[str, ...], MultiHot]()
    names = [header[at] for at in columns.labels]
    left_out = [name for at, name in enumerate(header)
                if at not in (columns.image, columns.split, columns.fold, columns.group, *columns.labels)]
    seen = {cells[at].lower() if at < len(cells) else "" for cells in sample for at in columns.labels}
    if "" not in seen and all(words.get(cell) != 0 for cell in seen):
        words = {word: max(0, value) for word, value in words.items()}

    def read(line: int, cells: Sequence[str]) -> MultiHot:
        texts = tuple(cells[at].lower() for at in columns.labels)
        if texts not in known:
            if (odd := next((text for text in texts if text not in words), None)) is not None:
                raise DataError(f"{path}:{line}: has {odd[:40]!r} in a column of 0 and 1; name the column of the labels with "
                                "DATA.LABEL_COLUMN, or those of 0 and 1, joined by commas")
            known[texts] = MultiHot(names, tuple(words[text] for text in texts), left_out)
        return known[texts]

    return read


def _text_rows(text: str, path: str) -> Iterator[Row]:
    for number, line in lines_of(text):
        if not line.startswith("#"):
            name, label = split_line(line)
            if not label and not is_image(os.path.basename(name)):
                raise DataError(f"{path}:{number}: has no label ({line[:80]!r}); a line is a path, a tab or blank, and a label")
            yield checked_row(path, number, name, label)


def split_line(line: str) -> tuple[str, str]:
    """(path, label) of a line; the path may contain blanks and commas, and so may a label after a tab or the path's suffix."""
    if "\t" in line:
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) == 3 and is_image(os.path.basename(cells[2])) and not is_image(os.path.basename(cells[0])):
            return cells[2], cells[1]  # MXNet's: number, label, path
        return cells[0], cells[1]
    if found := _NAMED_FIRST.fullmatch(line):
        return found[1], found[2]
    for separator in (",", None):
        cells = line.rsplit(separator, 1)
        if len(cells) == 2 and not is_image(line):
            return cells[0].strip(), cells[1].strip()
    return line, ""


# --------------------------------------------------------------------------------------------------
# Sources of listed images
# --------------------------------------------------------------------------------------------------

def list_source(path: str, rows: Sequence[Row], roots: Sequence[str], keys: ListKeys = NO_KEYS) -> Source:
    """The image files that ``rows`` of the list ``path`` name.

    Args:
        roots: folders that the rows' paths may be relative to.

    Raises:
        DataError: as of ``find_listed``, or an image has no label where each must have one.
    """
    names = [row.path for row in rows]
    root, names, notices = (roots[0], names, []) if keys.unseen else find_listed(path, [row.line for row in rows], names, roots, keys)
    classes, targets = encode_labels([row.label for row in rows])
    source = find_label_sets(ImageFolder(root, classes, PackedNames.of(names), targets, notices), keys)
    source.marks = marks_of(rows)
    require_labels(source, path, rows)
    source.notices += _contradictions(path, names, source.targets) if source.labels is None else []
    return source


def _contradictions(path: str, names: Sequence[str], targets: np.ndarray) -> list[Caution]:
    """A word on images that have several rows with different labels: of one class each, none of these rows can be right."""
    keys = np.fromiter(map(hash, names), dtype=np.int64, count=len(names))
    order = np.lexsort((targets, keys))
    again = order[1:][(keys[order][1:] == keys[order][:-1]) & (targets[order][1:] != targets[order][:-1])]
    few = first_few([names[i] for i in again[:4]], 3)
    return [Caution(f"{path}: {len(again)} rows give an image another label than another row ({few}); "
                    "keep one, or, where an image has several labels, join them in one row")] if len(again) else []


def require_labels(source: Source, path: str, rows: Sequence[Row]) -> None:
    """Raise ``DataError`` for a row without a label where each image of ``source`` has a class."""
    if source.labels is None and (bare := next((row for row in rows if not row.label), None)):
        raise DataError(f"{path}:{bare.line}: has no path or no label ({bare.path[:80]!r})")


def marks_of(rows: Sequence[Row]) -> dict[str, tuple[list[str], np.ndarray]]:
    """``Source.marks`` of rows."""
    columns = {"fold": [row.fold for row in rows], "group": [row.group for row in rows]}
    marks = {}
    for what, cells in columns.items():
        if any(cells):
            names = sorted(set(cells), key=lambda name: (natural_key(name), name))
            marks[what] = names, class_positions(cells, names)
    return marks


def mapped_archive(archive: ArchiveImages, path: str) -> Source:
    """The images of an archive that a map file lists (lines ``path<TAB>number``), with the file's labels.

    A class is named by its images' folder where each number has a folder of its own, else by its number.

    Raises:
        DataError: a bad line, or an image that the archive lacks; the message names the line.
    """
    rows = read_list(path)
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
