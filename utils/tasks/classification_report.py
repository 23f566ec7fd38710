"""What --eval says of a classifier: label sets, intervals, calibration, figures of each class, and the files of predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from yacs.config import CfgNode

from config import ConfigError, lookup
from data import Loaders
from models.weights import unwrap_state_dict
from utils.checkpoints.file_format import is_own
from utils.evaluation.image_predictions import ImagePredictions, PredictionRecorder, mistakes_table, recordable, write_predictions
from utils.evaluation.label_sets import Labels, LabelSet
from utils.evaluation.metrics import Evaluation
from utils.evaluation.per_class import PerClass
from utils.evaluation.predictions_file import MOST_IMAGES
from utils.evaluation.summary import describe
from utils.inference.outputs import standard_output
from utils.runtime.files import STANDARD, replace_file
from utils.tasks.base import Batch, EvaluationReport, Task


class ClassificationReport(EvaluationReport):
    """Predictions of all images are kept twice where a label set restricts the classes: from all classes, and from those allowed."""

    tells_mistakes = True
    loaders: Loaders
    label_set: LabelSet
    predictions: ImagePredictions
    among: ImagePredictions | None

    def __init__(self, task: Task, config: CfgNode, labels: Labels | None = None):
        """``labels``: those of TEST.LABELS, where they have been read already."""
        super().__init__(task)
        self.config, self.labels = config, labels or Labels(config)

    def classes_wanted(self, content: Any) -> Any:
        if is_own(content):
            return self.labels.naming(content["classes"], thousand=False)
        state = unwrap_state_dict(content, "weights")
        return self.labels.naming(None, thousand=any(t.ndim == 2 and t.shape[0] == 1000 for t in state.values()))

    def begin(self, loaders: Loaders) -> list[str]:
        for key in ("TEST.PREDICTIONS", "PREDICT.CSV"):
            if lookup(self.config, key) and not recordable(loaders.val):
                raise ConfigError(f"{key}: not for a stream, whose images have no numbers, nor beyond {MOST_IMAGES:,} images; leave it "
                                  "empty")
        self.loaders, self.label_set = loaders, self.labels.on(loaders.val.dataset.source, loaders.classes)
        self._everything, self._chosen = PredictionRecorder(), PredictionRecorder(self.label_set.allowed)
        return list(self.label_set.notices)

    def record(self, outputs: Tensor, batch: Batch) -> None:
        self._everything(outputs, batch[1])
        if self.label_set.allowed is not None:
            self._chosen(outputs, batch[1])

    def lines(self, result: Evaluation, raw: Sequence[Evaluation]) -> list[str]:
        classes, label_set, allowed = self.loaders.classes, self.label_set, self.label_set.allowed
        self.predictions = predictions = self._everything.predictions(self.loaders.val)
        self.among = self._chosen.predictions(self.loaders.val) if allowed is not None else None
        lines = []
        if self.among is not None and label_set.headline:
            lines.append(f"predictions from all {len(classes)} classes: {predictions.on(allowed).evaluation().line}")
            predictions = self.among.on(allowed)
            result = predictions.evaluation()
        elif self.among is not None:
            lines.append(f"predictions from the {len(allowed)} classes with images alone: {self.among.evaluation().line}")
        lines += describe(predictions, PerClass.of(predictions.target, predictions.top1, len(classes)), classes)
        whose = "raw, all images and classes:" if label_set.headline else "raw"
        lines += [f"{whose} {other.line}" for other in raw]
        if label_set.real is not None:
            return [*lines, f"by the original labels: {result.line}", _real_line(label_set.real, predictions)]
        return [*lines, result.line]

    def write(self) -> list[str]:
        lines, config, classes, allowed = [], self.config, self.loaders.classes, self.label_set.allowed
        if config.TEST.PREDICTIONS:
            write_predictions(self.predictions, self.loaders.val, classes, os.path.expanduser(config.TEST.PREDICTIONS))
            lines.append(f"prediction of each image: {config.TEST.PREDICTIONS}")
        counted = self.among.on(allowed) if self.among is not None and self.label_set.headline else self.predictions
        if config.PREDICT.CSV:
            table = mistakes_table(counted, self.loaders.val, classes)
            if config.PREDICT.CSV == STANDARD:
                standard_output().write(table.decode())
            else:
                replace_file(os.path.expanduser(config.PREDICT.CSV), table)
                lines.append(f"mistakes: {config.PREDICT.CSV}")
        if config.TEST.PER_CLASS:
            table = PerClass.of(counted.target, counted.top1, len(classes)).csv(classes, allowed)
            replace_file(os.path.expanduser(config.TEST.PER_CLASS), table.encode("utf-8", "backslashreplace"))
            lines.append(f"figures of each class: {config.TEST.PER_CLASS}")
        return lines


def _real_line(real: Sequence[Sequence[int]], predictions: ImagePredictions) -> str:
    rows = zip(real, predictions.top1.tolist(), predictions.target.tolist(), strict=True)
    evaluated = [(labels, predicted) for labels, predicted, target in rows if target >= 0]
    labelled = [(labels, predicted) for labels, predicted in evaluated if labels]
    right = sum(predicted in labels for labels, predicted in labelled)
    return (f"top1 {100 * right / max(1, len(labelled)):.2f} by ReaL labels ({right} of {len(labelled)}; "
            f"images without a label, left out: {len(evaluated) - len(labelled)})")
