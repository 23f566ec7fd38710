"""The file that a run keeps of its last evaluation: figures of each class and each image, and pictures of the worst images.

Pictures show the truth to the left and the answer to the right. Of maps and segments only the answers of the worst images are kept
meanwhile, so that memory stays bounded; to know them, an image's figures are waited for.
"""

from __future__ import annotations

import heapq
import io
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from data import DataError, Loaders
from data.dense.base import DenseSource, Objects
from data.dense.batch import DenseBatch
from utils.evaluation.dense_figures import MapFigures
from utils.evaluation.dense_predictions_file import MOST_PICTURES, SURE, DenseFile, DetectionsFile, MapsFile, PanopticFile, f1
from utils.evaluation.detection_metrics import DetectionEvaluator
from utils.evaluation.map_metrics import confusion
from utils.evaluation.panoptic_metrics import PanopticEvaluator
from utils.evaluation.predictions_file import FILE, MOST_IMAGES, names_of
from utils.inference.found import Found, Panoptic
from utils.runtime import distributed
from utils.tasks.base import PredictionLog
from utils.tasks.dense_predictions import objects_drawn, segments_as_objects
from utils.visualization.drawing import magnification
from utils.visualization.overlays import draw_map

_SIDE = 320  # pixels of the longer side of a picture's halves


def keeps_log(loaders: Loaders) -> bool:
    """Whether the images are few enough for a log of each."""
    return len(loaders.val.dataset.source) <= MOST_IMAGES


class DetectionLog(PredictionLog):
    """Of objects.

    Args:
        evaluator: gives that of the weights that count; asked for when its result is there.
    """

    def __init__(self, loaders: Loaders, evaluator: Callable[[], DetectionEvaluator]):
        self.loaders, self.evaluator = loaders, evaluator

    def __call__(self, outputs: Sequence[Found], batch: DenseBatch) -> None:
        """The evaluator keeps what was found."""

    def write(self, folder: str) -> None:
        evaluation = self.evaluator().evaluation
        if not distributed.is_main() or evaluation is None:
            return
        source, numbers, curves = self.loaders.val.dataset.source, list(evaluation.found), evaluation.curves
        index, figures = np.array(numbers, np.int64), curves["mask" if "mask" in curves else "box"]
        made = DetectionsFile(index, f1(figures.images), names_of(source, numbers), list(self.loaders.classes), {}, curves)
        answers = {number: evaluation.found[number].above(SURE) for number in index[made.worst(MOST_PICTURES)].tolist()}
        _finish(made, source, folder, lambda number, picture, scale: objects_drawn(picture, answers[number], made.classes, scale))


class MapLog(PredictionLog):
    """Of maps of classes.

    Args:
        targets: gives the true maps of a batch, None for an image that could not be read.
    """

    def __init__(self, loaders: Loaders, targets: Callable[[DenseBatch], Sequence[Tensor | None]]):
        self.loaders, self.targets, self._worst = loaders, targets, _Worst()
        self._counts = np.zeros((len(loaders.classes),) * 2, dtype=np.int64)

    def __call__(self, outputs: Sequence[Tensor], batch: DenseBatch) -> None:
        for number, answer, target in zip(batch.numbers.tolist(), outputs, self.targets(batch), strict=True):
            if number >= 0 and target is not None:
                counts = confusion(answer, target.to(answer.device), len(self._counts)).cpu().numpy()
                self._counts += counts
                self._worst.add(number, MapFigures(counts).mean_iou(), lambda answer=answer: answer.cpu().numpy())

    def write(self, folder: str) -> None:
        source, scores, answers = self.loaders.val.dataset.source, *self._worst.gathered()
        counts = sum(distributed.gather_objects(self._counts))
        if distributed.is_main():
            numbers = sorted(scores)
            made = MapsFile(np.array(numbers, np.int64), np.array([scores[n] for n in numbers], np.float32), names_of(source, numbers),
                            list(self.loaders.classes), {}, counts)
            _finish(made, source, folder, lambda number, picture, scale: draw_map(picture, answers[number]))


class PanopticLog(PredictionLog):
    """Of segments.

    Args:
        evaluator: as of ``DetectionLog``.
    """

    def __init__(self, loaders: Loaders, evaluator: Callable[[], PanopticEvaluator]):
        self.loaders, self.evaluator, self._worst = loaders, evaluator, _Worst()

    def __call__(self, outputs: Sequence[Panoptic], batch: DenseBatch) -> None:
        for number, answer in zip(batch.numbers.tolist(), outputs, strict=True):
            if number >= 0:
                self._worst.add(number, self.evaluator().quality(number), lambda answer=answer: segments_as_objects(answer))

    def write(self, folder: str) -> None:
        source, scores, answers = self.loaders.val.dataset.source, *self._worst.gathered()
        evaluation = self.evaluator().evaluation
        if distributed.is_main() and evaluation is not None:
            numbers = sorted(scores)
            made = PanopticFile(np.array(numbers, np.int64), np.array([scores[n] for n in numbers], np.float32), names_of(source, numbers),
                                list(self.loaders.classes), {}, evaluation.sums, np.array(source.things, dtype=bool))
            _finish(made, source, folder, lambda number, picture, scale: objects_drawn(picture, answers[number], made.classes, scale))


class _Worst:
    """The scores of all images, and the answers for those of the lowest."""

    def __init__(self) -> None:
        self.scores: dict[int, float] = {}
        self._heap: list[tuple[float, int, Any]] = []  # the best of the worst first

    def add(self, number: int, score: float, answer: Callable[[], Any]) -> None:
        """``answer`` is asked for where the image is one of the worst so far."""
        self.scores[number] = score = float(np.float32(score))  # as the file has it, by which the worst are chosen
        if math.isnan(score) or (len(self._heap) == MOST_PICTURES and (-score, -number) <= self._heap[0][:2]):
            return
        heapq.heappush(self._heap, (-score, -number, answer()))
        if len(self._heap) > MOST_PICTURES:
            heapq.heappop(self._heap)

    def gathered(self) -> tuple[dict[int, float], dict[int, Any]]:
        """(scores, answers) by image, of all ranks."""
        scores, answers = {}, {}
        for own, heap in distributed.gather_objects((self.scores, self._heap)):
            scores |= own
            answers |= {-number: answer for _, number, answer in heap}
        return scores, answers


def _finish(made: DenseFile, source: DenseSource, folder: str, drawn: Callable[[int, Image.Image, float], Image.Image]) -> None:
    """Add the pictures to the file, and write it."""
    for position in made.worst(MOST_PICTURES):
        number = int(made.index[position])
        try:
            image = source.load(number)
            scale = magnification(image.height, image.width, _SIDE) if max(image.size) < _SIDE else _SIDE / max(image.size)
            picture = image.convert("RGB").resize([max(1, round(side * scale)) for side in image.size])
            made.pictures[position] = _beside(_truth_drawn(picture, source, number, made.classes, scale), drawn(number, picture, scale))
        except (DataError, OSError):  # an image that could be read a moment ago
            continue
    made.write(os.path.join(folder, FILE))


def _beside(left: Image.Image, right: Image.Image) -> bytes:
    both = Image.new("RGB", (left.width + right.width + 4, left.height), (255, 255, 255))
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 4, 0))
    file = io.BytesIO()
    both.save(file, "JPEG", quality=85)
    return file.getvalue()


def _truth_drawn(picture: Image.Image, source: DenseSource, number: int, classes: Sequence[str], scale: float) -> Image.Image:
    if source.kind == "maps":
        return draw_map(picture, source.index_map(number))
    truth: Objects = source.objects(number)
    return objects_drawn(picture, Found(truth.boxes, np.ones(len(truth), np.float32), truth.labels, truth.masks), classes, scale, False)
