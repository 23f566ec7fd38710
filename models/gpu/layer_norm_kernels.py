"""Triton kernels of ``models.gpu.layer_norm``, imported only where they run.

A program takes a tile of whole rows, the channels padded to a power of two by masks: of 96 channels a quarter of its lanes idle, but no
byte is moved for them. It is given an image's pixels in order and writes a row where the table of places says, so that what is read first
waits for no table. A row of 96 numbers is 192 bytes in bf16, six whole sectors of memory, wherever it lies.

Sizes, by what a compilation for an H200 (sm_90) gives. The memory's pace takes about 25 KB under way a multiprocessor (4.8 TB/s, 132 of
them, 0.7 us). Forward, 32 numbers a thread are 60 to 96 registers, so 5 to 8 programs of 12 KB and more are resident; backward, 8 numbers
are at most 72 registers, so 7 programs of 4.6 KB, or with a branch 80, so 6 of 7.7 KB. No registers spill. Instructions issued take half
of the time that the bytes take.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_FORWARD_TILE, _BACKWARD_TILE = 4096, 1024  # numbers a program holds at a time
_RESIDENT_WARPS = {False: 28, True: 24}  # a multiprocessor's, in the backward kernel without and with a branch's gradient
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: on a CPU, for tests
_LEAST_TILES = 4  # of a backward program: each writes sums of its own
_SIZES = ["pixels", "places_number", "tiles", "all_tiles"]  # one kernel for all sizes of image and batch


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(x, branch, factor, weight, bias, places, y, total, mean, rstd, pixels, places_number, tiles, eps,
                    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    row = (program % tiles) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside, real = column < CHANNELS, row < pixels
    source = image * pixels + row
    mask = real[:, None] & inside[None, :]
    numbers = tl.load(x + source[:, None] * CHANNELS + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + source[:, None] * CHANNELS + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if factor is not None:
            added *= tl.load(factor + image)
        stored = (numbers + added).to(total.dtype.element_ty)
        tl.store(total + source[:, None] * CHANNELS + column[None, :], stored, mask=mask)
        numbers = stored.to(tl.float32)
    average = tl.sum(numbers, 1) / CHANNELS
    centred = tl.where(inside[None, :], numbers - average[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / CHANNELS + eps)
    tl.store(mean + source, average, mask=real)
    tl.store(rstd + source, scale, mask=real)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    result = centred * scale[:, None] * gain[None, :] + offset[None, :]
    if places is None:
        tl.store(y + source[:, None] * CHANNELS + column[None, :], result, mask=mask)
    else:  # behind an image's pixels come the places of its padding, which gets zeros
        exists = row < places_number
        target = image * places_number + tl.load(places + row, mask=exists, other=0)
        result = tl.where(real[:, None], result, 0.0)
        tl.store(y + target[:, None] * CHANNELS + column[None, :], result, mask=exists[:, None] & inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(grad, skip, x, factor, weight, mean, rstd, places, to_x, to_branch, sums, pixels, places_number, tiles, all_tiles,
                     CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, WIDTH)
    inside = column < CHANNELS
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    to_weight = tl.zeros((ROWS, WIDTH), tl.float32)
    to_bias = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(program, all_tiles, programs):
        image = (tile // tiles).to(tl.int64)
        row = (tile % tiles) * ROWS + tl.arange(0, ROWS)
        real = row < pixels
        mask = real[:, None] & inside[None, :]
        source = image * pixels + row
        target = source
        if places is not None:
            target = image * places_number + tl.load(places + row, mask=real, other=0)
        numbers = tl.load(x + source[:, None] * CHANNELS + column[None, :], mask=mask, other=0.0).to(tl.float32)
        to_y = tl.load(grad + target[:, None] * CHANNELS + column[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + source, mask=real, other=0.0)
        normed = (numbers - tl.load(mean + source, mask=real, other=0.0)[:, None]) * scale[:, None]
        to_weight += to_y * normed
        to_bias += to_y
        to_normed = to_y * gain[None, :]
        along, level = tl.sum(to_normed * normed, 1) / CHANNELS, tl.sum(to_normed, 1) / CHANNELS
        result = (to_normed - level[:, None] - normed * along[:, None]) * scale[:, None]
        if skip is not None:
            result += tl.load(skip + source[:, None] * CHANNELS + column[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(to_x + source[:, None] * CHANNELS + column[None, :], result, mask=mask)
        if to_branch is not None:
            if factor is not None:
                result *= tl.load(factor + image)
            tl.store(to_branch + source[:, None] * CHANNELS + column[None, :], result, mask=mask)
    tl.store(sums + program * 2 * CHANNELS + column, tl.sum(to_weight, 0), mask=inside)
    tl.store(sums + (program * 2 + 1) * CHANNELS + column, tl.sum(to_bias, 0), mask=inside)


def forward(x: Tensor, branch: Tensor | None, factor: Tensor | None, weight: Tensor, bias: Tensor, places: Tensor | None, y: Tensor,
            total: Tensor | None, mean: Tensor, rstd: Tensor, eps: float) -> None:
    """Fill ``y``, ``total``, ``mean`` and ``rstd`` of ``models.gpu.layer_norm``'s operation; ``places`` is that of ``group_places``."""
    channels = x.shape[-1]
    images, pixels, rows = _layout(mean, places, factor)
    width = _power_of_two(channels)
    tile = max(1, _FORWARD_TILE // width)
    tiles = -(-rows // tile)
    with _on(x.device):
        _forward_kernel[(images * tiles,)](x, branch, factor, weight, bias, places, y, total, mean, rstd, pixels, rows, tiles, eps,
                                           CHANNELS=channels, WIDTH=width, ROWS=tile, num_warps=4)


def backward(grad: Tensor, skip: Tensor | None, x: Tensor, factor: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor,
             places: Tensor | None, to_x: Tensor, to_branch: Tensor | None) -> Tensor:
    """Fill ``to_x`` and ``to_branch``; returns sums (n, 2, C) in fp32 to add up, always the same ones, to the gradients of weight and
    bias."""
    channels = x.shape[-1]
    images, pixels, rows = _layout(mean, places, factor)
    width = _power_of_two(channels)
    tile, warps = max(1, _BACKWARD_TILE // width), max(4, width // 256)
    tiles = -(-pixels // tile)
    programs = min(_multiprocessors(x.device) * max(1, _RESIDENT_WARPS[to_branch is not None] // warps), -(-images * tiles // _LEAST_TILES))
    sums = mean.new_empty(programs, 2, channels)
    with _on(x.device):
        _backward_kernel[(programs,)](grad, skip, x, factor, weight, mean, rstd, places, to_x, to_branch, sums, pixels, rows, tiles,
                                      images * tiles, CHANNELS=channels, WIDTH=width, ROWS=tile, num_warps=warps)
    return sums


def _layout(mean: Tensor, places: Tensor | None, factor: Tensor | None) -> tuple[int, int, int]:
    """Images, pixels of each, and rows of each that come out; all rows are one image if nothing differs from image to image."""
    rows = mean.numel()
    if places is None and factor is None:
        return 1, rows, rows
    images = mean.shape[0]
    pixels = rows // images
    return images, pixels, pixels if places is None else places.shape[0]


def _power_of_two(number: int) -> int:
    """The next one; Triton's function of that takes 5 us."""
    return 1 << (number - 1).bit_length()


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device; of a CPU's tensors, which only its interpreter takes, there is none."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
