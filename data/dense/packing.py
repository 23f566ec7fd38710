"""From samples to a ``DenseBatch``: packed by a DataLoader worker into one buffer, unpacked and normalised on the device.

One buffer a batch is one block of shared memory and one copy to the device, however many tensors a batch has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.dense.base import IGNORED
from data.dense.batch import DenseBatch
from data.dense.bit_masks import unpacked
from data.dense.transforms import Size, padded_size
from data.loading.dataset import empty_in_shared_memory

_ALIGNED = 16  # bytes, at whose multiples each part of a buffer begins
_HOST = ("sizes", "originals", "numbers", "counts")
_TYPES = dict(images=torch.uint8, boxes=torch.float32, labels=torch.int64, masks=torch.uint8, maps=torch.uint8,
              **dict.fromkeys(_HOST, torch.int64))

Layout = tuple[tuple[str, int, tuple[int, ...]], ...]  # of a buffer: names of its parts, where they begin, their shapes


class Prepared(NamedTuple):
    """An image ready for a batch, with what the task needs of what it shows.

    Attributes:
        image: (C, H, W) uint8.
        original: height and width in the file.
        number: position in the source, -1 where it could not be read.
        boxes: (n, 4) float32; labels: (n,) int64.
        masks: (n, H, ceil(W / 8)) of eight pixels a byte (``data/dense/bit_masks.py``); None where the task needs none.
        map: (H, W) uint8, in evaluation of the original's size; None where the task needs none.
    """

    image: Tensor
    original: Size
    number: int
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    map: Tensor | None = None


def pack(samples: Sequence[Prepared], stride: int, least: Size = (1, 1), flat_maps: bool = False,
         pipe: bool = False) -> tuple[Tensor, Layout]:
    """(a buffer that holds all of a batch, its layout).

    Args:
        stride: the padded size is the smallest multiple of it that holds each of the images and is ``least`` or more.
        flat_maps: maps are not padded but lie one behind another (evaluation).
        pipe: the buffer travels through a pipe, not in shared memory.
    """
    sides = zip(least, *(sample.image.shape[1:] for sample in samples), strict=True)
    height, width = padded_size(*map(max, sides), stride)
    count, objects, channels = len(samples), sum(len(sample.labels) for sample in samples), samples[0].image.shape[0]
    shapes: dict[str, tuple[int, ...]] = dict(
        images=(count, channels, height, width), sizes=(count, 2), originals=(count, 2), numbers=(count,), counts=(count,),
        boxes=(objects, 4), labels=(objects,))
    if samples[0].masks is not None:
        shapes["masks"] = (objects, height, -(-width // 8))
    if samples[0].map is not None:
        shapes["maps"] = (sum(sample.map.numel() for sample in samples),) if flat_maps else (count, height, width)
    layout, end = [], 0
    for name, shape in shapes.items():
        layout.append((name, end, shape))
        end += -(-math.prod(shape) * _TYPES[name].itemsize // _ALIGNED) * _ALIGNED
    buffer = empty_in_shared_memory((end,), torch.uint8, pipe)
    _fill({name: _part(buffer, start, shape, name) for name, start, shape in layout}, samples, flat_maps)
    return buffer, tuple(layout)


def _part(buffer: Tensor, start: int, shape: Sequence[int], name: str) -> Tensor:
    dtype = _TYPES[name]
    return buffer[start:start + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)


def _fill(parts: dict[str, Tensor], samples: Sequence[Prepared], flat_maps: bool) -> None:
    parts["sizes"].copy_(torch.tensor([sample.image.shape[1:] for sample in samples]))
    parts["originals"].copy_(torch.tensor([sample.original for sample in samples]))
    parts["numbers"].copy_(torch.tensor([sample.number for sample in samples]))
    parts["counts"].copy_(torch.tensor([len(sample.labels) for sample in samples]))
    torch.cat([sample.boxes for sample in samples], out=parts["boxes"])
    torch.cat([sample.labels for sample in samples], out=parts["labels"])
    first = 0
    for row, sample in enumerate(samples):
        height, width = sample.image.shape[1:]
        parts["images"][row, :, :height, :width] = sample.image  # what lies around it becomes zeros on the device
        if "masks" in parts:
            bits = parts["masks"][first:first + len(sample.masks)].zero_()
            bits[:, :height, :sample.masks.shape[2]] = sample.masks
            first += len(bits)
        if "maps" in parts and not flat_maps:
            parts["maps"][row].fill_(IGNORED)[:height, :width] = sample.map
    if "maps" in parts and flat_maps:
        torch.cat([sample.map.reshape(-1) for sample in samples], out=parts["maps"])


class Unpack:
    """From what ``pack`` made to a batch, normalised, on a device.

    Args:
        mean, std: (C,), in 0 to 1, of the normalisation.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, parts: tuple[Any, ...], device: torch.device) -> DenseBatch:
        buffer, layout = parts
        there = buffer.to(device, non_blocking=True)
        # Copies: what a batch keeps should not keep the whole buffer in memory.
        found = {name: _part(buffer if name in _HOST else there, start, shape, name) for name, start, shape in layout}
        kept = {name: part.clone() for name, part in found.items() if name not in ("images", "masks")}
        width = found["images"].shape[3]
        sizes = next(_part(there, start, shape, name) for name, start, shape in layout if name == "sizes")
        return DenseBatch(images=self._normalised(found["images"], sizes),
                          masks=unpacked(found["masks"], width) if "masks" in found else there.new_zeros((0, 0, 0), dtype=torch.bool),
                          **{"maps": there.new_zeros((0,)), **kept})

    def _normalised(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Both on one device."""
        device = images.device
        if device not in self._there:
            scale, shift = 1 / (255 * self.std), self.mean / self.std
            self._there[device] = tuple(values.to(device)[:, None, None] for values in (scale, shift))
        scale, shift = self._there[device]
        images = images.float().mul_(scale).sub_(shift)
        if device.type != "cpu":  # one pass over all pixels, where a CPU writes the padding alone, in two steps an image
            return images.masked_fill_(beyond(sizes, *images.shape[2:]), 0)
        for image, (height, width) in zip(images, sizes.tolist(), strict=True):
            image[:, height:].zero_()
            image[:, :, width:].zero_()
        return images


def beyond(sizes: Tensor, height: int, width: int) -> Tensor:
    """Where images of ``sizes`` (B, 2) have no pixels: (B, 1, height, width) bool."""
    rows, columns = (torch.arange(side, device=sizes.device) for side in (height, width))
    below, behind = rows >= sizes[:, :1], columns >= sizes[:, 1:]
    return (below[:, :, None] | behind[:, None])[:, None]
