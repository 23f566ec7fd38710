"""Pipelines from an encoded file to what a DataLoader worker hands over.

Each is called with ``(source, index, out)``. ``PillowPipeline`` is timm's transform on Pillow's image, the papers' pixels;
``TrainPipeline`` and ``EvalPipeline`` decode and resize faster, and either finish an image in the worker (normalised float) or hand
over uint8 pixels, of which ``finish`` makes images on the device (``data/transforms/device_transforms.py``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.data.transforms import CenterCropOrPad, RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch import Tensor
from torchvision import transforms

from data.decoding import jpeg
from data.decoding.pillow import decode_pixels, from_rgb
from data.decoding.resize import MODES, resize_crop, resize_window, rows_needed
from data.sources.base import Source
from data.transforms import randaugment
from data.transforms.device_transforms import DeviceAugment, DeviceNormalise
from data.transforms.fit import fitted_size, padded
from data.transforms.params import Augmentation


class Decoder:
    """Decodes plain JPEGs fast and everything else by Pillow, and counts both.

    Attributes:
        fast, by_pillow: numbers of images decoded so far.
    """

    def __init__(self) -> None:
        self.fast = self.by_pillow = 0

    def open(self, source: Source, index: int) -> tuple[tuple[int, int], Callable[[int], np.ndarray]]:
        """((height, width) of an image, a function from a number of rows to its pixels: (at least these rows, W, C) uint8).

        Raises:
            UnreadableImage: it cannot be read or decoded; the function raises it as well.
        """
        data = source.read(index)
        header = jpeg.read_header(data)
        if header is None or source.reading.channels not in (1, 2, 3, 4) or (source.reading.exif and not header.upright):
            image = self._decode_by_pillow(data, source, index)
            return image.shape[:2], lambda rows: image

        def pixels(rows: int) -> np.ndarray:
            image = jpeg.decode(data, header, rows)
            if image is None:
                return self._decode_by_pillow(data, source, index)
            self.fast += 1
            return from_rgb(image, source.reading.channels)

        return (header.height, header.width), pixels

    def _decode_by_pillow(self, data: bytes, source: Source, index: int) -> np.ndarray:
        image = decode_pixels(data, source.path(index), source.reading)
        self.by_pillow += 1
        return image


class Pipeline:
    """The interface of all pipelines.

    Attributes:
        shape, dtype: of an image as it is handed over.
        finish: makes normalised images (B, 3, H, W) of a batch on the device; None where the worker has finished them.
    """

    shape: tuple[int, ...]
    dtype = torch.float32
    finish: Callable[..., Tensor] | None = None

    def __call__(self, source: Source, index: int, out: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Image ``index``, written to ``out``, a row of the batch, where that is given; for ``TrainPipeline`` on the device (crop, packed
        parameters).

        Raises:
            UnreadableImage: it cannot be read or decoded.
        """
        raise NotImplementedError

    def image_bytes(self) -> int:
        """Bytes of an image as it is handed over, at most."""
        return math.prod(self.shape) * self.dtype.itemsize

    def counts(self) -> tuple[int, int]:
        """(images decoded by the fast decoder, images decoded by Pillow) since the last call."""
        raise NotImplementedError

    def description(self) -> str:
        """How images are decoded and augmented, for the log."""
        raise NotImplementedError

    def summary(self, fast: int, by_pillow: int) -> str:
        """How images were decoded, for the log, given the sums of ``counts``."""
        raise NotImplementedError


class PillowPipeline(Pipeline):
    """timm's transform on what Pillow decodes: normalised float (3, H, W)."""

    def __init__(self, transform: Callable[[Any], Tensor]):
        kinds = (RandomResizedCropAndInterpolation, transforms.CenterCrop, CenterCropOrPad)
        crop = next(t for t in transform.transforms if isinstance(t, kinds))
        self.transform, self.shape = transform, (3, *crop.size)

    def __call__(self, source: Source, index: int, out: Tensor | None = None) -> Tensor:
        image = self.transform(source.load(index))
        return image if out is None else out.copy_(image)

    def counts(self) -> tuple[int, int]:
        return 0, 0  # not counted: there is only one decoder

    def description(self) -> str:
        return "decoded, resized and augmented by Pillow in the workers"

    def summary(self, fast: int, by_pillow: int) -> str:
        return "decoded and resized by Pillow"


class _FastPipeline(Pipeline):
    """Hands over (C, *size) float, normalised; or, with a ``finish`` for the device, (*size, C) uint8."""

    def __init__(self, size: tuple[int, int], mean: Tensor, std: Tensor, finish: Callable[..., Tensor] | None):
        self.on_device, self.finish = finish is not None, finish
        channels = len(mean)
        self.shape, self.dtype = ((*size, channels), torch.uint8) if self.on_device else ((channels, *size), torch.float32)
        self.decoder, self.normalise = Decoder(), Normalise(mean, std)

    def counts(self) -> tuple[int, int]:
        counts = self.decoder.fast, self.decoder.by_pillow
        self.decoder.fast = self.decoder.by_pillow = 0
        return counts

    def summary(self, fast: int, by_pillow: int) -> str:
        """Such as ``decoded by simplejpeg: 49,977, by Pillow (other formats, unusual JPEGs): 23``."""
        return f"decoded by {jpeg.LIBRARY}: {fast:,}" + (f", by Pillow (other formats, unusual JPEGs): {by_pillow:,}" if by_pillow else "")


class TrainPipeline(_FastPipeline):
    """A training sample, the same as timm's transform makes with the same seeds.

    Returns (C, H, W) float, normalised; or with ``on_device`` the resized crop (H, W, C) uint8, and its packed parameters (R,).
    """

    def __init__(self, augmentation: Augmentation, on_device: bool):
        super().__init__(augmentation.size, augmentation.mean, augmentation.std, DeviceAugment(augmentation) if on_device else None)
        self.augmentation = augmentation

    def __call__(self, source: Source, index: int, out: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        augmentation = self.augmentation
        (height, width), pixels = self.decoder.open(source, index)
        params = augmentation.sample(width, height)
        size = augmentation.size if augmentation.padding is None else fitted_size(*params.crop[2:], augmentation.size)
        crop = resize_crop(pixels(params.crop[0] + params.crop[2]), params.crop, size, augmentation.mode)
        if augmentation.padding is not None:
            crop = padded(crop, augmentation.size, augmentation.padding)
        if self.on_device:
            return _copy_to(out, crop), augmentation.pack(params, random.getrandbits(48))
        if params.hflip or params.vflip:
            crop = flip(crop, params.hflip, params.vflip)
        for operation, argument in params.operations:
            crop = randaugment.apply(crop, operation, argument, augmentation.fill, augmentation.mode)
        out = self.normalise(crop, out)
        for top, left, height, width in params.boxes:
            area = out[:, top:top + height, left:left + width]
            if augmentation.erase == "pixel":
                area.copy_(torch.empty(area.shape).normal_())
            elif augmentation.erase == "rand":
                area.copy_(torch.empty(len(area), 1, 1).normal_())
            else:
                area.zero_()
        return out

    def description(self) -> str:
        return f"decoded by {jpeg.LIBRARY}, resized by torch, augmented " + ("on the device" if self.on_device else "in the workers")


class EvalPipeline(_FastPipeline):
    """An image resized and cropped for evaluation: (C, H, W) float, normalised, or with ``on_device`` (H, W, C) uint8.

    Raises:
        LookupError: a part of timm's transform is not supported here; the message names it.
    """

    def __init__(self, transform: transforms.Compose, on_device: bool):
        for part in transform.transforms:
            if isinstance(part, (transforms.Resize, ResizeKeepRatio)):
                self.resize, mode = part, part.interpolation
            elif isinstance(part, (transforms.CenterCrop, CenterCropOrPad)):
                self.size, self.padding = tuple(part.size), getattr(part, "fill", None)
            elif isinstance(part, transforms.Normalize):
                mean, std = torch.as_tensor(part.mean), torch.as_tensor(part.std)
            elif not isinstance(part, transforms.ToTensor):
                raise LookupError(type(part).__name__)
        self.mode = getattr(mode, "value", "random")
        if self.mode not in MODES:
            raise LookupError(f"interpolation {self.mode}")
        super().__init__(self.size, mean, std, DeviceNormalise(mean, std) if on_device else None)

    def __call__(self, source: Source, index: int, out: Tensor | None = None) -> Tensor:
        shape, pixels = self.decoder.open(source, index)
        resized = self._resized_size(*shape)
        size = self.size if self.padding is None else resized
        top, left = (int(round((a - b) / 2)) for a, b in zip(resized, size, strict=True))
        rows = rows_needed(shape[0], resized[0], top + size[0])
        crop = resize_window(pixels(rows), shape, resized, (top, left, *size), self.mode)
        if self.padding is not None:
            crop = padded(crop, self.size, self.padding)
        return _copy_to(out, crop) if self.on_device else self.normalise(crop, out)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize; timm's transforms make it no smaller than the crop, or where they pad no larger."""
        size = self.resize.size
        if self.padding is not None:
            return fitted_size(height, width, size)
        if isinstance(self.resize, ResizeKeepRatio):
            ratio = min(height / size[0], width / size[1])
            return round(height / ratio), round(width / ratio)
        if not isinstance(size, int):
            return tuple(size)
        return (int(size * height / width), size) if width <= height else (size, int(size * width / height))

    def description(self) -> str:
        return f"decoded by {jpeg.LIBRARY}, resized by torch"

    def summary(self, fast: int, by_pillow: int) -> str:
        return (super().summary(fast, by_pillow)
                + "; resized by torch, 0.005 of 255 from Pillow's on average (DATA.DECODER pillow: Pillow's own)")


def flip(image: np.ndarray, horizontally: bool, vertically: bool) -> np.ndarray:
    """A mirrored copy of (H, W, C)."""
    axes = [axis for axis, wanted in ((1, horizontally), (0, vertically)) if wanted]
    return torch.from_numpy(image).flip(axes).numpy()


def _copy_to(out: Tensor | None, image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)) if out is None else out.copy_(torch.from_numpy(image))


class Normalise:
    """(H, W, C) uint8 to (C, H, W) float, equal to ToTensor and Normalize but for the last bit: their divisions take three times as
    long as these products."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.scale, self.shift = (1 / (255 * std))[:, None, None], (mean / std)[:, None, None]

    def __call__(self, image: np.ndarray, out: Tensor | None = None) -> Tensor:
        out = torch.empty(image.shape[2], *image.shape[:2]) if out is None else out
        return out.copy_(torch.from_numpy(image).permute(2, 0, 1)).mul_(self.scale).sub_(self.shift)
