"""The augmentation of ``device_transforms`` as Triton kernels: the same pixels in 2 launches, and 2 more a RandAugment layer.

Each program of a kernel takes a block of pixels of one sample and goes by that sample's own parameters, so that the number of launches
does not depend on what was drawn; between layers an image is bytes. On the pixels of (256, 3, 224, 224) with two layers the operations of
``device_transforms`` one by one are 900 launches that read and write 32 GB; these are 6, of 0.5 GB.

Nothing may be contracted to multiply-adds, which round otherwise than the operations one by one: hence ``enable_fp_fusion=False``.
Triton is no requirement of this program: ``device_transforms`` imports this file where it is used, and does without where that fails.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from data.transforms import randaugment as ra
from data.transforms.device_transforms import constant, rotation, to_device
from data.transforms.params import Augmentation

AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE = (tl.constexpr(number) for number in (ra.AUTO_CONTRAST, ra.EQUALIZE, ra.INVERT, ra.ROTATE))
POSTERIZE, SOLARIZE, SOLARIZE_ADD = (tl.constexpr(number) for number in (ra.POSTERIZE, ra.SOLARIZE, ra.SOLARIZE_ADD))
COLOR, CONTRAST, BRIGHTNESS, SHARPNESS = (tl.constexpr(number) for number in (ra.COLOR, ra.CONTRAST, ra.BRIGHTNESS, ra.SHARPNESS))
SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = (tl.constexpr(number) for number in (
    ra.SHEAR_X, ra.SHEAR_Y, ra.TRANSLATE_X, ra.TRANSLATE_Y))
RED, GREEN, BLUE = (tl.constexpr(int(part)) for part in ra.GREY)
_BLOCK = 256  # pixels of a program; of 512 the rotation needs 235 registers, of 1,024 more than there are
_ERASE = dict(const=0, rand=1, pixel=2)


def augment(crops: Tensor, rows: Tensor, augmentation: Augmentation) -> Tensor:
    """``(crops (B, H, W, C) uint8, packed parameters (B, R) on the host) -> (B, C, H, W) float32``, on the device of the crops.

    The parameters are moved in one copy, which nobody waits for.
    """
    (batch, height, width, channels), device = crops.shape, crops.device
    numbers = rows.numpy()
    places = augmentation.unpack(np.arange(numbers.shape[1])[None])  # which column of a row is what
    operations = augmentation.unpack(numbers)[1]
    turns = [np.stack(rotation(operations[:, layer, 1], height, width), axis=1) for layer in range(operations.shape[1])]
    there = to_device(np.concatenate([numbers, *turns], axis=1), device)
    flips, operations, boxes = (there[:, part.min():] if part.size else there for part in places[:3])
    stride, size = there.shape[1], dict(H=height, W=width, C=channels, BLOCK=_BLOCK, enable_fp_fusion=False)
    grid = triton.cdiv(height * width, _BLOCK), batch
    images, other = (torch.empty((batch, channels, height, width), dtype=torch.uint8, device=device) for _ in range(2))
    _flip[grid](crops.contiguous(), flips, images, stride, **size)
    tables = torch.empty((batch, channels, 256), dtype=torch.uint8, device=device)
    fill = constant(tuple(map(float, augmentation.fill)), device)
    for layer in range(augmentation.max_operations):
        operation, turn = operations[:, 2 * layer:], there[:, numbers.shape[1] + 4 * layer:]
        _make_tables[batch, channels](images, operation, tables, stride, num_warps=8, **size | dict(BLOCK=2048))
        _apply[grid](images, other, tables, operation, turn, fill, stride, CUBIC=augmentation.mode == "bicubic", **size)
        images, other = other, images
    mean, std = (constant(tuple(values.tolist()), device) for values in (augmentation.mean, augmentation.std))
    out = torch.empty(images.shape, dtype=torch.float32, device=device)
    _finish[grid](images, out, mean, std, boxes, there[:, numbers.shape[1] - 1:], stride, BOXES=augmentation.max_boxes,
                  FILLING=_ERASE[augmentation.erase], **size)
    return out


@triton.jit
def _flip(crops, flips, images, stride, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Crops (B, H, W, C) as planes (B, C, H, W), mirrored where a sample is."""
    sample = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < H * W
    y, x = place // W, place % W
    x = tl.where(tl.load(flips + sample * stride) > 0, W - 1 - x, x)
    y = tl.where(tl.load(flips + sample * stride + 1) > 0, H - 1 - y, y)
    source = crops + sample * (H * W * C) + (y * W + x) * C
    target = images + sample * (H * W * C) + place
    for channel in range(C):
        tl.store(target + channel * (H * W), tl.load(source + channel, mask=inside), mask=inside)


# --------------------------------------------------------------------------------------------------
# Operations that look at a pixel alone, and at most at how often each value occurs: a table (256,) a sample and channel
# --------------------------------------------------------------------------------------------------

@triton.jit
def _make_tables(images, operations, tables, stride, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """The tables (B, C, 256) of the samples that have such an operation; the rest is left as it is."""
    sample, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    operation = tl.load(operations + sample * stride).to(tl.int32)
    argument = tl.load(operations + sample * stride + 1)
    images += sample * (H * W * C)
    tables += (sample * C + channel) * 256
    levels = tl.arange(0, 256)
    if operation == INVERT:
        tl.store(tables + levels, (255 - levels).to(tl.uint8))
    elif operation == POSTERIZE:
        bits = 8 - tl.minimum(argument.to(tl.int32), 8)
        tl.store(tables + levels, ((levels >> bits) << bits).to(tl.uint8))
    elif operation == SOLARIZE:
        tl.store(tables + levels, tl.where(levels < argument.to(tl.float32), levels, 255 - levels).to(tl.uint8))
    elif operation == SOLARIZE_ADD:
        tl.store(tables + levels, tl.where(levels < 128, tl.minimum(levels + argument.to(tl.int32), 255), levels).to(tl.uint8))
    elif operation == BRIGHTNESS:
        tl.store(tables + levels, _blend(tl.zeros((256,), tl.float32), levels.to(tl.float32), argument))
    elif operation == CONTRAST:
        base = tl.floor(_mean(images, H * W, C, BLOCK) + 0.5).to(tl.float32)
        tl.store(tables + levels, _blend(base + tl.zeros((256,), tl.float32), levels.to(tl.float32), argument))
    elif operation == AUTO_CONTRAST:
        counts = _counts(images + channel * (H * W), H * W, BLOCK)
        tl.store(tables + levels, _stretched(levels, counts).to(tl.uint8))
    elif operation == EQUALIZE:
        counts = _counts(images + channel * (H * W), H * W, BLOCK)
        tl.store(tables + levels, _evened(levels, counts, H * W).to(tl.uint8))


@triton.jit
def _counts(plane, N: tl.constexpr, BLOCK: tl.constexpr):
    """How often each value occurs among the N of a plane: (256,) int32."""
    counts = tl.zeros((256,), tl.int32)
    for start in range(0, N, BLOCK):
        place = start + tl.arange(0, BLOCK)
        counts += tl.histogram(tl.load(plane + place, mask=place < N, other=0).to(tl.int32), 256)
    return counts - tl.where(tl.arange(0, 256) == 0, -N % BLOCK, 0)  # the zeros behind the end


@triton.jit
def _mean(images, N: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """The mean luminance of an RGB image of N pixels, the mean of all values of any other; in double precision."""
    total = tl.zeros((), tl.int64)
    if C == 3:
        for start in range(0, N, BLOCK):
            place = start + tl.arange(0, BLOCK)
            total += tl.sum(_grey(images + place, N, place < N)).to(tl.int64)
        mean = total.to(tl.float64) / N
    else:
        for start in range(0, N * C, BLOCK):
            place = start + tl.arange(0, BLOCK)
            total += tl.sum(tl.load(images + place, mask=place < N * C, other=0).to(tl.int32)).to(tl.int64)
        mean = total.to(tl.float64) / (N * C)
    return mean


@triton.jit
def _stretched(levels, counts):
    last = tl.max(tl.where(counts > 0, levels, -1))
    first = tl.min(tl.where(counts > 0, levels, 256))
    low = first.to(tl.float64)
    scale = 255.0 / tl.maximum(last - first, 1).to(tl.float64)
    stretched = levels.to(tl.float64) * scale + -low * scale
    return tl.where(last > first, tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32), levels)


@triton.jit
def _evened(levels, counts, N: tl.constexpr):
    last = tl.max(tl.where(counts > 0, levels, -1))
    step = (N - tl.sum(tl.where(levels == last, counts, 0))) // 255
    before = tl.cumsum(counts, 0) - counts
    table = (step // 2 + before) // tl.maximum(step, 1)
    return tl.where(step > 0, tl.minimum(table, 255), levels)


# --------------------------------------------------------------------------------------------------
# A layer: one operation of each sample
# --------------------------------------------------------------------------------------------------

@triton.jit
def _apply(source, target, tables, operations, turns, fill, stride, CUBIC: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
           C: tl.constexpr, BLOCK: tl.constexpr):
    """From images (B, C, H, W) to others, each by its operation."""
    sample = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    operation = tl.load(operations + sample * stride).to(tl.int32)
    argument = tl.load(operations + sample * stride + 1)
    source += sample * (H * W * C)
    target += sample * (H * W * C)
    inside = place < H * W
    if operation < 0:
        for channel in range(C):
            tl.store(target + channel * (H * W) + place, tl.load(source + channel * (H * W) + place, mask=inside), mask=inside)
    elif operation == ROTATE:
        _rotate(source, target, turns + sample * stride, fill, place, CUBIC, H, W, C)
    elif operation >= SHEAR_X:
        _shift(source, target, operation, argument, fill, place, CUBIC, H, W, C)
    elif operation == SHARPNESS:
        _sharpen(source, target, argument, place, H, W, C)
    elif operation == COLOR:
        if C == 3:
            grey = _grey(source + place, H * W, inside).to(tl.float32)
            for channel in range(C):
                value = tl.load(source + channel * (H * W) + place, mask=inside, other=0).to(tl.float32)
                tl.store(target + channel * (H * W) + place, _blend(grey, value, argument), mask=inside)
    else:
        for channel in range(C):
            value = tl.load(source + channel * (H * W) + place, mask=inside, other=0).to(tl.int32)
            tl.store(target + channel * (H * W) + place, tl.load(tables + (sample * C + channel) * 256 + value), mask=inside)


@triton.jit
def _grey(pixels, N: tl.constexpr, inside):
    """Pillow's luminance of pixels whose three values lie N apart, int32."""
    red, green = tl.load(pixels, mask=inside, other=0).to(tl.int32), tl.load(pixels + N, mask=inside, other=0).to(tl.int32)
    blue = tl.load(pixels + 2 * N, mask=inside, other=0).to(tl.int32)
    return tl.where(inside, (red * RED + green * GREEN + blue * BLUE + 32768) >> 16, 0)


@triton.jit
def _blend(base, value, factor):
    return _byte(base + (value - base) * factor.to(tl.float32))


@triton.jit
def _byte(value):
    """Clipped and rounded down."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32).to(tl.uint8)


@triton.jit
def _sharpen(source, target, factor, place, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    y, x = place // W, place % W
    inner = (y > 0) & (y < H - 1) & (x > 0) & (x < W - 1)  # Pillow leaves the border as it is
    for channel in range(C):
        pixels = source + channel * (H * W) + place
        value = tl.load(pixels, mask=place < H * W, other=0).to(tl.int32)
        total = 4 * value
        for dy in tl.static_range(-1, 2):
            for dx in tl.static_range(-1, 2):
                total += tl.load(pixels + dy * W + dx, mask=inner, other=0).to(tl.int32)
        smooth = (2 * total + 13) // 26  # total / 13, rounded
        sharp = _blend(smooth.to(tl.float32), value.to(tl.float32), factor)
        tl.store(target + channel * (H * W) + place, tl.where(inner, sharp, value.to(tl.uint8)), mask=place < H * W)


@triton.jit
def _weights(fraction, CUBIC: tl.constexpr):
    """Those of ``randaugment.interpolation_weights``, in the precision of ``fraction``."""
    before, behind = 0 * fraction, 0 * fraction
    if CUBIC:
        before, behind = fraction * ((1 - fraction) * (1 - fraction)), -(fraction * fraction) * (1 - fraction)
    return before.to(tl.float32), fraction.to(tl.float32), behind.to(tl.float32)


@triton.jit
def _between(p1, p2, p3, p4, c1, c2, c3):
    p1, p2, p3, p4 = p1.to(tl.float32), p2.to(tl.float32), p3.to(tl.float32), p4.to(tl.float32)
    return p2 + c1 * (p2 - p1) + c2 * (p3 - p2) + c3 * (p4 - p3)


@triton.jit
def _within(position, SIZE):
    return tl.minimum(tl.maximum(position, 0), SIZE - 1)


@triton.jit
def _shift(source, target, operation, argument, fill, place, CUBIC: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """Along a row, or a column, by a number of pixels of its own; positions are found in double precision."""
    y, x = place // W, place % W
    in_rows = (operation == SHEAR_X) | (operation == TRANSLATE_X)
    along, line = tl.where(in_rows, x, y), tl.where(in_rows, y, x)
    size, step = tl.where(in_rows, W, H), tl.where(in_rows, 1, W)
    sheared = (operation == SHEAR_X) | (operation == SHEAR_Y)
    shift = argument * tl.where(sheared, line.to(tl.float64) + 0.5, 1.0)
    whole = tl.floor(shift)
    c1, c2, c3 = _weights(shift - whole, CUBIC)
    position = along.to(tl.float64)
    shown = (position >= tl.ceil(-shift - 0.5)) & (position < tl.ceil(size.to(tl.float64) - shift - 0.5))
    start, first = along + whole.to(tl.int32), place - along * step
    a1, a2 = first + _within(start - 1, size) * step, first + _within(start, size) * step
    a3, a4 = first + _within(start + 1, size) * step, first + _within(start + 2, size) * step
    inside = place < H * W
    for channel in range(C):
        plane = source + channel * (H * W)
        value = _between(tl.load(plane + a1, mask=inside, other=0), tl.load(plane + a2, mask=inside, other=0),
                         tl.load(plane + a3, mask=inside, other=0), tl.load(plane + a4, mask=inside, other=0), c1, c2, c3)
        tl.store(target + channel * (H * W) + place, tl.where(shown, _byte(value), _byte(tl.load(fill + channel))), mask=inside)


@triton.jit
def _rotate(source, target, turn, fill, place, CUBIC: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    cos, sin = tl.load(turn).to(tl.float32), tl.load(turn + 1).to(tl.float32)
    y, x = (place // W).to(tl.float32) + 0.5, (place % W).to(tl.float32) + 0.5
    source_x = cos * x + sin * y + tl.load(turn + 2).to(tl.float32)
    source_y = -sin * x + cos * y + tl.load(turn + 3).to(tl.float32)
    shown = (source_x >= 0) & (source_x < W) & (source_y >= 0) & (source_y < H)
    source_x, source_y = source_x - 0.5, source_y - 0.5
    left, top = tl.floor(source_x), tl.floor(source_y)
    c1, c2, c3 = _weights(source_x - left, CUBIC)
    d1, d2, d3 = _weights(source_y - top, CUBIC)
    left, top = left.to(tl.int32), top.to(tl.int32)
    inside = place < H * W
    for channel in range(C):
        plane = source + channel * (H * W)
        r1 = _row(plane, top - 1, left, inside, c1, c2, c3, H, W)
        r2 = _row(plane, top, left, inside, c1, c2, c3, H, W)
        r3 = _row(plane, top + 1, left, inside, c1, c2, c3, H, W)
        r4 = _row(plane, top + 2, left, inside, c1, c2, c3, H, W)
        value = _byte(_between(r1, r2, r3, r4, d1, d2, d3))
        tl.store(target + channel * (H * W) + place, tl.where(shown, value, _byte(tl.load(fill + channel))), mask=inside)


@triton.jit
def _row(plane, y, x, inside, c1, c2, c3, H: tl.constexpr, W: tl.constexpr):
    row = plane + _within(y, H) * W
    return _between(tl.load(row + _within(x - 1, W), mask=inside, other=0), tl.load(row + _within(x, W), mask=inside, other=0),
                    tl.load(row + _within(x + 1, W), mask=inside, other=0), tl.load(row + _within(x + 2, W), mask=inside, other=0),
                    c1, c2, c3)


# --------------------------------------------------------------------------------------------------
# Normalised and erased
# --------------------------------------------------------------------------------------------------

@triton.jit
def _finish(images, out, mean, std, boxes, noise, stride, BOXES: tl.constexpr, FILLING: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
            C: tl.constexpr, BLOCK: tl.constexpr):
    """Bytes (B, C, H, W) as normalised floats, with zeros, a colour (1) or noise (2) in each sample's boxes."""
    sample = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x, inside = place // W, place % W, place < H * W
    images += sample * (H * W * C)
    out += sample * (H * W * C)
    for channel in range(C):
        value = tl.load(images + channel * (H * W) + place, mask=inside, other=0).to(tl.float32)
        value = tl.div_rn(tl.div_rn(value, 255.0) - tl.load(mean + channel), tl.load(std + channel))
        for number in range(BOXES):
            box = boxes + sample * stride + 4 * number
            top, left = tl.load(box).to(tl.int32), tl.load(box + 1).to(tl.int32)
            bottom, right = top + tl.load(box + 2).to(tl.int32), left + tl.load(box + 3).to(tl.int32)
            if bottom > top:
                filling = tl.zeros((BLOCK,), tl.float32)
                if FILLING > 0:
                    seed = tl.load(noise + sample * stride).to(tl.int64) + number * tl.full((), 0x9E3779B97F4A7, tl.int64)
                    filling += _normal(seed & 0xFFFFFFFFFFFF, channel * (H * W) + place if FILLING == 2 else channel + 0 * place)
                value = tl.where((y >= top) & (y < bottom) & (x >= left) & (x < right), filling, value)
        tl.store(out + channel * (H * W) + place, value, mask=inside)


@triton.jit
def _normal(seed, place):
    """``device_transforms.normal_noise``, whose 32 bits are unsigned numbers here."""
    low, high = (seed & 0xFFFFFF).to(tl.uint32), (seed >> 24).to(tl.uint32)
    key = low + place.to(tl.uint32) * 2
    first = _hash(_hash(key) ^ high)
    second = _hash(_hash(key + 1) ^ high ^ 0x5BD1E995)
    radius = tl.sqrt_rn(-2.0 * tl.minimum(tl.log((first.to(tl.float32) + 1.0) * 2.3283064365386963e-10), 0.0))
    return radius * tl.cos(second.to(tl.float32) * 1.4629180792671596e-09)


@triton.jit
def _hash(value):
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)
