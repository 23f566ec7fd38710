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

    def objects(self) -> list[dict[str, Tensor]]:
        """What each image shows: ``boxes (n, 4)``, ``labels (n,)`` and, where the batch has them, ``masks (n, H, W)``."""
        counts = self.counts.tolist()
        parts = dict(boxes=self.boxes.split(counts), labels=self.labels.split(counts))
        if len(self.masks) == len(self.labels) and self.masks.shape[1:] == self.images.shape[2:]:
            parts["masks"] = self.masks.split(counts)
        return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]

    def split(self, parts: int, stride: int = 0) -> list[DenseBatch]:
        """The batch in so many parts, whose images differ in number by one at most; of a training batch, whose maps are (B, H, W).

        Args:
            stride: where given, each part is padded to the smallest multiple of it that holds its own images.
        """
        rows = [self.images, self.sizes, self.originals, self.numbers, self.counts]
        rows = list(zip(*(part.tensor_split(parts) for part in rows), strict=True))
        lengths = [int(counts.sum()) for *_, counts in rows]
        masks = self.masks.split(lengths) if len(self.masks) == len(self.labels) else [self.masks] * parts
        maps = self.maps.tensor_split(parts) if self.maps.ndim == 3 else [self.maps] * parts
        flat = zip(self.boxes.split(lengths), self.labels.split(lengths), masks, maps, strict=True)
        found = [DenseBatch(*row, *objects) for row, objects in zip(rows, flat, strict=True)]
        return [part._trimmed(stride) for part in found] if stride and parts > 1 else found

    def _trimmed(self, stride: int) -> DenseBatch:
        """Without padding that none of its images needs."""
        if not len(self.images):
            return self
        height, width = (-(-side // stride) * stride for side in self.sizes.amax(dim=0).tolist())
        maps = self.maps[..., :height, :width] if self.maps.ndim == 3 else self.maps
        return self._replace(images=self.images[..., :height, :width], masks=self.masks[..., :height, :width], maps=maps)
