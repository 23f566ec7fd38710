"""What a model said of every label of every image: gathered exactly over ranks, evaluated, and written to a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.evaluation.image_predictions import thumbnails_of
from utils.evaluation.label_figures import LabelFigures, best_thresholds
from utils.evaluation.label_predictions_file import LabelPredictionsFile
from utils.evaluation.metrics import Evaluation, Metric, line
from utils.evaluation.predictions_file import names_of
from utils.runtime import distributed

METRICS = (
    Metric("map", "mAP"),
    Metric("f1", "macro F1"),
    Metric("micro_f1", "micro F1"),
    Metric("val_loss", "loss", higher_is_better=False, digits=4),
)


class LabelRecorder:
    """Keeps the outputs and the truth of a pass on the device."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor]] = []

    def __call__(self, logits: Tensor, targets: Tensor) -> None:
        self._rows.append((logits.float().clone(), targets))

    def gathered(self, loader: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """(logits float64, truth int8), (N, C) each, of all ranks; every rank must ask.

        Args:
            loader: where given, in the order of its images, and only what fills the last batch up is left out; else all rows are of which
                nothing is known.
        """
        mine = [torch.cat(column).cpu().numpy() for column in zip(*self._rows, strict=True)] if self._rows else None
        if mine is not None and loader is not None:  # what fills the last batch up stands at the end
            own = loader.batch_sampler.high - loader.batch_sampler.low
            mine = [column[:own] for column in mine]
        elif mine is not None:
            known = (mine[1] >= 0).any(axis=1)
            mine = [column[known] for column in mine]
        parts = [part for part in distributed.gather_objects(mine) if part is not None]
        if not parts:
            return np.zeros((0, 0)), np.zeros((0, 0), np.int8)
        logits, truth = (np.concatenate(column) for column in zip(*parts, strict=True))
        return logits.astype(np.float64), truth


class LabelEvaluator:
    """Evaluates labels: the same figures for every batch size and number of ranks, since they follow from all outputs together.

    Args:
        thresholds: for a number of labels their thresholds (C,), or None to find them on these images.
        found: called with the thresholds that were found.
    """

    def __init__(self, thresholds: Callable[[int], np.ndarray | None], found: Callable[[list[float]], None]):
        self.thresholds, self.found, self.update = thresholds, found, LabelRecorder()

    def result(self) -> Evaluation:
        """The figures over all ranks; every rank must ask."""
        logits, truth = self.update.gathered()
        thresholds = self.thresholds(truth.shape[1])
        if thresholds is None:
            thresholds = best_thresholds(truth, probabilities(logits))
            self.found(thresholds.tolist())
        return evaluation(logits, truth, thresholds)


def evaluation(logits: np.ndarray, truth: np.ndarray, thresholds: np.ndarray) -> Evaluation:
    """The figures of ``logits`` (N, C) against ``truth`` (N, C)."""
    figures = LabelFigures.of(truth, probabilities(logits), thresholds)
    values = dict(map=100 * figures.mean_average_precision(), f1=100 * figures.macro_f1(), micro_f1=100 * figures.micro_f1(),
                  val_loss=_loss(logits, truth))
    samples = int((truth >= 0).any(axis=1).sum())
    return Evaluation(values, samples, line(METRICS, values, f"({samples})"))


def probabilities(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))


def _loss(logits: np.ndarray, truth: np.ndarray) -> float:
    """Mean over images of the mean over labels of the binary cross entropy; what is not known adds nothing."""
    known = truth >= 0
    images = int(known.any(axis=1).sum())
    loss = np.logaddexp(0, np.where(truth == 1, -logits, logits))
    return float(loss[known].sum() / (images * truth.shape[1])) if images else float("nan")


def write_label_predictions(logits: np.ndarray, truth: np.ndarray, loader: Any, classes: Sequence[str], thresholds: np.ndarray,
                            path: str) -> None:
    """Write what was gathered of the images of ``loader``, which are ``recordable``; rank 0's business.

    Raises:
        OSError: it cannot be written.
    """
    if not distributed.is_main():
        return
    index = np.flatnonzero((truth >= 0).any(axis=1))
    source = loader.dataset.source
    made = LabelPredictionsFile(index, truth[index], probabilities(logits[index]).astype(np.float32), np.asarray(thresholds, np.float64),
                                names_of(source, index.tolist()), list(classes), {})
    made.thumbnails = thumbnails_of(made, source)
    made.write(path)
