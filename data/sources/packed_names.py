"""Many names in two arrays: a million Python strings would take 100 MB in every DataLoader worker."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import numpy as np

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class PackedNames:
    """An immutable sequence of file names (or parts of them), whose memory forked processes share.

    Attributes:
        blob: (bytes,) uint8: the encoded names one after another.
        ends: (names,) int64: where each ends in ``blob``.
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> PackedNames:
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(bytearray(b"".join(encoded)), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.blob[start:int(self.ends[index])].tobytes())

    def __iter__(self) -> Iterable[str]:
        return (self[i] for i in range(len(self)))


def is_image(name: str) -> bool:
    """Whether it is the name of a visible file with an image's extension; not Thumbs.db, .DS_Store or macOS's ._x.jpg."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def is_hidden(folder: str) -> bool:
    """Whether a folder is never a class: .ipynb_checkpoints, .git, and what macOS adds to zip files."""
    return folder.startswith(".") or folder == "__MACOSX"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that compares digits as numbers, as timm does: 2 before 10."""
    parts = [(part, part.lstrip("0")) for part in re.split(r"(\d+)", name.lower()) if part]
    return [(0, len(digits), digits) if part.isdecimal() else (1, 0, part) for part, digits in parts]
