"""Masks proposed by queries (Mask2Former), for whatever the data has: objects, a class for each pixel, or both at once (panoptic)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError
from data import Loaders
from data.dense.batch import DenseBatch
from utils.evaluation.detection_metrics import DetectionEvaluator, detection_metrics
from utils.evaluation.map_metrics import MAP_METRICS, MapEvaluator
from utils.evaluation.metrics import Evaluation
from utils.evaluation.panoptic_metrics import PANOPTIC_METRICS, PanopticEvaluator
from utils.inference.found import found_of_queries, map_of_queries, panoptic_of_queries
from utils.inference.trained_model import Trained
from utils.runtime.distributed import all_reduce_sum
from utils.tasks.base import EvaluationReport, PredictionLog, chosen_metric
from utils.tasks.dense import DenseTask
from utils.tasks.dense_logs import DetectionLog, MapLog, PanopticLog, keeps_log
from utils.tasks.dense_predictions import FoundMaps, FoundObjects, FoundSegments
from utils.tasks.detection_report import DetectionReport
from utils.tasks.map_report import MapReport, PanopticReport
from utils.tasks.semantic import maps_of

# By the kind of the data: what is evaluated, and which figure decides.
_FIGURES = {"objects": (detection_metrics(("mask",)), "mask_ap"), "maps": (MAP_METRICS, "miou"), "panoptic": (PANOPTIC_METRICS, "pq")}


class Mask(DenseTask):
    """Answers are ``Found`` of objects, maps of classes (H, W) uint8, or the segments of panoptic data, by the kind of the data."""

    name = "mask"

    def __init__(self, config: CfgNode):
        super().__init__(config)
        if config.TEST.FLIP != "none":
            raise ConfigError(f"TEST.FLIP is for classification and semantic segmentation, and TASK is {config.TASK}; leave it out")
        self.things: list[bool] = []
        self.classes: list[str] = []
        self.masks_per_image: Tensor | None = None
        self._take("objects")

    def _take(self, kind: str, decide: bool = False) -> None:
        """``decide``: TRAIN.BEST_METRIC must be one of this kind of data."""
        self.kind, (self.metrics, deciding) = kind, _FIGURES[kind]
        known = {metric.name: metric for metric in self.metrics}
        self.best = chosen_metric(self.config, known, deciding) if decide else known[deciding]

    def build_loaders(self, config: CfgNode, rank: int = 0, world_size: int = 1, **options: Any) -> Loaders:
        loaders = super().build_loaders(config, rank, world_size, **options)
        self.classes = loaders.classes
        if self.source is not None:
            if self.source.kind == "objects" and not self.source.has_masks:
                raise ConfigError(f"{config.DATA.DATA_PATH}: its objects have boxes but no masks, which TASK {config.TASK} needs; give "
                                  "--opts TASK detection")
            self.things = list(self.source.things)
            self._take(self.source.kind, decide=True)
        return loaders

    def begin_step(self, batch: DenseBatch, world_size: int) -> None:
        """Find what the losses are divided by: the mean over the step's images, on all the processes that share it."""
        numbers, device = (float(batch.counts.sum()), float(len(batch.images))), batch.images.device
        totals = torch.cat([torch.full((1,), number, device=device) for number in numbers])  # a copy to the device would wait for it
        objects, images = all_reduce_sum(totals) if world_size > 1 else totals
        self.masks_per_image = objects / images

    def forward(self, model: nn.Module, batch: DenseBatch) -> Any:
        if not model.training:
            return super().forward(model, batch)
        return model(batch.images, batch.sizes, self.training_targets(batch), self.masks_per_image)

    def answers(self, outputs: Mapping[str, Tensor], batch: DenseBatch) -> list[Any]:
        whole = outputs, batch.sizes, batch.originals, batch.images.shape[2:]
        if self.kind == "maps":
            return map_of_queries(*whole)
        return panoptic_of_queries(*whole, self.things) if self.kind == "panoptic" else found_of_queries(
            *whole, self.config.MODEL.DENSE.DETECTIONS)

    def targets(self, batch: DenseBatch) -> Any:
        return maps_of(batch) if self.kind == "maps" else batch.numbers

    def evaluator(self, device: torch.device) -> Any:
        if self.kind == "maps":
            self._evaluator = MapEvaluator(self.classes, device)
        else:
            self._evaluator = PanopticEvaluator(self.source) if self.kind == "panoptic" else DetectionEvaluator(self.source, ("mask",))
        return self._evaluator

    def prediction_log(self, loaders: Loaders) -> PredictionLog | None:
        if not keeps_log(loaders):
            return None
        if self.kind == "maps":
            return MapLog(loaders, maps_of)
        return (PanopticLog if self.kind == "panoptic" else DetectionLog)(loaders, lambda: self._evaluator)

    def evaluation_report(self, config: CfgNode) -> EvaluationReport:
        return _ReportByKind(self, config)

    def evaluated_model(self, config: CfgNode, model: nn.Module, names: Any, classes: Any) -> nn.Module:
        return model

    def state_dict(self) -> dict[str, Any]:
        return dict(kind=self.kind, things=self.things)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("kind") in _FIGURES:
            self._take(state["kind"])
            self.things = [bool(thing) for thing in state.get("things", ())]

    def prediction_format(self, config: CfgNode, trained: Trained) -> Any:
        if self.kind == "maps":
            return FoundMaps(trained.classes)
        return FoundSegments(trained.classes) if self.kind == "panoptic" else FoundObjects(trained.classes, config.PREDICT.SCORE)


class _ReportByKind(EvaluationReport):
    """What the kind of the data asks for, once it is known."""

    _REPORTS = {"objects": DetectionReport, "maps": MapReport, "panoptic": PanopticReport}
    task: Mask

    def __init__(self, task: Mask, config: CfgNode):
        super().__init__(task)
        self.config = config

    def begin(self, loaders: Loaders) -> list[str]:
        self.report = self._REPORTS[self.task.kind](self.task, self.config)
        return self.report.begin(loaders)

    def record(self, outputs: Any, batch: DenseBatch) -> None:
        self.report.record(outputs, batch)

    def lines(self, result: Any, raw: Sequence[Evaluation]) -> list[str]:
        return self.report.lines(result, raw)

    def write(self) -> list[str]:
        return self.report.write()
