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


class LabelMixup(BatchMixup):
    """``(images (B, 3, H, W), targets (B, classes), step) -> (mixed images, shares (B, classes) float)`` of several labels an image.

    A label's share is that of the images with it; it is not known, -1, where it is not known of one of them.
    """

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        # timm mixes classes: with an image's own number as its class the soft targets are the shares of the images.
        self.mixup.num_classes = len(images)
        images, shares = super().__call__(images, torch.arange(len(images), device=images.device), step)
        mixed = shares @ targets.clamp(min=0).to(shares)
        return images, mixed.clamp_(max=1).masked_fill_(shares @ (targets < 0).to(shares) > 0, -1)


def identity_mixup(images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """No mixing: the batch as it is."""
    return images, targets


def build_mixup(config: CfgNode, num_classes: int, rank: int) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """The mixing of batches that the section AUG asks for; the targets are smoothed, too."""
    mixup = _timm_mixup(config, config.MODEL.LABEL_SMOOTHING, num_classes)
    return identity_mixup if mixup is None else BatchMixup(mixup, config.SEED, rank)


def build_label_mixup(config: CfgNode, rank: int) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """As ``build_mixup``, of several labels an image, which are not smoothed."""
    mixup = _timm_mixup(config, 0.0, 0)
    return identity_mixup if mixup is None else LabelMixup(mixup, config.SEED, rank)


def _timm_mixup(config: CfgNode, smoothing: float, num_classes: int) -> Mixup | None:
    aug = config.AUG
    if aug.MIXUP_PROB == 0 or not (aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX):
        return None
    return Mixup(mixup_alpha=aug.MIXUP, cutmix_alpha=aug.CUTMIX, cutmix_minmax=aug.CUTMIX_MINMAX, prob=aug.MIXUP_PROB,
                 switch_prob=aug.MIXUP_SWITCH_PROB, mode=aug.MIXUP_MODE, label_smoothing=smoothing, num_classes=num_classes)
