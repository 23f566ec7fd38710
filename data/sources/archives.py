"""Images inside tar and zip archives, read in place: the members are listed once, then read by their offset.

tarfile and zipfile do the listing only: their own readers share one file position, and would have to list the archive again in
every process. Here a read is one ``pread`` from a descriptor that each process opens for itself, and the list is arrays that
processes share and the index cache keeps. Nothing is ever extracted, so a member's name cannot write anywhere.
"""

from __future__ import annotations

import json
import os
import re
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data.errors import DataError, UnreadableImage
from data.messages import Caution
from data.sources.base import Source
from data.sources.classes import encode_labels, first_few
from data.sources.index_cache import Index, cached, names_of, store_names
from data.sources.listing_progress import tick
from data.sources.packed_names import PackedNames, is_hidden, is_image
from data.sources.regular_files import LARGEST_IMAGE
from data.sources.tar import BEGINNING, CheckedHeader, damaged

LARGEST_MEMBER = LARGEST_IMAGE  # a zip bomb unpacks to no more
_OPEN_FILES = 16  # archives that a process keeps open: there may be thousands of shards
_SPLIT_FOLDERS = {"train", "val", "validation", "test", "images", "data"}
_LABEL_SUFFIXES = (".cls", ".json")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class Member(NamedTuple):
    """Where a member of an archive lies: its bytes (tar) or its zip header begin at ``offset``."""

    name: str
    offset: int
    size: int  # bytes as stored
    method: int  # -1: tar; else the zip method, 0 stored or 8 deflated
    unpacked: int  # bytes when unpacked
    crc: int


class ArchiveImages(Source):
    """Images in archives.

    Attributes:
        files: paths of the archives.
        names: names of the members.
        place: (images, 6) int64: index in ``files``, offset, stored size, method, unpacked size, CRC.
    """

    def __init__(self, root: str, files: list[str], names: PackedNames, place: np.ndarray, classes: list[str], targets: np.ndarray,
                 notices: Sequence[str] = ()):
        self.root, self.files, self.names, self.place = root, files, names, place
        self.classes, self.targets, self.notices = classes, targets, list(notices)
        self._opened: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def path(self, index: int) -> str:
        return f"{self.files[self.place[index, 0]]}/{self.names[index]}"

    def fetch(self, index: int) -> bytes:
        archive, offset, size, method, unpacked, crc = self.place[index].tolist()
        try:
            descriptor = self._descriptor(archive)
            if method >= 0:
                return _unpack(descriptor, self.names[index], offset, size, method, unpacked, crc)
            data = read_at(descriptor, offset, size)
            if len(data) < size:
                raise ValueError("the archive ends before it")
            return data
        except (ValueError, zlib.error, struct.error) as error:
            raise UnreadableImage.of(self.path(index), error) from None
        except OSError:
            if archive in self._opened:  # once a network share was away, only a new descriptor works
                os.close(self._opened.pop(archive))
            raise

    def identity(self) -> bytes:
        return self.names.blob.tobytes() + self.names.ends.tobytes() + self.place.tobytes()

    def _descriptor(self, archive: int) -> int:
        if self._process != os.getpid():  # a forked process must not share descriptors with its parent
            self._opened, self._process = OrderedDict(), os.getpid()
        if archive in self._opened:
            self._opened.move_to_end(archive)
        else:
            if len(self._opened) >= _OPEN_FILES:
                os.close(self._opened.popitem(last=False)[1])
            self._opened[archive] = os.open(self.files[archive], os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        return self._opened[archive]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": OrderedDict(), "_process": -1}

    def __del__(self) -> None:
        if os is not None and getattr(self, "_process", -1) == os.getpid():  # at the interpreter's end modules are None
            for descriptor in self._opened.values():
                os.close(descriptor)


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """``size`` bytes from ``offset``, fewer at the end of the file; the file's position is neither used nor moved."""
    if not hasattr(os, "pread"):  # Windows, where processes are not forked and share no descriptors
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)
    parts = []
    while size > 0 and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _unpack(descriptor: int, name: str, offset: int, size: int, method: int, unpacked: int, crc: int) -> bytes:
    """A zip entry, checked against its name in the zip directory and its CRC, and never larger than the directory says."""
    header = read_at(descriptor, offset, 30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError("the zip file is damaged there")
    length, extra = struct.unpack("<HH", header[26:30])
    written = read_at(descriptor, offset + 30, length)
    if name not in (written.decode(encoding, "replace").removeprefix("./") for encoding in ("utf-8", "cp437")):
        raise ValueError("its name in the zip directory is another one than beside it: the zip file is damaged")
    data = read_at(descriptor, offset + 30 + length + extra, size)
    if len(data) < size:
        raise ValueError("the archive ends before it")
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-15).decompress(data, unpacked + 1)
    if len(data) != unpacked or zlib.crc32(data) != crc:
        raise ValueError("its checksum (CRC) is wrong")
    return data


# --------------------------------------------------------------------------------------------------
# Listing
# --------------------------------------------------------------------------------------------------

def members(path: str, notices: list[str]) -> Iterator[Member]:
    """The regular files in an archive, including those of tar files inside a tar file (``inner.tar/name``).

    Members whose names lead outside (absolute, or through ``..``), links, encrypted and huge ones are skipped, with a
    warning in ``notices``.

    Raises:
        DataError: not an archive, compressed as a whole, or damaged.
    """
    skipped: dict[str, list[str]] = {}
    try:
        listed = _zip_members(path, skipped) if path.lower().endswith(".zip") else _tar_members(path, skipped)
        for count, member in enumerate(listed):
            if count % 256 == 0:
                tick(path, count)
            parts = member.name.split("/")
            if member.name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
                skipped.setdefault("whose names lead outside", []).append(member.name)
            elif member.unpacked > LARGEST_MEMBER:
                skipped.setdefault("too large to be images", []).append(member.name)
            elif not any(is_hidden(part) for part in parts[:-1]) and not parts[-1].startswith("."):
                yield member
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    for what, names in skipped.items():
        notices.append(Caution(f"{path}: {len(names)} members {what} are skipped ({first_few(names, 3)})"))


def _tar_members(path: str, skipped: dict[str, list[str]]) -> Iterator[Member]:
    with open(path, "rb") as file:
        start = file.read(2)
        if start in _COMPRESSED:
            raise DataError(f"{path}: is compressed as a whole ({_COMPRESSED[start]}), so that no image can be read by itself; "
                            "decompress it to a plain .tar, or unpack it")
        file.seek(0)
        yield from _walk_tar(file, path, 0, "", skipped)


def _walk_tar(file, path: str, base: int, prefix: str, skipped: dict[str, list[str]]) -> Iterator[Member]:
    name, end = prefix + BEGINNING, 0  # of the member before
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=CheckedHeader) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep a kilobyte for each member
                name, end = prefix + member.name.removeprefix("./"), tar.offset
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    skipped.setdefault("that are links, devices or sparse", []).append(name)
                elif name.lower().endswith(".tar") and not prefix:
                    yield from _walk_tar(tar.extractfile(member), path, member.offset_data, name + "/", skipped)
                else:
                    yield Member(name, base + member.offset_data, member.size, -1, member.size, 0)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise damaged(path, base + end, name, error) from None


def _zip_members(path: str, skipped: dict[str, list[str]]) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as file:
            _require_alone(file)
            for info in file.infolist():
                name = info.filename.removeprefix("./")
                if info.is_dir():
                    continue
                if info.flag_bits & 1:
                    skipped.setdefault("that are encrypted", []).append(name)
                elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    skipped.setdefault("neither stored nor deflated", []).append(name)
                else:
                    yield Member(name, info.header_offset, info.compress_size, info.compress_type, info.file_size, info.CRC)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise DataError(f"{path}: a damaged zip file ({error}); copy it again") from None


def _require_alone(file: zipfile.ZipFile) -> None:
    """A zip file is read from its end: of two that were joined, the directory of one would count, and the images of the other be lost."""
    first = min((info.header_offset for info in file.infolist()), default=0)
    start, end = read_at(file.fp.fileno(), 0, 4), read_at(file.fp.fileno(), os.fstat(file.fp.fileno()).st_size - 22 - len(file.comment), 4)
    if first and start == b"PK\x03\x04":
        raise zipfile.BadZipFile(f"its directory does not list what lies before byte {first}; joined with another one?")
    if end != b"PK\x05\x06":
        raise zipfile.BadZipFile("more follows its directory; joined with another one?")


def label_of(data: bytes, suffix: str) -> str | None:
    """The label in a .cls or .json member of a WebDataset sample; None where it has none."""
    try:
        value = data.decode("utf-8").strip()
        if suffix == ".json":
            fields = json.loads(value)
            value = next((fields[key] for key in ("label", "cls", "class", "target") if key in fields), None)
    except (ValueError, TypeError, RecursionError):
        return None
    return str(value) if type(value) in (int, str) and value != "" else None


def _index_archives(files: list[str], name_in_split: Callable[[str], str | None]) -> tuple[Index, list[str]]:
    """List the images of archives with their labels: from the .cls or .json member of their sample, else their folder's name.

    Args:
        name_in_split: from a member's name to its name below the split's folder; None for a member of another split.
    """
    names, labels, below, notices, place = [], [], [], [], array("q")
    for archive, path in enumerate(files):
        images, sample_labels = _images_and_labels(path, name_in_split, notices)
        for name, member in images:
            if sample_labels:  # a WebDataset shard: a sample's members share their name up to the first dot
                folder, slash, base = name.rpartition("/")
                key, _, suffix = base.partition(".")
                if "." in suffix:
                    continue  # a second picture of the sample, such as 0001.mask.png
                if (key := folder + slash + key) not in sample_labels:
                    raise DataError(f"{path}/{member.name}: has no label (.cls or .json) in its sample, though others in the shard have")
                labels.append(sample_labels[key])
            else:
                labels.append(_folder_label(name, _stem(path)))
                below.append(name)
            names.append(member.name)
            place.extend((archive, member.offset, member.size, member.method, member.unpacked, member.crc))
    inner = labels if len(below) == len(labels) else []
    while len(set(inner)) == 1 and inner[0]:  # folders around all the class folders, as zip programs make them
        below = [name.partition(f"{inner[0]}/")[2] for name in below]
        inner = [_folder_label(name, "") for name in below]
    labels = inner if all(inner) and len(set(inner)) > 1 else labels
    classes, targets = encode_labels(labels)
    index = dict(targets=targets, place=np.array(place, dtype=np.int64).reshape(-1, 6))
    for key, values in (("names", names), ("classes", classes), ("notices", notices)):
        store_names(index, key, PackedNames.of(values))
    return index, files


def _images_and_labels(path: str, name_in_split: Callable[[str], str | None],
                       notices: list[str]) -> tuple[list[tuple[str, Member]], dict[str, str]]:
    """(images with their names below the split's folder, labels by sample) of an archive."""
    images: list[tuple[str, Member]] = []
    labels: dict[str, str] = {}
    with open(path, "rb") as file:
        for member in members(path, notices):
            if (name := name_in_split(member.name)) is None:
                continue
            stem, suffix = os.path.splitext(name)
            if is_image(os.path.basename(name)):
                images.append((name, member))
            elif suffix in _LABEL_SUFFIXES and member.method < 0 and member.size < 1 << 20 and "." not in os.path.basename(stem):
                label = label_of(read_at(file.fileno(), member.offset, member.size), suffix)
                if label is not None and (suffix == ".cls" or stem not in labels):
                    labels[stem] = label
                elif label is None and suffix == ".cls":
                    raise DataError(f"{path}/{member.name}: holds no label (a number or a class name)")
    return images, labels


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _folder_label(name: str, archive: str) -> str:
    """The first folder of a member's name, below folders named after a split or the archive; "" where there is none."""
    parts = name.split("/")[:-1]
    while parts and (parts[0].lower() in _SPLIT_FOLDERS or parts[0] == archive):
        parts = parts[1:]
    return parts[0].removesuffix(".tar") if parts else ""


def scan_archives(files: Sequence[str], root: str, cache: str | None = None, splits: Sequence[str] = ()) -> ArchiveImages:
    """The images of archives: WebDataset shards, archives of class folders, tar files of a class each, tar files in a tar file.

    Args:
        root: the name of all of them, for messages.
        cache: folder of the index cache, or None.
        splits: names of a split's folder inside the archives: only the images below it are listed. Empty: all.

    Raises:
        DataError: an archive is damaged, or has no images.
    """
    files, wanted = list(files), {name.lower() for name in splits}

    def name_in_split(name: str) -> str | None:
        if not wanted:
            return name
        parts = name.split("/")
        at = next((i for i, part in enumerate(parts[:3]) if part.lower() in wanted), None)
        return None if at is None else "/".join(parts[at + 1:])

    index = cached(cache, "archive:" + ",".join(sorted(wanted)), files, lambda: _index_archives(files, name_in_split))
    targets, classes = index["targets"], list(names_of(index, "classes"))
    if not len(targets):
        raise DataError(f"{root}: holds no images" + (f" below {' or '.join(n + '/' for n in splits)}" if splits else "")
                        + _skipped_words(names_of(index, "notices")))
    notices = [Caution(line) for line in names_of(index, "notices")]
    images = ArchiveImages(root, files, names_of(index, "names"), index["place"], classes, targets, notices)
    if classes == [""] and (len(files) > 1 or re.fullmatch(r"n\d{8}", _stem(files[0]))):
        # one tar file per class, without folders inside
        stems = [_stem(path) for path in files]
        images.classes = sorted(set(stems))
        position = {name: i for i, name in enumerate(images.classes)}
        images.targets = np.array([position[stem] for stem in stems], dtype=np.int64)[images.place[:, 0]]
    return images


def named_by_folders(images: ArchiveImages) -> bool:
    """Whether the classes are named by folders or files of the archives, not by the labels of WebDataset samples (by a hundred images)."""
    for index in range(0, len(images), max(1, len(images) // 100)):
        folders = {folder.removesuffix(".tar") for folder in images.names[index].split("/")[:-1]}
        if images.classes[images.targets[index]] not in folders | {_stem(images.files[images.place[index, 0]])}:
            return False
    return True


def split_folders(path: str, wanted: set[str]) -> set[str]:
    """Which of the names ``wanted``, in lower case, are folders in an archive, at its top or up to two levels below."""
    found: set[str] = set()
    notices: list[str] = []
    for member in members(path, notices):
        found |= {part.lower() for part in member.name.split("/")[:-1][:3]} & wanted
        if found == wanted:
            break
    if not found and notices:
        raise DataError(f"{path}: shows no folders" + _skipped_words(notices))
    return found


def _skipped_words(notices: Iterable[str]) -> str:
    """What was skipped in archives of which nothing is left; "" where nothing was."""
    words = "; ".join(line.partition(": ")[2] for line in notices)
    return f": {words}; unpack it, and pack it again as a plain .tar or .zip without a password" if words else ""
