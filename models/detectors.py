"""RetinaNet on any backbone, of torchvision's parts, and what it shares with R-CNN (models/region_cnn.py).

Papers: "Feature Pyramid Networks for Object Detection" (CVPR 2017), "Focal Loss for Dense Object Detection" (ICCV 2017).

Structure and numbers of parameters are those of the models in the backbones' tables, which OpenMMLab's programs trained; where torchvision
does otherwise at the same parameters, these are followed: P6 from the backbone's last map, P7 from P6 without a ReLU, 100 detections,
anchors that are not rounded and lie at whole strides. torchvision's resizing and normalising inside the model is left out: images come
ready. Anchors go by the strides of the maps, so any pyramid will do, also one of strides 2 to 16.

Boxes are x0, y0, x1, y1 in pixels of the padded image. Shapes: B images, H W padded image, C channels of a map, r its stride, n objects.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
import torchvision.models.detection as tv
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, box_area
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from yacs.config import CfgNode

from models.dense import DenseModel, image_sizes, named
from models.pyramid import Pyramid

WIDTH = 256  # channels of the published pyramids
RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors

Targets = list[dict[str, Tensor]]


class Anchors(AnchorGenerator):
    """Anchors of every cell of maps of known strides, in float32 whatever the maps are: bf16 cannot tell pixels beyond 256 apart.

    Args:
        strides: of the maps, the finest first.
        scales: sides of the square anchors over the stride.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float]):
        super().__init__(tuple(tuple(stride * scale for scale in scales) for stride in strides), (RATIOS,) * len(strides))
        self.strides = list(strides)

    def generate_anchors(self, scales: Sequence[float], aspect_ratios: Sequence[float], dtype: torch.dtype = torch.float32,
                         device: torch.device | None = None) -> Tensor:
        """(scales * ratios, 4), around zero."""
        sides = torch.tensor([(scale / math.sqrt(ratio), scale * math.sqrt(ratio)) for ratio in aspect_ratios for scale in scales],
                             dtype=dtype, device="cpu")  # where a model is built on the meta device too
        return torch.cat([-sides, sides], dim=1) / 2

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """Of each image the anchors of all its maps (anchors, 4), cell by cell, row by row."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        anchors = torch.cat(self.grid_anchors([x.shape[-2:] for x in maps], [(stride, stride) for stride in self.strides]))
        return [anchors] * len(images.image_sizes)


class FromLastMap(ExtraFPNBlock):
    """P6, a strided convolution of the backbone's last map, and P7, one of P6."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        for layer in (self.p6, self.p7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


def head_options(config: CfgNode, anchor_scale: float) -> dict[str, float]:
    """Arguments that ``MODEL.DENSE`` sets; ``anchor_scale`` is the published one."""
    dense = config.MODEL.DENSE
    return dict(width=dense.WIDTH or WIDTH, anchor_scale=dense.ANCHOR_SCALE or anchor_scale, detections=dense.DETECTIONS,
                min_score=dense.MIN_SCORE, nms=dense.NMS)


class RetinaNet(DenseModel, tv.RetinaNet):
    """Boxes from a grid of anchors at once. See ``DenseModel``; losses ``loss_class`` (focal) and ``loss_box``, each of an image's the sum
    over anchors over the number of those that match an object, so that they add up over micro-batches.

    Args:
        backbone: its three coarsest maps are what the published models take; two more levels come behind the last.
        classes: how many.
        anchor_scale: side of a level's smallest anchor over its stride.
        detections, min_score, nms: as the keys of ``MODEL.DENSE``.
    """

    class_modules = ("head.classification_head.cls_logits",)

    def __init__(self, backbone: Pyramid, classes: int, width: int = WIDTH, anchor_scale: float = 4.0, detections: int = 100,
                 min_score: float = 0.05, nms: float = 0.5):
        backbone.out_channels = width  # torchvision's constructor asks for it
        last = backbone.strides[-1]
        anchors = Anchors([*backbone.strides, 2 * last, 4 * last], [anchor_scale * 2 ** (octave / 3) for octave in range(3)])
        super().__init__(backbone, classes, anchor_generator=anchors, head=RetinaNetHead(width, 3 * len(RATIOS), classes),
                         score_thresh=min_score, nms_thresh=nms, detections_per_img=sys.maxsize)  # all; forward leaves so many
        del self.transform
        self.stride, self.detections = last, detections
        self.fpn = FeaturePyramidNetwork(backbone.channels, width, FromLastMap(backbone.channels[-1], width))

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: Targets | None = None) -> dict[str, Tensor] | Targets:
        maps = list(self.fpn(named(self.backbone(images))).values())
        outputs = {name: output.float() for name, output in self.head(maps).items()}
        shapes = image_sizes(images, sizes)
        anchors = self.anchor_generator(ImageList(images, shapes), maps)
        if self.training and targets is not None:
            losses = self.compute_loss(targets, outputs, anchors)
            return dict(loss_class=losses["classification"], loss_box=losses["bbox_regression"])
        counts = [3 * len(RATIOS) * x.shape[-2] * x.shape[-1] for x in maps]
        levels = {name: list(output.split(counts, dim=1)) for name, output in outputs.items()}
        found = self.postprocess_detections(levels, [list(boxes.split(counts)) for boxes in anchors], shapes)
        # Those in the padding have no area within their image.
        return [{name: values[box_area(image["boxes"]) > 0][:self.detections] for name, values in image.items()} for image in found]


def build_retinanet(config: CfgNode, pyramid: Callable[..., Pyramid], classes: int) -> RetinaNet:
    return RetinaNet(pyramid(levels=3), classes, **head_options(config, anchor_scale=4.0))
