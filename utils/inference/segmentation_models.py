"""Semantic segmentation at several scales, mirrored and by sliding windows: a model around a model, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from utils.inference.found import resized


def segmentation_model(config: CfgNode, model: nn.Module) -> nn.Module:
    """``model`` as TEST.SCALES, TEST.FLIP and TEST.SLIDE ask for it; itself where they ask for nothing."""
    if list(config.TEST.SCALES) == [1.0] and config.TEST.FLIP == "none" and not config.TEST.SLIDE:
        return model
    slide = config.TEST.SLIDE
    window = (slide, slide) if isinstance(slide, int) else tuple(slide)
    return SegmentationViews(model, config.TEST.SCALES, config.TEST.FLIP, window if all(window) else None)


class SegmentationViews(nn.Module):
    """One answer from several views of each image: (images (B, 3, H, W), sizes (B, 2)) -> (B, C, H, W) like the model's own.

    The mean is of logits where ``flip`` is ``logits`` or there is one view, else of probabilities, whose logarithm is then returned.

    Args:
        scales: factors of each image's size; it is resized within its own pixels, without the padding.
        flip: ``none``, or as well each image's mirror image: ``logits`` or ``probabilities``.
        window: height and width of the windows that a model looks at one by one, or None.
    """

    def __init__(self, model: nn.Module, scales: Sequence[float] = (1.0,), flip: str = "none", window: Sequence[int] | None = None):
        super().__init__()
        self.model, self.scales, self.flip, self.window = model, tuple(scales), flip, window
        self.stride = model.stride

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        if sizes is None:
            sizes = torch.tensor([images.shape[2:]] * len(images))
        views = self._views(images, sizes)
        if len(self.scales) == 1 and self.flip == "none":
            return next(views)
        total, count = 0.0, 0
        for logits in views:
            total, count = total + (logits if self.flip == "logits" else logits.softmax(1)), count + 1
        mean = total / count
        return mean if self.flip == "logits" else mean.clamp(min=torch.finfo(mean.dtype).tiny).log()

    def _views(self, images: Tensor, sizes: Tensor) -> Iterator[Tensor]:
        """The logits (B, C, H, W) of each view, laid back onto the images."""
        whole = tuple(images.shape[2:])
        for scale in self.scales:
            scaled = (sizes * scale).round().long().clamp(min=1)
            # As large as the padded image would be, whatever images stand beside: an answer must not hang on the batch.
            seen = fitted(images, sizes, scaled, self._padded([max(1, round(side * scale)) for side in whole]), antialias=scale < 1)
            yield fitted(self._logits(seen, scaled), scaled, sizes, whole)
            if self.flip != "none":
                yield fitted(mirrored(self._logits(mirrored(seen, scaled), scaled), scaled), scaled, sizes, whole)

    def _padded(self, size: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-side // self.stride) * self.stride for side in size)

    def _logits(self, images: Tensor, sizes: Tensor) -> Tensor:
        if self.window is None:
            return self.model(images, sizes).float()
        height, width = images.shape[2:]
        total, times = None, torch.zeros(height, width, device=images.device)
        for top in starts(height, self.window[0]):
            for left in starts(width, self.window[1]):
                part = images[:, :, top:top + self.window[0], left:left + self.window[1]]
                h, w = part.shape[2:]
                ends = self._padded((h, w))
                own = (sizes - torch.tensor([top, left])).clamp(min=1).minimum(torch.tensor([h, w]))
                logits = self.model(F.pad(part, (0, ends[1] - w, 0, ends[0] - h)), own).float()[:, :, :h, :w]
                if total is None:
                    total = logits.new_zeros(len(images), logits.shape[1], height, width)
                total[:, :, top:top + h, left:left + w] += logits
                times[top:top + h, left:left + w] += 1
        return total / times


def starts(length: int, window: int) -> list[int]:
    """Where windows of ``window`` pixels begin that cover ``length`` of them: each two thirds of a window further, the last at the end."""
    step = max(1, round(window * 2 / 3))
    return [*range(0, max(0, length - window), step), max(0, length - window)]


def mirrored(images: Tensor, sizes: Tensor) -> Tensor:
    """Each image (B, C, H, W) left to right within its own size (B, 2); the padding stays to the right."""
    flipped = images.clone()
    for image, (height, width) in zip(flipped, sizes.tolist(), strict=True):
        image[:, :height, :width] = image[:, :height, :width].flip(2)
    return flipped


def fitted(images: Tensor, sizes: Tensor, wanted: Tensor, padded: Sequence[int], antialias: bool = False) -> Tensor:
    """Each image (B, C, H, W), in its own size (B, 2), at its ``wanted`` size (B, 2), on zeros of the ``padded`` height and width."""
    if torch.equal(sizes, wanted) and tuple(images.shape[2:]) == tuple(padded):
        return images
    made = images.new_zeros(*images.shape[:2], *padded)
    for target, image, size, want in zip(made, images, sizes.tolist(), wanted.tolist(), strict=True):
        own = image[None, :, :size[0], :size[1]]
        target[:, :want[0], :want[1]] = (F.interpolate(own, size=want, mode="bilinear", align_corners=False, antialias=True) if antialias
                                         else resized(own, want))[0]
    return made
