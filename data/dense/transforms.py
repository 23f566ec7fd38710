"""Joint transforms of an image and what it shows, by torchvision.transforms.v2 on its tv_tensors; all randomness is torch's global one.

A sample is a dict of ``image`` (C, H, W) uint8 and, as far as the task needs them, ``boxes`` (n, 4) with ``labels`` (n,) and ``masks``
(n, H, W), or ``map`` (H, W), a class for each pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from yacs.config import CfgNode

from config import input_channels
from data.dense.base import IGNORED

Sample = dict[str, Any]
Size = tuple[int, int]

_DRAWS = 10  # of a crop, until no class has too large a share
# DETR's sizes, as parts of the short side of 800 that it has: a first resize to 400, 500 or 600, a crop of 384 to 600.
_DETR_SIDES, _DETR_CROP = (0.5, 0.625, 0.75), (0.48, 0.75)
_PASTED = 0.5  # probability of each object of the other image


def resized_size(height: int, width: int, short: float, long: float) -> Size:
    """(height, width) of an image whose shorter side is resized to ``short``, or less where the longer would be more than ``long``."""
    scale = min(short / max(1, min(height, width)), long / max(1, height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def padded_size(height: int, width: int, stride: int) -> Size:
    """Both rounded up to multiples of ``stride``."""
    return -(-height // stride) * stride, -(-width // stride) * stride


def resize(sample: Sample, size: Size) -> Sample:
    """Images with antialias, masks by the nearest pixel."""
    return _each(sample, _resize, size)


def _each(sample: Sample, change: Callable[..., Any], *arguments: Any) -> Sample:
    """``change`` of each of a sample's tv_tensors."""
    return {name: change(value, *arguments) if isinstance(value, tv_tensors.TVTensor) else value for name, value in sample.items()}


def _resize(value: Any, size: Size) -> Any:
    if not isinstance(value, tv_tensors.Mask):
        return v2.functional.resize(value, list(size), antialias=True)
    # v2's own takes the pixel at each corner, which lies half a pixel off what the image is resized from.
    planes = value.as_subclass(Tensor).reshape(-1, *value.shape[-2:])
    planes = v2.functional.resize_image(planes, list(size), InterpolationMode.NEAREST_EXACT)
    return tv_tensors.Mask(planes.reshape(*value.shape[:-2], *size))


class EvalTransform:
    """Resize alone, to the largest of DATA.DENSE.SHORT_SIDE within DATA.DENSE.LONG_SIDE."""

    def __init__(self, config: CfgNode):
        self.short, self.long = max(config.DATA.DENSE.SHORT_SIDE), config.DATA.DENSE.LONG_SIDE

    def size(self, height: int, width: int) -> Size:
        """(height, width) of the result for an image of that size."""
        return resized_size(height, width, self.short, self.long)

    def __call__(self, image: Tensor) -> Tensor:
        """(C, H, W) uint8, resized."""
        return v2.functional.resize(image, list(self.size(*image.shape[-2:])), antialias=True)


class TrainTransform:
    """What DATA.DENSE and AUG ask for, in two parts, between which the objects of another image may be pasted in.

    ``place`` resizes, crops and flips; ``finish`` distorts colours and drops what the crop left nothing of.
    """

    def __init__(self, config: CfgNode):
        dense = config.DATA.DENSE
        self.short, self.long, self.scale = list(dense.SHORT_SIDE), dense.LONG_SIDE, tuple(dense.SCALE)
        self.crop = crop_size(config)
        self.most_of_a_class, self.detr_crops = dense.CROP_CATEGORY, dense.DETR_CROPS
        self.flips = (v2.RandomHorizontalFlip(config.AUG.HFLIP), v2.RandomVerticalFlip(config.AUG.VFLIP))
        self.distort = v2.RandomPhotometricDistort() if dense.PHOTOMETRIC and input_channels(config) == 3 else None
        # Masks and labels go with their boxes: README's trap of a labels_getter that returns the labels alone.
        self.sanitize = v2.SanitizeBoundingBoxes(labels_getter=lambda sample: tuple(sample[name] for name in ("labels", "masks")
                                                                                    if name in sample))

    def largest(self, height: int, width: int) -> Size:
        """(height, width) of the largest result that an image of that size can have."""
        if self.crop is not None:
            return self.crop
        return resized_size(height, width, max(self.short) * self.scale[1], self.long * self.scale[1])

    def place(self, sample: Sample) -> Sample:
        """Resized, cropped, flipped."""
        if self.detr_crops and torch.rand(()) < 0.5:
            side = max(self.short)
            sample = resize(sample, resized_size(*_size(sample), side * _choice(_DETR_SIDES), float("inf")))
            low, high = (round(side * part) for part in _DETR_CROP)
            sample = self._cropped(sample, tuple(_between(min(length, low), min(length, high)) for length in _size(sample)))
        factor = _uniform(*self.scale)
        sample = resize(sample, resized_size(*_size(sample), _choice(self.short) * factor, self.long * factor))
        if self.crop is not None:
            sample = self._cropped(sample, self.crop)
        for flip in self.flips:
            sample = flip(sample)
        return sample

    def _cropped(self, sample: Sample, size: Sequence[int]) -> Sample:
        """A random part of ``size``, or of the image's own where that is smaller."""
        height, width = (min(side, most) for side, most in zip(_size(sample), size, strict=True))
        for _ in range(_DRAWS):
            top, left = (_between(0, whole - part) for whole, part in zip(_size(sample), (height, width), strict=True))
            if "map" not in sample or not self._has_one_class(sample["map"][top:top + height, left:left + width]):
                break
        return _each(sample, v2.functional.crop, top, left, height, width) | dict(cut=True)

    def _has_one_class(self, pixels: Tensor) -> bool:
        """Whether one class has more of a map than ``most_of_a_class``."""
        if self.most_of_a_class >= 1:
            return False
        counts = torch.bincount(pixels.as_subclass(Tensor).reshape(-1), minlength=IGNORED + 1)[:IGNORED]
        return bool(counts.max() > self.most_of_a_class * counts.sum())

    def finish(self, sample: Sample) -> Sample:
        """Colours distorted; boxes as their masks are now; objects of which less than a pixel is left dropped."""
        if self.distort is not None:
            sample = sample | dict(image=self.distort(sample["image"]))
        if "boxes" not in sample:
            return sample
        if "masks" in sample:
            around = boxes_around(sample["masks"])
            empty = (around == 0).all(dim=1, keepdim=True)
            boxes = around if sample.get("cut") else torch.where(empty, 0.0, sample["boxes"].as_subclass(Tensor))
            sample = sample | dict(boxes=tv_tensors.wrap(boxes, like=sample["boxes"]))
        return self.sanitize(sample | dict(boxes=v2.functional.clamp_bounding_boxes(sample["boxes"])))


def paste(sample: Sample, other: Sample) -> Sample:
    """Some of ``other``'s objects, each with probability 1/2, laid over ``sample`` at the same place (Ghiasi et al. 2021, simple
    copy-paste); both are placed already, and ``other`` is cut or padded to the size of ``sample``."""
    chosen = torch.rand(len(other["labels"])) < _PASTED
    height, width = _size(sample)
    image = v2.functional.crop(other["image"], 0, 0, height, width)  # zeros beyond its own pixels
    masks = v2.functional.crop(tv_tensors.Mask(other["masks"][chosen]), 0, 0, height, width)
    if not masks.any():
        return sample
    over = masks.amax(dim=0)
    boxes = torch.cat([sample["boxes"], torch.zeros(len(masks), 4)])  # made anew from the masks
    return sample | dict(image=tv_tensors.Image(torch.where(over > 0, image, sample["image"])),
                         boxes=tv_tensors.wrap(boxes, like=sample["boxes"]), labels=torch.cat([sample["labels"], other["labels"][chosen]]),
                         masks=tv_tensors.Mask(torch.cat([sample["masks"] * (1 - over), masks])), cut=True)


def boxes_around(masks: Tensor) -> Tensor:
    """(n, 4) float32: the edges of what is set in masks (n, H, W); zeros for one without."""
    edges = []
    for axis in (1, 2):  # over rows: what columns are used; over columns: what rows
        used = masks.as_subclass(Tensor).amax(dim=axis) if masks.shape[0] else masks.new_zeros(0, masks.shape[3 - axis])
        used = used > 0
        length = used.shape[1]
        first = used.int().argmax(dim=1)
        last = length - used.flip(1).int().argmax(dim=1)
        edges.append((first, torch.where(used.any(dim=1), last, 0)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1).float()


def crop_size(config: CfgNode) -> Size | None:
    """DATA.DENSE.CROP as (height, width); None where it is 0."""
    crop = config.DATA.DENSE.CROP
    return None if not crop else (crop, crop) if isinstance(crop, int) else tuple(crop)


def _size(sample: Sample) -> Size:
    return tuple(sample["image"].shape[-2:])


def _uniform(low: float, high: float) -> float:
    return low if low == high else low + (high - low) * torch.rand(()).item()


def _between(low: int, high: int) -> int:
    """A random whole number, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def _choice(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else values[_between(0, len(values) - 1)]
