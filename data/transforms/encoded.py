"""Training images of which the DataLoader workers only read the files: the device decodes and resizes them (DATA.DECODER nvjpeg)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.decoding import jpeg, nvjpeg
from data.decoding.resize import resize_crop_on_device
from data.sources.base import Source
from data.transforms.fit import fitted_size
from data.transforms.params import Augmentation, Box
from data.transforms.pipeline import TrainPipeline

# Bytes of a file, and pixels of a side, that the device decodes. What is larger is rare, takes its memory, and of it the workers decode
# only what the crop needs.
LARGEST, LONGEST = 1 << 19, 2048


class Encoded(NamedTuple):
    """An image to decode.

    Attributes:
        data: the bytes of a plain JPEG.
        crop: (top, left, height, width) in its pixels.
        size: (height, width) to which the crop is resized.
    """

    data: bytes
    crop: Box
    size: tuple[int, int]


class EncodedTrainPipeline(TrainPipeline):
    """As ``TrainPipeline`` with ``on_device``, with an ``Encoded`` in place of the crop where the file is a plain and whole JPEG.

    The parameters of a sample are the same. All other files are decoded where it is called.
    """

    def __init__(self, augmentation: Augmentation):
        super().__init__(augmentation, on_device=True)

    def __call__(self, source: Source, index: int, out: Tensor | None = None) -> tuple[Encoded | Tensor, Tensor]:
        data = source.read(index)
        header = jpeg.read_header(data)
        if header is None or not _suits(data, header) or source.reading.exif and not header.upright:
            return self.decoded(source, index, out)
        augmentation = self.augmentation
        params = augmentation.sample(header.width, header.height)
        size = augmentation.size if augmentation.padding is None else fitted_size(*params.crop[2:], augmentation.size)
        return Encoded(data, params.crop, size), augmentation.pack(params, random.getrandbits(48))

    def decoded(self, source: Source, index: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sample decoded and resized here, as ``TrainPipeline`` has it."""
        return super().__call__(source, index, out)

    def image_bytes(self) -> int:
        return super().image_bytes() + LARGEST

    def description(self) -> str:
        return f"JPEGs decoded by nvJPEG, other files by {jpeg.LIBRARY} or Pillow, augmented on the device"

    def summary(self, fast: int, by_pillow: int, by_device: int = 0) -> str:
        others = super().summary(fast, by_pillow).removeprefix("decoded ")
        return f"decoded by nvJPEG, whose pixels differ slightly: {by_device:,}" + (f"; {others}" if fast or by_pillow else "")


def _suits(data: bytes, header: jpeg.Header) -> bool:
    """Whether a plain JPEG is one for the device."""
    small = len(data) <= LARGEST and max(header.width, header.height) <= LONGEST
    return small and jpeg.is_whole(data) and jpeg.is_ycc(data, header)


@torch.no_grad()
def decode_crops(files: Sequence[Tensor], crops: Sequence[Box], sizes: Sequence[tuple[int, int]], augmentation: Augmentation,
                 device: torch.device) -> tuple[Tensor, list[int]]:
    """(resized crops (B, H, W, 3) uint8 on ``device``; which of them are not there, since their files were not decoded).

    Args:
        files: the bytes of each, (n,) uint8 on the host.
        crops, sizes: as of ``Encoded``.
    """
    height, width = augmentation.size
    fill = torch.tensor(augmentation.padding or (0, 0, 0), dtype=torch.float32)[:, None, None].to(device)
    images, failed = [], []
    for place, pixels in enumerate(nvjpeg.decode(files, device) if files else []):
        if pixels is None:
            failed.append(place)
            image = fill.expand(-1, height, width)
        else:
            image = resize_crop_on_device(pixels, crops[place], sizes[place], augmentation.mode)
            if image.shape[1:] != (height, width):
                top, left = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
                canvas = fill.repeat(1, height, width)
                canvas[:, top:top + image.shape[1], left:left + image.shape[2]] = image
                image = canvas
        images.append(image)
    if not images:
        return torch.empty(0, height, width, 3, dtype=torch.uint8, device=device), failed
    return torch.stack(images).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(), failed
