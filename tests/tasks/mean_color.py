"""A task that the program does not know: the mean colour of an image, by regression."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from models import build_model
from utils.evaluation.metrics import SumEvaluator, SumMetric
from utils.inference.outputs import PredictionFormat
from utils.inference.trained_model import Trained
from utils.tasks.base import Batch, Task, noise


def absolute_error(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    colors, counted = targets
    return torch.stack([((outputs - colors).abs().mean(1) * counted).sum(), counted.sum().float()])


def close(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    colors, counted = targets
    return torch.stack([(((outputs - colors).abs().amax(1) < 0.2) & counted).sum(), counted.sum()])


METRICS = (
    SumMetric("close", "close", sums=close, value=lambda sums: 100 * float(sums[0]) / float(sums[1])),
    SumMetric("error", "error", higher_is_better=False, digits=4, sums=absolute_error, value=lambda sums: float(sums[0] / sums[1])),
)


class MeanColor(Task):
    """Batches are those of classification, whose labels only say which rows fill a batch."""

    name, metrics, best = "mean_color", METRICS, METRICS[1]

    def __init__(self, config: CfgNode):
        pass

    def build_model(self, config: CfgNode, num_classes: int | None = None) -> nn.Module:
        return build_model(config, 3)

    def synthetic_batch(self, config: CfgNode, images: int, num_classes: int, device: torch.device, generator: torch.Generator) -> Batch:
        return noise(config, images, device, generator), torch.zeros(images, dtype=torch.int64, device=device)

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch[0].float().mean((2, 3)), batch[1] >= 0

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(self.images(batch)).float()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(outputs, self.targets(batch)[0], reduction="sum")

    def evaluator(self, device: torch.device) -> SumEvaluator:
        return SumEvaluator(METRICS, device, lambda targets: targets[1].sum())

    def prediction_format(self, config: CfgNode, trained: Trained) -> PredictionFormat:
        return Colors()


class Colors:
    columns = ("red", "green", "blue")

    def tell(self, outputs: Tensor) -> list[dict[str, Any]]:
        return [dict(text=f"{color}", cells=color, record=dict(color=color), caption=f"{color[0]:.2f}") for color in outputs.tolist()]
