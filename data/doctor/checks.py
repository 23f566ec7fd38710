"""The doctor's checks: from a survey to findings, each with its severity and its repair.

An error stops training or makes its result worthless, a warning harms the result, a note is worth knowing.
"""

from __future__ import annotations

import difflib
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from config import image_size
from data.doctor.duplicate_checks import exact_duplicates, near_duplicates
from data.doctor.finding import ERROR, NOTE, SEVERITIES, WARNING, Finding, Images, Move, all_rows, many, start_of
from data.doctor.ignored_files import HIDDEN, LOOSE, ignored_files
from data.doctor.image_record import ALPHA, ANIMATED, BLANK, DEEP, EXIF_ROTATED, EXTENSION_OF, MISNAMED, MODES, format_of
from data.doctor.survey import Split, Survey, base_of
from data.sources.deep_levels import window_option

HUGE_PIXELS = 20_000_000
LONG, MANY_LONG = 2, 0.1  # sides over those of the input's shape; share of the images from where such ones are a warning
_FOUND_HERE = ("empty-classes", "missing-classes", "fault")  # codes of messages of the listing that are findings here


def findings(survey: Survey, distance: int) -> list[Finding]:
    """All findings, errors first.

    Args:
        distance: bits in which the fingerprints of near-duplicates may differ; negative: near-duplicates are not looked for.
    """
    found = [*_splits(survey), *_classes(survey), *_unreadable(survey), *exact_duplicates(survey), *_kinds(survey), *_ignored(survey)]
    if distance >= 0:
        found += near_duplicates(survey, distance)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


# --------------------------------------------------------------------------------------------------
# Splits and classes
# --------------------------------------------------------------------------------------------------

def _splits(survey: Survey) -> Iterator[Finding]:
    for name, sentence in survey.failures.items():
        if name == "val" and sentence == survey.failures.get("train"):
            continue
        advised = "--opts DATA.VAL_FRACTION 0.1" if "DATA.VAL_FRACTION" in sentence else ""
        yield Finding(f"no-{name}", ERROR, sentence, commands=[advised] if advised else [])
    data, train = survey.config.DATA, survey.splits.get("train")
    if train is not None:
        batch = data.BATCH_SIZE * survey.config.TRAIN.ACCUMULATION_STEPS
        if len(train.rows) < batch:
            fitting = max(1, 2 ** int(np.log2(max(1, len(train.rows) // 4))))
            yield Finding("small", WARNING,
                          f"only {many(len(train.rows), 'training image')}, less than a batch ({batch:,}): an epoch is one step",
                          commands=[f"--batch-size {fitting} --accumulation-steps 1"])
        wanted = survey.config.MODEL.NUM_CLASSES
        if wanted and wanted != survey.known:
            yield Finding("class-count", ERROR, f"MODEL.NUM_CLASSES is {wanted}, but the data has {many(survey.known, 'class')}",
                          commands=["--opts MODEL.NUM_CLASSES 0"])
        if survey.known == 1:
            yield Finding("one-class", WARNING,
                          "there is one class only: nothing can be learned from it", advice="give another class's folder")
    seen = set()
    for split in survey.splits.values():
        for line in split.source.notices:
            if line.code not in _FOUND_HERE and line not in seen:
                seen.add(line)
                yield Finding("told", WARNING if line.level >= logging.WARNING else NOTE, line, advice="training says the same")


def _classes(survey: Survey) -> Iterator[Finding]:
    train, val, names = survey.splits.get("train"), survey.splits.get("val"), survey.classes
    in_train, in_val = survey.counts("train"), survey.counts("val")
    if train is None:
        return
    if len(names) > survey.known:
        surplus = np.arange(survey.known, len(names))
        near = [difflib.get_close_matches(names[i], names[:survey.known], n=1, cutoff=0.8) for i in surplus[:100].tolist()]
        yield Finding("surplus-classes", ERROR,
                      f"{many(len(surplus), 'class')} of val that train does not know: training stops", len(surplus),
                      lambda i: dict(name=names[surplus[i]], detail=many(in_val[surplus[i]])
                                     + (f"; is {near[i][0]!r} meant?" if i < len(near) and near[i] else "")),
                      advice="name them as train does, or take them out of val", moves=_folders(val, names, surplus))
    known = np.arange(survey.known)
    empty = known[in_train[known] == 0]
    if len(empty):
        yield Finding("empty-classes", WARNING, f"{many(len(empty), 'class')} without training images", len(empty),
                      lambda i: dict(name=names[empty[i]], detail=f"{many(in_val[empty[i]])} in val"),
                      advice="add images, or take the classes out of train and val",
                      moves=_folders(train, names, empty, val))
    if val is not None:
        missing = known[(in_val[known] == 0) & (in_train[known] > 0)]
        if len(missing):
            yield Finding("missing-classes", WARNING,
                          f"{many(len(missing), 'class')} without validation images: nothing says what is learned there",
                          len(missing), lambda i: dict(name=names[missing[i]], detail=f"{many(in_train[missing[i]])} in train"),
                          advice="give val a tenth of the training images", moves=_share(train, val, names, missing))
    alike: dict[str, list[str]] = {}
    for name in names[:survey.known]:
        alike.setdefault(" ".join(name.lower().replace("_", " ").replace("-", " ").split()), []).append(name)
    double = [group for group in alike.values() if len(group) > 1]
    if double:
        yield Finding("double-classes", WARNING,
                      f"{many(len(double), 'class')} under several names that differ only in case or blanks", len(double),
                      lambda i: dict(name=double[i][0], detail="also " + ", ".join(map(repr, double[i][1:]))),
                      advice="join them with a file of lines label<TAB>class, given as DATA.CLASS_NAMES")
    unusual = [name for name in names if not name.isprintable() or len(name) > 100]
    if unusual:
        yield Finding("odd-names", NOTE,
                      f"{many(len(unusual), 'class')} with control characters in the name, or more than 100 letters", len(unusual),
                      lambda i: dict(name=unusual[i], detail=f"{len(unusual[i])} letters"),
                      advice="this works here; rename those that other programs cannot use")
    present = in_train[in_train > 0]
    if len(present) and present.max() >= 10 * present.min() and len(present) > 1:
        yield Finding("imbalance", WARNING if present.max() >= 100 * present.min() else NOTE,
                      f"classes of {present.min():,} to {present.max():,} training images, 1 to {present.max() / present.min():,.0f}",
                      advice="top-1 favours the large ones; add images to the small ones, or let training see all alike",
                      commands=["--opts DATA.SAMPLING balanced TRAIN.BEST_METRIC mean_recall"])


def _folders(split: Split | None, names: Sequence[str], chosen: np.ndarray, other: Split | None = None):
    """Moves of whole class folders out of one split, or two; None where classes are not folders."""
    if split is None or not split.movable or split.source.classes == [""]:
        return None
    own = [s for s in (split, other) if s is not None and s.movable]

    def moves() -> Iterator[Move]:
        for number in chosen.tolist():
            for part in own:
                path = os.path.join(part.source.root, names[number])
                if os.path.isdir(path):
                    yield Move(path)
    return moves


def _share(train: Split, val: Split, names: Sequence[str], chosen: np.ndarray):
    """Moves of a tenth of some classes' readable training images to validation."""
    if not (train.movable and val.movable) or train.source.root == val.source.root:
        return None

    def moves() -> Iterator[Move]:
        for number in chosen.tolist():
            images = np.flatnonzero((train.targets == number) & train.readable)
            for index in images[len(images) - max(1, len(images) // 10):].tolist() if len(images) > 1 else []:
                path = train.source.path(index)
                yield Move(path, os.path.join(val.source.root, names[number], os.path.basename(path)))
    return moves


# --------------------------------------------------------------------------------------------------
# Single images
# --------------------------------------------------------------------------------------------------

def _unreadable(survey: Survey) -> Iterator[Finding]:
    for split in survey.splits.values():
        bad = np.flatnonzero(~split.readable)
        if not len(bad):
            continue
        images = Images(survey, bad + start_of(survey, split.name), lambda split, index: split.reasons.get(index, ""))
        much = f"{len(bad):,} of {len(split.rows):,} images of {split.name} cannot be read"
        if split.name == "val":
            whole = len(bad) == len(split.rows)
            yield images.finding("unreadable-val", ERROR if whole else WARNING, much + ("" if whole else "; results do not count them"),
                                 moves=images.moves())
            continue
        budget = survey.config.DATA.CORRUPT_BUDGET
        allowed = int(budget * len(split.rows) if budget < 1 else budget)
        over = len(bad) > allowed
        yield images.finding("unreadable-train", ERROR if over else WARNING,
                             much + (f": training stops above {allowed:,}" if over else "; others of their class replace them"),
                             commands=[f"--opts DATA.CORRUPT_BUDGET {len(bad)}"] if over else [], moves=images.moves())
        counts, readable = survey.counts("train"), survey.counts("train", readable=True)
        lost = np.flatnonzero((counts > 0) & (readable == 0))
        if len(lost):
            yield Finding("unreadable-classes", ERROR,
                          f"{many(len(lost), 'class')} without a readable training image: training stops there",
                          len(lost), lambda i, lost=lost, counts=counts: dict(
                              name=survey.classes[lost[i]], detail=f"{counts[lost[i]]:,} unreadable"),
                          advice="repair or add images, or take the classes out of train and val",
                          moves=_folders(split, survey.classes, lost, survey.splits.get("val")))


def _kinds(survey: Survey) -> Iterator[Finding]:
    """Unusual sizes, and files whose reading needs a note."""
    rows = all_rows(survey)
    if not len(rows):
        return
    flags, read = rows["flags"], np.concatenate([split.readable for split in survey.splits.values()])
    shorter = np.minimum(rows["width"], rows["height"])
    side = min(image_size(survey.config))

    def size(split: Split, index: int) -> str:
        return f"{split.rows['width'][index]} x {split.rows['height'][index]}"

    tiny = min(32, side // 4)
    if len(at := np.flatnonzero(read & (shorter < tiny))):
        images = Images(survey, at, size)
        yield images.finding("tiny", WARNING,
                             f"{many(len(at))} with a side below {tiny} pixels (the input is {side})", moves=images.moves())
    pixels = rows["width"].astype(np.int64) * rows["height"]
    if len(at := np.flatnonzero(read & (pixels > HUGE_PIXELS))):
        ms = rows["decode_us"][at].mean() / 1000
        yield Images(survey, at, size).finding("huge", NOTE, f"{many(len(at))} of more than {HUGE_PIXELS // 10**6} million pixels, "
                                               f"{ms:,.0f} ms each to decode", commands=[resize_command(survey)])
    yield from _long(survey, rows, read, size)
    if len(at := np.flatnonzero(read & ((flags & BLANK) > 0))):
        images = Images(survey, at, size)
        yield images.finding("blank", WARNING, f"{many(len(at))} of a single colour", moves=images.moves())
    if len(at := np.flatnonzero(read & ((flags & MISNAMED) > 0))):
        images = Images(survey, at, lambda split, index: f"is {format_of(split.rows[index])}")
        yield images.finding("misnamed", NOTE, f"{many(len(at))} with another format's extension, read by content",
                             advice="nothing needs to be done for training", moves=images.moves(_right_name))
    if len(at := np.flatnonzero(read & ((flags & EXIF_ROTATED) > 0))) and not survey.config.DATA.EXIF:
        yield Images(survey, at).finding("exif", NOTE,
                                         f"{many(len(at))} rotated by an EXIF orientation, used as stored (as torchvision and timm do)",
                                         commands=["--opts DATA.EXIF True"])
    if len(at := np.flatnonzero(read & ((flags & ANIMATED) > 0))):
        yield Images(survey, at).finding("animated", NOTE, f"{many(len(at), 'file')} of several pictures, of which the first is used",
                                         advice="nothing needs to be done")
    if len(at := np.flatnonzero(read & ((flags & ALPHA) > 0))):
        yield Images(survey, at, _mode).finding("transparent", NOTE,
                                                f"{many(len(at))} with an alpha channel; transparent parts become white",
                                                advice="nothing needs to be done")
    if len(at := np.flatnonzero(read & (rows["mode"] == MODES.index("CMYK")))):
        yield Images(survey, at, _mode).finding("cmyk", NOTE,
                                                f"{many(len(at))} in CMYK, converted by Pillow's rule (as torchvision and timm do)",
                                                advice="nothing needs to be done")
    if len(at := np.flatnonzero(read & ((flags & DEEP) > 0))):
        yield from _deep(Images(survey, at, _mode), survey)
    middle = float(np.median(shorter[read])) if read.any() else 0
    if middle > 2.5 * side:
        yield Finding("large", NOTE, f"half of the images have a shorter side above {middle:,.0f} pixels, and the input is {side}: "
                      "a smaller copy decodes several times as fast", commands=[resize_command(survey)])


def _deep(images: Images, survey: Survey) -> Iterator[Finding]:
    levels, much = survey.levels, f"{many(len(images.positions))} of more than 8 bits a channel, scaled to 8"
    if levels is None:
        yield images.finding("deep", WARNING, f"{much}; they are rare, and the first look of training may miss them",
                             advice="give the values that are black and white with DATA.WINDOW")
        return
    yield images.finding("deep", NOTE, f"{much}: {levels.words()}, in all of them",
                         advice="training finds the same, and its checkpoints keep it")
    if levels.few:
        yield Finding("few-levels", WARNING, levels.loss(), advice="differences between images may be lost",
                      commands=[f"--opts {window_option(levels.better)}"] if levels.better is not None else [])


def _long(survey: Survey, rows: np.ndarray, read: np.ndarray, size: Callable[[Split, int], str]) -> Iterator[Finding]:
    """Images of another shape than the input, which crops show only parts of."""
    high, wide = image_size(survey.config)
    lengths = np.maximum(rows["width"], 1) * float(high) / (np.maximum(rows["height"], 1) * float(wide))
    lengths = np.maximum(lengths, 1 / lengths)
    at = np.flatnonzero(read & (lengths >= LONG))
    if len(at) and survey.config.DATA.FIT == "crop":
        middle = np.median(lengths[at])
        yield Images(survey, at, size).finding(
            "long", WARNING if len(at) >= MANY_LONG * read.sum() else NOTE,
            f"{many(len(at))} at least {LONG} times as long or as high as the input's shape, half of them {middle:.1f} times or more: "
            + (f"evaluation sees the middle {100 / middle:.0f} % of such an image, " if survey.config.TEST.CROP else "")
            + "training sees crops of other proportions",
            "where a class shows at the edges, squash the images or pad them (DATA.FIT)", ["--opts DATA.FIT squash"])


def _mode(split: Split, index: int) -> str:
    return MODES[split.rows["mode"][index]]


def _right_name(split: Split, index: int) -> str:
    path = split.source.path(index)
    return os.path.splitext(path)[0] + EXTENSION_OF.get(format_of(split.rows[index]), "")


def resize_command(survey: Survey) -> str:
    """The command that makes a smaller copy of the data."""
    side = min(512, max(256, round(min(image_size(survey.config)) * 352 / 224)))
    root = survey.root.rstrip(os.sep) or survey.root
    stem = os.path.splitext(root)[0] if os.path.isfile(root) else root
    share = survey.config.DATA.VAL_FRACTION
    return (f"python scripts/resize_dataset.py {shlex.quote(root)} {shlex.quote(f'{stem}-{side}')} --side {side}"
            + (f" --val-fraction {share:g}" if share else ""))


def _ignored(survey: Survey) -> Iterator[Finding]:
    seen: set[Any] = set()
    for split in survey.splits.values():
        base, _ = base_of(split.source)
        place = tuple(getattr(base, "files", ())) or base.root
        if place in seen or (not split.movable and not hasattr(base, "files")):
            continue
        seen.add(place)
        counts, examples = ignored_files(base)
        if loose := counts.pop(LOOSE, 0):
            yield Finding("loose", WARNING, f"{many(loose)} of {split.name} outside any class folder: not used", 1,
                          lambda i, e=examples[LOOSE]: dict(path=e, detail="for example"), advice="move them into their class's folder")
        if counts:
            kinds = sorted(counts.items(), key=lambda kind: -kind[1])
            other = set(counts) - {HIDDEN}
            yield Finding("passed-over", NOTE,
                          f"{many(counts.total(), 'file')} or folders of {split.name} ignored: not images", len(kinds),
                          lambda i, kinds=kinds, examples=examples: dict(
                              path=examples[kinds[i][0]], detail=f"{kinds[i][1]:,} {kinds[i][0]}", number=kinds[i][1]),
                          advice=f"pictures of other kinds than {', '.join(EXTENSION_OF)} must be converted" if other
                          else "nothing needs to be done")


