"""What Mask2Former learns from: queries matched to masks one to one, and the losses of the pairs.

Paper: "Masked-attention Mask Transformer for Universal Image Segmentation" (CVPR 2022), sections 3.3 and 4.1. Masks are compared at points
drawn at random: for matching evenly, for the losses more of them where a prediction is unsure. The parts are transformers'; what is
around them is here for three reasons: points are drawn within an image's own pixels, so that padding does not count; the losses can be
divided by numbers that hold for all micro-batches and ranks; and one transfer from the device matches all layers of an image.

Shapes: B images, Q queries, C classes, L layers, h w map of masks, H W padded image, n masks of an image, M pairs of a batch, P points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from models.semantic import IGNORED

POINTS = 12_544  # at most; of a smaller image a quarter of its pixels
CLASS, MASK, DICE = 2.0, 5.0, 5.0  # weights of the losses, and of the costs of matching
_NO_OBJECT = 0.1  # weight of the queries that match nothing in the loss of classes
_OVERSAMPLED, _UNSURE = 3, 0.75  # points drawn for each that is kept; share of points where the prediction is least sure


def masks_of(target: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(labels (n,), masks (n, H, W) bool) of a target; of a ``map`` without ``masks`` one mask for each class that is there."""
    if "masks" in target:
        return target["labels"], target["masks"]
    labels = target["map"].unique()
    labels = labels[labels != IGNORED]
    return labels.long(), target["map"] == labels[:, None, None]


def mask_losses(library: ModuleType, class_logits: Sequence[Tensor], mask_logits: Sequence[Tensor], sizes: Tensor | None,
                targets: Sequence[Mapping[str, Tensor]], masks_per_image: Tensor | float | None = None) -> dict[str, Tensor]:
    """Weighted losses of all layers together: ``loss_class``, ``loss_mask`` and ``loss_dice``, scalars, means over the images.

    What is random is drawn from torch's global generator of the device.

    Args:
        library: transformers' module of Mask2Former.
        class_logits: (B, Q, C + 1) of each layer, the last class meaning no object.
        mask_logits: (B, Q, h, w) of each layer.
        sizes: (B, 2) height and width of each image within the padded one; None: no padding.
        targets: of each image, as ``masks_of`` takes them.
        masks_per_image: mean number of masks of an image, by which the losses are divided. With the mean over all images of a step, on
            all ranks, the losses of micro-batches, each times its images, add up to the whole step's; with None it is these images' own,
            and they do not quite.
    """
    labels, masks = zip(*map(masks_of, targets), strict=True)
    masks = [mask.float() for mask in masks]
    height, width = masks[0].shape[1:]
    points = min(POINTS, height * width // 4)
    images, queries, _ = class_logits[0].shape
    extents = _extents(sizes, images, height, width, mask_logits[0])
    stacked = [torch.stack([layer.detach() for layer in layers], dim=1).float() for layers in (class_logits, mask_logits)]
    pairs = [_match(library, stacked[0][i], stacked[1][i], labels[i], masks[i], extents[i], points) for i in range(images)]
    if masks_per_image is None:
        masks_per_image = sum(map(len, labels)) / images
    mean = torch.as_tensor(masks_per_image, dtype=torch.float32, device=extents.device)
    weights = images * (mean + _NO_OBJECT * (queries - mean)).clamp(min=_NO_OBJECT)
    total = (images * mean).clamp(min=1e-6)
    every_mask = torch.cat(masks)[:, None]
    firsts = [sum(map(len, labels[:i])) for i in range(images)]
    by_class, by_mask, by_dice = [], [], []
    for layer, (classes, logits) in enumerate(zip(class_logits, mask_logits, strict=True)):
        of_image = torch.cat([torch.full_like(matched[layer][0], i) for i, matched in enumerate(pairs)])
        of_query = torch.cat([matched[layer][0] for matched in pairs])
        of_mask = torch.cat([first + matched[layer][1] for first, matched in zip(firsts, pairs, strict=True)])
        by_class.append(_class_loss(classes.float(), of_image, of_query, torch.cat(labels)[of_mask]) / weights)
        predicted = logits[of_image, of_query][:, None].float()
        wanted = every_mask if len(of_mask) == len(every_mask) else every_mask[of_mask]  # pairs are in the order of the masks
        coordinates = _points(library, predicted.detach(), extents[of_image], points)
        predicted, wanted = (library.sample_point(maps, coordinates, align_corners=False)[:, 0] for maps in (predicted, wanted))
        by_mask.append(library.sigmoid_cross_entropy_loss(predicted, wanted, total))
        by_dice.append(library.dice_loss(predicted, wanted, total))
    return dict(loss_class=CLASS * sum(by_class), loss_mask=MASK * sum(by_mask), loss_dice=DICE * sum(by_dice))


def _extents(sizes: Tensor | None, images: int, height: int, width: int, like: Tensor) -> Tensor:
    """(B, 2): share of the padded width and height that each image's own pixels take, as points have x before y."""
    if sizes is None:
        return torch.ones(images, 2, device=like.device)
    return sizes.flip(1).to(like.device) / torch.tensor([width, height], device=like.device)


@torch.no_grad()
def _match(library: ModuleType, class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor, extent: Tensor, points: int,
           ) -> list[tuple[Tensor, Tensor]]:
    """The pairs of one image at the least cost, for each layer: queries (n,) and masks (n,), the masks in ascending order.

    Args:
        class_logits: (L, Q, C + 1).
        mask_logits: (L, Q, h, w).
        extent: (2,) as of ``_extents``.
    """
    from scipy.optimize import linear_sum_assignment  # here: its import takes most of a second, which every start would pay
    layers, queries, *size = mask_logits.shape
    coordinates = torch.rand(1, points, 2, device=extent.device) * extent
    wanted = library.sample_point(masks[None], coordinates, align_corners=False)[0]
    predicted = library.sample_point(mask_logits.view(1, layers * queries, *size), coordinates, align_corners=False)[0]
    cost = MASK * library.pair_wise_sigmoid_cross_entropy_loss(predicted, wanted) + DICE * library.pair_wise_dice_loss(predicted, wanted)
    cost = cost.view(layers, queries, len(labels)) - CLASS * class_logits.softmax(-1)[..., labels]
    most = torch.finfo(cost.dtype).max  # what is not finite is matched last; that the loss is not finite is told elsewhere
    pairs = []
    for layer in torch.nan_to_num(cost, nan=most, posinf=most, neginf=most).cpu().numpy():
        of_mask, of_query = linear_sum_assignment(layer.T)
        pairs.append((torch.as_tensor(of_query, device=extent.device), torch.as_tensor(of_mask, device=extent.device)))
    return pairs


def _class_loss(logits: Tensor, of_image: Tensor, of_query: Tensor, labels: Tensor) -> Tensor:
    """Weighted cross entropy of (B, Q, C + 1), summed; queries that are in no pair are to say that there is no object."""
    nothing = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:2], nothing, device=logits.device)
    wanted[of_image, of_query] = labels
    weight = torch.ones(nothing + 1, device=logits.device)
    weight[nothing] = _NO_OBJECT
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight, reduction="sum")


def _points(library: ModuleType, logits: Tensor, extents: Tensor, points: int) -> Tensor:
    """Where each mask of (M, 1, h, w) is compared: (M, P, 2), most of them where it is least sure among many drawn evenly.

    Args:
        extents: (M, 2), within which they are drawn.
    """
    def drawn(number: int) -> Tensor:
        return torch.rand(len(logits), number, 2, device=logits.device) * extents[:, None]

    candidates, unsure = drawn(_OVERSAMPLED * points), int(_UNSURE * points)
    sureness = library.sample_point(logits, candidates, align_corners=False)[:, 0].abs()
    chosen = sureness.topk(unsure, dim=1, largest=False).indices
    return torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), drawn(points - unsure)], dim=1)
