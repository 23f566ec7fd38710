"""Lists of images as layouts: one for each split, or one for all with a split column, a fold column, or neither."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from data.errors import DataError
from data.layouts.options import ALL, Options, find_entry, names_of
from data.messages import Caution, Notice
from data.sources.base import Source
from data.sources.columns import SPLIT_WORDS
from data.sources.folder import visible_entries
from data.sources.lists import LIST_EXTENSIONS, Row, list_source, read_list

FRACTION_ADVICE = "; keep a part of each class for validation with --opts DATA.VAL_FRACTION 0.1, or a fold with DATA.FOLD 1/5"
_WHOLE_LISTS = ("metadata", "labels", "label", "annotations", "all", "data", "dataset", "list", "index", "images")
_TABLES = (".csv", ".tsv", ".jsonl")


def find_split_list(root: str, split: str) -> str | None:
    """The list of a split in a folder."""
    stems = [*names_of(split), *(f"{name}{more}" for name in names_of(split) for more in ("_find_list", "_labels", "-list", "_list")),
             f"ILSVRC2011fall_whole_map_{split}"]
    return find_entry(root, [stem + extension for stem in stems for extension in LIST_EXTENSIONS], os.path.isfile)


def find_whole_list(root: str) -> str | None:
    """The one list of a folder that has none for each split: by its usual names, or the only table there is."""
    if path := find_entry(root, [stem + extension for stem in _WHOLE_LISTS for extension in _TABLES], os.path.isfile):
        return path
    tables = [entry.path for entry in visible_entries(root) if entry.name.lower().endswith(_TABLES) and entry.is_file()]
    return tables[0] if len(tables) == 1 else None


def open_split_list(path: str, split: str, options: Options) -> Source:
    """A list that is one split."""
    root = os.path.dirname(path) or "."
    folders = [found for name in (*names_of(split), "images") if (found := find_entry(root, [name], os.path.isdir))]
    return list_source(path, read_list(path, options.keys), [root, *folders], options.keys)


def open_list(path: str, split: str, options: Options) -> Source:
    """A split of a list of all: by its split column, by DATA.FOLD or DATA.VAL_FRACTION, or under --eval all of it.

    Raises:
        DataError: the list has no such split; the message shows those it has.
    """
    rows = read_list(path, options.keys)
    folder = os.path.dirname(path) or "."
    roots = [folder, os.path.join(folder, "images")]
    counts = Counter(row.split for row in rows)
    has_column, own = counts.keys() != {""}, sum(counts[word] for word in _words(split))
    divided = options.divides(split) and (bool(options.fold) or not any(counts[word] for word in _words("val")))
    if split == ALL or (options.whole(split) and not has_column):
        source = list_source(path, rows, roots, options.keys)
        why = ", whatever their split" if has_column else "; it has no split column"
        source.notices.insert(0, Notice(f"{path}: all of its {len(rows)} images are evaluated{why}"))
        return source
    if divided:
        pool = [row for row in rows if row.split in _words("train")] if has_column else rows
        if not pool:
            raise DataError(f"{path}: no line's split is train; it has {_shown(counts)}")
        source = options.part(list_source(path, pool, roots, options.keys), split)
        used = _words("train")
    elif own:
        source = list_source(path, [row for row in rows if row.split in _words(split)], roots, options.keys)
        used = _words(split) if options.alone else [*_words("train"), *_words("val")]
    else:
        raise _no_split(path, split, options, rows, counts)
    if has_column:
        source.notices += _left_out(path, {word: count for word, count in counts.items() if word not in used}, len(rows))
    return source


def _words(split: str) -> Sequence[str]:
    return SPLIT_WORDS.get(split, (split,))


def _left_out(path: str, counts: dict[str, int], total: int) -> list[Notice | Caution]:
    if not counts:
        return []
    known = {word for words in SPLIT_WORDS.values() for word in words}
    line = f"{path}: {sum(counts.values())} of its {total} rows are left out; their split is {_shown(counts)}"
    return [Notice(line) if counts.keys() <= known else Caution(f"{line}; the splits of training are called train and val")]


def _shown(counts: dict[str, int]) -> str:
    few = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{word or 'empty'} ({count})" for word, count in few[:6]) + (", ..." if len(few) > 6 else "")


def _no_split(path: str, split: str, options: Options, rows: Sequence[Row], counts: Counter[str]) -> DataError:
    if counts.keys() != {""}:
        there = next((word for word in counts if word), "")
        advice = f"; evaluate another with --split {there}, or every row with --split all" if options.alone else FRACTION_ADVICE
        return DataError(f"{path}: no line's split is {' or '.join(_words(split))}; it has {_shown(counts)}{advice}")
    if split not in ("train", "val"):
        return DataError(f"{path}: has no split column, so there is no split {split}; --split all takes every row")
    folds = dict.fromkeys(row.fold for row in rows if row.fold)
    if folds:
        return DataError(f"{path}: has no split column, but one of folds ({', '.join(sorted(folds)[:10])}); say which is for validation "
                         f"with --opts DATA.FOLD {min(folds)}")
    folder = os.path.dirname(path) or "."
    other = find_split_list(folder, "val" if split == "train" else "train")
    beside = f"; {other} lies beside it: give their folder {folder} for both" if other and not os.path.samefile(other, path) else ""
    return DataError(f"{path}: has no split column{beside or FRACTION_ADVICE}")
