"""Several labels an image, or none: each label is a question of its own, by binary cross entropy."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError, command_of
from data import Loaders, build_loaders
from data.streaming.stream import is_stream
from data.transforms.mixup import build_label_mixup
from utils.evaluation.image_predictions import recordable
from utils.evaluation.label_figures import UNDECIDED
from utils.evaluation.label_predictions import METRICS, LabelEvaluator, LabelRecorder, write_label_predictions
from utils.evaluation.predictions_file import FILE
from utils.inference.evaluation_models import arranged
from utils.inference.outputs import LabelsOverThreshold
from utils.inference.trained_model import Trained
from utils.tasks.base import Batch, Task, chosen_metric, noise
from utils.tasks.multilabel_report import MultilabelReport


class Multilabel(Task):
    """Batches are ``(images (B, 3, H, W), targets (B, C))``: 1 for a label that the image has, 0 for one that it has not, and -1 for what
    is not known and does not count, which is all of a row that only fills a batch; mixup makes shares of 0 to 1 of them. Outputs are
    logits (B, C), float32, each label's own.

    Training finds thresholds anew in each evaluation, and a checkpoint keeps the last ones; evaluation and prediction go by these.
    """

    name, metrics = "multilabel", METRICS

    def __init__(self, config: CfgNode):
        known = {"loss" if metric.name == "val_loss" else metric.name: metric for metric in METRICS}
        self.best, loss = chosen_metric(config, known, "map"), known["loss"]
        if config.TRAIN.CLASS_WEIGHTS != "none":
            raise ConfigError(f"TRAIN.CLASS_WEIGHTS is for one class an image, and TASK is {config.TASK}; DATA.SAMPLING balanced shows "
                              "images of rare labels more often")
        if config.TRAIN.DISTILLATION.TEACHER:
            raise ConfigError(f"TRAIN.DISTILLATION.TEACHER is for one class an image, and TASK is {config.TASK}; leave it empty")
        self.tie_break = loss if self.best is not loss else None
        self.softening, self.given = config.MODEL.LABEL_SMOOTHING, config.TEST.THRESHOLDS
        self.found: dict[str, list[float]] = {}  # thresholds of raw and averaged weights, by the last evaluation or in the checkpoint
        self.finds, self.trains, self.wanted = self.given is None, command_of(config) is None, config.TEST.WEIGHTS
        self._take_turns(["raw", "ema"] if config.TRAIN.EMA_DECAY else ["raw"])

    def build_loaders(self, config: CfgNode, rank: int = 0, world_size: int = 1, **options: Any) -> Loaders:
        if is_stream(config.DATA.DATA_PATH):
            raise ConfigError(f"{config.DATA.DATA_PATH}: is a stream, whose images have one class each; several labels an image are read "
                              "from a list, so leave TASK multilabel out, or copy the data to a disk")
        return build_loaders(config, rank, world_size, **options)

    def batch_transform(self, config: CfgNode, num_classes: int, rank: int) -> Callable[[Batch, int], Batch]:
        mixup = build_label_mixup(config, rank)
        return lambda batch, step: mixup(*batch, step)

    def synthetic_batch(self, config: CfgNode, images: int, num_classes: int, device: torch.device, generator: torch.Generator) -> Batch:
        targets = torch.randint(2, (images, num_classes), generator=generator, dtype=torch.int8).to(device)
        return noise(config, images, device, generator), targets

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(self.images(batch)).float()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """A sample's is the mean over all labels; the smoothing of each, a choice of two, goes to yes and no in equal parts."""
        targets = self.targets(batch)
        known = (targets >= 0).float()
        shares = targets.clamp(min=0).float() * (1 - self.softening) + self.softening / 2
        return F.binary_cross_entropy_with_logits(outputs, shares, weight=known, reduction="sum") / outputs.shape[1]

    def evaluator(self, device: torch.device) -> LabelEvaluator:
        whose = next(self._turns)

        def keep(thresholds: list[float]) -> None:
            self.found[whose] = thresholds
        return LabelEvaluator(lambda labels: None if self.finds else self.thresholds(labels, whose), keep)

    def _take_turns(self, weights: list[str]) -> None:
        """Evaluators are asked for in this order; what comes last counts."""
        self.counts, self._turns = weights[-1], itertools.cycle(weights)

    def thresholds(self, labels: int, whose: str = "") -> np.ndarray:
        """(labels,) those of TEST.THRESHOLDS, else those found for the weights that count, or for ``whose``, else one half.

        Raises:
            ConfigError: TEST.THRESHOLDS is a list of another length.
        """
        chosen = self.given if self.given is not None else self.found.get(whose or self.counts, UNDECIDED)
        if isinstance(chosen, list) and labels and len(chosen) != labels:
            raise ConfigError(f"TEST.THRESHOLDS has {len(chosen)} numbers, there are {labels} classes; give one for each in their order, "
                              "or one for all")
        return np.broadcast_to(np.asarray(chosen, dtype=np.float64), (labels,)) if labels else np.zeros(0)

    def state_dict(self) -> dict[str, Any]:
        names = {self.counts: "thresholds", "raw": "thresholds" if self.counts == "raw" else "raw_thresholds"}
        return {names[whose]: list(values) for whose, values in self.found.items() if whose in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        averaged = "raw_thresholds" in state
        names = {"raw": "raw_thresholds" if averaged else "thresholds", **({"ema": "thresholds"} if averaged else {})}
        self.found = {whose: [float(value) for value in state[name]] for whose, name in names.items() if _are_numbers(state.get(name))}
        turns = [whose for whose in self.found if self.wanted in ("auto", whose)]
        if turns and not self.trains:  # training evaluates what it has, whatever the checkpoint had
            self._take_turns(turns)

    def facts(self, classes: Sequence[str]) -> dict[str, Any]:
        return dict(problem_type="multi_label_classification", thresholds=self.thresholds(len(classes)).tolist())

    def prediction_log(self, loaders: Loaders) -> _PredictionLog | None:
        return _PredictionLog(self, loaders) if recordable(loaders.val) else None

    def evaluation_report(self, config: CfgNode) -> MultilabelReport:
        self.finds = False
        return MultilabelReport(self, config)

    def evaluated_model(self, config: CfgNode, model: nn.Module, names: Sequence[str], classes: Sequence[str]) -> nn.Module:
        return arranged(model, names, classes, config.TEST.FLIP)

    def prediction_format(self, config: CfgNode, trained: Trained) -> LabelsOverThreshold:
        return LabelsOverThreshold(trained.classes, self.thresholds(len(trained.classes)))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)


class _PredictionLog:
    """predictions.npz of a run's last evaluation."""

    def __init__(self, task: Multilabel, loaders: Loaders):
        self.task, self.loaders, self.recorder = task, loaders, LabelRecorder()

    def __call__(self, outputs: Tensor, batch: Batch) -> None:
        self.recorder(outputs, batch[1])

    def write(self, folder: str) -> None:
        loader, classes = self.loaders.val, self.loaders.classes
        write_label_predictions(*self.recorder.gathered(loader), loader, classes, self.task.thresholds(len(classes)),
                                os.path.join(folder, FILE))
