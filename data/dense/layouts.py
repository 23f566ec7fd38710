"""The layouts of dense tasks, and opening whichever one lies at DATA.DATA_PATH.

A layout is a row of ``LAYOUTS``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
from yacs.config import CfgNode

from config import ConfigError
from data.dense import canvases, coco, map_layouts, maps, panoptic, voc, yolo
from data.dense.base import DenseOptions, DenseSource
from data.dense.painting import WithBackground
from data.dense.view import DenseView
from data.errors import DataError
from data.layouts.advice import holds_images, split_folder
from data.layouts.listed import FRACTION_ADVICE
from data.layouts.options import ALL, resolve_data_file
from data.layouts.splits import read_class_names, split_by_fold, split_by_fraction, subset
from data.messages import Caution, Notice
from data.sources.base import Source, View
from data.sources.classes import first_few
from data.sources.folder import visible_entries

MASK_TASKS = ("instance", "semantic", "mask")
_MOST_CLASSES = 255  # of a map of classes


class Layout(NamedTuple):
    """A way in which data of dense tasks are laid out.

    Attributes:
        name: the value of DATA.DATASET that looks for it alone.
        splits: the splits that a root has of it, of "train", "val", "test", or "all" alone for data without splits; empty: not this layout.
        open: a split of a root: (root, split, options) -> source.
        tasks: that it can serve, what it is made for first.
        shape: what it looks like, for messages.
    """

    name: str
    splits: Callable[[str], Collection[str]]
    open: Callable[[str, str, DenseOptions], DenseSource]
    tasks: Sequence[str]
    shape: str


OBJECT_TASKS = ("detection", "instance", "mask", "semantic")
LAYOUTS = (
    Layout("coco", coco.annotation_files, coco.open_coco, OBJECT_TASKS, "annotations/instances_train2017.json and _val2017.json (COCO)"),
    Layout("voc", voc.voc_splits, voc.open_voc, ("detection",), "Annotations/*.xml and JPEGImages/, or an XML file beside each (VOC)"),
    Layout("yolo", yolo.yolo_splits, yolo.open_yolo, OBJECT_TASKS, "data.yaml with images/ and labels/ (YOLO)"),
    Layout("maps", map_layouts.splits_of_maps, maps.open_maps, ("semantic", "mask"),
           "images/train/*.jpg and masks/train/*.png (or the folders of ADE20K, Cityscapes or Pascal VOC)"),
    Layout("panoptic", panoptic.panoptic_files, panoptic.open_panoptic, ("mask", "semantic"),
           "annotations/panoptic_train2017.json and _val2017.json, with folders of PNG files of the same names"),
)


Classes = Sequence[str] | Callable[[Sequence[str]], Sequence[str] | None] | None


def open_dense_sources(config: CfgNode, splits: Sequence[str], classes: Classes) -> tuple[dict[str, DenseSource], str]:
    """The splits of a dense task.

    Args:
        splits: of "train" and "val".
        classes: those of a checkpoint, to which the data's are matched by name, or a function that chooses them by the data's; None: those
            of the training data.

    Returns:
        (sources by split, with the same classes in the same order; the layout's name).

    Raises:
        DataError: nothing usable lies there; the message says what the task needs and what lies there.
        ConfigError: keys that do not fit the data, or a package that is missing.
    """
    root = os.path.expanduser(config.DATA.DATA_PATH)
    if not root:
        raise ConfigError("DATA.DATA_PATH is empty; give the folder of the images and their annotations with --data-path")
    wrote = config.DATA.DATASET == "canvases" and root == canvases.DEFAULT_PATH and canvases.ensure_canvases(root)
    if not os.path.exists(root):
        raise DataError(f"{root}: no such data folder; give the folder of the images and their annotations with --data-path")
    options = DenseOptions(config.DATA, config.TASK)
    layout = _find(root, config)
    there = layout.splits(root)
    sources: dict[str, DenseSource] = {}
    for split in (name for name in ("train", "val") if name in splits):
        source = _open_split(layout, root, split, there, options, config, alone=list(splits) == ["val"])
        _check_task(source, config.TASK, layout)
        if config.TASK == "semantic" and source.kind == "objects":
            source = WithBackground(source)
        source = _choose(source, resolve_data_file(config.DATA.CLASS_NAMES, root)) if config.DATA.CLASS_NAMES else source
        source = match_dense(source, classes(source.classes) if callable(classes) else classes)
        classes = source.classes
        if split == "train":
            source = _for_training(source, config)
        if not len(source):
            raise DataError(f"{source.root}: holds no image for {dict(train='training', val='validation')[split]}")
        sources[split] = source
    if wrote:
        next(iter(sources.values())).notices.insert(0, Notice(f"wrote canvases of scikit-learn's digits to {root}"))
    return sources, layout.name


def _find(root: str, config: CfgNode) -> Layout:
    """The layout at ``root``."""
    wanted = config.DATA.DATASET
    asked = [layout for layout in LAYOUTS if wanted in ("imagenet", "canvases", layout.name)]
    serving = [layout for layout in asked if config.TASK in layout.tasks]
    there = [layout for layout in asked if layout.splits(root)]
    if there:  # one that serves the task, and best the one made for it: canvases have boxes and maps
        return min(there, key=lambda layout: (layout not in serving, layout.tasks[0] != config.TASK))
    if not serving:
        raise ConfigError(f"DATA.DATASET is {wanted}, which has no annotations for TASK {config.TASK}; leave it away, or give one of "
                          f"{', '.join(layout.name for layout in LAYOUTS if config.TASK in layout.tasks)}")
    raise DataError(f"{root}: TASK {config.TASK} needs {'; or '.join(layout.shape for layout in serving)}; {_what_lies_there(root)}")


def _what_lies_there(root: str) -> str:
    """What was found instead, for a message."""
    if os.path.isfile(root):
        return "this is a file of another kind"
    if other := next((layout for layout in LAYOUTS if layout.splits(root)), None):
        return f"there are data in the layout {other.name}, which are found without --data-set"
    entries = visible_entries(root)
    if not entries:
        return "the folder is empty"
    train = split_folder(root, "train") or split_folder(root, "val") or root
    if sum(e.is_dir() and holds_images(e.path) for e in visible_entries(train)[:50]) > 1:
        return "there are folders of classes, which TASK classification takes"
    return f"there are {first_few([e.name for e in entries], 4)}"


def _open_split(layout: Layout, root: str, split: str, there: Collection[str], options: DenseOptions, config: CfgNode,
                alone: bool) -> DenseSource:
    """A split, or a part of what has no validation part."""
    data = config.DATA
    wanted = split
    if alone and split == "val" and config.TEST.SPLIT not in ("val", "validation"):
        wanted = config.TEST.SPLIT
        if wanted == ALL and ALL not in there:
            raise DataError(f"{root}: has splits ({', '.join(there)}); evaluate one after the other with --split {next(iter(there))}")
    whole = "train" if "train" in there else ALL
    divides = bool(data.FOLD or data.VAL_FRACTION) and wanted in ("train", "val") and (data.FOLD or "val" not in there)
    if divides and whole in there:
        source = layout.open(root, whole, options)
        part = split_by_fold(source, data.FOLD, split) if data.FOLD else split_by_fraction(source, data.VAL_FRACTION, split)
        return dense_view(part)
    if wanted in there:
        return layout.open(root, wanted, options)
    if alone and ALL in there:
        source = layout.open(root, ALL, options)
        source.notices.insert(0, Notice(f"{root}: has no validation part; all of its {len(source)} images are evaluated"))
        return source
    raise DataError(f"{root}: has no {wanted} split in the layout {layout.name} (it has {', '.join(there)})"
                    + (FRACTION_ADVICE if wanted in ("train", "val") else ""))


def dense_view(view: Source) -> DenseSource:
    """A part of a dense source that code for classification made, with its objects."""
    if isinstance(view, View) and not isinstance(view, DenseView):
        return DenseView(view.source, view.indices, view.targets, view.notices)
    return view


def _check_task(source: DenseSource, task: str, layout: Layout) -> None:
    if task in MASK_TASKS and source.kind == "objects" and not source.has_masks:
        raise DataError(f"{source.root}: has boxes without masks, and TASK {task} needs masks; give --opts TASK detection, or annotations "
                        "with outlines")
    if task not in layout.tasks:
        serves = " or ".join(layout.tasks)
        raise DataError(f"{source.root}: the layout {layout.name} does not serve TASK {task}; give --opts TASK {serves}, or other "
                        "annotations")
    if task == "semantic" and len(source.classes) > _MOST_CLASSES:
        raise DataError(f"{source.root}: has {len(source.classes)} classes, and a map of classes at most {_MOST_CLASSES}; name those to "
                        "keep in a file with DATA.CLASS_NAMES")


def match_dense(source: DenseSource, classes: Sequence[str] | None) -> DenseSource:
    """``source`` with its classes as positions in ``classes``, by name; None keeps its own.

    Raises:
        DataError: it has a class that is not among them.
    """
    if classes is None or list(classes) == list(source.classes):
        return source
    position = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in source.classes if name not in position]
    notices = [*source.notices]
    if unknown and (found := flat_objects(source)) is not None:  # Roboflow names a class above its own, which no image shows
        there = {source.classes[label] for label in np.unique(found[1]).tolist()}
        unused, unknown = [name for name in unknown if name not in there], [name for name in unknown if name in there]
        if unused:
            notices.append(Notice(f"{source.root}: no image shows {first_few(unused)}, unknown to the training classes: left out"))
    if unknown:
        raise DataError(f"{source.root}: class {unknown[0]!r} is unknown to the training classes ({len(unknown)} such: "
                        f"{first_few(unknown, 3)}; those are {first_few(list(classes), 3)}); rename it, or train with it")
    table = np.array([position.get(name, -1) for name in source.classes], dtype=np.int64)
    absent = [name for name in classes if name not in set(source.classes)]
    if absent:
        notices.append(Caution(f"{source.root}: {len(absent)} of the {len(classes)} classes are not among its own ({first_few(absent)})",
                               "missing-classes"))
    return _with_table(source, list(classes), table, notices)


def _with_table(source: DenseSource, classes: list[str], table: np.ndarray, notices: Sequence[str]) -> DenseSource:
    targets = np.append(np.where(table < 0, len(classes), table), len(classes))[np.minimum(source.targets, len(table))]
    return DenseView(source, np.arange(len(source)), targets, notices, classes, table)


def _choose(source: DenseSource, path: str) -> DenseSource:
    """With the classes that a file names, in its order; objects of others are left out."""
    classes, table = read_class_names(path)
    position = {name: i for i, name in enumerate(classes)}
    places = np.array([position[table[name]] if name in table else -1 for name in source.classes], dtype=np.int64)
    if (places < 0).all():
        raise DataError(f"{path}: names none of the classes of {source.root} ({first_few(source.classes, 3)})")
    left = [name for name, at in zip(source.classes, places.tolist(), strict=True) if at < 0]
    notice = [Notice(f"{source.root}: {len(left)} classes that {path} does not name are left out ({first_few(left)})")] if left else []
    return _with_table(source, classes, places, [*source.notices, *notice])


def _for_training(source: DenseSource, config: CfgNode) -> DenseSource:
    """The images to train on: not those without objects, unless DATA.DENSE.EMPTY; of the others DATA.SUBSET."""
    if source.kind == "objects" and not config.DATA.DENSE.EMPTY:
        counts = object_counts(source)
        if counts is not None and (counts == 0).any():
            keep = np.flatnonzero(counts > 0)
            notice = Notice(f"{source.root}: {len(source) - len(keep):,} images without an object are not trained on (DATA.DENSE.EMPTY "
                            "True takes them)")
            if not len(keep):
                raise DataError(f"{source.root}: no training image has an object of the {len(source.classes)} classes; check them")
            source = DenseView(source, keep, source.targets[keep], [*source.notices, notice])
    return dense_view(subset(source, config.DATA.SUBSET, config.SEED)) if config.DATA.SUBSET < 1 else source


def object_counts(source: Source) -> np.ndarray | None:
    """(images,) int64: objects of each image, without crowds; None where the source cannot tell without reading files."""
    found = flat_objects(source)
    return None if found is None else np.bincount(found[0], minlength=len(source))


def flat_objects(source: Source) -> tuple[np.ndarray, np.ndarray] | None:
    """(image, class) of all objects of a source, or of the classes of its maps, (objects,) int64 each, images rising; without crowds. None
    where files would have to be read."""
    if not isinstance(source, DenseView):
        return source.shown() if isinstance(source, DenseSource) else None
    if (found := flat_objects(source.source)) is None:
        return None
    bounds = np.searchsorted(found[0], np.arange(len(source.source) + 1))
    own = [np.arange(bounds[i], bounds[i + 1]) for i in source.indices.tolist()] or [np.zeros(0, dtype=np.int64)]
    images, labels = np.repeat(np.arange(len(own)), [len(part) for part in own]), found[1][np.concatenate(own)]
    if source.table is not None:
        labels = source.table[labels]
    if isinstance(source, WithBackground):  # which all but a few images show
        every = np.arange(len(source))
        order = np.argsort(np.concatenate([images, every]), kind="stable")
        images = np.concatenate([images, every])[order]
        labels = np.concatenate([labels + 1, np.zeros_like(every)])[order]
    keep = labels >= 0
    return images[keep], labels[keep]
