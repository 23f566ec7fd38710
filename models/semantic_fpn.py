"""Semantic FPN: a class for each pixel from a feature pyramid.

Paper: "Panoptic Feature Pyramid Networks" (CVPR 2019), section 3.1 and figure 3, with batch norm and the dropout before the classifier of
the models in the backbones' tables.

Shapes: B images, C classes, H W image, r the finest stride.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from yacs.config import CfgNode

from models.dense import DenseModel, named
from models.pyramid import Pyramid
from models.semantic import enlarged_logits, semantic_loss, stacked_maps

WIDTH = 256  # channels of the published pyramids; the branches have half of them
_DROPOUT = 0.1


class SemanticFPN(DenseModel):
    """A pyramid whose levels are brought to the finest stride and added. See ``DenseModel``; evaluation gives logits (B, C, H, W), training
    ``loss_semantic``.

    Args:
        backbone: all its maps are taken.
        classes: how many.
        width: channels of the pyramid, an even number.
    """

    class_modules = ("classifier",)

    def __init__(self, backbone: Pyramid, classes: int, width: int = WIDTH):
        super().__init__()
        self.backbone, self.stride = backbone, backbone.strides[-1]
        self.fpn = FeaturePyramidNetwork(backbone.channels, width)
        inner = max(1, width // 2)
        self.branches = nn.ModuleList(_branch(width, inner, stride // backbone.strides[0]) for stride in backbone.strides)
        self.dropout = nn.Dropout2d(_DROPOUT)
        self.classifier = nn.Conv2d(inner, classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor, sizes: Tensor | None = None,
                targets: Sequence[Mapping[str, Tensor]] | None = None) -> Tensor | dict[str, Tensor]:
        maps = self.fpn(named(self.backbone(images))).values()
        logits = self.classifier(self.dropout(torch.stack([branch(x) for branch, x in zip(self.branches, maps, strict=True)]).sum(0)))
        if self.training and targets is not None:
            return dict(loss_semantic=semantic_loss(logits, stacked_maps(targets)))
        return enlarged_logits(logits, images.shape[2:])


class _Enlarge(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _branch(width: int, inner: int, factor: int) -> nn.Sequential:
    """A convolution with batch norm and ReLU, and a doubling, repeated up to ``factor`` times the size; for 1 the convolution alone."""
    if factor == 1:
        return nn.Sequential(Conv2dNormActivation(width, inner, 3))
    doublings = round(math.log2(factor))
    return nn.Sequential(*(layer for number in range(doublings)
                           for layer in (Conv2dNormActivation(inner if number else width, inner, 3), _Enlarge())))


def build_semantic_fpn(config: CfgNode, pyramid: Callable[..., Pyramid], classes: int) -> SemanticFPN:
    return SemanticFPN(pyramid(), classes, config.MODEL.DENSE.WIDTH or WIDTH)
