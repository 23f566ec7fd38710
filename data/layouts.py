"""Recognising how data is laid out."""

from __future__ import annotations

import os
from collections.abc import Sequence

from data.errors import DataError
from data.folder import LAYOUT, VAL_NAMES, entries
from data.names import is_image


def find_split(root: str, names: Sequence[str]) -> str:
    """The folder of a split below ``root``.

    Raises:
        DataError: no such folder, with advice from what is there instead.
    """
    if not os.path.exists(root):
        raise DataError(f"{root}: no such data folder; give the folder that holds train/ and val/ with --data-path")
    if not os.path.isdir(root):
        raise DataError(f"{root}: is a file; give the folder that holds train/ and val/ with --data-path")
    for name in names:
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name)
    raise DataError(f"{root}: holds no {' or '.join(n + '/' for n in names)} folder; {LAYOUT}{_advice(root)}")


def _advice(root: str) -> str:
    found = entries(root)
    folders = [e.name for e in found if e.is_dir()]
    if not found:
        return "; the folder is empty"
    splits = {"train", *VAL_NAMES}
    if os.path.basename(os.path.abspath(root)) in splits:
        return f"; this looks like one split, give its parent {os.path.dirname(os.path.abspath(root))}"
    for name in folders:
        if splits & {e.name for e in entries(os.path.join(root, name)) if e.is_dir()}:
            return f"; {os.path.join(root, name)} holds them, give that"
    if folders and any(is_image(e.name) for e in entries(os.path.join(root, folders[0]))):
        return "; its folders look like classes without a split: move them into train/ and a part of each class into val/"
    return ""


