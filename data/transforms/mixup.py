"""Mixing whole batches: timm's Mixup and CutMix, seeded by the step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor
from yacs.config import CfgNode

from data import seeds


class BatchMixup:
    """``(images (B, 3, H, W), targets (B,), step) -> (mixed images, soft targets (B, classes))``.

    A function of (seed, step, rank) and the batch. Mixes in place. In a batch of odd size the last image is not mixed.
    """

    def __init__(self, mixup: Mixup, seed: int, rank: int):
        self.mixup, self.seed, self.rank = mixup, seed, rank

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        np.random.seed(seeds.derive32(self.seed, seeds.MIXUP, step, self.rank))
        even = len(images) // 2 * 2
        parts = []
        if even:
            images[:even], mixed = self.mixup(images[:even], targets[:even])
            parts.append(mixed)
        if even < len(images):
            parts.append(mixup_target(targets[even:], self.mixup.num_classes, 1.0, self.mixup.label_smoothing))
        return images, torch.cat(parts)


def identity_mixup(images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """No mixing: the batch as it is."""
    return images, targets


def build_mixup(config: CfgNode, num_classes: int, rank: int) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """The mixing of batches that the section AUG asks for."""
    aug = config.AUG
    if aug.MIXUP_PROB == 0 or not (aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX):
        return identity_mixup
    mixup = Mixup(mixup_alpha=aug.MIXUP, cutmix_alpha=aug.CUTMIX, cutmix_minmax=aug.CUTMIX_MINMAX, prob=aug.MIXUP_PROB,
                  switch_prob=aug.MIXUP_SWITCH_PROB, mode=aug.MIXUP_MODE, label_smoothing=config.MODEL.LABEL_SMOOTHING,
                  num_classes=num_classes)
    return BatchMixup(mixup, config.SEED, rank)
