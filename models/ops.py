"""Padding, and operations whose fastest form depends on the device and the precision, the result being the same.

Shapes: B batch, H W map, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cpu_bf16 import compute_dtype, linear
from models.gpu import depthwise as gpu_depthwise

LARGE_MAP = 2 ** 19  # numbers of one sample, 1 MiB in bfloat16: two such maps leave a core's cache no room
_WIDE = {8: torch.int64, 16: torch.complex128}  # types by bytes, to move several numbers as one
_FEW_CHANNELS = 64  # 128 bytes in bfloat16, two cache lines


def pad_to(x: Tensor, least: int) -> Tensor:
    """(B, C, H, W) with zeros below and to the right so that no side is shorter than ``least``."""
    pad_h, pad_w = max(0, least - x.shape[2]), max(0, least - x.shape[3])
    return F.pad(x, (0, pad_w, 0, pad_h)) if pad_h or pad_w else x


def pad_to_multiple(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) with zeros below and to the right up to the next multiple of ``side``."""
    # Not -size % side: torch.compile with dynamic sizes cannot bound the remainder of a negative number.
    pad_h, pad_w = (side - x.shape[2] % side) % side, (side - x.shape[3] % side) % side
    return F.pad(x, (0, pad_w, 0, pad_h)) if pad_h or pad_w else x


def pad_to_even(x: Tensor) -> Tensor:
    """(B, H, W, C) with a row and a column of zeros where the height or the width is odd."""
    pad_h, pad_w = x.shape[1] % 2, x.shape[2] % 2
    return F.pad(x, (0, 0, 0, pad_w, 0, pad_h)) if pad_h or pad_w else x


def space_to_depth(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, H/side, W/side, C*side*side), a block's pixels in the order channel, row, column."""
    return windows(x, side, side, side)


def windows(x: Tensor, size: int, step: int, unit: int) -> Tensor:
    """Square windows of ``size`` pixels at every ``step``, (B, C, H, W) -> (B, H', W', C*size*size), as ``space_to_depth`` orders them.

    ``unit`` divides ``size``, ``step`` and the width: pixels that may be moved as one number, which is four times as fast.
    """
    wide = _WIDE.get(unit * x.element_size())
    if wide is None or x.requires_grad or x.device.type == "mps" or torch.compiler.is_compiling():
        return _cut(x, (size, size), (step, step)).flatten(3)
    if x.stride(3) != 1 or any(place % unit for place in (x.storage_offset(), *x.stride()[:3])):
        x = x.contiguous()
    return _cut(x.view(wide), (size, size // unit), (step, step // unit)).contiguous().view(x.dtype).flatten(3)


def _cut(x: Tensor, size: tuple[int, int], step: tuple[int, int]) -> Tensor:
    """A view (B, H', W', C, height, width) of windows of that size at every step, both (vertical, horizontal)."""
    if size == step:  # whole blocks, whose gradient is a permutation
        return x.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0])).permute(0, 2, 4, 1, 3, 5)
    return x.unfold(2, size[0], step[0]).unfold(3, size[1], step[1]).permute(0, 2, 3, 1, 4, 5)


def join_squares(maps: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
    """Maps of squares, (B, H/side, W/side, side*side*C_i) with a side each, as one map of pixels, (B, H, W, C), in one copy."""
    if torch.compiler.is_compiling():
        return torch.cat([_swap_inner(x.unflatten(3, (side, side, -1))).flatten(3, 4).flatten(1, 2)
                          for x, side in zip(maps, sides, strict=True)], dim=3)
    return _JoinSquares.apply(*maps, sides)


class _JoinSquares(torch.autograd.Function):
    """Several channels are moved as one number where widths allow, as pixels by ``windows``; both ways."""

    @staticmethod
    def forward(ctx: Any, *maps_and_sides: Any) -> Tensor:
        *maps, sides = maps_and_sides
        widths = [x.shape[3] // side ** 2 for x, side in zip(maps, sides, strict=True)]
        size = maps[0].element_size()
        ctx.unit = next((bytes_ // size for bytes_ in (16, 8) if not any(width * size % bytes_ for width in widths)), 1)
        ctx.sides, ctx.widths = sides, [width // ctx.unit for width in widths]
        joined = maps[0].new_empty(len(maps[0]), *(length * sides[0] for length in maps[0].shape[1:3]), sum(widths))
        for part, x, side in zip(_by_units(joined, ctx.unit).split(ctx.widths, dim=3), maps, sides, strict=True):
            _in_squares(part, side).copy_(_swap_inner(_by_units(x, ctx.unit).unflatten(3, (side, side, -1))))
        return joined

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(_by_units(grad.contiguous(), ctx.unit).split(ctx.widths, dim=3), ctx.sides, strict=True)
        return *(_swap_inner(_in_squares(part, side)).flatten(3).view(grad.dtype) for part, side in parts), None


def _by_units(x: Tensor, unit: int) -> Tensor:
    """A view of dense ``x`` whose last axis counts ``unit`` numbers as one."""
    return x.contiguous().view(_WIDE[unit * x.element_size()]) if unit > 1 else x


def _in_squares(x: Tensor, side: int) -> Tensor:
    """A view (B, H/side, side, W/side, side, C) of (B, H, W, C)."""
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side))


def _swap_inner(x: Tensor) -> Tensor:
    """(B, h, w, row, column, C) to (B, h, row, w, column, C), or back."""
    return x.permute(0, 1, 3, 2, 4, 5)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of an odd square kernel, padded by half of it. (B, C, H, W) -> (B, C, H/stride, W/stride), rounded up.

    Channels-last inside. In bfloat16 on a CPU its gradients are composed of what oneDNN (3.13) does fast: others of the same cost
    take 2 to 60 times as long. In 16 bits on a GPU it has kernels of its own (``models.gpu.depthwise``).

    ``skip`` adds the input to the output, at the price of one addition to the kernel.
    """

    def __init__(self, dim: int, kernel: int = 3, stride: int = 1, bias: bool = True, skip: bool = False):
        super().__init__(dim, dim, kernel, stride=stride, padding=kernel // 2, groups=dim, bias=bias)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        weight, dtype = self.weight, compute_dtype(x)
        if gpu_depthwise.applies(x, dtype):
            return self.on_cuda(x, weight, self.bias)
        if self.skip:
            weight = weight + F.pad(weight.new_ones(1, 1, 1, 1), (self.kernel_size[0] // 2,) * 4)
        if x.device.type != "cpu" or dtype != torch.bfloat16 or not torch.is_grad_enabled():
            return self._conv_forward(x, weight, self.bias)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        return _Depthwise.apply(x, weight.to(dtype), None if self.bias is None else self.bias.to(dtype), self.stride[0])

    def on_cuda(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Where ``gpu_depthwise.applies``, with ``weight`` and ``bias`` in place of its own."""
        x = x.to(compute_dtype(x)).permute(0, 2, 3, 1)
        return gpu_depthwise.depthwise(x, weight, bias, self.stride[0], self.skip).permute(0, 3, 1, 2)


class _Depthwise(torch.autograd.Function):
    """The convolution of ``DepthwiseConv2d``, with gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.has_bias = stride, bias is not None
        return F.conv2d(x, weight, bias, stride, weight.shape[2] // 2, groups=weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = _input_gradient(grad, x, weight, ctx.stride) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if any(ctx.needs_input_grad[1:3]):
            grad_weight, grad_bias = _kernel_gradient(grad, x, weight, ctx.stride, ctx.has_bias)
        return grad_x, grad_weight, grad_bias, None


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The gradient convolved with the flipped kernel; for a stride, spread over the plain convolution's outputs with zeros between."""
    if stride > 1:
        spread = torch.zeros_like(x)
        spread[:, :, ::stride, ::stride] = grad
        grad = spread
    return F.conv2d(grad, weight.flip(2, 3), None, padding=weight.shape[2] // 2, groups=weight.shape[0])


def _kernel_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Of weight and bias; kernels wider than 3 in strips of three columns, large maps in slices of channels, since oneDNN walks over
    a whole map for every 16 channels, half a cache line of each position: 1.4 to 1.9 times as fast with the copies."""
    padding = weight.shape[2] // 2
    if x.shape[1:].numel() > LARGE_MAP and x.shape[1] > _FEW_CHANNELS:
        slices = zip(*(t.split(_FEW_CHANNELS, dim=1) for t in (grad, x)), weight.split(_FEW_CHANNELS), strict=True)
        parts = [_kernel_gradient(g.contiguous(memory_format=torch.channels_last), y.contiguous(memory_format=torch.channels_last),
                                  w, stride, has_bias) for g, y, w in slices]
        return torch.cat([w for w, _ in parts]), torch.cat([b for _, b in parts if b is not None]) if has_bias else None
    if weight.shape[3] > 3 and stride == 1:
        padded, strips = F.pad(x, (padding, padding)), []
        for first, strip in zip(range(0, weight.shape[3], 3), weight.split(3, dim=3), strict=True):
            seen = padded[..., first:first + grad.shape[3] + strip.shape[3] - 1].contiguous(memory_format=torch.channels_last)
            strips.append(_torch_gradient(grad, seen, strip, 1, (padding, 0), has_bias and first == 0))
        return torch.cat([w for w, _ in strips], dim=3), strips[0][1]
    return _torch_gradient(grad, x, weight, stride, (padding, padding), has_bias)


def _torch_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: Sequence[int], has_bias: bool,
                    ) -> tuple[Tensor, Tensor | None]:
    """torch's own gradients of a depthwise convolution's weight and bias."""
    groups = weight.shape[0]
    return torch.ops.aten.convolution_backward(grad, x, weight, [groups] if has_bias else None, [stride] * 2, padding, [1, 1], False,
                                               [0, 0], groups, [False, True, has_bias])[1:]


def channels_last(x: Tensor) -> Tensor:
    """The image (B, C, H, W) as the convolutions of a stem are fastest, in memory (B, H, W, C): what follows keeps it.

    oneDNN's convolutions of a stem on a CPU, and their gradients, are 1.6 to 5 times as fast so in bfloat16, batch norm 1.3 times. On a
    GPU in 16 bits cuDNN's kernels for tensor cores take this layout, to which it would copy each map, and the layers behind it take maps
    with the channels last.
    """
    fits = x.device.type == "cpu" or x.is_cuda and compute_dtype(x).itemsize == 2
    return x.contiguous(memory_format=torch.channels_last) if fits else x


def concatenate(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C_i, H, W) side by side, (B, C, H, W); in training, channels last, each gets a gradient of its own, dense in memory.

    A slice of the whole's gradient, which autograd gives, makes the batch norm behind it on a CPU 15 times as slow, additions 3 times; on a
    GPU every operation that it passes on its way reads it in short rows.
    """
    dense = maps[0].device.type == "cpu" or maps[0].is_cuda and maps[0].is_contiguous(memory_format=torch.channels_last)
    if not dense or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat(maps, dim=1)
    return _Concatenate.apply(*maps)


class _Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        ctx.widths = [m.shape[1] for m in maps]
        return torch.cat(maps, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in grad.split(ctx.widths, dim=1))


def conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """A convolution without bias, then batch norm; in evaluation one convolution. (B, C, H, W) -> (B, C', H', W').

    The product with the norm is computed each time, which costs next to nothing and can never be stale.
    """
    if norm.training:
        return norm(_convolve(conv, x, conv.weight, None) if x.is_cuda else conv(x))
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return _convolve(conv, x, conv.weight * factor.view(-1, 1, 1, 1), norm.bias - norm.running_mean * factor)


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What ``conv`` does, with ``weight`` and ``bias`` in place of its own; of one pixel on a GPU in 16 bits a product of matrices, whose
    gradient of the weights cuBLAS sums over all pixels in parallel."""
    if isinstance(conv, DepthwiseConv2d) and gpu_depthwise.applies(x, compute_dtype(x)):
        return conv.on_cuda(x, weight, bias)
    if x.is_cuda and weight.shape[1:] == (x.shape[1], 1, 1) and conv.stride == (1, 1) and compute_dtype(x).itemsize == 2:
        return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)


def merge_patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution whose stride is its kernel. (B, H, W, C) -> (B, H/kernel, W/kernel, C'), rounded down.

    In training on a CPU it is a linear layer on whole patches: oneDNN's backward of the convolution takes up to twice as long. On a GPU
    likewise: a convolution's gradient of weights that cover 64 pixels and 64 channels is a few tiles of output for each of which a
    processor walks over the whole batch; cuBLAS divides the walk.
    """
    (batch, height, width, dim), side = x.shape, conv.kernel_size[0]
    by_product = x.is_cuda or x.device.type == "cpu" and torch.is_grad_enabled()
    if not by_product or height % side or width % side:
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    patches = x.reshape(batch, height // side, side, width // side, side, dim).transpose(2, 3).flatten(3)
    return linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)
