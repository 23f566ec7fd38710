"""From an encoded file to what a worker hands over: the fast way for plain JPEGs, and the choice between it and timm's own.

Three pipelines, each called with ``(source, index, out)``: ``PillowPipeline`` is timm's transform on Pillow's image, the papers' pixels;
``TrainPipeline`` and ``EvalPipeline`` decode and resize faster. The last two either finish an image in the worker (float, NCHW,
normalised) or hand over uint8 pixels for ``finish`` to make images of on the device (``data.device_augment``).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch import Tensor
from torchvision import transforms
from yacs.config import CfgNode

from config import ConfigError
from data.decoding import jpeg
from data.decoding.pillow import decode
from data.decoding.resize import MODES, needed, resize_crop, resize_window
from data.messages import Notice
from data.sources.base import Source
from data.transforms import randaugment
from data.transforms.build import build_eval_transform, build_train_transform, preprocessing
from data.transforms.device_transforms import DeviceAugment, DeviceNormalise
from data.transforms.params import Recipe


def train_pipeline(config: CfgNode, device: torch.device) -> tuple[Pipeline, list[str]]:
    """What DATA.DECODER, DATA.AUGMENT_ON and the policy ask for, and lines that the user should see.

    Raises:
        ConfigError: augmentation is asked for on the device, and not all of it can be done there.
    """
    transform, where = build_train_transform(config), config.DATA.AUGMENT_ON
    if config.DATA.DECODER == "pillow":
        if where == "device":
            raise ConfigError("DATA.AUGMENT_ON device does not go with DATA.DECODER pillow; set one of them to auto")
        return PillowPipeline(transform), []
    try:
        recipe = Recipe(transform)
    except LookupError as reason:
        if where == "device":
            raise ConfigError(f"DATA.AUGMENT_ON is device, which does not know this augmentation ({reason.args[0]}); "
                              "set it to auto, or take a rand- policy in AUG.AUTO_AUGMENT") from None
        return PillowPipeline(transform), [Notice(f"this augmentation ({reason.args[0]}) is timm's own on Pillow, about half as fast "
                                           "as that of a rand- policy")]
    return TrainPipeline(recipe, where == "device" or (where == "auto" and device.type == "cuda")), []


def eval_pipeline(config: CfgNode, device: torch.device, published: bool) -> tuple[Pipeline, list[str]]:
    """As ``train_pipeline``; ``published`` weights are judged on Pillow's pixels, as their authors did, unless told otherwise."""
    transform = build_eval_transform(preprocessing(config))
    if config.DATA.DECODER == "pillow" or (published and config.DATA.DECODER == "auto"):
        return PillowPipeline(transform), []
    try:
        return EvalPipeline(transform, on_device=device.type == "cuda"), []
    except LookupError as reason:
        return PillowPipeline(transform), [Notice(f"evaluation images are prepared by Pillow ({reason.args[0]})")]


class Decoder:
    """Decodes and counts: plain JPEGs fast, all else as ``data.decode`` does.

    Attributes:
        fast, odd: images decoded so far, by the fast decoder and by Pillow.
    """

    def __init__(self) -> None:
        self.fast = self.odd = 0

    def open(self, source: Source, index: int) -> tuple[tuple[int, int], Callable[[int], np.ndarray]]:
        """(height, width) of an image and a function: the pixels (H or fewer, W, 3), uint8, of at least so many rows.

        Raises:
            UnreadableImage: it cannot be read or decoded; so may the function.
        """
        data = source.read(index)
        header = jpeg.read_header(data)
        if header is None or (source.exif and not header.upright):
            image = self._by_pillow(data, source, index)
            return image.shape[:2], lambda rows: image

        def pixels(rows: int) -> np.ndarray:
            image = jpeg.decode(data, header, rows)
            if image is None:
                return self._by_pillow(data, source, index)
            self.fast += 1
            return image

        return (header.height, header.width), pixels

    def _by_pillow(self, data: bytes, source: Source, index: int) -> np.ndarray:
        image = np.array(decode(data, source.path(index), source.exif))
        self.odd += 1
        return image


class Pipeline:
    """What the three have in common.

    Attributes:
        shape, dtype: of an image as it is handed over.
        finish: what makes finished images of a batch of them on the device; None where they are finished already.
    """

    shape: tuple[int, ...]
    dtype = torch.float32
    finish: Callable[..., Tensor] | None = None

    def __call__(self, source: Source, index: int, out: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Image ``index``, written to ``out`` where that is given: a row of the batch.

        Raises:
            UnreadableImage: it cannot be read or decoded.
        """
        raise NotImplementedError

    def counts(self) -> tuple[int, int]:
        """Images decoded by the fast decoder, and by Pillow, since this was last asked."""
        raise NotImplementedError

    def description(self) -> str:
        """How images are made, for the log."""
        raise NotImplementedError

    def summary(self, fast: int, odd: int) -> str:
        """How images were made, given the sums of ``counts``."""
        raise NotImplementedError


class PillowPipeline(Pipeline):
    """timm's transform on what Pillow decodes: normalised float (3, H, W)."""

    def __init__(self, transform: Callable[[Any], Tensor]):
        crop = next(t for t in transform.transforms if isinstance(t, (RandomResizedCropAndInterpolation, transforms.CenterCrop)))
        self.transform, self.shape = transform, (3, *crop.size)

    def __call__(self, source: Source, index: int, out: Tensor | None = None) -> Tensor:
        image = self.transform(source.load(index))
        return image if out is None else out.copy_(image)

    def counts(self) -> tuple[int, int]:
        return 0, 0  # nobody asks who decoded where there is but one decoder

    def description(self) -> str:
        return "decoded, resized and augmented by Pillow in the workers"

    def summary(self, fast: int, odd: int) -> str:
        return "decoded and resized by Pillow"


class _FastPipeline(Pipeline):
    """Finished in the worker, (3, *size) float; or with ``on_device`` handed over as (*size, 3), uint8, for ``finish``."""

    def __init__(self, size: tuple[int, int], mean: Tensor, std: Tensor, finish: Callable[..., Tensor] | None):
        self.on_device, self.finish = finish is not None, finish
        self.shape, self.dtype = ((*size, 3), torch.uint8) if self.on_device else ((3, *size), torch.float32)
        self.decoder, self.normalise = Decoder(), Normalise(mean, std)

    def counts(self) -> tuple[int, int]:
        counts = self.decoder.fast, self.decoder.odd
        self.decoder.fast = self.decoder.odd = 0
        return counts

    def summary(self, fast: int, odd: int) -> str:
        """Such as ``decoded by simplejpeg: 49,977, by Pillow (other formats, odd files): 23``."""
        return f"decoded by {jpeg.LIBRARY}: {fast:,}" + (f", by Pillow (other formats, odd files): {odd:,}" if odd else "")


class TrainPipeline(_FastPipeline):
    """A training sample as timm's transform makes it of the same seeds.

    Returns (3, H, W) float, finished; or with ``on_device`` the resized crop (H, W, 3), uint8, and the row of its draws.
    """

    def __init__(self, recipe: Recipe, on_device: bool):
        super().__init__(recipe.size, recipe.mean, recipe.std, DeviceAugment(recipe) if on_device else None)
        self.recipe = recipe

    def __call__(self, source: Source, index: int, out: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        recipe = self.recipe
        (height, width), pixels = self.decoder.open(source, index)
        draw = recipe.draw(width, height)
        crop = resize_crop(pixels(draw.crop[0] + draw.crop[2]), draw.crop, recipe.size, recipe.mode)
        if self.on_device:
            return _into(out, crop), recipe.row(draw, random.getrandbits(48))
        if draw.hflip or draw.vflip:
            crop = flip(crop, draw.hflip, draw.vflip)
        for operation, argument in draw.operations:
            crop = randaugment.apply(crop, operation, argument, recipe.fill, recipe.mode)
        out = self.normalise(crop, out)
        for top, left, height, width in draw.boxes:
            area = out[:, top:top + height, left:left + width]
            if recipe.erase == "pixel":
                area.copy_(torch.empty(area.shape).normal_())
            elif recipe.erase == "rand":
                area.copy_(torch.empty(3, 1, 1).normal_())
            else:
                area.zero_()
        return out

    def description(self) -> str:
        return f"decoded by {jpeg.LIBRARY}, resized by torch, augmented " + ("on the device" if self.on_device else "in the workers")


class EvalPipeline(_FastPipeline):
    """An image as evaluation sees it, resized and cropped: float (3, H, W), normalised, or with ``on_device`` uint8 (H, W, 3).

    Raises:
        LookupError: a part of timm's transform is not covered here; the message names it.
    """

    def __init__(self, transform: transforms.Compose, on_device: bool):
        for part in transform.transforms:
            if isinstance(part, (transforms.Resize, ResizeKeepRatio)):
                self.resize, mode = part, part.interpolation
            elif isinstance(part, transforms.CenterCrop):
                self.size = tuple(part.size)
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
        resized = self._resized(*shape)
        top, left = (int(round((a - b) / 2)) for a, b in zip(resized, self.size, strict=True))
        rows = needed(shape[0], resized[0], top + self.size[0])
        crop = resize_window(pixels(rows), shape, resized, (top, left, *self.size), self.mode)
        return _into(out, crop) if self.on_device else self.normalise(crop, out)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, never below the crop's: timm scales to at least it."""
        size = self.resize.size
        if isinstance(self.resize, ResizeKeepRatio):
            ratio = min(height / size[0], width / size[1])
            return round(height / ratio), round(width / ratio)
        if not isinstance(size, int):
            return tuple(size)
        return (int(size * height / width), size) if width <= height else (size, int(size * width / height))

    def description(self) -> str:
        return f"decoded by {jpeg.LIBRARY}, resized by torch"

    def summary(self, fast: int, odd: int) -> str:
        return super().summary(fast, odd) + "; resized by torch, 0.005 of 255 from Pillow's on average (DATA.DECODER pillow: Pillow's own)"


def flip(image: np.ndarray, horizontally: bool, vertically: bool) -> np.ndarray:
    """A mirrored copy of (H, W, 3)."""
    axes = [axis for axis, wanted in ((1, horizontally), (0, vertically)) if wanted]
    return torch.from_numpy(image).flip(axes).numpy()


def _into(out: Tensor | None, image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)) if out is None else out.copy_(torch.from_numpy(image))


class Normalise:
    """(H, W, 3), uint8, to (3, H, W) float, as ToTensor and Normalize do it but for the last bit: divisions cost three times as much."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.scale, self.shift = (1 / (255 * std))[:, None, None], (mean / std)[:, None, None]

    def __call__(self, image: np.ndarray, out: Tensor | None = None) -> Tensor:
        out = torch.empty(3, *image.shape[:2]) if out is None else out
        return out.copy_(torch.from_numpy(image).permute(2, 0, 1)).mul_(self.scale).sub_(self.shift)
