"""What the doctor makes of a survey: findings, each with its severity and what mends it.

An error is what training would stop for or what makes its result worthless, a warning what harms it, a note what is worth
knowing. Findings hold positions, not sentences: a million of them cost a few megabytes.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from config import image_size
from data.classes import some
from data.errors import UnreadableImage
from data.examine import ALPHA, ANIMATED, BLANK, EXIF_TURNED, EXTENSION_OF, MISNAMED, MODES, PLAIN, format_of, thumbnail
from data.similar import near_pairs, same_bytes
from data.strays import HIDDEN, LOOSE, strays
from data.survey import Split, Survey, base_of

ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")
HUGE_PIXELS = 20_000_000
LEAK_SHARE = 0.01  # of the validation images: below it a result moves by less than that
_LIKE = 6.0  # mean difference of thumbnails, of 255: recompressed and resized copies stay below 3, other pictures begin at 10
_COMPARED = 20_000  # pairs whose pixels are compared, the nearest first


@dataclass(frozen=True)
class Move:
    """A file to take out of the data (``to`` empty), or to be called or placed otherwise."""

    path: str
    to: str = ""


@dataclass
class Finding:
    """One thing found.

    Attributes:
        code: a word for scripts.
        title: a sentence without a full stop.
        count: how many items there are; ``item(i)`` describes one: ``path`` or ``name``, and ``detail``.
        advice: what to do, or that nothing needs doing.
        commands: that mend it.
        moves: files to take out or rename; whoever writes the report makes a script of them.
    """

    code: str
    severity: str
    title: str
    count: int = 0
    item: Callable[[int], dict[str, Any]] = dict
    advice: str = ""
    commands: list[str] = field(default_factory=list)
    moves: Callable[[], Iterator[Move]] | None = None


def findings(survey: Survey, distance: int) -> list[Finding]:
    """All findings, the gravest first.

    Args:
        distance: bits in which near-duplicates' fingerprints may differ; negative looks for none.
    """
    found = [*_splits(survey), *_classes(survey), *_unreadable(survey), *_same(survey), *_kinds(survey), *_passed_over(survey)]
    if distance >= 0:
        found += _alike(survey, distance)
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
            yield Finding("small", WARNING, f"{len(train.rows):,} training images are fewer than a batch ({batch:,}), so that an epoch is one step",
                          commands=[f"--batch-size {max(1, 2 ** int(np.log2(max(1, len(train.rows) // 4))))} --accumulation-steps 1"])
        wanted = survey.config.MODEL.NUM_CLASSES
        if wanted and wanted != survey.known:
            yield Finding("class-count", ERROR, f"MODEL.NUM_CLASSES is {wanted}, but there are {survey.known} classes",
                          commands=["--opts MODEL.NUM_CLASSES 0"])
        if survey.known == 1:
            yield Finding("one-class", WARNING, "there is one class only: nothing can be learned from it", advice="give another class's folder")
    told = set()
    for split in survey.splits.values():
        for line in split.source.notices:
            severity, _, sentence = line.partition(": ")
            if "empty class folders" not in line and "classes without a folder" not in line and sentence not in told:
                told.add(sentence)
                yield Finding("told", WARNING if severity == "warning" else NOTE, sentence, advice="training says the same")


def _classes(survey: Survey) -> Iterator[Finding]:
    train, val, names = survey.splits.get("train"), survey.splits.get("val"), survey.classes
    in_train, in_val = survey.counts("train"), survey.counts("val")
    if train is None:
        return
    if len(names) > survey.known:
        surplus = np.arange(survey.known, len(names))
        near = {i: difflib.get_close_matches(names[i], names[:survey.known], n=1, cutoff=0.8) for i in surplus[:100].tolist()}
        yield Finding("surplus-classes", ERROR, f"{len(surplus):,} classes of val are unknown to train: training stops", len(surplus),
                      lambda i: dict(name=names[surplus[i]], detail=f"{in_val[surplus[i]]:,} images"
                                     + (f"; {near[surplus[i]][0]!r} is meant?" if near.get(surplus[i]) else "")),
                      advice="name them as train does, or take them out of val", moves=_folders(val, names, surplus))
    known = np.arange(survey.known)
    empty = known[in_train[known] == 0]
    if len(empty):
        yield Finding("empty-classes", WARNING, f"{len(empty):,} classes have no training images", len(empty),
                      lambda i: dict(name=names[empty[i]], detail=f"{in_val[empty[i]]:,} images in val"),
                      advice="add images, or take the classes out of train and val",
                      moves=_folders(train, names, empty, val))
    if val is not None:
        missing = known[(in_val[known] == 0) & (in_train[known] > 0)]
        if len(missing):
            yield Finding("missing-classes", WARNING, f"{len(missing):,} classes have no validation images: nothing says how well they are learned",
                          len(missing), lambda i: dict(name=names[missing[i]], detail=f"{in_train[missing[i]]:,} images in train"),
                          advice="give val a tenth of their training images", moves=_share(train, val, names, missing))
    alike: dict[str, list[str]] = {}
    for name in names[:survey.known]:
        alike.setdefault(" ".join(name.lower().replace("_", " ").replace("-", " ").split()), []).append(name)
    double = [group for group in alike.values() if len(group) > 1]
    if double:
        yield Finding("double-classes", WARNING, f"{len(double):,} classes stand there twice, under names that differ in case or blanks only",
                      len(double), lambda i: dict(name=double[i][0], detail="also " + ", ".join(map(repr, double[i][1:]))),
                      advice="join them with a file of lines label<TAB>class, given as DATA.CLASS_NAMES")
    odd = [name for name in names if not name.isprintable() or len(name) > 100]
    if odd:
        yield Finding("odd-names", NOTE, f"{len(odd):,} classes have names with control characters or of more than 100 letters", len(odd),
                      lambda i: dict(name=odd[i], detail=f"{len(odd[i])} letters"), advice="they work; rename them where they are in the way")
    present = in_train[in_train > 0]
    if len(present) and present.max() >= 10 * present.min() and len(present) > 1:
        yield Finding("imbalance", WARNING if present.max() >= 100 * present.min() else NOTE,
                      f"the largest class has {present.max() / present.min():,.0f} times as many training images as the smallest "
                      f"({present.max():,} and {present.min():,})",
                      advice="top-1 favours the large ones; add images to the small ones")


def _folders(split: Split | None, names: Sequence[str], chosen: np.ndarray, other: Split | None = None):
    """Moves of whole class folders out of one split, or two; None where they are no folders."""
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

class Images:
    """Some images of a survey, as items of a finding and as files to take out.

    Args:
        positions: positions in all splits put one behind the other.
    """

    def __init__(self, survey: Survey, positions: np.ndarray, detail: Callable[[Split, int], str] = lambda split, index: ""):
        self.positions, self.detail = np.asarray(positions, dtype=np.int64), detail
        self.splits = list(survey.splits.values())
        self.starts = np.cumsum([0, *(len(split.rows) for split in self.splits)])

    def place(self, position: int) -> tuple[Split, int]:
        at = int(np.searchsorted(self.starts, position, "right")) - 1
        return self.splits[at], int(position - self.starts[at])

    def item(self, i: int) -> dict[str, Any]:
        split, index = self.place(self.positions[i])
        return dict(path=split.source.path(index), split=split.name, detail=self.detail(split, index))

    def moves(self, target: Callable[[Split, int], str] = lambda split, index: "") -> Callable[[], Iterator[Move]] | None:
        if not any(self.place(p)[0].movable for p in self.positions[:1000]):
            return None

        def generate() -> Iterator[Move]:
            for position in self.positions.tolist():
                split, index = self.place(position)
                if split.movable:
                    yield Move(split.source.path(index), target(split, index))
        return generate

    def finding(self, code: str, severity: str, title: str, advice: str = "", commands: Sequence[str] = (), moves=None) -> Finding:
        return Finding(code, severity, title, len(self.positions), self.item, advice, list(commands), moves)


def _rows(survey: Survey) -> np.ndarray:
    rows = [split.rows for split in survey.splits.values()]
    return np.concatenate(rows) if rows else np.zeros(0)


def _start(survey: Survey, name: str) -> int:
    return len(survey.splits["train"].rows) if name == "val" and "train" in survey.splits else 0


def _unreadable(survey: Survey) -> Iterator[Finding]:
    for split in survey.splits.values():
        bad = np.flatnonzero(~split.readable)
        if not len(bad):
            continue
        images = Images(survey, bad + _start(survey, split.name), lambda split, index: split.reasons.get(index, ""))
        much = f"{len(bad):,} of {len(split.rows):,} images of {split.name} cannot be read"
        if split.name == "val":
            whole = len(bad) == len(split.rows)
            yield images.finding("unreadable-val", ERROR if whole else WARNING, much + ("" if whole else "; they do not count"),
                                 moves=images.moves())
            continue
        budget = survey.config.DATA.CORRUPT_BUDGET
        allowed = int(budget * len(split.rows) if budget < 1 else budget)
        over = len(bad) > allowed
        yield images.finding("unreadable-train", ERROR if over else WARNING,
                             much + (f": training stops above {allowed:,}" if over else "; others of their class take their place"),
                             commands=[f"--opts DATA.CORRUPT_BUDGET {len(bad)}"] if over else [], moves=images.moves())
        counts, readable = survey.counts("train"), survey.counts("train", readable=True)
        lost = np.flatnonzero((counts > 0) & (readable == 0))
        if len(lost):
            yield Finding("unreadable-classes", ERROR, f"{len(lost):,} classes have no readable training image: training stops there", len(lost),
                          lambda i: dict(name=survey.classes[lost[i]], detail=f"{counts[lost[i]]:,} unreadable"),
                          advice="repair or add images, or take the classes out of train and val",
                          moves=_folders(split, survey.classes, lost, survey.splits.get("val")))


def _kinds(survey: Survey) -> Iterator[Finding]:
    """Sizes, and files that are read in a way worth knowing."""
    rows = _rows(survey)
    if not len(rows):
        return
    flags, read = rows["flags"], np.concatenate([split.readable for split in survey.splits.values()])
    shorter, longer = np.minimum(rows["width"], rows["height"]), np.maximum(rows["width"], rows["height"])
    side = min(image_size(survey.config))

    def size(split: Split, index: int) -> str:
        return f"{split.rows['width'][index]} x {split.rows['height'][index]}"

    tiny = min(32, side // 4)
    if len(at := np.flatnonzero(read & (shorter < tiny))):
        images = Images(survey, at, size)
        yield images.finding("tiny", WARNING, f"{len(at):,} images have a side below {tiny} pixels (the input is {side})", moves=images.moves())
    pixels = rows["width"].astype(np.int64) * rows["height"]
    if len(at := np.flatnonzero(read & (pixels > HUGE_PIXELS))):
        ms = rows["decode_us"][at].mean() / 1000
        yield Images(survey, at, size).finding("huge", NOTE, f"{len(at):,} images have more than {HUGE_PIXELS // 10**6} million pixels; "
                                               f"one takes {ms:,.0f} ms to decode", commands=[resize_command(survey)])
    if len(at := np.flatnonzero(read & (longer > 10 * shorter.astype(np.int64)))):
        yield Images(survey, at, size).finding("long", NOTE, f"{len(at):,} images are more than ten times as long as wide",
                                               advice="crops show little of them; nothing needs doing")
    if len(at := np.flatnonzero(read & ((flags & BLANK) > 0))):
        images = Images(survey, at, size)
        yield images.finding("blank", WARNING, f"{len(at):,} images are of a single colour", moves=images.moves())
    if len(at := np.flatnonzero(read & ((flags & MISNAMED) > 0))):
        images = Images(survey, at, lambda split, index: f"is {format_of(split.rows[index])}")
        yield images.finding("misnamed", NOTE, f"{len(at):,} images have another format's extension; they are read by their content",
                             advice="nothing needs doing for training", moves=images.moves(_right_name))
    if len(at := np.flatnonzero(read & ((flags & EXIF_TURNED) > 0))) and not survey.config.DATA.EXIF:
        yield Images(survey, at).finding("exif", NOTE, f"{len(at):,} images are turned by their EXIF block; they are used as they are stored, as in "
                                         "torchvision and timm", commands=["--opts DATA.EXIF True"])
    if len(at := np.flatnonzero(read & ((flags & ANIMATED) > 0))):
        yield Images(survey, at).finding("animated", NOTE, f"{len(at):,} files hold several pictures; the first is used",
                                         advice="nothing needs doing")
    if len(at := np.flatnonzero(read & ((flags & ALPHA) > 0))):
        yield Images(survey, at, _mode).finding("transparent", NOTE, f"{len(at):,} images may have transparent parts; those are laid on white",
                                                advice="nothing needs doing")
    for code, modes, what in (("cmyk", ("CMYK",), "are CMYK; they are converted by Pillow's rule, as in torchvision and timm"),
                              ("deep", ("I;16", "I", "F"), "have more than 8 bits a channel; they are scaled to 8")):
        if len(at := np.flatnonzero(read & np.isin(rows["mode"], [MODES.index(mode) for mode in modes]))):
            yield Images(survey, at, _mode).finding(code, NOTE, f"{len(at):,} images {what}", advice="nothing needs doing")
    middle = float(np.median(shorter[read])) if read.any() else 0
    if middle > 2.5 * side:
        yield Finding("large", NOTE, f"half of the images have a shorter side above {middle:,.0f} pixels, of which an input of {side} uses few; a "
                      "smaller copy decodes several times as fast", commands=[resize_command(survey)])


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


def _passed_over(survey: Survey) -> Iterator[Finding]:
    seen: set[Any] = set()
    for split in survey.splits.values():
        base, _ = base_of(split.source)
        place = tuple(getattr(base, "files", ())) or base.root
        if place in seen or (not split.movable and not hasattr(base, "files")):
            continue
        seen.add(place)
        counts, examples = strays(base)
        if loose := counts.pop(LOOSE, 0):
            yield Finding("loose", WARNING, f"{loose:,} images of {split.name} lie outside a class folder and are not used", 1,
                          lambda i, e=examples[LOOSE]: dict(path=e, detail="for example"), advice="move them into their class's folder")
        if counts:
            kinds = sorted(counts.items(), key=lambda kind: -kind[1])
            yield Finding("passed-over", NOTE, f"{counts.total():,} files or folders of {split.name} are no images and are passed over", len(kinds),
                          lambda i, kinds=kinds, examples=examples: dict(path=examples[kinds[i][0]], detail=f"{kinds[i][1]:,} {kinds[i][0]}",
                                                                         number=kinds[i][1]),
                          advice=f"read are {some([e for e in EXTENSION_OF.values()], 9)}; convert other pictures to one of them"
                          if set(counts) - {HIDDEN} else "nothing needs doing")


# --------------------------------------------------------------------------------------------------
# The same image twice
# --------------------------------------------------------------------------------------------------

def _same(survey: Survey) -> Iterator[Finding]:
    """Byte for byte: copies within a split, under several classes, in training and validation."""
    rows = _rows(survey)
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
        path, target = named(twin[index + _start(survey, split.name)])
        other = f", there of class {survey.classes[target]!r}" if target != split.targets[index] else ""
        return f"= {os.path.relpath(path, survey.root) if os.path.isdir(survey.root) else path}{other}"

    if first["leaks"]:
        share = len(first["leaks"]) / max(1, len(rows) - border)
        yield Images(survey, first["leaks"], like).finding(
            "leaks", ERROR if share >= LEAK_SHARE else WARNING,
            f"{len(first['leaks']):,} validation images ({share:.2%}) are training images too, byte for byte: the result is too good",
            advice="take them out of train", moves=Images(survey, first["leaked from"]).moves())
    if first["conflicts"]:
        images = Images(survey, first["conflicts"], like)
        yield images.finding("conflicts", WARNING, f"{len(first['conflicts']):,} images stand under more than one class, byte for byte the same",
                             advice="keep the right one of each; the script takes out all", moves=images.moves())
    if first["copies"]:
        images = Images(survey, first["copies"], like)
        yield images.finding("copies", WARNING, f"{len(first['copies']):,} images are copies of another of their class, byte for byte",
                             advice="the script keeps the first of each", moves=images.moves())


def _alike(survey: Survey, distance: int) -> Iterator[Finding]:
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
        same = np.array(list(pool.map(lambda pair: _look_alike(train, val, *pair), zip(theirs.tolist(), ours.tolist(), strict=True))), dtype=bool)
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
        "near-leaks", WARNING, f"{len(ours):,} validation images ({share:.2%}) look like a training image (resized or compressed anew)",
        advice="look at some of them; the script takes the training images out", moves=Images(survey, np.unique(theirs)).moves())


def _look_alike(train: Split, val: Split, theirs: int, ours: int) -> bool:
    try:
        one, other = thumbnail(train.source, theirs), thumbnail(val.source, ours)
    except UnreadableImage:  # gone since
        return False
    return float(np.abs(one - other).mean()) < _LIKE
