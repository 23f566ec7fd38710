"""Classification: one class an image."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError
from data import Loaders
from data.transforms.mixup import build_mixup
from utils.evaluation.classification_metrics import FEW, METRICS, OTHERS, counted, detail, only_answer, uneven
from utils.evaluation.image_predictions import PredictionRecorder, mistakes_table, recordable, write_predictions
from utils.evaluation.metrics import SumEvaluator, SumMetric
from utils.evaluation.predictions_file import FILE, MISTAKES
from utils.inference.evaluation_models import arranged
from utils.inference.outputs import TopClasses
from utils.inference.trained_model import Trained
from utils.runtime import distributed
from utils.runtime.files import replace_file
from utils.runtime.precision import Precision
from utils.tasks.base import Batch, Task, chosen_metric, noise
from utils.tasks.class_weights import class_weights
from utils.tasks.classification_report import ClassificationReport
from utils.tasks.distillation import build_teacher, distillation_loss, taught_by


class Classification(Task):
    """Batches are ``(images (B, 3, H, W), targets)``, in training with a teacher's logits (B, C) behind where there is one; targets are
    classes (B,), -1 for rows that only fill an evaluation batch, or the mixed and smoothed (B, C) that mixup makes of them. Outputs are
    logits (B, C), float32; of a model with a token for the teacher, in training, two of them."""

    name = "classification"

    def __init__(self, config: CfgNode):
        self.config, self.smoothing = config, config.MODEL.LABEL_SMOOTHING
        known = {metric.label.replace(" ", "_").lower(): metric for metric in (*METRICS, *OTHERS)}
        self.best, loss = chosen_metric(config, known, "top1"), known["loss"]
        self.metrics = METRICS if self.best in METRICS else (*METRICS, self.best)
        self.tie_break = loss if self.best is not loss else None
        self.classes: Sequence[str] = ()  # of the data, once its loaders are there
        self.weights: Tensor | None = None  # of the classes in training, likewise

    def build_loaders(self, config: CfgNode, rank: int = 0, world_size: int = 1, **options: Any) -> Loaders:
        loaders = super().build_loaders(config, rank, world_size, **options)
        self.classes = loaders.classes
        if self.best.name == "auroc" and len(self.classes) != 2:
            raise ConfigError(f"TRAIN.BEST_METRIC is auroc, which is of two classes, and {config.DATA.DATA_PATH} has {len(self.classes)}; "
                              "f1, kappa and mean_recall are of any number")
        if loaders.train is not None:
            self._weigh(config, loaders)
        return loaders

    def _weigh(self, config: CfgNode, loaders: Loaders) -> None:
        draws = loaders.train.batch_sampler.draws
        images = None if draws is None else np.pad(draws, (0, len(self.classes) - len(draws)))
        self.weights = class_weights(config, len(self.classes), images)
        if self.weights is not None:
            low, high = int(self.weights.argmin()), int(self.weights.argmax())
            loaders.notices.append(f"class weights from {self.weights[low]:.3g} ({self.classes[low]}) to {self.weights[high]:.3g} "
                                   f"({self.classes[high]})")

    def batch_transform(self, config: CfgNode, num_classes: int, rank: int) -> Callable[[Batch, int], Batch]:
        mixup = build_mixup(config, num_classes, rank)
        return lambda batch, step: mixup(*batch, step)

    def build_model(self, config: CfgNode, num_classes: int | None = None) -> nn.Module:
        model = super().build_model(config, num_classes)
        if config.TRAIN.DISTILLATION.TEACHER and hasattr(model, "set_distilled_training"):
            model.set_distilled_training(True)  # in training its two heads answer apart: one learns the labels, one the teacher
        return model

    def taught(self, config: CfgNode, transform: Callable[[Batch, int], Batch],
               precision: Precision) -> tuple[Callable[[Batch, int], Batch], list[str]]:
        if not config.TRAIN.DISTILLATION.TEACHER:
            return transform, []
        teacher, line = build_teacher(self, config, self.classes, precision)
        return taught_by(teacher, transform), [line]

    def synthetic_batch(self, config: CfgNode, images: int, num_classes: int, device: torch.device, generator: torch.Generator) -> Batch:
        targets = torch.randint(num_classes, (images,), generator=generator).to(device)
        return noise(config, images, device, generator), targets

    def forward(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        outputs = model(self.images(batch))
        return tuple(logits.float() for logits in outputs) if isinstance(outputs, tuple) else outputs.float()

    def loss(self, outputs: Tensor | tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        outputs, pupil = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        loss = self._label_loss(outputs, self.targets(batch))
        if len(batch) < 3:
            return loss
        alpha = self.config.TRAIN.DISTILLATION.ALPHA
        return (1 - alpha) * loss + alpha * distillation_loss(pupil, batch[2], self.config)

    def _label_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        smoothing = 0.0 if targets.is_floating_point() else self.smoothing  # mixed targets come smoothed already
        if self.weights is not None and self.weights.device != outputs.device:
            self.weights = self.weights.to(outputs.device)
        return F.cross_entropy(outputs, targets, self.weights, reduction="sum", label_smoothing=smoothing)

    def evaluator(self, device: torch.device) -> SumEvaluator:
        return SumEvaluator(self.metrics, device, counted, detail, self._is_shown, self._caution)

    def _is_shown(self, metric: SumMetric, sums: Mapping[str, Tensor]) -> bool:
        if metric.name == "top5":
            return sums["mean_recall"].shape[1] > FEW
        return metric.name != "mean_recall" or metric is self.best or uneven(sums["mean_recall"])

    def _caution(self, sums: Mapping[str, Tensor]) -> str:
        answer = only_answer(sums["mean_recall"])
        if answer is None:
            return ""
        name = repr(self.classes[answer]) if self.classes else f"number {answer}"
        even = "; against uneven classes DATA.SAMPLING balanced helps, or TRAIN.CLASS_WEIGHTS" if uneven(sums["mean_recall"]) else ""
        return (f"every image is taken for the class {name}: top1 is its share of the images, and nothing is told apart yet; where "
                f"that stays so, train longer or with another --lr{even}")

    def prediction_log(self, loaders: Loaders) -> _PredictionLog | None:
        return _PredictionLog(loaders) if recordable(loaders.val) else None

    def evaluation_report(self, config: CfgNode) -> ClassificationReport:
        return ClassificationReport(self, config)

    def evaluated_model(self, config: CfgNode, model: nn.Module, names: Sequence[str], classes: Sequence[str]) -> nn.Module:
        return arranged(model, names, classes, config.TEST.FLIP)

    def prediction_format(self, config: CfgNode, trained: Trained) -> TopClasses:
        return TopClasses(trained.classes, trained.descriptions, config.PREDICT.TOPK)


class _PredictionLog:
    """predictions.npz and mistakes.csv of a run's last evaluation."""

    def __init__(self, loaders: Loaders):
        self.loaders, self.recorder = loaders, PredictionRecorder()

    def __call__(self, outputs: Tensor, batch: Batch) -> None:
        self.recorder(outputs, batch[1])

    def write(self, folder: str) -> None:
        predictions = self.recorder.predictions(self.loaders.val)
        write_predictions(predictions, self.loaders.val, self.loaders.classes, os.path.join(folder, FILE))
        if distributed.is_main():
            replace_file(os.path.join(folder, MISTAKES), mistakes_table(predictions, self.loaders.val, self.loaders.classes))
