"""From the paths in a list to files on the disk: another folder, no suffix, backslashes, the folders of another machine."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from data.errors import DataError
from data.messages import Caution, Message, Notice
from data.sources.classes import first_few, whole_number
from data.sources.columns import ListKeys
from data.sources.folder import images_below, visible_entries
from data.sources.packed_names import IMAGE_EXTENSIONS, is_image
from data.sources.regular_files import kind_of

_SAMPLE = 32  # rows by which a folder is judged
_MOST_FOLDERS = 200
_MOST_CHECKED = 100_000  # files that are looked at before the run begins
_THREADS = 16
_SUFFIXES = ("", *(spelled for extension in IMAGE_EXTENSIONS for spelled in (extension, extension.upper())))


class _Way(NamedTuple):
    """How a row's path becomes a file's: below ``root``, ``dropped`` folders from its beginning left out, ``suffix`` appended."""

    root: str
    dropped: int = 0
    suffix: str = ""

    def name(self, path: str) -> str:
        if self.dropped:
            path = path.split("/", self.dropped)[-1]
        return path if self.suffix and path.lower().endswith(self.suffix.lower()) else path + self.suffix

    def merges(self, paths: Sequence[str]) -> bool:
        """Whether different paths would become one file's: the folders left out are not only another machine's."""
        return self.dropped > 0 and len({self.name(path) for path in paths}) < len(set(paths))

    def leads(self, path: str) -> bool:
        return path.count("/") >= self.dropped and os.path.exists(os.path.join(self.root, self.name(path)))


def find_listed(path: str, lines: Sequence[int], paths: Sequence[str], roots: Sequence[str],
                keys: ListKeys) -> tuple[str, list[str], list[Message]]:
    """(folder, names below it or absolute, messages) of the images that a list names.

    Tried in this order, by a sample of the rows: the paths as they are below each of ``roots``; with the suffix of an image; below another
    folder beside the list (train_images/ for train.csv first); without the folders in front that only another machine has; last, each
    image by its name wherever it lies below the list's folder.

    Args:
        path: the list.
        lines: the rows' lines, for messages.
        paths: of the rows.
        roots: folders that they may be relative to.
        keys: DATA.IMAGE_ROOT replaces ``roots`` and all other folders, DATA.IMAGE_SUFFIX the suffixes.

    Raises:
        DataError: no image is found, several folders hold images of these names, or a row names a folder, a pipe or a device.
    """
    if any("\\" in name for name in paths) and not any(os.path.exists(os.path.join(root, paths[0])) for root in roots):
        paths = [name.replace("\\", "/") for name in paths]
    paths = [name.removeprefix("./") for name in paths]
    sample = [paths[i] for i in sorted({round(k * (len(paths) - 1) / (_SAMPLE - 1)) for k in range(_SAMPLE)})]
    way, found = _best_way(path, paths, sample, [keys.root] if keys.root else list(dict.fromkeys(roots)), keys)
    names, notices = [way.name(name) for name in paths], []
    if found < len(sample):
        top = keys.root or os.path.dirname(path) or "."
        below = {i: file for i, file in _by_name(top, paths, keys.suffix).items() if not _lacks(way, paths[i], os.path.join(top, file))}
        below = _unshared(way, top, paths, below)
        if len(below) > (found * len(paths)) // len(sample):
            names = [below.get(i) or os.path.relpath(os.path.join(way.root, name), top) for i, name in enumerate(names)]
            way, found = way._replace(root=top), len(below)
            notices.append(Notice(f"{path}: its images are found by their names, wherever they lie below {way.root} ({paths[0]} is "
                                  f"{names[0]})"))
    if not found:
        raise DataError(f"{path}:{lines[0]}: {paths[0]} is not below {keys.root or ' or '.join(dict.fromkeys(roots))}; paths are relative "
                        "to the list's folder, or absolute; DATA.IMAGE_ROOT names another folder, DATA.IMAGE_SUFFIX a suffix such as .jpg")
    if way.root not in roots or way.dropped or way.suffix:
        notices = notices or [Notice(f"{path}: {paths[0]} is {os.path.join(way.root, names[0])}, and so are the others")]
    return way.root, names, [*notices, *_checked(path, lines, way.root, names)]


def _best_way(path: str, paths: Sequence[str], sample: Sequence[str], roots: Sequence[str], keys: ListKeys) -> tuple[_Way, int]:
    """(the way that leads to the sample, how much of it it leads to).

    Where the list's own folders hold some of the paths as they are, or half of them by their last folders or as names without one, the
    rest is missing there: a folder beside that has them all, such as val/ for train.csv, holds other images of the same names.

    Raises:
        DataError: a folder beside the list leads to all of it, and another one to half of it, so that either may be meant.
    """
    suffixes = [keys.suffix] if keys.suffix else _SUFFIXES
    depth, probes = max(name.count("/") for name in sample), [*sample[::len(sample) // 3 + 1], sample[-1]]
    beside = [] if keys.root else [folder for folder in _folders_below(os.path.dirname(path) or ".") if folder not in roots]
    best, most = _Way(roots[0], suffix=keys.suffix), 0
    for folders, drops in ((roots, [0]), (beside, [0]), (roots, range(1, depth + 1)), (beside, range(1, depth + 1))):
        ways: dict[str, tuple[int, _Way]] = {}
        as_is = folders is roots and 0 in drops
        for root, dropped, suffix in itertools.product(folders, drops, suffixes):
            way = _Way(root, dropped, suffix)
            if ways.get(root, (0,))[0] == len(sample) or not (as_is or any(map(way.leads, probes))):
                continue
            count = sum(map(way.leads, sample))
            if count and way.merges(paths):
                continue
            if count > ways.get(root, (0,))[0]:
                ways[root] = count, way
            if count == len(sample) and folders is roots:
                return way, count
            if count > most:
                best, most = way, count
        if folders is roots and (as_is and depth and most or 2 * most >= len(sample) and (as_is or "/" in best.name(sample[0]))):
            break
        near = [(count, way) for count, way in ways.values() if 2 * count >= len(sample)]
        if any(count == len(sample) for count, _ in near):
            return _preferred(path, near)
    return best, most


def _preferred(path: str, ways: Sequence[tuple[int, _Way]]) -> tuple[_Way, int]:
    """Of folders beside the list that hold its images the one named like the list: train_images for train.csv."""
    stem = os.path.splitext(os.path.basename(path))[0].lower()
    ways = [(count, way) for count, way in ways
            if os.path.relpath(way.root, os.path.dirname(path) or ".").lower().startswith(stem)] or ways
    if len(ways) > 1:
        raise DataError(f"{path}: {' and '.join(sorted(way.root for _, way in ways)[:3])} hold images of these names; say which is meant "
                        "with DATA.IMAGE_ROOT")
    return ways[0][1], ways[0][0]


def _lacks(way: _Way, path: str, found: str) -> bool:
    """Whether the folder that a path names is there without the image, so that the file ``found`` outside of it is another one's."""
    named = os.path.join(way.root, way.name(path))
    folder = os.path.join(os.path.dirname(named), "")
    return "/" in way.name(path) and not found.startswith(folder) and os.path.isdir(folder) and not os.path.exists(named)


def _unshared(way: _Way, top: str, paths: Sequence[str], below: dict[int, str]) -> dict[int, str]:
    """``below`` without the images that several paths lead to by their names, but for the path that is the image's."""
    of_file: dict[str, set[str]] = {}
    for i, file in below.items():
        of_file.setdefault(file, set()).add(paths[i])
    return {i: file for i, file in below.items() if len(of_file[file]) == 1
            or os.path.abspath(os.path.join(way.root, way.name(paths[i]))) == os.path.abspath(os.path.join(top, file))}


def _folders_below(folder: str) -> list[str]:
    """Visible folders one and two levels down."""
    level = [entry.path for entry in visible_entries(folder) if entry.is_dir()][:_MOST_FOLDERS]
    return (level + [entry.path for above in level for entry in visible_entries(above) if entry.is_dir()])[:_MOST_FOLDERS]


def _by_name(root: str, paths: Sequence[str], suffix: str) -> dict[int, str]:
    """The image below ``root`` that each path ends like, by the path's index; paths with none or several are left out."""
    by_name: dict[str, list[str]] = {}
    for file in images_below(root):
        below = os.path.relpath(file, root)
        name = os.path.basename(below)
        stem = os.path.splitext(name)[0]
        for spelled in {name, stem, stem if (number := whole_number(stem)) is None else str(number)}:  # a spreadsheet's 7 is 0007.jpg
            by_name.setdefault(spelled, []).append(below)
    found = {}
    for i, path in enumerate(paths):
        path += suffix if suffix and not path.endswith(suffix) else ""
        files = by_name.get(os.path.basename(path), [])
        if len(files) > 1:  # the one with the longest common end
            tails = [len(os.path.commonprefix([f"/{file if is_image(path) else os.path.splitext(file)[0]}"[::-1], f"/{path}"[::-1]]))
                     for file in files]
            files = [file for file, tail in zip(files, tails, strict=True) if tail == max(tails)]
        if len(files) == 1:
            found[i] = files[0]
    return found


def _checked(path: str, lines: Sequence[int], root: str, names: Sequence[str]) -> list[Message]:
    """A word on images that are not there.

    Raises:
        DataError: a row names something that is no file.
    """
    def modes(part: Sequence[str]) -> list[int]:
        return [_mode(os.path.join(root, name)) for name in part]

    checked = names[:_MOST_CHECKED]
    parts = [checked[i::_THREADS] for i in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found: Iterator[list[int]] = pool.map(modes, parts)
        by_row = {i + k * _THREADS: mode for i, part in enumerate(found) for k, mode in enumerate(part)}
    absent = [names[i] for i in sorted(by_row) if by_row[i] < 0]
    for i in sorted(by_row):
        if by_row[i] >= 0 and (what := kind_of(by_row[i])):
            raise DataError(f"{path}:{lines[i]}: {names[i]} is {what}, not an image's file; take the line out")
    return [Caution(f"{path}: {len(absent)} of its {len(names)} images are not there ({first_few(absent, 3)})")] if absent else []


def _mode(file: str) -> int:
    """``st_mode``; -1 where there is no such file."""
    try:
        return os.stat(file).st_mode
    except (OSError, ValueError):
        return -1
