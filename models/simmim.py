"""SimMIM: a backbone that sees an image with squares of it masked, and a linear decoder that predicts their pixels.

Paper: "SimMIM: A Simple Framework for Masked Image Modeling" (CVPR 2022). A learned token stands for every masked patch; one linear layer
on the last map predicts the pixels of a square of its stride; the loss is the mean absolute error over masked pixels alone.

The names are those of the authors' files: ``encoder.`` with the family's own names and ``encoder.mask_token``, and ``decoder.0``.

Differences: masked pixels are set to the mean as well, because the kernels of CrossFormer's cross-scale embedding reach from visible
patches into masked ones (Swin's do not, so nothing changes there); the mask is a function of a number given with each image, computed
where the image lies; a size that is no multiple of the squares has cut ones at its lower and right edge.

Shapes: B batch, c H W image, h w map of tokens, C channels of the last map, r its stride, n squares of an image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from models.base import MergingModel

# Of splitmix64, as signed numbers of 64 bits, in which products and sums wrap around.
_STEP, _FIRST, _SECOND = (constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _scrambled(x: Tensor) -> Tensor:
    """Splitmix64's finaliser: another number for each, and no order left in them."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def masked_squares(seeds: Tensor, size: tuple[int, int], side: int, ratio: float) -> Tensor:
    """Which squares of ``side`` pixels are masked in images of ``size``: (B, H/side, W/side), rounded up, of bool.

    Each image has ``ratio`` of its squares masked, rounded up; which ones is a function of its seed (B,), the same on every device.
    """
    rows, columns = (math.ceil(pixels / side) for pixels in size)
    number = torch.arange(1, rows * columns + 1, device=seeds.device)
    scores = _scrambled(seeds[:, None] + number * _STEP)  # different ones, so that no two squares tie
    last = scores.sort(dim=1).values[:, math.ceil(ratio * rows * columns) - 1, None]
    return (scores <= last).view(-1, rows, columns)


def enlarged(mask: Tensor, factor: int, height: int, width: int) -> Tensor:
    """(B, h, w) with every entry repeated ``factor`` times both ways, cut to (B, height, width)."""
    return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, :height, :width]


class SimMIM(nn.Module):
    """The masked backbone and its decoder. Images (B, c, H, W), masked squares (B, H/side, W/side) -> predicted pixels (B, c, H, W).

    Args:
        encoder: a backbone in Swin's layout, without a classifier.
        side: of a masked square in pixels, a multiple of the encoder's first stride.
        channels: of the images.

    Raises:
        ValueError: another kind of encoder, or squares that are no whole number of its patches.
    """

    def __init__(self, encoder: nn.Module, side: int, channels: int = 3):
        super().__init__()
        if not isinstance(encoder, (MergingModel, SwinTransformer, SwinTransformerV2)):
            raise ValueError("it takes a model of type crossformer, swin, swinv2, swin_mlp or galerkin")
        self.patch, self.stride = encoder.feature_info[0]["reduction"], encoder.feature_info[-1]["reduction"]
        if side % self.patch:
            raise ValueError(f"a masked square of {side} pixels is no multiple of the model's patches of {self.patch}")
        self.encoder, self.side, self.num_classes = encoder, side, 0
        encoder.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.feature_info[0]["num_chs"]))
        trunc_normal_(encoder.mask_token, std=0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.num_features, channels * self.stride ** 2, kernel_size=1), nn.PixelShuffle(self.stride))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {f"encoder.{name}" for name in (*self.encoder.no_weight_decay(), "mask_token")}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Without a mask nothing is hidden."""
        _, _, height, width = x.shape
        if mask is not None:
            x = x * ~enlarged(mask, self.side, height, width)[:, None]
        tokens = self.encoder.patch_embed(x)
        if mask is not None:
            hidden = enlarged(mask, self.side // self.patch, tokens.shape[1], tokens.shape[2]).unsqueeze(-1)
            tokens = torch.where(hidden, self.encoder.mask_token.to(tokens.dtype), tokens)
        if isinstance(self.encoder, MergingModel):
            features = self.encoder.run_stages(self.encoder.place(tokens), len(self.encoder.layers) - 1)[-1]
        else:
            features = self.encoder.layers(tokens)
        return self.decoder(self.encoder.norm(features).permute(0, 3, 1, 2))[:, :, :height, :width]


def masked_error(predicted: Tensor, images: Tensor, mask: Tensor, side: int) -> Tensor:
    """Mean absolute error over the masked pixels of each image, (B,).

    Args:
        predicted, images: (B, c, H, W).
        mask: (B, H/side, W/side), as of ``masked_squares``.
    """
    hidden = enlarged(mask, side, *images.shape[2:])[:, None].to(images.dtype)
    return ((predicted - images).abs() * hidden).sum((1, 2, 3)) / (hidden.sum((1, 2, 3)) * images.shape[1])


def normalised_by_neighbourhood(images: Tensor, side: int) -> Tensor:
    """Every pixel less the mean and over the deviation of the ``side`` x ``side`` pixels around it, those beyond the edge left out.

    (B, c, H, W) -> the same; the deviation is that of a sample. 1e-6 is added to its square, as the authors' targets have it.
    """
    ones, half = torch.ones_like(images[:1, :1]), side // 2

    def pooled(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, stride=1, padding=half)
    count = pooled(ones) * side ** 2
    mean = pooled(images) * side ** 2 / count
    variance = (pooled(images.square()) * side ** 2 / count - mean.square()) * (count / (count - 1).clamp(min=1))
    return (images - mean) / (variance.clamp(min=0) + 1e-6).sqrt()
