"""CrossFormer's cross-scale embedding layers (CEL): tokens sampled by convolutions of several sizes at one stride.

Paper: "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (ICLR 2022), section 3.1.

Shapes: B batch, H W image or map, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cpu_bf16 import LayerNormForProducts, compute_dtype, conv2d, linear
from models.ops import join_squares, merge_patches, pad_to_even, pad_to_multiple, space_to_depth, windows

_SIDE = 4  # tokens along the largest square that ``sample_by_products`` computes at once


class CrossScaleEmbedding(nn.Module):
    """CEL on the image: convolutions of growing kernels at one stride, concatenated (CrossFormer, section 3.1).

    (B, 3, H, W) -> (B, H/4, W/4, C). Each kernel gets half the channels of the one before, the last as many as that one.
    """

    def __init__(self, dim: int, kernels: Sequence[int] = (4, 8, 16, 32), in_chans: int = 3, norm: bool = True):
        super().__init__()
        self.stride = kernels[0]
        self.projs = nn.ModuleList(
            nn.Conv2d(in_chans, width, kernel, stride=self.stride, padding=(kernel - self.stride) // 2)
            for kernel, width in zip(kernels, split_channels(dim, len(kernels)), strict=True))
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pays_as_products(x):
            return self.norm(self.sample_by_products(x))
        x = pad_to_multiple(x, self.stride)
        # The gradient of a large kernel over three channels is slow; the forward pass alone gains nothing.
        sample = self.sample_in_blocks if self.training and self.stride % 2 == 0 else self.sample
        return self.norm(torch.cat(sample(x), dim=-1))

    def pays_as_products(self, x: Tensor) -> bool:
        """Whether ``sample_by_products`` is the fastest: on tensor cores in 16 bits, which make up for four times the arithmetic.

        In crossformer_small at batch 256 on an H200 one weight gradient, of 12 channels under the largest kernel, takes 5.4 ms of the
        step as a convolution, all of the embedding's products 1.0 ms by their sizes. An exported model keeps its convolutions.
        """
        exports = torch.jit.is_tracing() or torch.compiler.is_exporting()
        return x.is_cuda and compute_dtype(x).itemsize == 2 and len(self.projs) > 1 and not exports

    def sample(self, x: Tensor) -> list[Tensor]:
        """Each kernel's tokens, (B, H/4, W/4, width)."""
        return [proj(x).permute(0, 2, 3, 1) for proj in self.projs]

    def sample_in_blocks(self, x: Tensor) -> list[Tensor]:
        """The same with the pixels of a 4x4 block as channels: a kernel of 4m pixels is one of m blocks at stride 1.

        A token's kernel begins half a block off the image's blocks if m is even, so the blocks do; for an odd m (the smallest
        kernel, one block) the kernel gets half a block of zeros around it.
        """
        x = x.to(compute_dtype(x))  # once, not in every convolution
        half = self.stride // 2
        blocks = space_to_depth(F.pad(x, (half,) * 4), self.stride).permute(0, 3, 1, 2)
        tokens = []
        for proj in self.projs:
            across, rest = divmod(proj.kernel_size[0], self.stride)
            if rest:
                tokens.append(proj(x))
                continue
            kernel = proj.weight if across % 2 == 0 else F.pad(proj.weight, (half,) * 4)
            weight = space_to_depth(kernel, self.stride).permute(0, 3, 1, 2)
            tokens.append(conv2d(blocks, weight, proj.bias, padding=weight.shape[2] // 2 - 1))
        return [token.permute(0, 2, 3, 1) for token in tokens]

    def sample_by_products(self, x: Tensor) -> Tensor:
        """All kernels' tokens side by side, (B, H/4, W/4, C), as products of large matrices, of the kernels two by two.

        A row holds the pixels that a square of tokens sees; the weights are those of all its tokens, zero where one does not look.
        Tokens in 4x4 share most of what they see: under a kernel of 32 the rows take an eighth of the memory of rows for each token.
        """
        height, width = (-(-size // self.stride) for size in x.shape[2:])
        margin = (max(proj.kernel_size[0] for proj in self.projs) - self.stride) // 2
        x = F.pad(pad_to_multiple(x.to(compute_dtype(x)), self.stride * _SIDE), (margin,) * 4)
        pairs = [list(self.projs[i:i + 2]) for i in range(0, len(self.projs), 2)]
        maps, sides = zip(*(self.sample_squares(x, margin, pair) for pair in pairs), strict=True)
        return join_squares(maps, sides)[:, :height, :width]

    def sample_squares(self, x: Tensor, margin: int, projs: Sequence[nn.Conv2d]) -> tuple[Tensor, int]:
        """Some kernels' tokens by squares of a side that is returned too, (B, H/4/side, W/4/side, side*side*channels).

        ``x`` is the image with that margin around it.
        """
        largest, stride = max(proj.kernel_size[0] for proj in projs), self.stride
        side = next(side for side in (_SIDE, 2, 1) if side * stride <= largest)  # larger ones hold more zeros than they save memory
        beyond = stride * (side - 1)
        seen, inside = largest + beyond, margin - (largest - stride) // 2
        image = x[:, :, inside:x.shape[2] - inside, inside:x.shape[3] - inside]
        rows = windows(image, seen, stride * side, math.gcd(stride, seen))
        # With zeros around it, a kernel seen through a window at the last possible place is the first token's, and so on.
        kernels = torch.cat([F.pad(proj.weight, (beyond + (largest - proj.kernel_size[0]) // 2,) * 4) for proj in projs])
        weight = kernels.unfold(2, seen, stride).unfold(3, seen, stride).flip(2, 3).permute(2, 3, 0, 1, 4, 5)
        bias = torch.cat([proj.bias for proj in projs]).repeat(side * side)
        return linear(rows, weight.flatten(3).flatten(0, 2), bias), side


def split_channels(dim: int, parts: int) -> list[int]:
    """Output widths of the embedding's kernels, from the smallest kernel: D/2, D/4, ..., the last one twice."""
    widths = [dim // 2 ** (i + 1) for i in range(parts - 1)]
    return [*widths, dim - sum(widths)]


def check_kernels(name: str, kernels: Sequence[int], stride: int, width: int) -> None:
    """Raise ``ValueError`` unless kernels at one stride sample maps of one size and have a channel each of ``width``."""
    if any(kernel < stride or (kernel - stride) % 2 for kernel in kernels):
        raise ValueError(f"{name} is {list(kernels)}: at stride {stride} every kernel must be that large, or larger by an even number of "
                         "pixels")
    if len(kernels) > 1 and min(split_channels(width, len(kernels))) < 1:
        raise ValueError(f"{name} is {list(kernels)}: too many kernels for {width} channels, of which each gets half of what the one "
                         "before has")


class CrossScaleMerging(nn.Module):
    """CEL between stages: norm, then convolutions of stride 2, concatenated. (B, H, W, C) -> (B, H/2, W/2, 2C)."""

    def __init__(self, dim: int, kernels: Sequence[int] = (2, 4)):
        super().__init__()
        self.norm = LayerNormForProducts(dim)
        self.reductions = nn.ModuleList(
            nn.Conv2d(dim, width, kernel, stride=2, padding=(kernel - 2) // 2)
            for kernel, width in zip(kernels, split_channels(2 * dim, len(kernels)), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_even(self.norm(x))
        return torch.cat([self.merge(reduction, x) for reduction in self.reductions], dim=-1)

    @staticmethod
    def merge(conv: nn.Conv2d, x: Tensor) -> Tensor:
        if conv.kernel_size[0] == 2:
            return merge_patches(conv, x)
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
