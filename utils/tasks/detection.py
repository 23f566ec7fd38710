"""Objects in boxes, and with a mask each (instance segmentation), by COCO's figures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError
from data import Loaders
from data.dense.batch import DenseBatch
from utils.evaluation.detection_metrics import DetectionEvaluator, detection_metrics
from utils.inference.found import Found, found_of_detections
from utils.inference.trained_model import Trained
from utils.tasks.base import chosen_metric
from utils.tasks.dense import DenseTask
from utils.tasks.dense_logs import DetectionLog, keeps_log
from utils.tasks.dense_predictions import FoundObjects
from utils.tasks.detection_report import DetectionReport


class Detection(DenseTask):
    """Answers are ``Found``: boxes, scores and labels, and masks where the head has them."""

    name = "detection"
    kinds: tuple[str, ...] = ("box",)
    deciding = "box_ap"

    def __init__(self, config: CfgNode):
        super().__init__(config)
        if config.TEST.FLIP != "none":
            raise ConfigError(f"TEST.FLIP is for classification and semantic segmentation, and TASK is {config.TASK}; leave it out")
        self.metrics = detection_metrics(self.kinds)
        self.best = chosen_metric(config, {metric.name: metric for metric in self.metrics}, self.deciding)

    def build_loaders(self, config: CfgNode, rank: int = 0, world_size: int = 1, **options: Any) -> Loaders:
        loaders = super().build_loaders(config, rank, world_size, **options)
        if "mask" in self.kinds and self.source is not None and not self.source.has_masks:
            raise ConfigError(f"{config.DATA.DATA_PATH}: its objects have boxes but no masks, which TASK {config.TASK} needs; give --opts "
                              "TASK detection")
        return loaders

    def answers(self, outputs: Any, batch: DenseBatch) -> list[Found]:
        return found_of_detections(outputs, batch.sizes, batch.originals)

    def targets(self, batch: DenseBatch) -> Tensor:
        return batch.numbers

    def evaluator(self, device: torch.device) -> DetectionEvaluator:
        self._evaluator = DetectionEvaluator(self.source, self.kinds)
        return self._evaluator

    def prediction_log(self, loaders: Loaders) -> DetectionLog | None:
        return DetectionLog(loaders, lambda: self._evaluator) if keeps_log(loaders) else None

    def evaluation_report(self, config: CfgNode) -> DetectionReport:
        return DetectionReport(self, config)

    def evaluated_model(self, config: CfgNode, model: nn.Module, names: Any, classes: Any) -> nn.Module:
        return model

    def prediction_format(self, config: CfgNode, trained: Trained) -> FoundObjects:
        return FoundObjects(trained.classes, config.PREDICT.SCORE, masks="mask" in self.kinds)


class Instance(Detection):
    """As detection, with the masks of the objects; the best is by these."""

    name, kinds, deciding = "instance", ("box", "mask"), "mask_ap"
