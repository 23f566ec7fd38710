"""COCO's figures of detections: pycocotools' own ``COCOeval``, on any kind of data with objects and on any number of ranks."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from data.dense.base import DenseSource
from data.dense.shapes import mask_library
from utils.evaluation.dense_predictions_file import SIZES, SURE, Curves
from utils.evaluation.metrics import Evaluation, Metric, line
from utils.inference.found import Found
from utils.runtime import distributed

KINDS = {"box": "bbox", "mask": "segm"}  # what COCO calls them
# In the order of COCO's summary: of the mean over the overlaps from 0.5 to 0.95 except for the two that say another.
FIGURES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP small", "ap_medium": "AP medium", "ap_large": "AP large",
           "ar1": "AR1", "ar10": "AR10", "ar100": "AR100", "ar_small": "AR small", "ar_medium": "AR medium", "ar_large": "AR large"}


def detection_metrics(kinds: Sequence[str]) -> tuple[Metric, ...]:
    """The twelve figures of each of ``kinds`` (``box``, ``mask``), in percent, COCO's headline first: ``box_ap``, ``box_ap50``, ..."""
    return tuple(Metric(f"{kind}_{name}", f"{kind} {label}") for kind in kinds for name, label in FIGURES.items())


@dataclass(frozen=True)
class DetectionEvaluation(Evaluation):
    """An evaluation of detections; what stands here is rank 0's alone, and empty elsewhere.

    Attributes:
        found: what was found, by the image's position in the source, rising.
        curves: of each kind.
    """

    found: Mapping[int, Found] = field(default_factory=dict)
    curves: Mapping[str, Curves] = field(default_factory=dict)


class DetectionEvaluator:
    """Keeps what was found in each image, and evaluates it together: the same figures for every batch size and number of ranks.

    Args:
        source: the images with their objects.
        kinds: ``box``, ``mask``.

    Raises:
        ConfigError: pycocotools is not installed.
    """

    def __init__(self, source: DenseSource, kinds: Sequence[str]):
        coco_library()
        self.source, self.kinds = source, tuple(kinds)
        self._found: dict[int, Found] = {}
        self.evaluation: DetectionEvaluation | None = None  # once it was asked for

    def update(self, outputs: Sequence[Found], numbers: Tensor) -> None:
        """Take in the objects found in the images at positions ``numbers`` (B,) of the source; -1 is an image that does not count."""
        self._found.update((number, found) for number, found in zip(numbers.tolist(), outputs, strict=True) if number >= 0)

    def result(self) -> DetectionEvaluation:
        """The figures over all ranks; every rank must ask."""
        parts = distributed.gather_objects(self._found)
        found = {number: part[number] for part in parts for number in part}
        found = {number: found[number] for number in sorted(found)} if distributed.is_main() else {}
        evaluation = evaluate_found(found, self.source, self.kinds)
        values, samples, told, caution = distributed.gather_objects(
            (evaluation.values, evaluation.samples, evaluation.line, evaluation.caution))[0]
        self.evaluation = DetectionEvaluation(values, samples, told, caution, evaluation.found, evaluation.curves)
        return self.evaluation


def evaluate_found(found: Mapping[int, Found], source: DenseSource, kinds: Sequence[str]) -> DetectionEvaluation:
    """COCO's figures of what was ``found`` in the images of ``source``, by their positions; other images do not count."""
    values, curves = {}, {}
    truth = _truth(source, list(found), "mask" in kinds)
    for kind in kinds:
        stats, curves[kind] = _coco(truth, found, source, kind)
        values |= {f"{kind}_{name}": value for name, value in zip(FIGURES, stats, strict=True)}
    told = [metric for metric in detection_metrics(kinds) if metric.name.endswith("_ap")]
    caution = ""
    if found and not any(map(len, found.values())):
        caution = ("nothing was found in any image with a score of MODEL.DENSE.MIN_SCORE or more; where that stays so, train longer or "
                   "with another --lr")
    elif found and all(map(math.isnan, values.values())):
        caution = "no image shows an object that counts (crowds do not), so there is nothing to measure"
    return DetectionEvaluation(values, len(found), line(told, values, f"({len(found)} images)"), caution, found, curves)


def table(values: Mapping[str, float], kinds: Sequence[str]) -> list[str]:
    """Lines with all twelve figures of each kind: six of AP, then six of AR, narrow enough for any terminal."""
    lines = []
    for part in (list(FIGURES.items())[:6], list(FIGURES.items())[6:]):
        widths = [max(7, len(label) + 2) for _, label in part]
        lines.append(" " * 5 + "".join(f"{label:>{width}}" for (_, label), width in zip(part, widths, strict=True)))
        for kind in kinds:
            cells = zip((values[f"{kind}_{name}"] for name, _ in part), widths, strict=True)
            lines.append(f"{kind:5}" + "".join(f"{'-' if value != value else format(value, '.2f'):>{width}}" for value, width in cells))
    return lines


def coco_json_rows(found: Mapping[int, Found], source: DenseSource) -> Iterator[dict[str, Any]]:
    """What was ``found`` in COCO's format of results, plain data for JSON: a row an object, with its mask where there is one.

    COCO's tool takes the size of an object for that of its box where a row has one: take the boxes out to have its figures of masks by
    size, as Detectron2 and mmdetection do (``del row["bbox"]``), and ``evaluate_found``.
    """
    for number, objects in found.items():
        yield from _rows(objects, int(source.image_ids[number]), source.category_ids, ("box", "mask"))


def _rows(found: Found, image_id: int, category_ids: Sequence[int], kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    boxes, labels, scores = found.boxes.astype(np.float64), found.labels.tolist(), found.scores.tolist()
    boxes[:, 2:] -= boxes[:, :2]
    for i, box in enumerate(boxes.tolist()):
        row = dict(image_id=image_id, category_id=int(category_ids[labels[i]]), score=scores[i])
        if "box" in kinds:
            row["bbox"] = box
        if "mask" in kinds and found.masks is not None:
            row["segmentation"] = dict(size=list(found.masks[i]["size"]), counts=found.masks[i]["counts"].decode("ascii"))
        yield row


# --------------------------------------------------------------------------------------------------
# pycocotools
# --------------------------------------------------------------------------------------------------

def coco_library() -> tuple[Any, Any]:
    """(``COCO``, ``COCOeval``) of pycocotools; raises as ``mask_library``."""
    mask_library()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    return COCO, COCOeval


def _truth(source: DenseSource, numbers: Sequence[int], masks: bool) -> Any:
    """The objects of the images at ``numbers`` as pycocotools' ``COCO``; annotations count from 1, since it takes a 0 for no object."""
    rows: list[dict[str, Any]] = []
    for number in numbers:
        objects = source.objects(number)
        boxes = objects.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        for i, box in enumerate(boxes.tolist()):
            rows.append(dict(id=len(rows) + 1, image_id=int(source.image_ids[number]), bbox=box, area=float(objects.areas[i]),
                             category_id=int(source.category_ids[objects.labels[i]]), iscrowd=int(objects.crowd[i])))
            if masks:
                rows[-1]["segmentation"] = dict(objects.masks[i])
    images = [dict(id=int(source.image_ids[number]), height=int(source.sizes[number][0]), width=int(source.sizes[number][1]))
              for number in numbers]
    return _indexed(images, [dict(id=int(category), name=name) for category, name in zip(source.category_ids, source.classes, strict=True)],
                    rows)


def _indexed(images: list[dict[str, Any]], categories: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> Any:
    made = coco_library()[0]()
    made.dataset = dict(info={}, images=images, categories=categories, annotations=annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        made.createIndex()
    return made


def _coco(truth: Any, found: Mapping[int, Found], source: DenseSource, kind: str) -> tuple[list[float], Curves]:
    """(the twelve figures in percent, the figures of each class)."""
    rows = [row for number, objects in found.items()
            for row in _rows(objects, int(source.image_ids[number]), source.category_ids, (kind,))]
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress
        detections = truth.loadRes(rows) if rows else _indexed(truth.dataset["images"], truth.dataset["categories"], [])
        done = coco_library()[1](truth, detections, KINDS[kind])
        done.evaluate()
        done.accumulate()
        done.summarize()
    stats = [100 * float(value) if value >= 0 else float("nan") for value in done.stats]
    return stats, _curves(done, truth, found, source)


def _curves(done: Any, truth: Any, found: Mapping[int, Found], source: DenseSource) -> Curves:
    column = np.argsort(np.argsort(np.asarray(source.category_ids)))  # of each class among COCO's, which are by id
    precision, recall = (np.where(done.eval[name] < 0, np.nan, done.eval[name]) for name in ("precision", "recall"))
    precision, recall = precision[..., -1][:, :, column], recall[..., -1][:, column]  # of at most 100 detections an image
    classes = len(source.classes)
    objects, label_of = np.zeros((classes, len(SIZES)), dtype=np.int64), {int(c): i for i, c in enumerate(source.category_ids)}
    ranges = np.array(done.params.areaRng)
    for row in truth.dataset["annotations"]:
        if not row["iscrowd"]:
            objects[label_of[row["category_id"]]] += (row["area"] >= ranges[:, 0]) & (row["area"] <= ranges[:, 1])
    labels = np.concatenate([np.zeros(0, np.int64), *(part.labels for part in found.values())])
    # A class without an object is nan at every overlap and recall, any other at none.
    return Curves(precision[..., 0].astype(np.float32), precision.mean((0, 1)), recall.mean(0), objects,
                  np.bincount(labels, minlength=classes), _of_images(done, found, source))


def _of_images(done: Any, found: Mapping[int, Found], source: DenseSource) -> np.ndarray:
    """``Curves.images``, from COCO's matches at an overlap of 0.5 within objects of all sizes."""
    params, row_of = done.params, {int(source.image_ids[number]): row for row, number in enumerate(found)}
    counts = np.zeros((len(found), 3), dtype=np.int64)
    for block in range(len(params.catIds)):
        first = block * len(params.areaRng) * len(params.imgIds)
        for matches in filter(None, done.evalImgs[first:first + len(params.imgIds)]):
            sure = (np.asarray(matches["dtScores"]) >= SURE) & ~matches["dtIgnore"][0].astype(bool)
            right = int((sure & (matches["dtMatches"][0] > 0)).sum())
            objects = int((np.asarray(matches["gtIgnore"]) == 0).sum())
            counts[row_of[matches["image_id"]]] += right, int(sure.sum()) - right, objects - right
    return counts
