"""What the heads that give a class to each pixel share: their loss, and logits at the size of the image.

Shapes: B images, C classes, H W image, h w map of the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255  # in a map of classes: pixels that do not count


def enlarged_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear, in float32: rounding errors of bf16 would grow with the number of pixels."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


def stacked_maps(targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The ``map`` of each target (H, W), as (B, H, W) int64."""
    return torch.stack([target["map"] for target in targets]).long()


def semantic_loss(logits: Tensor, maps: Tensor) -> Tensor:
    """Cross entropy of logits (B, C, h, w), enlarged to the maps (B, H, W) int64, whose pixels of 255 do not count; a scalar.

    It is the mean over the images of the mean over an image's pixels, so that every image weighs the same, however much of it is padded
    or ignored, and the losses of micro-batches, each times its images, add up to that of the whole batch. An image without a pixel that
    counts adds 0.
    """
    loss = F.cross_entropy(enlarged_logits(logits, maps.shape[1:]), maps, ignore_index=IGNORED, reduction="none")
    counted = (maps != IGNORED).sum(dim=(1, 2))
    return (loss.sum(dim=(1, 2)) / counted.clamp(min=1)).mean()
