"""DATA.FIT: how the whole image, or in training a crop with the image's own proportions, comes to the size of the input.

``squash`` changes its shape, ``pad`` keeps it and fills the rest with the mean colour, as timm's crop mode "border" does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torchvision.transforms import functional

Size = tuple[int, int]  # height, width


def fitted_size(height: int, width: int, size: Size) -> Size:
    """The largest (height, width) in ``size`` with the proportions of ``height`` and ``width``, at least a pixel each."""
    ratio = max(height / size[0], width / size[1])
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def mean_colour(mean: Sequence[float]) -> tuple[int, ...]:
    """What is padded with, 0 to 255, for the ``mean`` of the normalisation: about 0 behind it."""
    return tuple(min(255, max(0, round(255 * value))) for value in mean)


def padded(image: np.ndarray, size: Size, fill: Sequence[int]) -> np.ndarray:
    """``image`` (h, w, C), uint8, in the middle of (height, width, C) of the colour ``fill`` (C)."""
    (height, width), (h, w) = size, image.shape[:2]
    if (h, w) == tuple(size):
        return image
    canvas = np.empty((height, width, image.shape[2]), dtype=np.uint8)
    canvas[:] = np.asarray(fill, dtype=np.uint8)
    top, left = (height - h) // 2, (width - w) // 2
    canvas[top:top + h, left:left + w] = image
    return canvas


class ResizeInside(ResizeKeepRatio):
    """timm's resize to the largest size that fits; a side of an extremely long image, too, keeps a pixel."""

    @staticmethod
    def get_params(img: Image.Image, *arguments: Any) -> list[int]:
        return [max(1, side) for side in ResizeKeepRatio.get_params(img, *arguments)]


class ProportionalCrop(RandomResizedCropAndInterpolation):
    """timm's random crop with ratios relative to the image's own: the ratio 1 and the scale 1 are the whole image, however long.

    Args:
        crop: timm's, whose parameters are taken over.
        fill: colour of the padding; None squashes.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation, fill: Sequence[int] | None):
        self.__dict__.update(crop.__dict__)
        self.fill = fill

    def get_params(self, img: Image.Image, scale: Sequence[float], ratio: Sequence[float]) -> tuple[int, int, int, int]:
        width, height = img.size
        return RandomResizedCropAndInterpolation.get_params(img, scale, relative(ratio, width, height))

    def __call__(self, img: Image.Image) -> Image.Image:
        if self.fill is None:
            return super().__call__(img)
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        interpolation = random.choice(self.interpolation) if isinstance(self.interpolation, (tuple, list)) else self.interpolation
        inner = functional.resized_crop(img, top, left, height, width, fitted_size(height, width, self.size), interpolation)
        return Image.fromarray(padded(np.asarray(inner), self.size, self.fill))


def relative(ratio: Sequence[float], width: int, height: int) -> tuple[float, float]:
    """The range of a crop's aspect ratio in pixels, from that relative to an image of ``width`` and ``height``."""
    return ratio[0] * (width / height), ratio[1] * (width / height)
