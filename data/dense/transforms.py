"""Joint transforms of an image and what it shows, by torchvision.transforms.v2 on its tv_tensors; all randomness is torch's global one.

A sample is a dict of ``image`` (C, H, W) uint8 and, as far as the task needs them, ``boxes`` (n, 4) with ``labels`` (n,) and ``masks``,
or ``map`` (H, W), a class for each pixel. Before they are placed masks are a function from chosen rows and columns of the image to
packed masks, afterwards these (n, H, ceil(W / 8)), as ``data/dense/bit_masks.py`` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from yacs.config import CfgNode

from config import input_channels
from data.dense import bit_masks
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


def crop_size(config: CfgNode) -> Size | None:
    """DATA.DENSE.CROP as (height, width); None where it is 0."""
    crop = config.DATA.DENSE.CROP
    return None if not crop else (crop, crop) if isinstance(crop, int) else tuple(crop)


class EvalTransform:
    """Resize alone, to the largest of DATA.DENSE.SHORT_SIDE within DATA.DENSE.LONG_SIDE."""

    def __init__(self, config: CfgNode):
        self.short, self.long = max(config.DATA.DENSE.SHORT_SIDE), config.DATA.DENSE.LONG_SIDE

    def size(self, height: int, width: int) -> Size:
        """(height, width) of the result for an image of that size."""
        return resized_size(height, width, self.short, self.long)

    def __call__(self, image: Tensor) -> Tensor:
        """(C, H, W) uint8, resized."""
        return functional.resize(image, list(self.size(*image.shape[-2:])), antialias=True)


class TrainTransform:
    """What DATA.DENSE and AUG ask for, in two parts, between which the objects of another image may be pasted in.

    ``place`` resizes, crops and flips; ``finish`` distorts colours and drops what the crop left nothing of.
    """

    def __init__(self, config: CfgNode):
        dense = config.DATA.DENSE
        self.short, self.long, self.scale = list(dense.SHORT_SIDE), dense.LONG_SIDE, tuple(dense.SCALE)
        self.crop = crop_size(config)
        self.most_of_a_class, self.detr_crops = dense.CROP_CATEGORY, dense.DETR_CROPS
        self.flip, self.flip_down = config.AUG.HFLIP, config.AUG.VFLIP
        self.distort = v2.RandomPhotometricDistort() if dense.PHOTOMETRIC and input_channels(config) == 3 else None
        # Left to itself it drops labels, and only masks of whole pixels, with their boxes.
        self.sanitize = v2.SanitizeBoundingBoxes(labels_getter=lambda sample: tuple(sample[name] for name in ("labels", "masks")
                                                                                    if name in sample))

    def largest(self, height: int, width: int) -> Size:
        """(height, width) of the largest result that an image of that size can have."""
        return self.resized(height, width) if self.crop is None else self.crop

    def resized(self, height: int, width: int) -> Size:
        """The same before a crop."""
        return resized_size(height, width, max(self.short) * self.scale[1], self.long * self.scale[1])

    def place(self, sample: Sample) -> Sample:
        """Resized, cropped, flipped; ``cut`` tells whether anything can have been cropped."""
        work = _Placed(sample)
        if self.detr_crops and torch.rand(()) < 0.5:
            side = max(self.short)
            work.resize(resized_size(*work.size, side * _choice(_DETR_SIDES), float("inf")))
            low, high = (round(side * part) for part in _DETR_CROP)
            self._crop(work, [_between(min(length, low), min(length, high)) for length in work.size])
        factor = _uniform(*self.scale)
        work.resize(resized_size(*work.size, _choice(self.short) * factor, self.long * factor))
        if self.crop is not None:
            self._crop(work, self.crop)
        for probability, axis in ((self.flip, 1), (self.flip_down, 0)):
            if torch.rand(()) < probability:
                work.flip(axis)
        return work.sample()

    def _crop(self, work: _Placed, size: Sequence[int]) -> None:
        """To a random part of ``size``, or of the image's own where that is smaller."""
        height, width = (min(side, most) for side, most in zip(work.size, size, strict=True))
        for _ in range(_DRAWS):
            top, left = (_between(0, whole - part) for whole, part in zip(work.size, (height, width), strict=True))
            if self.most_of_a_class >= 1 or not self._has_one_class(work.map(top, left, height, width)):
                break
        work.crop(top, left, height, width)

    def _has_one_class(self, pixels: Tensor | None) -> bool:
        """Whether one class has more of a map than ``most_of_a_class``."""
        if pixels is None:
            return False
        counts = torch.bincount(pixels.reshape(-1), minlength=IGNORED + 1)[:IGNORED]
        return bool(counts.max() > self.most_of_a_class * counts.sum())

    def finish(self, sample: Sample) -> Sample:
        """Colours distorted; boxes as their masks are now; objects of which less than a pixel is left dropped."""
        if self.distort is not None:
            sample = sample | dict(image=self.distort(sample["image"]))
        if "boxes" not in sample:
            return sample
        boxes = sample["boxes"]
        if "masks" in sample:
            around = bit_masks.boxes_around(sample["masks"])
            empty = (around == 0).all(dim=1, keepdim=True)
            boxes = tv_tensors.wrap(around if sample["cut"] else torch.where(empty, 0.0, boxes.as_subclass(Tensor)), like=boxes)
        return self.sanitize(sample | dict(boxes=functional.clamp_bounding_boxes(boxes)))


class _Placed:
    """A sample on its way: image and boxes as they are now, masks and maps as they were, with the rows and columns chosen of them."""

    def __init__(self, sample: Sample):
        self._sample, self._cut = sample, False
        self._rows, self._columns = (torch.arange(length) for length in self.size)

    @property
    def size(self) -> Size:
        return tuple(self._sample["image"].shape[-2:])

    def resize(self, size: Size) -> None:
        self._rows, self._columns = (places[bit_masks.nearest(len(places), wanted)]
                                     for places, wanted in zip((self._rows, self._columns), size, strict=True))
        self._each(functional.resize, list(size), antialias=True)

    def crop(self, top: int, left: int, height: int, width: int) -> None:
        self._rows, self._columns, self._cut = self._rows[top:top + height], self._columns[left:left + width], True
        self._each(functional.crop, top, left, height, width)

    def flip(self, axis: int) -> None:
        """Columns where ``axis`` is 1, rows where it is 0."""
        if axis:
            self._columns = self._columns.flip(0)
        else:
            self._rows = self._rows.flip(0)
        self._each(functional.horizontal_flip if axis else functional.vertical_flip)

    def map(self, top: int, left: int, height: int, width: int) -> Tensor | None:
        """The map in a part of the image; None without one."""
        if "map" not in self._sample:
            return None
        return self._sample["map"][self._rows[top:top + height]][:, self._columns[left:left + width]]

    def sample(self) -> Sample:
        found = self._sample | dict(cut=self._cut)
        if "masks" in found:
            found["masks"] = found["masks"](self._rows, self._columns)
        if "map" in found:
            found["map"] = self.map(0, 0, *self.size)
        return found

    def _each(self, change: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        changed = {name: change(self._sample[name], *arguments, **named) for name in ("image", "boxes") if name in self._sample}
        self._sample = self._sample | changed


def paste(sample: Sample, other: Sample) -> Sample:
    """Some of ``other``'s objects, each with probability 1/2, laid over ``sample`` at the same place (Ghiasi et al. 2021, simple
    copy-paste); both are placed already, and ``other`` is cut or padded to the size of ``sample``."""
    chosen = torch.rand(len(other["labels"])) < _PASTED
    height, width = sample["image"].shape[-2:]
    masks = bit_masks.fitted(other["masks"][chosen], height, width)
    if not masks.any():
        return sample
    over = torch.from_numpy(np.bitwise_or.reduce(masks.numpy(), axis=0))
    image = functional.crop(other["image"], 0, 0, height, width)  # zeros beyond its own pixels
    image = torch.where(bit_masks.unpacked(over[None], width), image, sample["image"])
    boxes = torch.cat([sample["boxes"], torch.zeros(len(masks), 4)])  # made anew from the masks
    return sample | dict(image=tv_tensors.Image(image), boxes=tv_tensors.wrap(boxes, like=sample["boxes"]), cut=True,
                         labels=torch.cat([sample["labels"], other["labels"][chosen]]), masks=torch.cat([sample["masks"] & ~over, masks]))


def _uniform(low: float, high: float) -> float:
    return low if low == high else low + (high - low) * torch.rand(()).item()


def _between(low: int, high: int) -> int:
    """A random whole number, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def _choice(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else values[_between(0, len(values) - 1)]
