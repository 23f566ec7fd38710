"""RandAugment, flips, normalisation and erasing on the device: a batch of uint8 crops and the rows of their draws become images.

The same fifteen operations as ``data.randaugment``, each on all samples of a batch that drew it. Pixels are whole numbers in
float between operations, as Pillow's are bytes. What a sample becomes depends on its own pixels and draws alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data.transforms import randaugment as ra
from data.transforms.params import Recipe
from data.transforms.randaugment import taps


class DeviceAugment:
    """``(crops (B, H, W, 3) uint8 on the device, rows (B, R) on the host) -> (B, 3, H, W) float on the device``."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    @torch.no_grad()
    def __call__(self, crops: Tensor, rows: Tensor) -> Tensor:
        recipe, device = self.recipe, crops.device
        flips, operations, boxes, noise = recipe.columns(rows.numpy())
        images = _planes(crops)
        for column, axis in ((0, 3), (1, 2)):
            chosen = np.flatnonzero(flips[:, column])
            if len(chosen):
                index = _to(chosen, device)
                images[index] = images[index].flip(axis)
        for layer in range(operations.shape[1]):
            self._layer(images, operations[:, layer])
        _normalise(images, recipe.mean, recipe.std)
        for number in range(boxes.shape[1]):
            self._erase(images, boxes[:, number], noise, number)
        return images

    def _layer(self, images: Tensor, drawn: np.ndarray) -> None:
        """One operation of every sample, in place; ``drawn`` is (B, 2), operation and argument."""
        order = np.argsort(drawn[:, 0], kind="stable")
        index = _to(order, images.device)  # one copy to the device for all operations of the layer
        kinds = drawn[order, 0]
        for kind in np.unique(kinds[kinds >= 0]):
            low, high = np.searchsorted(kinds, kind), np.searchsorted(kinds, kind, side="right")
            part = index[low:high]
            images[part] = _OPERATIONS[int(kind)](images[part], drawn[order[low:high], 1], self.recipe)

    def _erase(self, images: Tensor, boxes: np.ndarray, noise: np.ndarray, number: int) -> None:
        chosen = np.flatnonzero(boxes[:, 2])
        if not len(chosen):
            return
        index, (height, width) = _to(chosen, images.device), images.shape[2:]
        top, left, h, w = (_to(column, images.device)[:, None] for column in boxes[chosen].astype(np.int64).T)
        y, x = torch.arange(height, device=images.device)[None], torch.arange(width, device=images.device)[None]
        inside = ((y >= top) & (y < top + h))[:, None, :, None] & ((x >= left) & (x < left + w))[:, None, None, :]
        seeds = _to((noise[chosen].astype(np.int64) + number * 0x9E3779B97F4A7) & (2 ** 48 - 1), images.device)
        shape = dict(pixel=(3, height, width), rand=(3, 1, 1)).get(self.recipe.erase)
        filling = normal_noise(seeds, shape) if shape is not None else torch.zeros((), device=images.device)
        images[index] = torch.where(inside, filling, images[index])


class DeviceNormalise:
    """``(crops (B, H, W, 3) uint8) -> (B, 3, H, W) float``, normalised, on the device."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std

    def __call__(self, crops: Tensor) -> Tensor:
        return _normalise(_planes(crops), self.mean, self.std)


def _planes(crops: Tensor) -> Tensor:
    """(B, H, W, 3) bytes as (B, 3, H, W) floats, contiguous, so that every operation sees planes."""
    return crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    mean, std = (v.to(images.device, non_blocking=True)[:, None, None] for v in (mean, std))
    return images.div_(255).sub_(mean).div_(std)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _column(values: np.ndarray, device: torch.device) -> Tensor:
    """(B,) numbers as a float tensor (B, 1, 1, 1)."""
    return _to(values.astype(np.float32), device)[:, None, None, None]


# --------------------------------------------------------------------------------------------------
# Noise: a function of a sample's seed alone, whatever the batch and the device
# --------------------------------------------------------------------------------------------------

def normal_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers (B, *shape), each from a hash of its sample's 48-bit seed and its own place."""
    place = torch.arange(math.prod(shape), device=seeds.device, dtype=torch.int64)[None]
    key = (seeds[:, None] & 0xFFFFFF) + place * 2
    first = _hash(_hash(key) ^ (seeds[:, None] >> 24))
    second = _hash(_hash(key + 1) ^ (seeds[:, None] >> 24) ^ 0x5BD1E995)
    radius = torch.sqrt(-2 * torch.log((first.to(torch.float32) + 1) * 2.0 ** -32).clamp_(max=0))
    return (radius * torch.cos(second.to(torch.float32) * (2 * math.pi * 2.0 ** -32))).reshape(-1, *shape)


def _hash(value: Tensor) -> Tensor:
    """Two rounds of multiply and shift on 32 bits held in int64: every bit of the result hangs on every bit of the value."""
    mask = 0xFFFFFFFF
    value = value & mask
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & mask
    value = ((value ^ (value >> 15)) * 0x846CA68B) & mask
    return value ^ (value >> 16)


# --------------------------------------------------------------------------------------------------
# The operations: ``(images (B, 3, H, W), arguments (B,) of numpy, recipe) -> images``
# --------------------------------------------------------------------------------------------------

def _table(images: Tensor, tables: Tensor) -> Tensor:
    """Look every pixel up in its sample's and channel's table (B, 3, 256)."""
    return tables.to(torch.float32).gather(2, images.flatten(2).long()).view_as(images)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Pillow computes tables in double


def _auto_contrast(images: Tensor, _: np.ndarray, __: Recipe) -> Tensor:
    low, high = images.flatten(2).aminmax(dim=2)
    low, high = (v[..., None].to(_wide(images.device)) for v in (low, high))
    levels = torch.arange(256, device=images.device, dtype=low.dtype)
    scale = torch.full_like(low, 255.0) / (high - low)  # `255.0 / tensor` multiplies by a rounded reciprocal
    stretched = (levels * scale + -low * scale).trunc().clamp(0, 255)
    return _table(images, torch.where(high > low, stretched, levels))


def _equalize(images: Tensor, _: np.ndarray, __: Recipe) -> Tensor:
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device).scatter_add_(2, flat, torch.ones_like(flat))
    levels = torch.arange(256, device=images.device)
    last = torch.where(counts > 0, levels, -1).amax(2, keepdim=True)
    step = (flat.shape[2] - counts.gather(2, last)) // 255
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return _table(images, torch.where(step > 0, table, levels))


def _invert(images: Tensor, _: np.ndarray, __: Recipe) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, bits: np.ndarray, _: Recipe) -> Tensor:
    step = _column(2.0 ** (8 - np.minimum(8, bits.astype(np.int64))), images.device)
    return (images / step).floor() * step


def _solarize(images: Tensor, threshold: np.ndarray, _: Recipe) -> Tensor:
    return torch.where(images < _column(threshold, images.device), images, 255 - images)


def _solarize_add(images: Tensor, addend: np.ndarray, _: Recipe) -> Tensor:
    return torch.where(images < 128, (images + _column(addend.astype(np.int64), images.device)).clamp(max=255), images)


def _grey(images: Tensor) -> Tensor:
    """Pillow's luminance (B, 1, H, W), whole numbers; the sums fit single precision exactly."""
    red, green, blue = ra.GREY.tolist()
    return ((images[:, :1] * red + images[:, 1:2] * green + images[:, 2:] * blue + 32768) / 65536).floor()


def _blend(base: Tensor | float, images: Tensor, factors: np.ndarray) -> Tensor:
    return (base + (images - base) * _column(factors, images.device)).clamp(0, 255).trunc()


def _color(images: Tensor, factors: np.ndarray, _: Recipe) -> Tensor:
    return _blend(_grey(images), images, factors)


def _contrast(images: Tensor, factors: np.ndarray, _: Recipe) -> Tensor:
    grey = _grey(images).flatten(1)
    mean = (grey.long().sum(1).to(_wide(images.device)) / grey.shape[1] + 0.5).floor()
    return _blend(mean.to(torch.float32)[:, None, None, None], images, factors)


def _brightness(images: Tensor, factors: np.ndarray, _: Recipe) -> Tensor:
    return _blend(0.0, images, factors)


def _sharpness(images: Tensor, factors: np.ndarray, _: Recipe) -> Tensor:
    if min(images.shape[2:]) < 3:
        return images
    sums = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
    sums = sums[:, :, :-2] + sums[:, :, 1:-1] + sums[:, :, 2:]
    centre = images[:, :, 1:-1, 1:-1]
    smooth = ((sums + 4 * centre) / 13 + 0.5).floor()
    out = images.clone()  # Pillow leaves the border as it is
    out[:, :, 1:-1, 1:-1] = _blend(smooth, centre, factors)
    return out


def _fill(recipe: Recipe, device: torch.device) -> Tensor:
    return torch.tensor(recipe.fill, dtype=torch.float32, device=device)[None, :, None, None]


def _shift(images: Tensor, shifts: np.ndarray, recipe: Recipe) -> Tensor:
    """Row y of sample b moved so that x of the result is the image's ``x + shifts[b, y]``; shifts in double, (B, H)."""
    batch, channels, height, width = images.shape
    device, whole = images.device, np.floor(shifts)
    start = _to(whole.astype(np.int64), device)[:, None, :, None]
    x = torch.arange(width, device=device)
    points = [images.gather(3, (x + start + k).clamp_(0, width - 1).expand(batch, channels, height, width)) for k in (-1, 0, 1, 2)]
    coefficients = [_to(c.astype(np.float32), device)[:, None, :, None] for c in taps(shifts - whole, recipe.mode)]
    out = _mix(points, coefficients).clamp_(0, 255).trunc_()
    low = _to(np.ceil(-shifts - 0.5).astype(np.int64), device)[:, None, :, None]
    high = _to(np.ceil(width - shifts - 0.5).astype(np.int64), device)[:, None, :, None]
    return torch.where((x >= low) & (x < high), out, _fill(recipe, device))


def _mix(points: list[Tensor], coefficients: list[Tensor]) -> Tensor:
    p1, p2, p3, p4 = points
    c1, c2, c3 = coefficients
    return p2 + c1 * (p2 - p1) + c2 * (p3 - p2) + c3 * (p4 - p3)


def _shear_x(images: Tensor, shear: np.ndarray, recipe: Recipe) -> Tensor:
    return _shift(images, shear[:, None] * (np.arange(images.shape[2]) + 0.5), recipe)


def _translate_x(images: Tensor, pixels: np.ndarray, recipe: Recipe) -> Tensor:
    return _shift(images, np.repeat(pixels[:, None], images.shape[2], axis=1), recipe)


def _shear_y(images: Tensor, shear: np.ndarray, recipe: Recipe) -> Tensor:
    return _shear_x(images.transpose(2, 3), shear, recipe).transpose(2, 3)


def _translate_y(images: Tensor, pixels: np.ndarray, recipe: Recipe) -> Tensor:
    return _translate_x(images.transpose(2, 3), pixels, recipe).transpose(2, 3)


def _rotate(images: Tensor, degrees: np.ndarray, recipe: Recipe) -> Tensor:
    """About the centre, counter-clockwise."""
    batch, channels, height, width = images.shape
    device = images.device
    angle = -np.radians(degrees % 360)
    cos, sin = np.cos(angle).round(15), np.sin(angle).round(15)
    y, x = torch.arange(height, device=device)[:, None] + 0.5, torch.arange(width, device=device) + 0.5
    offset_x = _column(width / 2 - cos * width / 2 - sin * height / 2, device)[:, 0]
    offset_y = _column(height / 2 + sin * width / 2 - cos * height / 2, device)[:, 0]
    cos, sin = _column(cos, device)[:, 0], _column(sin, device)[:, 0]
    source_x, source_y = cos * x + sin * y + offset_x, -sin * x + cos * y + offset_y  # (B, H, W)
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    source_x, source_y = source_x - 0.5, source_y - 0.5
    x0, y0 = source_x.floor(), source_y.floor()
    across, down = taps(source_x - x0, recipe.mode), taps(source_y - y0, recipe.mode)
    x0, y0 = x0.long(), y0.long()
    columns = [(x0 + k).clamp_(0, width - 1) for k in (-1, 0, 1, 2)]
    flat, rows = images.flatten(2), []
    for k in (-1, 0, 1, 2):
        first = (y0 + k).clamp_(0, height - 1) * width
        points = [flat.gather(2, (first + column).flatten(1)[:, None].expand(-1, channels, -1)).view_as(images) for column in columns]
        rows.append(_mix(points, [c[:, None] for c in across]))
    out = _mix(rows, [c[:, None] for c in down]).clamp_(0, 255).trunc_()
    return torch.where(inside[:, None], out, _fill(recipe, device))


_OPERATIONS: dict[int, Callable[[Tensor, np.ndarray, Recipe], Tensor]] = {
    ra.AUTO_CONTRAST: _auto_contrast, ra.EQUALIZE: _equalize, ra.INVERT: _invert, ra.ROTATE: _rotate, ra.POSTERIZE: _posterize,
    ra.SOLARIZE: _solarize, ra.SOLARIZE_ADD: _solarize_add, ra.COLOR: _color, ra.CONTRAST: _contrast, ra.BRIGHTNESS: _brightness,
    ra.SHARPNESS: _sharpness, ra.SHEAR_X: _shear_x, ra.SHEAR_Y: _shear_y, ra.TRANSLATE_X: _translate_x, ra.TRANSLATE_Y: _translate_y}
