"""What the loaders of dense tasks yield."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DenseBatch(NamedTuple):
    """Images of one padded size, with what they show where that is asked for.

    B images, N objects of all of them together, in the order of the images. Objects lie flat, so that a batch is a few tensors.

    Attributes:
        images: (B, 3, H, W) float, normalised; zeros below and to the right of each image's own pixels. On the device.
        sizes: (B, 2) int64: height and width of each image within it, after the transforms. On the host.
        originals: (B, 2) int64: height and width in the file. On the host.
        numbers: (B,) int64: positions in the source; -1 for an image that could not be read, which is not counted. On the host.
        counts: (B,) int64: objects of each image. On the host.
        boxes: (N, 4) float32: x0, y0, x1, y1 in the padded image. On the device, as what follows.
        labels: (N,) int64.
        masks: (N, H, W) bool; (0, 0, 0) where the task needs none.
        maps: in training (B, H, W) uint8 with ``IGNORED`` in the padding; in evaluation the maps of the files, flat, one behind another
            (sum of their pixels,) uint8; (0,) where the task needs none.
    """

    images: Tensor
    sizes: Tensor
    originals: Tensor
    numbers: Tensor
    counts: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    maps: Tensor
