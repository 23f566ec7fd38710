"""From an image and its annotations to what a batch is packed of."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from yacs.config import CfgNode

from data.decoding import jpeg
from data.decoding.pillow import decode_pixels
from data.dense.base import IGNORED, DenseSource, Objects
from data.dense.bit_masks import boxes_around, chosen, packed
from data.dense.packing import Prepared
from data.dense.shapes import mask_library
from data.dense.transforms import EvalTransform, Sample, Size, TrainTransform, paste
from data.errors import UnreadableImage
from data.sources.base import Source
from data.transforms.pipeline import Decoder, Pipeline

_DECODED = 1 << 26  # pixels of masks that lie decoded at a time


class DensePipeline(Pipeline):
    """Decodes images at full size and changes them together with what they show.

    Args:
        shape: (C, H, W) of the largest image that a batch can hold.
        by_pillow: whether Pillow decodes every image.
    """

    dtype = torch.uint8

    def __init__(self, config: CfgNode, shape: tuple[int, ...], by_pillow: bool):
        self.task, self.shape, self.by_pillow, self.decoder = config.TASK, shape, by_pillow, Decoder()

    def image(self, source: Source, index: int, declared: Size | None = None) -> Tensor:
        """Image ``index`` (C, H, W) uint8, in channels-last memory.

        Raises:
            UnreadableImage: it cannot be read or decoded, or is not of the size ``declared``.
        """
        if self.by_pillow:
            pixels = decode_pixels(source.read(index), source.path(index), source.reading)
            size, rows = pixels.shape[:2], lambda _: pixels
        else:
            size, rows = self.decoder.open(source, index)
        if declared is not None and tuple(size) != tuple(declared):
            raise UnreadableImage.of(source.path(index), f"it is {size[1]} x {size[0]} pixels, but {declared[1]} x {declared[0]} by its "
                                     "annotations")
        return torch.from_numpy(rows(size[0])).permute(2, 0, 1)

    def counts(self) -> tuple[int, int]:
        counts = self.decoder.fast, self.decoder.by_pillow
        self.decoder.fast = self.decoder.by_pillow = 0
        return counts

    def description(self) -> str:
        return f"decoded by {'Pillow' if self.by_pillow else jpeg.LIBRARY}, resized by torchvision"

    def summary(self, fast: int, by_pillow: int) -> str:
        if self.by_pillow:
            return "decoded by Pillow, resized by torchvision"
        others = f", by Pillow (other formats, unusual JPEGs): {by_pillow:,}" if by_pillow else ""
        return f"decoded by {jpeg.LIBRARY}: {fast:,}{others}; resized by torchvision"


class TrainDensePipeline(DensePipeline):
    """Augmented images with the boxes, masks or maps of the config's task."""

    def __init__(self, config: CfgNode, shape: tuple[int, ...], transform: TrainTransform):
        super().__init__(config, shape, config.DATA.DECODER == "pillow")
        self.transform = transform
        self.masks = self.task != "detection" or config.DATA.DENSE.COPY_PASTE > 0  # what is pasted is cut out by its mask

    def placed(self, source: DenseSource, index: int) -> Sample:
        """Image ``index`` and what it shows, resized, cropped and flipped."""
        size = tuple(source.sizes[index].tolist())
        sample: Sample = dict(image=tv_tensors.Image(self.image(source, index, size)))
        if self.task == "semantic" or source.kind == "maps":
            sample["map"] = _map(source, index, size)
        else:
            sample |= _shown(source.objects(index), size, source.path(index), masks=self.masks)
        sample = self.transform.place(sample)
        return sample if self.task == "semantic" or source.kind != "maps" else _segments(sample)

    def finished(self, sample: Sample, source: DenseSource, index: int) -> Prepared:
        """What is packed of a placed sample."""
        plain = {name: value.as_subclass(Tensor) for name, value in self.transform.finish(sample).items() if isinstance(value, Tensor)}
        return Prepared(plain["image"], tuple(source.sizes[index].tolist()), index, plain.get("boxes", torch.zeros(0, 4)),
                        plain.get("labels", torch.zeros(0, dtype=torch.int64)), None if self.task == "detection" else plain.get("masks"),
                        plain.get("map"))

    def pasted(self, sample: Sample, other: Sample, source: DenseSource) -> Sample:
        """``sample`` with some of the countable things of ``other``; both placed."""
        things = torch.tensor(list(source.things), dtype=torch.bool)[other["labels"]]
        return paste(sample, other | {name: other[name][things] for name in ("labels", "masks")})


class EvalDensePipeline(DensePipeline):
    """Resized images, with the maps of the files where the task is evaluated on maps."""

    def __init__(self, config: CfgNode, shape: tuple[int, ...], transform: EvalTransform, maps: bool, published: bool):
        super().__init__(config, shape, config.DATA.DECODER == "pillow" or published and config.DATA.DECODER != "fast")
        self.transform, self.maps = transform, maps

    def prepared(self, source: Source, index: int, declared: Size | None) -> Prepared:
        """Image ``index`` for evaluation."""
        image = self.image(source, index, declared)
        shown = _map(source, index, tuple(image.shape[1:])) if self.maps else None
        return self._of(self.transform(image), tuple(image.shape[1:]), index, shown)

    def missing(self, channels: int, declared: Size) -> Prepared:
        """What stands for an image that cannot be read: of the size that it should have, without a class anywhere."""
        shown = torch.full(declared, IGNORED, dtype=torch.uint8) if self.maps else None
        return self._of(torch.zeros(channels, *self.transform.size(*declared), dtype=torch.uint8), declared, -1, shown)

    def _of(self, image: Tensor, original: Size, number: int, shown: Tensor | None) -> Prepared:
        return Prepared(image, original, number, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None, shown)


def _shown(objects: Objects, size: Size, path: str, masks: bool) -> Sample:
    """The objects that are trained on, as a part of a sample."""
    kept = np.flatnonzero(~objects.crowd)
    boxes = torch.from_numpy(np.asarray(objects.boxes, dtype=np.float32).reshape(-1, 4)[kept])
    sample: Sample = dict(boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
                          labels=torch.from_numpy(np.asarray(objects.labels, dtype=np.int64)[kept]))
    if masks:
        sample["masks"] = functools.partial(chosen_masks, [objects.masks[i] for i in kept.tolist()], size, path)
    return sample


def chosen_masks(masks: list[Any], size: Size, path: str, rows: Tensor, columns: Tensor) -> Tensor:
    """Packed rows and columns of masks that are run lengths, a few of which are decoded at a time.

    Args:
        size: (height, width) of the image.
        path: its name in errors.

    Raises:
        ConfigError: pycocotools is not installed.
        UnreadableImage: a mask is of another size than the image.
    """
    if wrong := next((mask["size"] for mask in masks if tuple(mask["size"]) != tuple(size)), None):
        raise UnreadableImage.of(path, f"it is {size[1]} x {size[0]} pixels, a mask of it {wrong[1]} x {wrong[0]}")
    number = max(1, _DECODED // (size[0] * size[1]))
    parts = [torch.zeros(0, len(rows), -(-len(columns) // 8), dtype=torch.uint8)]
    for first in range(0, len(masks), number):
        decoded = torch.from_numpy(mask_library().decode(masks[first:first + number])).permute(2, 0, 1)  # column by column in memory
        parts.append(chosen(decoded, rows, columns))
    return torch.cat(parts)


def _map(source: DenseSource, index: int, size: Size) -> Tensor:
    """The map of classes of image ``index``, whose size is ``size``."""
    shown = source.index_map(index)
    if shown.shape != tuple(size):
        raise UnreadableImage.of(source.path(index), f"it is {size[1]} x {size[0]} pixels, its map {shown.shape[1]} x {shown.shape[0]}")
    return torch.from_numpy(np.require(shown, np.uint8, ["C", "W"]))


def _segments(sample: Sample) -> Sample:
    """A mask for each class of a map in place of the map."""
    shown = sample["map"]
    labels = torch.bincount(shown.reshape(-1), minlength=IGNORED + 1)[:IGNORED].nonzero()[:, 0]
    masks = packed(shown == labels[:, None, None])
    boxes = tv_tensors.BoundingBoxes(boxes_around(masks), format="XYXY", canvas_size=tuple(shown.shape))
    return {name: value for name, value in sample.items() if name != "map"} | dict(boxes=boxes, labels=labels, masks=masks)
