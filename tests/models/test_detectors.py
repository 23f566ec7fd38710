"""RetinaNet, Faster R-CNN and Mask R-CNN: counts, anchors, pooling, what is found, losses."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou
from yacs.config import CfgNode

from config import ConfigError, get_config
from models import region_cnn
from models.build_dense import build_dense_model
from models.dense import DenseModel, named
from models.detectors import Anchors, FromLastMap
from models.region_cnn import RegionPooler, mask_loss

HEADS = {"retinanet": "detection", "faster_rcnn": "detection", "mask_rcnn": "instance"}


def dense_config(head: str, task: str, *opts: object, family: str = "crossformer") -> CfgNode:
    """Of a tiny model of two stages with the narrowest head."""
    words = FAMILIES[family].split()
    node = [x for key, value in zip(words[::2], words[1::2], strict=True) for x in (f"MODEL.{family.upper()}.{key}", value)]
    return get_config(None, ["TASK", task, "MODEL.DENSE.HEAD", head, "MODEL.DENSE.WIDTH", "16", "MODEL.TYPE", family, "MODEL.NAME", "tiny",
                             "DATA.IMG_SIZE", "32", "MODEL.DROP_PATH_RATE", "0.0", *node, *map(str, opts)])


def dense(head: str, task: str, *opts: object, family: str = "crossformer", classes: int = 3) -> DenseModel:
    torch.manual_seed(0)
    return build_dense_model(dense_config(head, task, *opts, family=family), classes)


def targets(boxes: list[list[float]], labels: list[int], height: int = 64, width: int = 96) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[int(y0):int(y1), int(x0):int(x1)] = True
    return dict(boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.long), masks=masks)


IMAGES = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
TRUTH = [targets([[8.0, 8, 40, 32], [50, 20, 90, 60]], [0, 2]), targets([], []), targets([[10.0, 30, 30, 60]], [1])]


@pytest.mark.parametrize(("head", "name", "count"), [
    ("retinanet", "crossformer_small", 40_824_958), ("retinanet", "crossformer_base", 62_139_118), ("retinanet", "swin_tiny", 38_455_918),
    ("retinanet", "pvt_medium", 53_944_052), ("retinanet", "mpvit_xsmall", 19_911_060), ("retinanet", "mpvit_base", 84_635_428),
    ("mask_rcnn", "crossformer_small", 50_165_119), ("mask_rcnn", "crossformer_base", 71_479_279), ("mask_rcnn", "swin_tiny", 47_796_079),
    ("mask_rcnn", "pvt_large", 81_027_061), ("mask_rcnn", "mpvit_small", 42_748_541)])
def test_parameters_are_as_many_as_the_papers_have(head: str, name: str, count: int) -> None:
    """Counted on the papers' models, whose tables they equal; a head is published for COCO's 80 classes."""
    config = get_config(None, ["TASK", HEADS[head], "MODEL.DENSE.HEAD", head, "MODEL.TYPE", name.split("_")[0], "MODEL.NAME", name])
    with torch.device("meta"):
        assert sum(p.numel() for p in build_dense_model(config, 80).parameters()) == count


def test_anchors_lie_at_whole_strides_with_the_published_sizes() -> None:
    anchors = Anchors([8, 128], [4, 8])
    maps = [torch.zeros(2, 1, 4, 6, dtype=torch.bfloat16), torch.zeros(2, 1, 1, 2, dtype=torch.bfloat16)]
    first, second = anchors(ImageList(torch.zeros(2, 3, 32, 168), [(32, 168)] * 2), maps)
    assert first.dtype == torch.float32 and torch.equal(first, second) and len(first) == 6 * (24 + 2)
    centres, sides = (first[:, :2] + first[:, 2:]) / 2, first[:, 2:] - first[:, :2]
    assert torch.allclose(centres[6 * 7], torch.tensor([8.0, 8.0]))  # second row, second cell
    assert torch.allclose(centres[-1], torch.tensor([128.0, 0.0]))  # not 84, the padded width over the map's
    assert torch.allclose(sides[:2], torch.tensor([[32 * 2 ** 0.5, 32 / 2 ** 0.5], [64 * 2 ** 0.5, 64 / 2 ** 0.5]]))
    assert torch.allclose(sides[-1], torch.tensor([1024 / 2 ** 0.5, 1024 * 2 ** 0.5]))


def test_regions_are_cut_out_where_they_are_from_the_level_of_their_size() -> None:
    strides = [4, 8, 16]
    maps = {}
    for stride in strides:  # what a map shows is where it is in the image, and its stride
        x = (torch.arange(512 // stride) + 0.5) * stride
        across = x.expand(len(x), -1)
        maps[str(stride)] = torch.stack([across, across.T, torch.full_like(across, stride)])[None]
    maps["pool"] = torch.zeros(1, 3, 4, 4)
    boxes = torch.tensor([[20.0, 40, 240, 300], [31, 45, 59, 73], [100, 100, 212, 212], [33.5, 200, 89.25, 270]])
    pooled = RegionPooler(strides, 7)({key: torch.cat([x, x + 1]) for key, x in maps.items()}, [boxes, boxes[:1]], [(512, 512)] * 2)
    assert pooled.shape == (5, 3, 7, 7) and pooled[:, 2, 0, 0].tolist() == [16, 4, 8, 4, 17]
    cells = (torch.arange(7) + 0.5) / 7
    for box, values in zip(boxes, pooled, strict=False):
        assert torch.allclose(values[0, 0], box[0] + cells * (box[2] - box[0]), atol=1e-3)
        assert torch.allclose(values[1, :, 0], box[1] + cells * (box[3] - box[1]), atol=1e-3)


def test_a_retinanet_whose_head_is_right_finds_the_objects_inside_each_image() -> None:
    model = dense("retinanet", "detection").eval()
    sizes = torch.tensor([[64, 96], [64, 96], [60, 80]])
    truth = [TRUTH[0], TRUTH[1], targets([[60.0, 30, 90, 62]], [1])]  # the last reaches into the padding

    def right(maps: list[Tensor]) -> dict[str, Tensor]:
        boxes = model.anchor_generator(ImageList(IMAGES, [(64, 96)] * 3), maps)[0]
        logits, offsets = torch.full((3, len(boxes), 3), -9.0), torch.zeros(3, len(boxes), 4)
        for image, target in enumerate(truth):
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                nearest = ((boxes[:, :2] + boxes[:, 2:]) / 2 - (box[:2] + box[2:]) / 2).norm(dim=1).argmin()
                logits[image, nearest, label] = 3.0
                offsets[image, nearest] = model.box_coder.encode_single(box[None], boxes[nearest][None])[0]
        logits[2, -1, 0] = 3.0
        offsets[2, -1] = model.box_coder.encode_single(torch.tensor([[82.0, 10, 95, 50]]), boxes[-1][None])[0]  # padding alone
        return dict(cls_logits=logits, bbox_regression=offsets)

    model.head.forward = right
    first, second, third = model(IMAGES, sizes)
    order = first["labels"].argsort()
    assert torch.allclose(first["boxes"][order], truth[0]["boxes"], atol=1e-3) and first["labels"][order].tolist() == [0, 2]
    assert torch.allclose(first["scores"], torch.tensor(3.0).sigmoid()) and len(second["boxes"]) == 0
    assert third["labels"].tolist() == [1] and torch.allclose(third["boxes"], torch.tensor([[60.0, 30, 80, 60]]), atol=1e-3)


def test_a_mask_rcnn_whose_heads_are_right_finds_the_objects_and_their_masks() -> None:
    model = dense("mask_rcnn", "instance").eval()
    truth = [TRUTH[0]["boxes"], TRUTH[1]["boxes"], TRUTH[2]["boxes"]]
    labels = torch.cat([t["labels"] for t in TRUTH])
    model.rpn.forward = lambda *_: (truth, {})
    scores = torch.zeros(3, 4)
    scores[torch.arange(3), labels + 1] = 20.0
    model.roi_heads.box_predictor.forward = lambda _: (scores, torch.zeros(3, 16))
    mask_logits = torch.arange(4.0).view(1, 4, 1, 1).expand(3, -1, 28, 28)
    model.roi_heads.mask_predictor.forward = lambda _: mask_logits
    found = model(IMAGES)
    assert [image["labels"].tolist() for image in found] == [[0, 2], [], [1]]
    for image, boxes in zip(found, truth, strict=True):
        assert torch.allclose(image["boxes"], boxes) and image["masks"].shape == (len(boxes), 28, 28)
        assert torch.allclose(image["masks"][:, 0, 0], (image["labels"] + 1.0).sigmoid())  # the map of its class


def test_the_target_of_a_mask_is_the_part_inside_its_box() -> None:
    target = targets([[0.0, 0, 96, 64], [20, 10, 60, 50]], [0, 1])
    boxes = [torch.tensor([[0.0, 0, 40, 50], [20, 10, 60, 50]])]
    logits = torch.zeros(2, 4, 28, 28)
    logits[0, 2] = torch.where((torch.arange(28) + 0.5) * 40 / 28 > 20, 50.0, -50.0)  # both boxes show object 1, of class 1 + 1
    logits[0, 2, (torch.arange(28) + 0.5) * 50 / 28 < 10] = -50.0
    logits[1, 2] = 50.0
    shifted = [dict(target, labels=target["labels"] + 1)]
    assert mask_loss(logits, boxes, [torch.tensor([1, 1])], shifted) < 1e-6
    assert mask_loss(logits[:0], [boxes[0][:0]], [torch.tensor([], dtype=torch.long)], shifted) == 0


def test_masks_are_learnt_in_the_proposals_that_lie_on_objects_each_from_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = dense("mask_rcnn", "instance").train(), []
    monkeypatch.setattr(region_cnn, "mask_loss", lambda logits, boxes, matched, targets: seen.append((boxes, matched)) or logits.sum())
    shifted = [dict(target, labels=target["labels"] + 1) for target in TRUTH]
    background, near = torch.tensor([[0.0, 40, 20, 60], [60, 0, 80, 10]]), torch.tensor([[51.0, 21, 89, 59], [9, 9, 41, 33]])
    proposals = [torch.cat([background, near]), background, background]
    model.roi_heads(model.fpn(named(model.backbone(IMAGES))), proposals, [(64, 96)] * 3, shifted)
    (boxes, matched), = seen
    assert [len(of_image) for of_image in boxes] == [4, 0, 1]  # two proposals, and the objects' own boxes
    for of_image, objects, target in zip(boxes, matched, TRUTH, strict=True):
        assert len(of_image) == 0 or box_iou(of_image, target["boxes"][objects]).diag().min() > 0.8


@pytest.mark.parametrize("head", HEADS)
def test_it_trains_on_images_with_and_without_objects(head: str) -> None:
    model = dense(head, HEADS[head]).train()
    names = {"retinanet": {"loss_class", "loss_box"}}.get(head, {"loss_objectness", "loss_proposal", "loss_class", "loss_box"})
    names |= {"loss_mask"} if head == "mask_rcnn" else set()
    truth = [{key: value.clone() for key, value in target.items()} for target in TRUTH]
    losses = model(IMAGES, None, truth)
    assert set(losses) == names and all(loss.ndim == 0 and loss.isfinite() and loss >= 0 for loss in losses.values())
    assert all(torch.equal(a[key], b[key]) for a, b in zip(truth, TRUTH, strict=True) for key in a)  # labels were not shifted in place
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    nothing = model(IMAGES[1:2], None, TRUTH[1:2])
    assert all(loss.isfinite() for loss in nothing.values()) and nothing["loss_box"] == 0
    model.zero_grad()
    sum(nothing.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]  # DDP waits for each


def test_the_losses_of_a_retinanet_are_means_over_its_images() -> None:
    model = dense("retinanet", "detection").train()
    whole, parts = model(IMAGES, None, TRUTH), [model(IMAGES[i:i + 1], None, TRUTH[i:i + 1]) for i in range(3)]
    for name, loss in whole.items():
        assert torch.allclose(loss, sum(part[name] for part in parts) / 3, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_what_is_found_hangs_on_the_image_alone_and_on_the_keys(head: str) -> None:
    opts = ("MODEL.DENSE.MIN_SCORE", 0.0, "MODEL.DENSE.DETECTIONS", 7)
    model = dense(head, HEADS[head], *opts).eval()
    sizes = torch.tensor([[64, 96], [50, 70], [64, 64]])
    with torch.inference_mode():
        together, alone = model(IMAGES, sizes), [model(IMAGES[i:i + 1], sizes[i:i + 1])[0] for i in range(3)]
    for one, other, (height, width) in zip(together, alone, sizes.tolist(), strict=True):
        assert len(one["boxes"]) == 7 and one["boxes"].min() >= 0
        assert one["boxes"][:, 2].max() <= width and one["boxes"][:, 3].max() <= height
        assert set(one) == {"boxes", "scores", "labels"} | ({"masks"} if head == "mask_rcnn" else set())
        assert all(torch.allclose(one[key].float(), other[key].float(), atol=1e-4) for key in one)
    assert not model.training and all(0 <= label < 3 for image in together for label in image["labels"])
    model = dense(head, HEADS[head], "MODEL.DENSE.MIN_SCORE", 0.999).eval()
    assert all(len(image["boxes"]) == 0 for image in model(IMAGES))


def test_scores_begin_near_the_priors() -> None:
    """Focal loss: one in a hundred anchors an object; and the box head knows nothing, but of the background."""
    model = dense("retinanet", "detection").eval()
    logits = model.head([torch.randn(1, 16, 4, 4)])["cls_logits"]
    assert torch.allclose(logits.sigmoid(), torch.tensor(0.01), atol=3e-3)
    predictor = dense("faster_rcnn", "detection").roi_heads.box_predictor
    assert math.isclose(predictor.cls_score.weight.std().item(), 0.01, rel_tol=0.2) and predictor.bbox_pred.weight.std() < 0.0013


def test_a_pyramid_of_strides_2_to_16_has_anchors_and_regions_of_its_own() -> None:
    opts = ("MODEL.GALERKIN.PATCH_SIZE", 2, "MODEL.GALERKIN.DEPTHS", "[1,1,1,1]", "MODEL.GALERKIN.NUM_HEADS", "[1,2,4,8]")
    retina = dense("retinanet", "detection", *opts, family="galerkin")
    assert retina.backbone.strides == [4, 8, 16] and retina.anchor_generator.strides == [4, 8, 16, 32, 64] and retina.stride == 16
    mask = dense("mask_rcnn", "instance", "MODEL.DENSE.ANCHOR_SCALE", 6, *opts, family="galerkin").train()
    assert mask.rpn.anchor_generator.strides == [2, 4, 8, 16, 32] and mask.rpn.anchor_generator.sizes[0] == (12.0,)
    assert mask.roi_heads.box_roi_pool.level_of(torch.tensor([[0.0, 0, 10, 10], [0, 0, 56, 56], [0, 0, 900, 900]])).tolist() == [0, 1, 3]
    assert all(loss.isfinite() for loss in mask(IMAGES, None, TRUTH).values())


@pytest.mark.parametrize("head", HEADS)
def test_bf16_trains_and_finds_on_a_cpu(head: str) -> None:
    model = dense(head, HEADS[head], "MODEL.DENSE.MIN_SCORE", 0.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(IMAGES, None, TRUTH)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.manual_seed(1)
    exact = dense(head, HEADS[head]).train()(IMAGES, None, TRUTH)
    assert abs(sum(losses.values()) / sum(exact.values()) - 1) < 0.05
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert all(image["boxes"].dtype == torch.float32 for image in model.eval()(IMAGES))


def test_what_is_predicted_is_float32_under_autocast() -> None:
    """Scores that are told apart, offsets of pixels beyond 256, and probabilities around a half."""
    model, maps = dense("mask_rcnn", "instance"), [torch.randn(1, 16, 8, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [*model.rpn.head(maps), model.roi_heads.box_predictor(torch.randn(2, 64)),
                 [model.roi_heads.mask_predictor(torch.randn(2, 16, 14, 14))]]
    assert [x.dtype for part in found for x in part] == [torch.float32] * 5


@pytest.mark.parametrize(("task", "head"), [("detection", "mask_rcnn"), ("instance", "retinanet"), ("semantic", "faster_rcnn")])
def test_a_head_of_another_task_is_refused(task: str, head: str) -> None:
    with pytest.raises(ConfigError, match=f"{head}.*TASK {task}"):
        dense(head, task)


def test_p6_comes_from_the_backbones_map_though_the_pyramid_is_as_wide_and_p7_from_it_as_it_is() -> None:
    extra, last, p5 = FromLastMap(16, 16), torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    results, names = extra([p5], [last], ["p5"])
    assert names == ["p5", "p6", "p7"] and torch.equal(results[0], p5)
    assert torch.equal(results[1], extra.p6(last)) and torch.equal(results[2], extra.p7(results[1]))


def test_the_first_class_is_no_background_to_the_region_heads() -> None:
    model, seen = dense("faster_rcnn", "detection").train(), []
    model.roi_heads.forward = lambda maps, proposals, shapes, given: (seen.extend(t["labels"].tolist() for t in given), ([], {}))[1]
    model(IMAGES, None, TRUTH)
    assert seen == [[1, 3], [], [2]]
