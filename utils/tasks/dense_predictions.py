"""How --predict tells objects, maps of classes and segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.dense.base import IGNORED
from data.dense.shapes import decode_mask
from utils.inference.found import Found, Panoptic, boxes_of, encode
from utils.inference.outputs import rounded
from utils.loggers.console import plain
from utils.visualization.overlays import draw_map, draw_objects

_SHOWN = 5  # in the line of an image
_SMALL = 250  # pixels: scores would cover what they are about


def objects_drawn(picture: Image.Image, found: Found, classes: Sequence[str], scale: float, scores: bool = True) -> Image.Image:
    """``picture``, ``scale`` times as large as the image's file, with what was found in it; ``scores`` behind the names of classes."""
    captions = [classes[label] + (f" {100 * score:.0f} %" if scores else "")
                for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True)]
    masks = None if found.masks is None else [decode_mask(mask) for mask in found.masks]
    return draw_objects(picture, found.boxes * scale, captions, found.labels.tolist(), masks)


class FoundObjects:
    """``3 objects: tabby 93.1 %, dog 81.0 %, ...``; a record holds each object's class, score, box and mask.

    Args:
        classes: names, in the order of the labels.
        least: objects of a lower score are not told.
        masks: whether they have some.
    """

    columns = ("objects", "found")

    def __init__(self, classes: Sequence[str], least: float, masks: bool = True):
        self.classes, self.least = classes, least
        self.gives = ("PREDICT.COCO", "PREDICT.PICTURES", *(["PREDICT.MASKS"] if masks else []))

    def tell(self, outputs: Sequence[Found]) -> list[dict[str, Any]]:
        return [self._of_image(found.above(self.least)) for found in outputs]

    def _of_image(self, found: Found) -> dict[str, Any]:
        labels, scores, boxes = found.labels.tolist(), found.scores.tolist(), found.boxes.round(2).tolist()
        names = [self.classes[label] for label in labels]
        told = [f"{plain(name)} {100 * score:.1f} %" for name, score in zip(names, scores, strict=True)]
        counted = ", ".join(f"{plain(name)}{f' x {count}' * (count > 1)}" for name, count in Counter(names).most_common())
        objects = [{"class": name, "number": label, "score": rounded(score), "box": [rounded(side) for side in box]}
                   for name, label, score, box in zip(names, labels, scores, boxes, strict=True)]
        for entry, mask in zip(objects, found.masks or (), strict=False):
            entry["mask"] = dict(size=list(mask["size"]), counts=_text(mask["counts"]))
        cells = ["; ".join(" ".join([name, f"{score:.4f}", *(f"{side:g}" for side in box)])
                           for name, score, box in zip(names, scores, boxes, strict=True))]
        text = f"{len(names)} object{'s' * (len(names) != 1)}: {', '.join(told[:_SHOWN])}" + ", ..." * (len(told) > _SHOWN)
        return dict(text=text if names else "nothing", cells=[len(names), *cells], record=dict(objects=objects),
                    caption=counted or "nothing", confidence=None, found=found,
                    draw=lambda picture, scale: objects_drawn(picture, found, self.classes, scale, min(picture.size) >= _SMALL))


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


class FoundMaps:
    """``sky 41.2 %, road 30.0 %, ...``: the classes of a map and their shares of the image.

    Args:
        classes: names, in the order of the map's values.
    """

    gives = ("PREDICT.PICTURES", "PREDICT.MASKS")

    def __init__(self, classes: Sequence[str]):
        self.classes = classes
        self.columns = [f"share_{name}" for name in classes]

    def tell(self, outputs: Sequence[Tensor]) -> list[dict[str, Any]]:
        return [self._of_image(one.cpu().numpy()) for one in outputs]

    def _of_image(self, numbers: np.ndarray) -> dict[str, Any]:
        shares = np.bincount(numbers.ravel(), minlength=IGNORED + 1)[:len(self.classes)] / max(1, numbers.size)
        there = sorted(np.flatnonzero(shares).tolist(), key=lambda number: -shares[number])
        told = [f"{plain(self.classes[number])} {100 * shares[number]:.1f} %" for number in there]
        record = [{"class": self.classes[number], "number": number, "share": rounded(float(shares[number]))} for number in there]
        return dict(text=", ".join(told[:_SHOWN]) + ", ..." * (len(told) > _SHOWN), cells=[rounded(float(share)) for share in shares],
                    record=dict(shares=record), caption=", ".join(self.classes[number] for number in there), confidence=None,
                    found=numbers, draw=lambda picture, scale: draw_map(picture, numbers))


class FoundSegments:
    """As ``FoundObjects``, of the segments of panoptic data, things and stuff, the largest first.

    Args:
        classes: names, in the order of the labels.
    """

    columns = FoundObjects.columns

    def __init__(self, classes: Sequence[str]):
        self.objects = FoundObjects(classes, 0.0)
        self.gives = self.objects.gives

    def tell(self, outputs: Sequence[Panoptic]) -> list[dict[str, Any]]:
        return self.objects.tell([segments_as_objects(one) for one in outputs])


def segments_as_objects(one: Panoptic) -> Found:
    """Segments as objects with masks, the largest first."""
    sizes = np.bincount(one.segments.ravel(), minlength=len(one.labels) + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    masks = encode(torch.from_numpy(one.segments[None] == (order + 1)[:, None, None]))
    height, width = one.segments.shape
    return Found(boxes_of(masks), one.scores[order], one.labels[order], masks, (height, width))
