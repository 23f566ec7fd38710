"""Findings about duplicate images: copies, an image in several classes, validation images in the training split."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data.doctor.finding import ERROR, WARNING, Finding, Images, all_rows, many, start_of
from data.doctor.image_hashes import equal_groups, near_pairs
from data.doctor.image_record import PLAIN, thumbnail
from data.doctor.survey import Split, Survey
from data.errors import UnreadableImage

LEAK_FRACTION = 0.01  # of the validation images: fewer leaks change a result by less than that
# Mean difference of two thumbnails, of 255, below which images are near-duplicates: 99 of 100 copies of half the size, saved as JPEG
# of quality 60, stay below 5.
_MAX_DIFFERENCE = 6.0
_MAX_COMPARED = 20_000  # pairs whose pixels are compared, the nearest first


def exact_duplicates(survey: Survey) -> Iterator[Finding]:
    """Images of the same bytes: within a class, in several classes, in training and validation."""
    rows = all_rows(survey)
    if not len(rows):
        return
    read = np.flatnonzero(np.concatenate([split.readable for split in survey.splits.values()]))
    targets = np.concatenate([split.groups for split in survey.splits.values()])
    border = len(survey.splits["train"].rows) if "train" in survey.splits else 0
    found: dict[str, list[int]] = {name: [] for name in ("copies", "conflicts", "leaks", "leaked from")}
    duplicate_of: dict[int, int] = {}
    for group in equal_groups(rows["sha256"][read]):
        members = read[group]
        for part in (members[members < border], members[members >= border]):
            if len(part) < 2:
                continue
            if len(np.unique(targets[part])) > 1:
                found["conflicts"] += part.tolist()
                duplicate_of.update((p, int(part[targets[part] != targets[p]][0])) for p in part.tolist())
            else:
                found["copies"] += part[1:].tolist()
                duplicate_of.update((p, int(part[0])) for p in part[1:].tolist())
        in_train, in_val = members[members < border], members[members >= border]
        if len(in_train) and len(in_val):
            found["leaks"] += in_val.tolist()
            found["leaked from"] += in_train.tolist()
            duplicate_of.update((p, int(in_train[0])) for p in in_val.tolist() if p not in duplicate_of or duplicate_of[p] >= border)
    everything = Images(survey, np.zeros(0))

    def detail(split: Split, index: int) -> str:
        other, other_index = everything.place(duplicate_of[index + start_of(survey, split.name)])
        return _same_as("=", survey, split, index, other, other_index)

    if found["leaks"]:
        fraction = len(found["leaks"]) / max(1, len(rows) - border)
        yield Images(survey, found["leaks"], detail).finding(
            "leaks", ERROR if fraction >= LEAK_FRACTION else WARNING,
            f"{many(len(found['leaks']), 'validation image')} ({fraction:.2%}) that train holds too, byte for byte: results are too good",
            advice="take them out of train", moves=Images(survey, found["leaked from"]).moves())
    if found["conflicts"]:
        images = Images(survey, found["conflicts"], detail)
        yield images.finding("conflicts", WARNING, f"{many(len(found['conflicts']))} under more than one class, byte for byte the same",
                             advice="keep the right one of each; the script takes out all", moves=images.moves())
    if found["copies"]:
        images = Images(survey, found["copies"], detail)
        yield images.finding("copies", WARNING, f"{many(len(found['copies']), 'copy')} of another image of the class, byte for byte",
                             advice="the script keeps the first of each", moves=images.moves())


def _same_as(sign: str, survey: Survey, split: Split, index: int, other: Split, other_index: int) -> str:
    """An item's detail: the other image's path, and its class where that is another."""
    path, label = other.source.path(other_index), other.label(other_index, survey.classes)
    return (f"{sign} {os.path.relpath(path, survey.root) if os.path.isdir(survey.root) else path}"
            + (f", there of class {label!r}" if label != split.label(index, survey.classes) else ""))


def near_duplicates(survey: Survey, distance: int) -> Iterator[Finding]:
    """Validation images of which training has another version; ``distance`` is that of the fingerprints, in bits."""
    train, val = survey.splits.get("train"), survey.splits.get("val")
    if train is None or val is None:
        return
    usable = [np.flatnonzero(split.readable & ((split.rows["flags"] & PLAIN) == 0)) for split in (train, val)]
    query, match, bits = near_pairs(train.rows["hash"][usable[0]], val.rows["hash"][usable[1]], distance)
    in_train, in_val = usable[0][match], usable[1][query]
    differ = np.any(train.rows["sha256"][in_train] != val.rows["sha256"][in_val], axis=1)
    in_train, in_val, bits = in_train[differ], in_val[differ], bits[differ]
    order = np.argsort(bits, kind="stable")[:_MAX_COMPARED]
    in_train, in_val = in_train[order], in_val[order]
    with ThreadPoolExecutor(max(1, survey.processes)) as pool:  # Pillow decodes without holding the interpreter's lock
        pairs = zip(in_train.tolist(), in_val.tolist(), strict=True)
        same = np.array(list(pool.map(lambda pair: _thumbnails_agree(train, val, *pair), pairs)), dtype=bool)
    in_train, in_val = in_train[same], in_val[same]
    if not len(in_val):
        return
    duplicate_of = dict(zip(in_val.tolist(), in_train.tolist(), strict=True))

    def detail(split: Split, index: int) -> str:
        return _same_as("~", survey, split, index, train, duplicate_of[index])

    yield Images(survey, in_val + len(train.rows), detail).finding(
        "near-leaks", WARNING,
        f"{many(len(in_val), 'validation image')} ({len(in_val) / len(val.rows):.2%}) much like a training image "
        "(resized or compressed again?)",
        advice="look at some of them; the script takes the training images out", moves=Images(survey, np.unique(in_train)).moves())


def _thumbnails_agree(train: Split, val: Split, in_train: int, in_val: int) -> bool:
    try:
        one, other = thumbnail(train.source, in_train), thumbnail(val.source, in_val)
    except UnreadableImage:  # deleted in the meantime
        return False
    return float(np.abs(one - other).mean()) < _MAX_DIFFERENCE
