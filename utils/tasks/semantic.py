"""A class for each pixel (semantic segmentation), by the mean intersection over union."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError
from data import Loaders
from data.dense.batch import DenseBatch
from utils.evaluation.map_metrics import MAP_METRICS, MapEvaluator
from utils.inference.found import map_of_logits
from utils.inference.segmentation_models import segmentation_model
from utils.inference.trained_model import Trained
from utils.tasks.base import chosen_metric
from utils.tasks.dense import DenseTask
from utils.tasks.dense_logs import MapLog, keeps_log
from utils.tasks.dense_predictions import FoundMaps
from utils.tasks.map_report import MapReport


class Semantic(DenseTask):
    """Answers are maps of classes (H, W) uint8, each of its file's size."""

    name = "semantic"
    metrics = MAP_METRICS
    usual_classes = 150

    def __init__(self, config: CfgNode):
        super().__init__(config)
        self.best = chosen_metric(config, {metric.name: metric for metric in self.metrics}, "miou")
        self.classes: list[str] = []

    def build_loaders(self, config: CfgNode, rank: int = 0, world_size: int = 1, **options: Any) -> Loaders:
        loaders = super().build_loaders(config, rank, world_size, **options)
        if len(loaders.classes) < 2:
            raise ConfigError(f"{config.DATA.DATA_PATH}: has one class ({', '.join(loaders.classes)}), and TASK semantic tells classes of "
                              "pixels apart; give the background a value of its own in the masks")
        if loaders.train is not None and self.least_images(config) > config.DATA.BATCH_SIZE:
            raise ConfigError(f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} is too small for UPerNet's batch norm; raise it to 2 or more, or "
                              "give --opts MODEL.DENSE.HEAD semantic_fpn")
        self.classes = loaders.classes
        return loaders

    def least_images(self, config: CfgNode) -> int:
        """UPerNet pools a map to one pixel, and batch norm there needs another image."""
        return 1 if config.MODEL.DENSE.HEAD == "semantic_fpn" or config.TRAIN.SYNC_BN else 2

    def training_targets(self, batch: DenseBatch) -> list[dict[str, Tensor]]:
        return [{"map": one} for one in batch.maps]

    def answers(self, outputs: Tensor, batch: DenseBatch) -> list[Tensor]:
        return map_of_logits(outputs, batch.sizes, batch.originals)

    def targets(self, batch: DenseBatch) -> list[Tensor | None]:
        """The map of each image as its file has it, None where it could not be read."""
        return maps_of(batch)

    def evaluator(self, device: torch.device) -> MapEvaluator:
        return MapEvaluator(self.classes, device)

    def prediction_log(self, loaders: Loaders) -> MapLog | None:
        return MapLog(loaders, maps_of) if keeps_log(loaders) else None

    def evaluation_report(self, config: CfgNode) -> MapReport:
        return MapReport(self, config)

    def evaluated_model(self, config: CfgNode, model: nn.Module, names: Any, classes: Any) -> nn.Module:
        return segmentation_model(config, model)

    def prediction_format(self, config: CfgNode, trained: Trained) -> FoundMaps:
        return FoundMaps(trained.classes)


def maps_of(batch: DenseBatch) -> list[Tensor | None]:
    """The maps of the files (H, W) uint8 in an evaluation batch; None for an image that could not be read."""
    sizes, read = batch.originals.tolist(), (batch.numbers >= 0).tolist()
    parts = batch.maps.split([height * width for height, width in sizes])
    return [part.view(*size) if known else None for part, size, known in zip(parts, sizes, read, strict=True)]
