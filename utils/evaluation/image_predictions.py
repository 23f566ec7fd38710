"""What a classifier predicts on each image of a pass, and the figures that follow from it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.errors import UnreadableImage
from data.loading.sampler import ShardSampler
from utils.evaluation.classification_metrics import FEW, HEADLINE, detail
from utils.evaluation.metrics import Evaluation, line
from utils.evaluation.predictions_file import MOST_IMAGES, PredictionsFile, names_of, thumbnail
from utils.runtime import distributed
from utils.runtime.files import csv_writer


@dataclass(frozen=True)
class ImagePredictions:
    """The images of a pass in the order of the data, (N,) each; those that could not be read have target -1.

    Attributes:
        target: class of the image.
        top1: class predicted.
        second: the next likely one; -1 where there is but one.
        in5: the image's class is among the first five predictions.
        confidence: probability of the class predicted.
        loss: cross entropy, float32; its negative exponential is the probability of the image's class.
        choices: how many classes predictions were chosen from.
    """

    target: np.ndarray
    top1: np.ndarray
    second: np.ndarray
    in5: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray
    choices: int

    @property
    def right(self) -> np.ndarray:
        return (self.top1 == self.target) & (self.target >= 0)

    def evaluation(self, counted: np.ndarray | None = None) -> Evaluation:
        """The counts over the images that could be read, or over those of them that are ``counted`` (N,) bool."""
        counted = (self.target >= 0) & (True if counted is None else counted)
        number = int(counted.sum())
        sums = dict(top1=self.right[counted].sum(), top5=self.in5[counted].sum(), val_loss=self.loss[counted].astype(np.float64).sum())
        values = {metric.name: metric.value(torch.tensor([sums[metric.name], number])) for metric in HEADLINE}
        told = [metric for metric in HEADLINE if metric.name != "top5" or self.choices > FEW]
        return Evaluation(values, number, line(told, values, detail(values, number)))

    def on(self, classes: np.ndarray) -> ImagePredictions:
        """The same, with images of other ``classes`` (K,) marked as such that do not count."""
        return dataclasses.replace(self, target=np.where(np.isin(self.target, classes), self.target, -1))


class PredictionRecorder:
    """Keeps the predictions of a pass on the device: ``evaluate`` may be given one as ``record``.

    Args:
        allowed: classes that predictions are chosen from, positions among the classes (K,); None: all of them.
    """

    def __init__(self, allowed: np.ndarray | None = None):
        self.allowed, self._barred, self._choices = allowed, None, 0
        self._rows: list[tuple[Tensor, ...]] = []

    def __call__(self, logits: Tensor, targets: Tensor) -> None:
        if self.allowed is not None:
            if self._barred is None:
                self._barred = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
                self._barred[torch.from_numpy(self.allowed).to(logits.device)] = False
            logits = logits.masked_fill(self._barred, float("-inf"))
        logs = logits.log_softmax(1)
        best = logs.topk(min(5, logs.shape[1]), dim=1)
        of_target = logs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        second = best.indices[:, 1] if logs.shape[1] > 1 else torch.full_like(targets, -1)
        self._rows.append((targets, best.indices[:, 0], second, (best.indices == targets[:, None]).any(1), best.values[:, 0], -of_target))
        self._choices = logs.shape[1] if self.allowed is None else len(self.allowed)

    def predictions(self, loader: Any) -> ImagePredictions:
        """The predictions of all ranks together, in the order of ``loader``'s images; every rank must ask."""
        columns = [torch.cat(column).cpu().numpy() for column in zip(*self._rows, strict=True)] if self._rows else _EMPTY
        sampler = loader.batch_sampler
        if hasattr(sampler, "high"):  # what fills the last batch up stands at the end
            columns = [column[:sampler.high - sampler.low] for column in columns]
        else:
            columns = [column[columns[0] >= 0] for column in columns]
        parts = zip(*distributed.gather_objects([*columns, np.array([self._choices])]), strict=True)
        target, top1, second, in5, log, loss, choices = map(np.concatenate, parts)
        return ImagePredictions(target, top1, second, in5, np.exp(log), loss, int(choices.max()))


_EMPTY = [np.zeros(0, kind) for kind in (np.int64, np.int64, np.int64, bool, np.float32, np.float32)]


_THUMBNAILS = 24


def recordable(loader: Any) -> bool:
    """Whether the images of ``loader`` have numbers (a stream's have none), and are no more than ``MOST_IMAGES``."""
    return isinstance(loader.batch_sampler, ShardSampler) and len(loader.dataset.source) <= MOST_IMAGES


def write_predictions(predictions: ImagePredictions, loader: Any, classes: Sequence[str], path: str) -> None:
    """Write the ``predictions`` on the images of ``loader``, which are ``recordable``; rank 0's business.

    Raises:
        OSError: it cannot be written.
    """
    if not distributed.is_main():
        return
    source, index = loader.dataset.source, np.flatnonzero(predictions.target >= 0)
    target, top1 = (column[index].astype(np.int32) for column in (predictions.target, predictions.top1))
    made = PredictionsFile(index, target, top1, predictions.confidence[index], np.exp(-predictions.loss[index]),
                           names_of(source, index.tolist()), list(classes), {})
    made.thumbnails = thumbnails_of(made, source)
    made.write(path)


def mistakes_table(predictions: ImagePredictions, loader: Any, classes: Sequence[str]) -> bytes:
    """A CSV table of the images of ``loader``, which are ``recordable``, that were not recognised, the surest mistake first: path, class,
    class predicted, its probability, and the next likely class."""
    text, path_of = io.StringIO(), loader.dataset.source.path
    rows = csv_writer(text)
    rows.writerow(["path", "true", "predicted", "probability", "second"])
    wrong = np.flatnonzero((predictions.target >= 0) & ~predictions.right)
    for index in wrong[np.argsort(-predictions.confidence[wrong], kind="stable")].tolist():
        true, predicted, second = (classes[column[index]] for column in (predictions.target, predictions.top1, predictions.second))
        rows.writerow([path_of(index), true, predicted, f"{predictions.confidence[index]:.6g}", second])
    return text.getvalue().encode("utf-8", "backslashreplace")


def thumbnails_of(made: Any, source: Any) -> dict[int, bytes]:
    """Pictures of the worst mistakes in a file of predictions of the images of ``source``, by their position in the file."""
    found = {}
    for position in made.worst(_THUMBNAILS):
        try:
            found[position] = thumbnail(source.load(int(made.index[position])))
        except (UnreadableImage, DataError, OSError):
            continue
    return found
