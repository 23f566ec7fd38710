"""Faster R-CNN and Mask R-CNN on any backbone, of torchvision's parts.

Papers: "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks" (NeurIPS 2015), "Feature Pyramid Networks for
Object Detection" (CVPR 2017), "Mask R-CNN" (ICCV 2017).

As in models/detectors.py the models in the backbones' tables are followed: absolute errors as the losses of boxes, aligned RoIAlign with as
many samples as a cell has pixels, 1,000 proposals in training, masks of 0 and 1 as targets. torchvision's mask head, kept here, has a map
for the background too; and every object has its best anchor matched, however little they overlap.

Boxes are x0, y0, x1, y1 in pixels of the padded image. Shapes: B images, H W padded image, C channels of a map, r its stride, n objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, box_area, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from yacs.config import CfgNode

from models.dense import DenseModel, image_sizes, named
from models.detectors import RATIOS, WIDTH, Anchors, Targets, head_options
from models.pyramid import Pyramid

_HIDDEN = 4  # hidden width of the box head over the pyramid's


class _ProposalHead(RPNHead):
    """Scores and offsets in float32, whatever the maps are."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, offsets = super().forward(x)
        return [y.float() for y in scores], [y.float() for y in offsets]


class _Proposals(RegionProposalNetwork):
    def compute_loss(self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor],
                     regression_targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """As torchvision's, with the absolute error of the offsets in place of its smoothed one."""
        positive, negative = (torch.cat(chosen).bool() for chosen in self.fg_bg_sampler(labels))
        chosen, truth = positive | negative, torch.cat(regression_targets)
        scores = F.binary_cross_entropy_with_logits(objectness.flatten()[chosen], torch.cat(labels)[chosen])
        offsets = F.l1_loss(pred_bbox_deltas[positive], truth[positive], reduction="sum") / chosen.sum()
        return scores, offsets


class RegionPooler(nn.Module):
    """Boxes cut out of the maps and brought to one size: aligned RoIAlign, each from the level that its size asks for (equation 1 of the
    FPN paper: a box of 224 pixels a side from stride 16). Boxes of each image (n, 4) -> (all boxes, C, side, side).

    Args:
        strides: of the maps that are pooled from.
        side: cells a side.
    """

    def __init__(self, strides: Sequence[int], side: int):
        super().__init__()
        self.strides, self.side = list(strides), side

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        numbered = torch.cat([F.pad(x, (1, 0), value=image) for image, x in enumerate(boxes)])  # (all boxes, 5)
        levels = self.level_of(numbered[:, 1:])
        of_level = [torch.where(levels == level)[0] for level in range(len(self.strides))]
        pooled = torch.cat([roi_align(x.float(), numbered[chosen], self.side, 1 / stride, 0, aligned=True) for x, stride, chosen
                            in zip(list(maps.values()), self.strides, of_level, strict=False)])  # the last map is the proposals' alone
        return pooled[torch.cat(of_level).argsort()]

    def level_of(self, boxes: Tensor) -> Tensor:
        """(n, 4) -> (n,), the number of the map with the stride nearest to 2 ** floor(4 + log2(side / 224))."""
        exponents = [math.log2(stride) for stride in self.strides]
        wanted = torch.floor(4 + torch.log2(box_area(boxes).sqrt() / 224 + 1e-6))
        return (wanted.clamp(exponents[0], exponents[-1]) - exponents[0]).long()


class _BoxPredictor(FastRCNNPredictor):
    """Class scores and offsets in float32. Initial weights are those of the Fast R-CNN paper, section 2.3."""

    def __init__(self, in_channels: int, classes: int):
        super().__init__(in_channels, classes)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, offsets = super().forward(x)
        return scores.float(), offsets.float()


class _MaskPredictor(MaskRCNNPredictor):
    """Mask logits in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class RegionHeads(RoIHeads):
    """torchvision's heads over proposals, whose classes count from 1 (0 is the background), with other losses."""

    def forward(self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]],
                targets: Targets | None = None) -> tuple[Targets, dict[str, Tensor]]:
        if targets is None:
            return self.detect(features, proposals, image_shapes), {}
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        scores, predicted = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        losses = box_losses(scores, predicted, torch.cat(labels), torch.cat(offsets))
        if self.has_mask():
            objects = [torch.where(of_image > 0)[0] for of_image in labels]
            boxes = [of_image[chosen] for of_image, chosen in zip(proposals, objects, strict=True)]
            truth = [of_image[chosen] for of_image, chosen in zip(matched, objects, strict=True)]
            logits = self.mask_logits(features, boxes, image_shapes)
            losses["loss_mask"] = mask_loss(logits, boxes, truth, targets)
        return [], losses

    def detect(self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]) -> Targets:
        scores, offsets = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        boxes, scores, labels = self.postprocess_detections(scores, offsets, proposals, image_shapes)
        found = [dict(boxes=b, scores=s, labels=n - 1) for b, s, n in zip(boxes, scores, labels, strict=True)]
        if self.has_mask():
            masks = maskrcnn_inference(self.mask_logits(features, boxes, image_shapes), labels)
            for image, of_image in zip(found, masks, strict=True):
                image["masks"] = of_image[:, 0]
        return found

    def mask_logits(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """(all boxes, classes + 1, 28, 28)"""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))


def box_losses(scores: Tensor, offsets: Tensor, labels: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the proposals' classes, and the absolute error of their offsets, summed over objects, over all proposals.

    Args:
        scores: (n, classes + 1).
        offsets: (n, 4 * (classes + 1)), of each class.
        labels: (n,), 0 for the background.
        truth: (n, 4), right offsets.
    """
    objects = torch.where(labels > 0)[0]
    predicted = offsets.unflatten(1, (-1, 4))[objects, labels[objects]]
    return dict(loss_class=F.cross_entropy(scores, labels),
                loss_box=F.l1_loss(predicted, truth[objects], reduction="sum") / max(1, len(labels)))


def mask_loss(logits: Tensor, boxes: list[Tensor], matched: list[Tensor], targets: Targets) -> Tensor:
    """Binary cross-entropy of the masks inside the boxes, of each the map of its object's class; 0 where there is no box.

    Args:
        logits: (all boxes, classes + 1, side, side).
        boxes: of each image, (n, 4).
        matched: of each image, the number of each box's object, (n,).
    """
    if not len(logits):
        return logits.sum() * 0
    side, truth = logits.shape[-1], []
    for of_image, objects, target in zip(boxes, matched, targets, strict=True):
        if len(objects):
            regions = torch.cat([objects[:, None].to(of_image.dtype), of_image], dim=1)
            truth.append(roi_align(target["masks"][:, None].float(), regions, side, 1.0, 0, aligned=True)[:, 0] >= 0.5)
    labels = torch.cat([target["labels"][objects] for target, objects in zip(targets, matched, strict=True)])
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels), device=labels.device), labels], torch.cat(truth).float())


class RegionCNN(DenseModel):
    """Faster R-CNN, with ``masks`` Mask R-CNN. See ``DenseModel``; a detection's ``masks`` (n, 28, 28) are probabilities inside its box.

    Losses ``loss_objectness`` and ``loss_proposal`` of the proposals, ``loss_class``, ``loss_box`` and ``loss_mask``. They are means over
    what is sampled of all the images together, at random, as in the papers' programs: of micro-batches they add up nearly, not exactly.

    Args:
        backbone: all its maps are taken, and one more level behind the last.
        width: channels of the pyramid; the box head's hidden width is 4 times that.
        anchor_scale: side of a level's anchor over its stride.
        detections, min_score, nms, regions: as the keys of ``MODEL.DENSE``.
    """

    def __init__(self, backbone: Pyramid, classes: int, masks: bool, width: int = WIDTH, anchor_scale: float = 8.0, detections: int = 100,
                 min_score: float = 0.05, nms: float = 0.5, regions: int = 512):
        super().__init__()
        self.backbone, self.stride = backbone, backbone.strides[-1]
        self.class_modules = ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred",
                              *(["roi_heads.mask_predictor.mask_fcn_logits"] if masks else []))
        self.fpn = FeaturePyramidNetwork(backbone.channels, width, LastLevelMaxPool())
        self.rpn = _Proposals(
            Anchors([*backbone.strides, 2 * backbone.strides[-1]], [anchor_scale]), _ProposalHead(width, len(RATIOS)), fg_iou_thresh=0.7,
            bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5, pre_nms_top_n=dict(training=2000, testing=1000),
            post_nms_top_n=dict(training=1000, testing=1000), nms_thresh=0.7)
        head = TwoMLPHead(width * 7 ** 2, _HIDDEN * width)
        for layer in (head.fc6, head.fc7):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        mask_parts = dict(mask_roi_pool=RegionPooler(backbone.strides, 14), mask_head=MaskRCNNHeads(width, (width,) * 4, dilation=1),
                          mask_predictor=_MaskPredictor(width, width, classes + 1)) if masks else {}
        self.roi_heads = RegionHeads(
            RegionPooler(backbone.strides, 7), head, _BoxPredictor(_HIDDEN * width, classes + 1), fg_iou_thresh=0.5, bg_iou_thresh=0.5,
            batch_size_per_image=regions, positive_fraction=0.25, bbox_reg_weights=None, score_thresh=min_score, nms_thresh=nms,
            detections_per_img=detections, **mask_parts)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: Targets | None = None) -> dict[str, Tensor] | Targets:
        maps, shapes = self.fpn(named(self.backbone(images))), image_sizes(images, sizes)
        if not (self.training and targets is not None):
            proposals, _ = self.rpn(ImageList(images, shapes), maps)
            return self.roi_heads(maps, proposals, shapes)[0]
        targets = [dict(target, labels=target["labels"] + 1) for target in targets]  # 0 is the background
        proposals, of_proposals = self.rpn(ImageList(images, shapes), maps, targets)
        _, losses = self.roi_heads(maps, proposals, shapes, targets)
        return dict(loss_objectness=of_proposals["loss_objectness"], loss_proposal=of_proposals["loss_rpn_box_reg"], **losses)


def _build_rcnn(config: CfgNode, pyramid: Callable[..., Pyramid], classes: int, masks: bool) -> RegionCNN:
    return RegionCNN(pyramid(), classes, masks, regions=config.MODEL.DENSE.REGIONS, **head_options(config, anchor_scale=8.0))


build_faster_rcnn, build_mask_rcnn = partial(_build_rcnn, masks=False), partial(_build_rcnn, masks=True)
