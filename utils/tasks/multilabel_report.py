"""What --eval says of several labels an image: how even they are, the table of labels, the file of predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from yacs.config import CfgNode

from config import ConfigError
from data import Loaders
from utils.evaluation.image_predictions import recordable
from utils.evaluation.label_figures import LabelFigures
from utils.evaluation.label_predictions import LabelRecorder, probabilities, write_label_predictions
from utils.evaluation.metrics import Evaluation
from utils.evaluation.predictions_file import MOST_IMAGES
from utils.loggers.console import plain
from utils.runtime.files import replace_file, require_place
from utils.tasks.base import Batch, EvaluationReport

if TYPE_CHECKING:
    from utils.tasks.multilabel import Multilabel

WORST = 5


class MultilabelReport(EvaluationReport):
    """Outputs of all images are kept; the table is made of them at the end."""

    task: Multilabel
    loaders: Loaders
    gathered: tuple[np.ndarray, np.ndarray]
    figures: LabelFigures

    def __init__(self, task: Multilabel, config: CfgNode):
        super().__init__(task)
        self.config, self.recorder = config, LabelRecorder()
        for key, value, otherwise in (("TEST.LABELS", config.TEST.LABELS, "auto"), ("TEST.REAL_LABELS", config.TEST.REAL_LABELS, "")):
            if value != otherwise:
                raise ConfigError(f"{key} is for one class an image, and TASK is {task.name}; leave it out")
        if config.TEST.FLIP == "probabilities":
            raise ConfigError(f"TEST.FLIP probabilities is for one class an image, and TASK is {task.name}; TEST.FLIP logits works")
        for key, path in (("TEST.PER_CLASS", config.TEST.PER_CLASS), ("TEST.PREDICTIONS", config.TEST.PREDICTIONS)):
            if path:
                require_place(os.path.expanduser(path), f"{key} is ")

    def begin(self, loaders: Loaders) -> list[str]:
        if self.config.TEST.PREDICTIONS and not recordable(loaders.val):
            raise ConfigError(f"TEST.PREDICTIONS: not beyond {MOST_IMAGES:,} images; leave it empty")
        self.loaders = loaders
        self.task.thresholds(len(loaders.classes))  # a list of another length is an error before long work
        return []

    def record(self, outputs: Tensor, batch: Batch) -> None:
        self.recorder(outputs, batch[1])

    def lines(self, result: Evaluation, raw: Sequence[Evaluation]) -> list[str]:
        classes = self.loaders.classes
        self.gathered = logits, truth = self.recorder.gathered(self.loaders.val)
        self.figures = figures = LabelFigures.of(truth, probabilities(logits), self.task.thresholds(truth.shape[1]))
        found = "given" if self.task.given is not None else "found in training" if self.task.found else "one half, since none are known"
        lines = []
        if len(figures.thresholds):
            lines.append(f"thresholds: {figures.thresholds.min():.3f} to {figures.thresholds.max():.3f} ({found})")
        if worst := figures.worst()[:WORST]:
            lines.append("worst labels: " + "; ".join(
                f"{plain(classes[i])}: AP {100 * figures.precision_area[i]:.2f}, {figures.correct[i]} of {figures.images[i]} found, "
                f"{figures.answered[i] - figures.correct[i]} wrongly" for i in worst))
        if absent := int(np.sum(figures.images == 0)):
            lines.append(f"{absent} labels that no image has do not count in mAP and macro F1")
        return [*lines, *super().lines(result, raw)]

    def write(self) -> list[str]:
        lines, config, classes = [], self.config, self.loaders.classes
        if config.TEST.PREDICTIONS:
            write_label_predictions(*self.gathered, self.loaders.val, classes, self.figures.thresholds,
                                    os.path.expanduser(config.TEST.PREDICTIONS))
            lines.append(f"prediction of each image: {config.TEST.PREDICTIONS}")
        if config.TEST.PER_CLASS:
            replace_file(os.path.expanduser(config.TEST.PER_CLASS), self.figures.csv(classes).encode("utf-8", "backslashreplace"))
            lines.append(f"figures of each class: {config.TEST.PER_CLASS}")
        return lines
