"""Many names in two arrays: a million Python strings would cost 100 MB in every loading process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import numpy as np

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class PackedNames:
    """An immutable sequence of file names (or parts of them); shared by forked processes without growing.

    Attributes:
        blob: the encoded names one after another, uint8 (bytes,).
        ends: where each ends, int64 (count,).
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
    """A visible file with an image's extension; Thumbs.db, .DS_Store and macOS's ._x.jpg are none."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def is_hidden(folder: str) -> bool:
    """A folder that is never a class: .ipynb_checkpoints, .git, and what macOS adds to zip files."""
    return folder.startswith(".") or folder == "__MACOSX"


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that takes digits for numbers, as timm sorts: 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name.lower()) if part]
