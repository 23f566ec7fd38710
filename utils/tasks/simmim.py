"""SimMIM: pre-training by predicting the pixels of masked squares, without labels (models/simmim.py has the model and the paper).

Whatever layout the images have, their classes are not looked at. The run's checkpoints start a classifier with ``--pretrained``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError, image_size, input_channels
from data import Loaders, build_loaders, seeds
from data.loading.sampler import Key
from models import build_model
from models.simmim import SimMIM, masked_error, masked_squares, normalised_by_neighbourhood
from utils.evaluation.metrics import SumEvaluator, SumMetric
from utils.tasks.base import Batch, Task, chosen_metric, noise


def mask_seed(seed: int, key: Key) -> int:
    """What an image's mask is a function of, from the run's seed and the image's (epoch, index, copy); never negative."""
    return seeds.derive(seed, seeds.MASK, *key)


class MaskedImages(Task):
    """Batches are ``(images (B, C, H, W), mask seeds (B,) int64)``, the seed -1 in rows that only fill an evaluation batch; outputs are
    the error of each image over its masked pixels (B,), float32. An image is evaluated with the same mask every time."""

    name, pretrains = "simmim", True
    metrics = (SumMetric("loss", "loss", higher_is_better=False, digits=4,
                         sums=lambda errors, mask_seeds: torch.stack([torch.where(mask_seeds >= 0, errors, 0).sum(),
                                                                      (mask_seeds >= 0).sum().to(errors.dtype)]),
                         value=lambda sums: float(sums[0] / sums[1]) if sums[1] else math.nan),)

    def __init__(self, config: CfgNode):
        if config.TRAIN.LAYER_DECAY < 1 or config.TRAIN.LINEAR_PROBE:
            raise ConfigError("TASK simmim trains all layers alike; leave TRAIN.LAYER_DECAY 1 and TRAIN.LINEAR_PROBE False for fine-tuning")
        if config.TRAIN.CLASS_WEIGHTS != "none":
            raise ConfigError(f"TRAIN.CLASS_WEIGHTS is {config.TRAIN.CLASS_WEIGHTS}, and TASK simmim looks at no classes; leave it none "
                              "for fine-tuning")
        self.best = chosen_metric(config, {"loss": self.metrics[0]}, "loss")
        self.seed, self.side, self.ratio = config.SEED, config.DATA.MASK_PATCH_SIZE, config.DATA.MASK_RATIO
        self.neighbourhood = config.MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE if config.MODEL.SIMMIM.NORM_TARGET.ENABLE else 0
        height, width = image_size(config)
        squares = math.ceil(height / self.side) * math.ceil(width / self.side)
        if math.ceil(self.ratio * squares) == squares:
            raise ConfigError(f"DATA.MASK_PATCH_SIZE is {self.side}; images of {height} x {width} pixels have {squares} such squares, of "
                              f"which DATA.MASK_RATIO {self.ratio:g} leaves none visible; make them smaller")

    def build_loaders(self, config: CfgNode, rank: int = 0, world_size: int = 1, **options: Any) -> Loaders:
        loaders = build_loaders(config, rank, world_size, **options)
        for loader in filter(None, (loaders.train, loaders.val)):
            loader.dataset.target_of = functools.partial(mask_seed, self.seed)
        return loaders

    def build_model(self, config: CfgNode, num_classes: int | None = None) -> nn.Module:
        try:
            return SimMIM(build_model(config, 0), self.side, input_channels(config))
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"TASK simmim with MODEL.TYPE {config.MODEL.TYPE}: {error}") from None

    def synthetic_batch(self, config: CfgNode, images: int, num_classes: int, device: torch.device, generator: torch.Generator) -> Batch:
        numbers = torch.randint(1 << 62, (images,), generator=generator).to(device)
        return noise(config, images, device, generator), numbers

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        images = self.images(batch)
        mask = masked_squares(self.targets(batch), images.shape[2:], self.side, self.ratio)
        predicted, images = model(images, mask).float(), images.float()
        wanted = normalised_by_neighbourhood(images, self.neighbourhood) if self.neighbourhood else images
        return masked_error(predicted, wanted, mask, self.side)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.sum()

    def evaluator(self, device: torch.device) -> SumEvaluator:
        return SumEvaluator(self.metrics, device, lambda mask_seeds: (mask_seeds >= 0).sum())
