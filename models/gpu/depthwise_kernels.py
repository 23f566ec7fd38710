"""Triton kernels for depthwise convolutions on a GPU, of maps whose channels lie side by side in memory.

torch has two forms. Its own kernels take maps with the channels first, so that a map with the channels last is copied before and after,
and its gradient of the weights walks over all pixels once for each number of the kernel. For channels-last maps it calls cuDNN, whose
16-bit kernels are made for a few sizes. A depthwise convolution multiplies little for what it reads, so that its time should be that of
reading and writing a map once: a program here takes a tile of pixels by a block of channels, and what neighbouring tiles share comes from
the cache. (256, 56, 56, 64) in bfloat16: 103 MB in and as many out, 0.05 ms on an H200.

The gradient of the weights is summed in two stages in a fixed order, hence equal from run to run.

Shapes: B batch, H W map, C channels, K side of the kernel. A map (B, H, W, C) may be a slice of channels of a wider one.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8  # pixels a side of a program's outputs: maps of 7, 14, 28 and 56 pixels leave little of the last tile unused
CHANNELS = 64  # of a program
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on a CPU, for tests
GRADIENT_ROWS = 16  # of a map, side by side, of a program of the weights' gradient
GRADIENT_PROGRAMS = 1024  # eight for each processor of an H200, of which three find room at a time


# Registers a thread, so that a processor has room for two programs of ``_convolve``; the compiler would take 146.
_TWO_PROGRAMS = {} if torch.version.hip else {"maxnreg": 128}
# One kernel for all sizes of map, batch and channels.
_SIZES = ["channels", "height", "width", "out_height", "out_width", "x_image", "x_pixel"]


@triton.jit
def _row(total, x, weight, c, oy, ox, ky, reach, height, width, x_pixel, C, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
         TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr):
    """``total`` (pixels, channels) and row ``ky`` of the kernel on it, of which the middle 2 reach + 1 columns count."""
    for kx in tl.static_range(KERNEL):
        if TRANSPOSED:
            iy, ix = oy + KERNEL // 2 - ky, ox + KERNEL // 2 - kx
            hit = (iy >= 0) & (ix >= 0) & (iy % STRIDE == 0) & (ix % STRIDE == 0)
            iy, ix = iy // STRIDE, ix // STRIDE
        else:
            iy, ix = oy * STRIDE + ky - KERNEL // 2, ox * STRIDE + kx - KERNEL // 2
            hit = (iy >= 0) & (ix >= 0)
        hit = hit & (iy < height) & (ix < width) & (kx >= KERNEL // 2 - reach) & (kx <= KERNEL // 2 + reach)
        seen = tl.load(x + ((iy * width + ix) * x_pixel * ALIGN)[:, None] + c[None, :], mask=hit[:, None] & (c < C)[None, :], other=0.0)
        tap = tl.load(weight + (ky * KERNEL + kx) * C + c, mask=c < C, other=0.0)
        total += seen.to(total.dtype) * tap.to(total.dtype)[None, :]
    return total


@triton.jit(do_not_specialize=[*_SIZES, "tiles_y", "tiles_x", "addend_image", "addend_pixel", "out_image", "out_pixel"])
def _convolve(x, weight, bias, addend, out, reaches, channels, height, width, out_height, out_width, tiles_y, tiles_x, x_image, x_pixel,
              addend_image, addend_pixel, out_image, out_pixel, KERNEL: tl.constexpr, STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
              HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr, HAS_REACHES: tl.constexpr, ALIGN: tl.constexpr, SUM: tl.constexpr,
              SIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of the outputs by a block of channels. TRANSPOSED: of the input's gradient, ``x`` being the output's, ``weight`` (K*K, C) the
    same. Channels and strides in memory come in units of ALIGN numbers, from which the compiler knows how much it may load at once."""
    program, C = tl.program_id(0), channels * ALIGN
    blocks = tl.cdiv(C, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = program // blocks
    pixel = tl.arange(0, SIDE * SIDE)
    ox = tile % tiles_x * SIDE + pixel % SIDE
    tile = tile // tiles_x
    oy = tile % tiles_y * SIDE + pixel // SIDE
    image = (tile // tiles_y).to(tl.int64)
    x += image * x_image * ALIGN
    total = tl.zeros((SIDE * SIDE, BLOCK_C), SUM)
    if HAS_REACHES:
        reach = tl.max(tl.load(reaches + c, mask=c < C, other=0))
        for ky in range(KERNEL // 2 - reach, KERNEL // 2 + reach + 1):
            total = _row(total, x, weight, c, oy, ox, ky, reach, height, width, x_pixel, C, KERNEL, STRIDE, TRANSPOSED, ALIGN)
    elif KERNEL > 3:
        for ky in range(KERNEL):
            total = _row(total, x, weight, c, oy, ox, ky, KERNEL // 2, height, width, x_pixel, C, KERNEL, STRIDE, TRANSPOSED, ALIGN)
    else:
        for ky in tl.static_range(KERNEL):
            total = _row(total, x, weight, c, oy, ox, ky, KERNEL // 2, height, width, x_pixel, C, KERNEL, STRIDE, TRANSPOSED, ALIGN)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(SUM)[None, :]
    place = oy * out_width + ox
    inside = ((oy < out_height) & (ox < out_width))[:, None] & (c < C)[None, :]
    if HAS_ADDEND:
        offsets = (place * addend_pixel * ALIGN)[:, None] + c[None, :]
        total += tl.load(addend + image * addend_image * ALIGN + offsets, mask=inside, other=0.0).to(SUM)
    offsets = (place * out_pixel * ALIGN)[:, None] + c[None, :]
    tl.store(out + image * out_image * ALIGN + offsets, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "rows", "chunk", "grad_image", "grad_pixel"])
def _weight_gradient(x, grad, sums, reaches, channels, rows, chunk, height, width, out_height, out_width, x_image, x_pixel, grad_image,
                     grad_pixel, KERNEL: tl.constexpr, STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REACHES: tl.constexpr,
                     ALIGN: tl.constexpr, SUM: tl.constexpr, KERNEL_ROWS: tl.constexpr, MAP_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The share of a chunk of the outputs' rows in the gradients of some rows of the kernels and of the bias: a row of ``sums``, which has
    the weights (C, K, K), then the bias (C). A program walks along MAP_ROWS rows at once, so that where a column lies is one number."""
    C = channels * ALIGN
    blocks, area = tl.cdiv(C, BLOCK_C), KERNEL * KERNEL
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first_ky = tl.program_id(0) // blocks * KERNEL_ROWS
    share = tl.program_id(1)
    zeros = tl.zeros((MAP_ROWS, BLOCK_C), SUM)
    total, bias_total = (), zeros
    for _ in tl.static_range(KERNEL_ROWS * KERNEL):
        total = total + (zeros,)
    last = tl.minimum(share * chunk + chunk, rows)
    if HAS_REACHES:  # nothing to sum beyond
        reach = tl.max(tl.load(reaches + c, mask=c < C, other=0))
        last = tl.where(tl.abs(first_ky - KERNEL // 2) <= reach, last, 0)
    for first in range(share * chunk, last, MAP_ROWS):
        row = first + tl.arange(0, MAP_ROWS)
        there = row < last
        oy, image = row % out_height, (row // out_height).to(tl.int64)
        grads = grad + (image * grad_image * ALIGN + oy * out_width * grad_pixel * ALIGN)[:, None] + c[None, :]
        maps = x + (image * x_image * ALIGN)[:, None] + c[None, :]
        for ox in range(out_width):
            gradient = tl.load(grads + ox * grad_pixel * ALIGN, mask=there[:, None] & (c < C)[None, :], other=0.0).to(SUM)
            more = ()
            for tap in tl.static_range(KERNEL_ROWS * KERNEL):
                iy, ix = oy * STRIDE + first_ky + tap // KERNEL - KERNEL // 2, ox * STRIDE + tap % KERNEL - KERNEL // 2
                hit = there & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
                seen = tl.load(maps + ((iy * width + ix) * x_pixel * ALIGN)[:, None], mask=hit[:, None] & (c < C)[None, :], other=0.0)
                more = more + (total[tap] + seen.to(SUM) * gradient,)
            total = more
            if HAS_BIAS:
                bias_total += gradient
    sums += share.to(tl.int64) * C * (area + HAS_BIAS)
    for tap in tl.static_range(KERNEL_ROWS * KERNEL):
        tl.store(sums + c * area + first_ky * KERNEL + tap, tl.sum(total[tap], axis=0), mask=c < C)
    if HAS_BIAS:
        middle = (first_ky <= KERNEL // 2) & (first_ky + KERNEL_ROWS > KERNEL // 2)
        tl.store(sums + C * area + c, tl.sum(bias_total, axis=0), mask=(c < C) & middle)


def convolve(out: Tensor, x: Tensor, taps: Tensor, bias: Tensor | None, addend: Tensor | None, reaches: Tensor | None, stride: int,
             transposed: bool) -> None:
    """Write the convolution of ``x``, padded by half of the kernel, plus bias and ``addend``, to ``out``; or (``transposed``) the gradient
    of its input, ``x`` being that of its output.

    Args:
        taps: the weights, (K*K, C), K odd.
        addend: of the shape of ``out``, which it may be.
        reaches: (C,) in int32, how far from its middle each channel's kernel has other weights than 0.
    """
    (_, height, width, channels), (batch, out_height, out_width, _) = x.shape, out.shape
    tiles_y, tiles_x = triton.cdiv(out_height, TILE), triton.cdiv(out_width, TILE)
    block = min(CHANNELS, triton.next_power_of_2(channels))
    align = _alignment(x, out, *([] if addend is None else [addend]))
    steps = [s // align for t in (x, out if addend is None else addend, out) for s in (t.stride(0), t.stride(2))]
    _convolve[(batch * tiles_y * tiles_x * triton.cdiv(channels, block),)](
        x, taps, bias, addend, out, reaches, channels // align, height, width, out_height, out_width, tiles_y, tiles_x, *steps,
        KERNEL=math.isqrt(len(taps)), STRIDE=stride, TRANSPOSED=transposed, HAS_BIAS=bias is not None,
        HAS_ADDEND=addend is not None, HAS_REACHES=reaches is not None, ALIGN=align, SUM=_sum_type(x), SIDE=TILE, BLOCK_C=block,
        num_warps=8, **_TWO_PROGRAMS)


def weight_sums(x: Tensor, grad: Tensor, reaches: Tensor | None, kernel: int, stride: int, has_bias: bool) -> Tensor:
    """Gradients of the weights (C, 1, K, K), then of the bias (C,), one behind the other, from the input and the output's gradient; in fp32
    at least. Beyond ``reaches`` they can be anything."""
    (_, height, width, channels), (batch, out_height, out_width, _) = x.shape, grad.shape
    rows, block = batch * out_height, min(CHANNELS, triton.next_power_of_2(channels))
    kernel_rows = kernel if kernel <= 3 else 1  # more sums find no room in registers
    programs = triton.cdiv(channels, block) * (kernel // kernel_rows)
    tiles = triton.cdiv(rows, GRADIENT_ROWS)
    chunk = triton.cdiv(tiles, max(1, min(GRADIENT_PROGRAMS // programs, tiles))) * GRADIENT_ROWS
    columns = channels * (kernel ** 2 + has_bias)
    sums = x.new_empty(triton.cdiv(rows, chunk), columns, dtype=torch.promote_types(x.dtype, torch.float32))
    align = _alignment(x, grad)
    steps = [s // align for t in (x, grad) for s in (t.stride(0), t.stride(2))]
    _weight_gradient[(programs, len(sums))](
        x, grad, sums, reaches, channels // align, rows, chunk, height, width, out_height, out_width, *steps, KERNEL=kernel, STRIDE=stride,
        HAS_BIAS=has_bias, HAS_REACHES=reaches is not None, ALIGN=align, SUM=_sum_type(x), KERNEL_ROWS=kernel_rows, MAP_ROWS=GRADIENT_ROWS,
        BLOCK_C=block, num_warps=4)
    return sums.sum(dim=0)


def _alignment(*maps: Tensor) -> int:
    """Numbers, 8 at most, that divide channels and strides; 8 in 16 bits are the most that a thread loads at once."""
    return functools.reduce(math.gcd, (s for t in maps for s in (t.shape[3], t.stride(0), t.stride(2))), 8)


def _sum_type(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
