"""Findings about images that are there twice: copies, one under several classes, validation images that training has too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data.doctor.finding import ERROR, WARNING, Finding, Images, all_rows, many, start_of
from data.doctor.image_hashes import near_pairs, same_bytes
from data.doctor.image_record import PLAIN, thumbnail
from data.doctor.survey import Split, Survey
from data.errors import UnreadableImage

LEAK_SHARE = 0.01  # of the validation images: below it a result moves by less than that
_LIKE = 6.0  # mean difference of thumbnails, of 255: copies made half as large and JPEG at quality 60 stay below 5 (99 of 100)
_COMPARED = 20_000  # pairs whose pixels are compared, the nearest first


def same_bytes_twice(survey: Survey) -> Iterator[Finding]:
    """Byte for byte: copies within a split, under several classes, in training and validation."""
    rows = all_rows(survey)
    if not len(rows):
        return
    read = np.flatnonzero(np.concatenate([split.readable for split in survey.splits.values()]))
    targets = np.concatenate([split.targets for split in survey.splits.values()])
    border = len(survey.splits["train"].rows) if "train" in survey.splits else 0
    first: dict[str, list[int]] = {name: [] for name in ("copies", "conflicts", "leaks", "leaked from")}
    twin: dict[int, int] = {}
    for group in same_bytes(rows["sha256"][read]):
        members = read[group]
        for part in (members[members < border], members[members >= border]):
            if len(part) < 2:
                continue
            if len(np.unique(targets[part])) > 1:
                first["conflicts"] += part.tolist()
                twin.update((p, int(part[targets[part] != targets[p]][0])) for p in part.tolist())
            else:
                first["copies"] += part[1:].tolist()
                twin.update((p, int(part[0])) for p in part[1:].tolist())
        inside, outside = members[members < border], members[members >= border]
        if len(inside) and len(outside):
            first["leaks"] += outside.tolist()
            first["leaked from"] += inside.tolist()
            twin.update((p, int(inside[0])) for p in outside.tolist() if p not in twin or twin[p] >= border)
    everywhere = Images(survey, np.zeros(0))

    def named(position: int) -> tuple[str, int]:
        split, index = everywhere.place(position)
        return split.source.path(index), int(split.targets[index])

    def like(split: Split, index: int) -> str:
        path, target = named(twin[index + start_of(survey, split.name)])
        other = f", there of class {survey.classes[target]!r}" if target != split.targets[index] else ""
        return f"= {os.path.relpath(path, survey.root) if os.path.isdir(survey.root) else path}{other}"

    if first["leaks"]:
        share = len(first["leaks"]) / max(1, len(rows) - border)
        yield Images(survey, first["leaks"], like).finding(
            "leaks", ERROR if share >= LEAK_SHARE else WARNING,
            f"{many(len(first['leaks']), 'validation image')} ({share:.2%}) that train holds too, byte for byte: results are too good",
            advice="take them out of train", moves=Images(survey, first["leaked from"]).moves())
    if first["conflicts"]:
        images = Images(survey, first["conflicts"], like)
        yield images.finding("conflicts", WARNING, f"{many(len(first['conflicts']))} under more than one class, byte for byte the same",
                             advice="keep the right one of each; the script takes out all", moves=images.moves())
    if first["copies"]:
        images = Images(survey, first["copies"], like)
        yield images.finding("copies", WARNING, f"{many(len(first['copies']), 'copy')} of another image of the class, byte for byte",
                             advice="the script keeps the first of each", moves=images.moves())


def look_alikes(survey: Survey, distance: int) -> Iterator[Finding]:
    """To the eye: validation images of which training has another version."""
    train, val = survey.splits.get("train"), survey.splits.get("val")
    if train is None or val is None:
        return
    able = [np.flatnonzero(split.readable & ((split.rows["flags"] & PLAIN) == 0)) for split in (train, val)]
    at, match, bits = near_pairs(train.rows["hash"][able[0]], val.rows["hash"][able[1]], distance)
    theirs, ours = able[0][match], able[1][at]
    differ = np.any(train.rows["sha256"][theirs] != val.rows["sha256"][ours], axis=1)
    theirs, ours, bits = theirs[differ], ours[differ], bits[differ]
    order = np.argsort(bits, kind="stable")[:_COMPARED]
    theirs, ours = theirs[order], ours[order]
    with ThreadPoolExecutor(max(1, survey.processes)) as pool:  # Pillow decodes without holding the interpreter
        pairs = zip(theirs.tolist(), ours.tolist(), strict=True)
        same = np.array(list(pool.map(lambda pair: _look_alike(train, val, *pair), pairs)), dtype=bool)
    theirs, ours = theirs[same], ours[same]
    if not len(ours):
        return
    start = len(train.rows)
    origin = dict(zip(ours.tolist(), theirs.tolist(), strict=True))

    def like(split: Split, index: int) -> str:
        other = origin[index]
        path = train.source.path(other)
        said = f"~ {os.path.relpath(path, survey.root) if os.path.isdir(survey.root) else path}"
        return said + (f", there of class {survey.classes[train.targets[other]]!r}" if train.targets[other] != val.targets[index] else "")

    share = len(ours) / len(val.rows)
    yield Images(survey, ours + start, like).finding(
        "near-leaks", WARNING,
        f"{many(len(ours), 'validation image')} ({share:.2%}) much like a training image (resized or compressed anew?)",
        advice="look at some of them; the script takes the training images out", moves=Images(survey, np.unique(theirs)).moves())


def _look_alike(train: Split, val: Split, theirs: int, ours: int) -> bool:
    try:
        one, other = thumbnail(train.source, theirs), thumbnail(val.source, ours)
    except UnreadableImage:  # gone since
        return False
    return float(np.abs(one - other).mean()) < _LIKE
