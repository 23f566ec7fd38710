"""Batches of noise for measuring speed and memory."""

from __future__ import annotations

import torch
from yacs.config import CfgNode

from config import input_channels
from data.dense.batch import DenseBatch
from data.dense.loaders import STRIDE, input_size

OBJECTS = 7  # an image, about as many as COCO's have


def synthetic_batch(config: CfgNode, images: int, num_classes: int, device: torch.device, generator: torch.Generator,
                    stride: int = STRIDE) -> DenseBatch:
    """Noise of the size that a run is planned for, with objects or maps as the config's task is trained on; the same on every device."""
    height, width = input_size(config, stride)
    shown = torch.randn(images, input_channels(config), height, width, generator=generator)
    sizes = torch.tensor([[height, width]]).repeat(images, 1)
    objects = 0 if config.TASK == "semantic" else OBJECTS
    corners = torch.rand(images * objects, 2, generator=generator) * 0.5
    sides = 0.1 + 0.4 * torch.rand(images * objects, 2, generator=generator)
    boxes = torch.cat([corners, corners + sides], dim=1) * torch.tensor([width, height, width, height])
    labels = torch.randint(max(1, num_classes), (images * objects,), generator=generator)
    masks, maps = torch.zeros(0, 0, 0, dtype=torch.bool), torch.zeros(0, dtype=torch.uint8)
    if config.TASK in ("instance", "mask"):
        across, down = torch.arange(width) + 0.5, torch.arange(height) + 0.5
        inside = [(place >= boxes[:, low, None]) & (place < boxes[:, low + 2, None]) for low, place in enumerate((across, down))]
        masks = inside[1][:, :, None] & inside[0][:, None, :]
    if config.TASK == "semantic":
        maps = torch.randint(max(1, num_classes), (images, height, width), generator=generator, dtype=torch.uint8)
    return DenseBatch(shown.to(device), sizes, sizes.clone(), torch.arange(images), torch.full((images,), objects),
                      *(part.to(device) for part in (boxes, labels, masks, maps)))
