"""``Found``: the objects that a model finds in an image, in the image's own pixels, made of what the models of dense tasks return."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.dense.shapes import mask_library

TOP = 100  # objects of an image that COCO's figures look at
_VALUES = 1 << 25  # floats of a chunk while masks or logits are enlarged: 128 MB
_FOREGROUND = 0.5  # probability from which a pixel belongs to its mask


@dataclass
class Found:
    """The objects found in an image, likeliest first, in the pixels of its file.

    Attributes:
        boxes: (n, 4) float32: x0, y0, x1, y1.
        scores: (n,) float32, between 0 and 1.
        labels: (n,) int64, positions among the classes.
        masks: run lengths of each (``dict(size=[H, W], counts=bytes)`` as pycocotools has them), or None from a model without masks.
        size: height and width of the file's image.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None = None
    size: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.labels)

    def above(self, score: float) -> Found:
        """Those of at least ``score``."""
        kept = np.flatnonzero(self.scores >= score)
        masks = None if self.masks is None else [self.masks[i] for i in kept.tolist()]
        return Found(self.boxes[kept], self.scores[kept], self.labels[kept], masks, self.size)


@dataclass
class Panoptic:
    """An image divided into segments.

    Attributes:
        segments: (H, W) int32: of each pixel the number of its segment from 1, 0 where there is none.
        labels: (n,) int64, the class of each segment.
        scores: (n,) float32; of stuff, the score of the likeliest of its parts.
    """

    segments: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


# --------------------------------------------------------------------------------------------------
# Objects
# --------------------------------------------------------------------------------------------------

def found_of_detections(outputs: Sequence[Mapping[str, Tensor]], sizes: Tensor, originals: Tensor) -> list[Found]:
    """What detectors found, in the pixels of the files.

    Args:
        outputs: of each image ``boxes`` (n, 4) in the padded image, ``scores`` (n,), ``labels`` (n,), and of a model with masks ``masks``
            (n, S, S): probabilities inside the box.
        sizes: (B, 2) height and width of each image within the padded one.
        originals: (B, 2) height and width in the file.
    """
    return [_of_detections(output, size, original)
            for output, size, original in zip(outputs, sizes.tolist(), originals.tolist(), strict=True)]


def _of_detections(output: Mapping[str, Tensor], size: Sequence[int], original: Sequence[int]) -> Found:
    (height, width), limit = original, np.array([original[1], original[0]] * 2, dtype=np.float64)
    factor = np.array([width / size[1], height / size[0]] * 2)
    boxes = np.clip(output["boxes"].float().cpu().numpy() * factor, 0, limit).astype(np.float32)
    scores = output["scores"].float().cpu().numpy()
    order = np.argsort(-scores, kind="stable")
    found = Found(boxes[order], scores[order], output["labels"].cpu().numpy().astype(np.int64)[order], size=(height, width))
    if "masks" in output:
        masks = output["masks"].float().cpu().numpy()[order]
        found.masks = [pasted(mask, box, height, width) for mask, box in zip(masks, found.boxes.astype(np.float64), strict=True)]
    return found


def pasted(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Run lengths of an image's mask where the probabilities ``mask`` (S, S), stretched over ``box``, are at least a half.

    Each pixel's centre gets the bilinear mean of the four probabilities around it, those outside the box being 0, as Detectron2 and mmdet
    have it; down the rows first, then along them, over the pixels of the box alone.
    """
    x0, y0, x1, y1 = box
    left, top = max(0, math.floor(x0)), max(0, math.floor(y0))
    right, bottom = min(width, math.ceil(x1)), min(height, math.ceil(y1))
    if right <= left or bottom <= top or x1 <= x0 or y1 <= y0:
        return encode_window(np.zeros((0, 0), dtype=bool), 0, 0, height, width)
    rows = _sampled(np.pad(mask, 1), y0, y1, np.arange(top, bottom))
    probabilities = _sampled(rows.T, x0, x1, np.arange(left, right)).T
    return encode_window(probabilities >= _FOREGROUND, left, top, height, width)


def _sampled(rows: np.ndarray, start: float, end: float, pixels: np.ndarray) -> np.ndarray:
    """The rows at the centres of ``pixels``, where the inner ones of ``rows`` (S + 2, n) lie evenly from ``start`` to ``end``."""
    place = (pixels + 0.5 - start) / (end - start) * (len(rows) - 2) + 0.5
    place = np.clip(place, 0, len(rows) - 1.001)  # a pixel's centre may lie outside
    before = place.astype(np.int64)
    share = (place - before)[:, None].astype(rows.dtype)
    return rows[before] * (1 - share) + rows[before + 1] * share


def encode_window(window: np.ndarray, left: int, top: int, height: int, width: int) -> dict[str, Any]:
    """Run lengths of an image's mask that is ``window`` (h, w) bool at ``left`` and ``top``, and nothing elsewhere."""
    columns = np.zeros((window.shape[1], window.shape[0] + 2), dtype=np.int8)  # COCO's runs go down the columns
    columns[:, 1:-1] = window.T
    steps = np.diff(columns, axis=1)
    column, row = np.nonzero(steps)  # starts and ends by turns
    places = (column + left) * height + row + top
    joined = np.flatnonzero(places[1:] == places[:-1])  # a run that ends a column where the next column's begins
    places = np.delete(places, np.concatenate([joined, joined + 1]))
    counts = np.diff(np.concatenate([[0], places, [height * width]])).tolist()
    if counts[-1] == 0:
        counts.pop()
    return mask_library().frPyObjects({"size": [height, width], "counts": counts}, height, width)


def encode(masks: Tensor) -> list[dict[str, Any]]:
    """Run lengths of each of ``masks`` (n, H, W) bool."""
    turned = masks.permute(0, 2, 1).contiguous().to(torch.uint8).cpu().numpy()
    return mask_library().encode(turned.T) if len(turned) else []


def found_of_queries(outputs: Mapping[str, Tensor], sizes: Tensor, originals: Tensor, padded: Sequence[int],
                     top: int = TOP) -> list[Found]:
    """What Mask2Former found, as COCO's instance evaluation has it: the ``top`` pairs of query and class, whatever the query's best class.

    A score is the class's probability times the mean probability of the mask's own pixels (Cheng et al., CVPR 2022, and its code). Masks
    without a pixel are left out; boxes are those around the masks.

    Args:
        outputs: ``class_logits`` (B, Q, C + 1), the last one for no object, and ``mask_logits`` (B, Q, h, w) over the padded image.
        sizes, originals: as of ``found_of_detections``.
        padded: height and width of the padded image.
    """
    return [_of_queries(classes, masks, size, original, padded, top) for classes, masks, size, original in _each(outputs, sizes, originals)]


def _of_queries(class_logits: Tensor, mask_logits: Tensor, size: Sequence[int], original: Sequence[int], padded: Sequence[int],
                top: int) -> Found:
    likely = class_logits.float().softmax(1)[:, :-1]
    classes = likely.shape[1]
    scores, pairs = likely.flatten().sort(descending=True, stable=True)
    scores, pairs = scores[:top], pairs[:top]
    queries, which = (pairs // classes).unique(return_inverse=True)
    sure, runs = torch.zeros(len(queries), device=scores.device), []
    for start, logits in _enlarged(mask_logits[queries], size, original, padded):
        inside = logits > 0
        area = inside.sum((1, 2))
        sure[start:start + len(logits)] = torch.where(inside, logits.sigmoid(), 0.0).sum((1, 2)) / area.clamp(min=1)
        runs += encode(inside)
    scores = (scores * sure[which]).cpu().numpy()
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > 0]
    masks = [dict(runs[query]) for query in which.cpu().numpy()[order].tolist()]
    return Found(boxes_of(masks), scores[order], (pairs % classes).cpu().numpy()[order], masks, (original[0], original[1]))


def boxes_of(masks: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The boxes (n, 4) float32, x0, y0, x1, y1, around ``masks``."""
    if not masks:
        return np.zeros((0, 4), dtype=np.float32)
    boxes = mask_library().toBbox(list(masks)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _each(outputs: Mapping[str, Tensor], sizes: Tensor, originals: Tensor) -> Iterator[tuple[Tensor, Tensor, list[int], list[int]]]:
    return zip(outputs["class_logits"], outputs["mask_logits"], sizes.tolist(), originals.tolist(), strict=True)


def _enlarged(logits: Tensor, size: Sequence[int], original: Sequence[int], padded: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """(first, the maps from there on at the file's size) of ``logits`` (n, h, w) over the padded image, in chunks of bounded memory."""
    chunk = _chunk(original, padded)
    for start in range(0, len(logits), chunk):
        maps = logits[start:start + chunk].float()[None]
        if tuple(maps.shape[2:]) != tuple(padded):
            maps = F.interpolate(maps, size=tuple(padded), mode="bilinear", align_corners=False)
        yield start, resized(maps[..., :size[0], :size[1]], original)[0]


def _chunk(*sizes: Sequence[int]) -> int:
    return max(1, _VALUES // max(height * width for height, width in sizes))


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """``maps`` (B, C, H, W) at ``size`` (height, width), bilinear, without aligned corners."""
    return maps if tuple(maps.shape[2:]) == tuple(size) else F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


# --------------------------------------------------------------------------------------------------
# Maps of classes
# --------------------------------------------------------------------------------------------------

def map_of_logits(logits: Tensor, sizes: Tensor, originals: Tensor) -> list[Tensor]:
    """The likeliest class of each pixel, (H, W) uint8 at the file's size, of each image, on the device of ``logits`` (B, C, H, W)."""
    return [_likeliest(_enlarged(scores, size, original, scores.shape[1:]))
            for scores, size, original in zip(logits, sizes.tolist(), originals.tolist(), strict=True)]


def _likeliest(chunks: Iterable[tuple[int, Tensor]]) -> Tensor:
    """The class (H, W) uint8 of the largest score, of equals the first; a few classes at a time, (first, scores (n, H, W)), so that 150
    classes of a large photograph need not fit into memory together."""
    best = answer = None
    for start, scores in chunks:
        most, which = scores.max(0)
        which = (which + start).to(torch.uint8)
        better = None if best is None else most > best
        best, answer = (most, which) if better is None else (torch.where(better, most, best), torch.where(better, which, answer))
    return answer


def map_of_queries(outputs: Mapping[str, Tensor], sizes: Tensor, originals: Tensor, padded: Sequence[int]) -> list[Tensor]:
    """The likeliest class of each pixel, as ``map_of_logits`` has it, by Mask2Former's semantic inference: a class's score is the sum over
    the queries of its probability times the mask's. Arguments as of ``found_of_queries``.
    """
    return [_likeliest(_class_scores(*each, padded)) for each in _each(outputs, sizes, originals)]


def _class_scores(class_logits: Tensor, mask_logits: Tensor, size: Sequence[int], original: Sequence[int],
                  padded: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    likely, masks = class_logits.float().softmax(1)[:, :-1], resized(mask_logits.float()[None], padded)[0, :, :size[0], :size[1]].sigmoid()
    chunk = _chunk(original, size)
    for start in range(0, likely.shape[1], chunk):
        yield start, resized(torch.einsum("qc,qhw->chw", likely[:, start:start + chunk], masks)[None], original)[0]


def panoptic_of_queries(outputs: Mapping[str, Tensor], sizes: Tensor, originals: Tensor, padded: Sequence[int], things: Sequence[bool],
                        score: float = 0.8, overlap: float = 0.8) -> list[Panoptic]:
    """Segments by Mask2Former's panoptic inference. Arguments as of ``found_of_queries``.

    Each pixel goes to the query of the largest product of class and mask probability; a query that keeps less than ``overlap`` of its mask
    is dropped, and the parts of one class of stuff are one segment.

    Args:
        things: of each class, whether its objects are counted.
        score: queries whose class is less probable are left out.
    """
    return [_panoptic(classes, masks, size, original, padded, things, score, overlap)
            for classes, masks, size, original in _each(outputs, sizes, originals)]


def _panoptic(class_logits: Tensor, mask_logits: Tensor, size: Sequence[int], original: Sequence[int], padded: Sequence[int],
              things: Sequence[bool], score: float, overlap: float) -> Panoptic:
    scores, labels = class_logits.float().softmax(1).max(1)
    kept = ((labels < class_logits.shape[1] - 1) & (scores > score)).nonzero().flatten()
    most = torch.zeros(tuple(original), device=scores.device)
    owner = torch.full(tuple(original), -1, device=scores.device)
    inside_of = []
    for start, logits in _enlarged(mask_logits[kept], size, original, padded):
        likely = logits.sigmoid()
        inside_of.append((likely >= 0.5).cpu())
        value, which = (scores[kept[start:start + len(likely)], None, None] * likely).max(0)
        owner, most = torch.where(value > most, which + start, owner), torch.maximum(most, value)
    inside = torch.cat(inside_of) if inside_of else owner
    owner, segments, found = owner.cpu(), np.zeros(tuple(original), dtype=np.int32), []
    stuff: dict[int, int] = {}
    for i, (label, sure) in enumerate(zip(labels[kept].tolist(), scores[kept].tolist(), strict=True)):
        own = owner == i
        visible = own & inside[i]
        if not int(visible.sum()) or int(own.sum()) < overlap * int(inside[i].sum()):
            continue
        if not things[label] and label in stuff:
            number = stuff[label]
            found[number - 1] = label, max(sure, found[number - 1][1])
        else:
            found.append((label, sure))
            number = stuff[label] = len(found)
        segments[visible.numpy()] = number
    return Panoptic(segments, np.array([label for label, _ in found], dtype=np.int64), np.array([s for _, s in found], dtype=np.float32))

