"""Mixing whole batches: timm's Mixup and CutMix, seeded by the step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target
from torch import Tensor
from yacs.config import CfgNode

from data import seeds
from data.transforms.device_transforms import to_device


class DeviceMixup(Mixup):
    """timm's Mixup, which on CUDA mixes all images of a batch at once where they are mixed by their own numbers (modes elem and pair).

    timm's mixes one by one, in up to four launches an image, and waits for the device.
    """

    def _mix_elem(self, x: Tensor) -> Tensor:
        return self.mix_rows(x, len(x)) if x.is_cuda else super()._mix_elem(x)

    def _mix_pair(self, x: Tensor) -> Tensor:
        return self.mix_rows(x, len(x) // 2) if x.is_cuda else super()._mix_pair(x)

    def mix_rows(self, x: Tensor, drawn: int) -> Tensor:
        """Mix ``x`` (B, C, H, W) in place with its mirror image along the batch, and return what is left of each image, (B, 1).

        Args:
            drawn: images that numbers are drawn for: all of them, or the first half, whose numbers hold for the other half, too.
        """
        shares, cut = self._params_per_elem(drawn)
        own, boxes = shares.copy(), np.zeros((drawn, 4), np.float32)
        for i in np.flatnonzero(cut & (shares != 1)):
            boxes[i], shares[i] = cutmix_bbox_and_lam(x.shape, shares[i], ratio_minmax=self.cutmix_minmax, correct_lam=self.correct_lam)
            own[i] = 1
        numbers = np.column_stack([boxes, own, 1 - own, shares])
        there = to_device(numbers if drawn == len(x) else np.concatenate([numbers, numbers[::-1]]), x.device)
        top, bottom, left, right, own, others = there[:, :6, None, None, None].unbind(1)
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape[2:])
        inside = ((rows[:, None] >= top) & (rows[:, None] < bottom)) & ((columns >= left) & (columns < right))
        other = x.flip(0)
        x.copy_(torch.where(inside, other, x * own + other * others))
        return there[:, 6:]


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
    return DeviceMixup(mixup_alpha=aug.MIXUP, cutmix_alpha=aug.CUTMIX, cutmix_minmax=aug.CUTMIX_MINMAX, prob=aug.MIXUP_PROB,
                       switch_prob=aug.MIXUP_SWITCH_PROB, mode=aug.MIXUP_MODE, label_smoothing=smoothing, num_classes=num_classes)
