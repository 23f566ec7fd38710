"""RandAugment, flips, normalisation and erasing on the device: from a batch of uint8 crops and their parameters to images.

The same fifteen operations as ``randaugment``. Between operations pixels are whole numbers, as Pillow's are bytes. A sample depends only
on its own pixels and parameters. On CUDA all operations together are a few kernels (``device_kernels``); here, for other devices and as the
measure of these, each is applied at once to all samples of the batch that have it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data.transforms import randaugment as ra
from data.transforms.params import Augmentation, AugmentParams
from data.transforms.randaugment import interpolation_weights


class DeviceAugment:
    """``(crops (B, H, W, C) uint8 on the device, packed parameters (B, R) on the host) -> (B, C, H, W) float on the device``."""

    def __init__(self, augmentation: Augmentation):
        self.augmentation = augmentation
        self._kernels: Callable[[Tensor, Tensor, Augmentation], Tensor] | None = None

    def compile(self, device: torch.device) -> str:
        """Go by ``device_kernels`` from now on, compiled for a CUDA device here and now; or return why that cannot be."""
        try:
            from data.transforms import device_kernels
            height, width = self.augmentation.size
            crop = torch.zeros(1, height, width, len(self.augmentation.mean), dtype=torch.uint8, device=device)
            row = self.augmentation.pack(AugmentParams((0, 0, height, width), False, False, [], []), noise=0)
            with torch.cuda.device(device):
                device_kernels.augment(crop, row[None], self.augmentation)
        except Exception as error:  # ImportError, CompilationError, RuntimeError (no C compiler), OSError, ...: Triton's are of many kinds
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self._kernels = device_kernels.augment
        return ""

    @torch.no_grad()
    def __call__(self, crops: Tensor, rows: Tensor) -> Tensor:
        if self._kernels is not None and crops.is_cuda:
            return self._kernels(crops, rows, self.augmentation)
        device = crops.device
        flips, operations, boxes, noise = self.augmentation.unpack(rows.numpy())
        images = _to_planes(crops)
        for column, axis in ((0, 3), (1, 2)):
            chosen = np.flatnonzero(flips[:, column])
            if len(chosen):
                index = to_device(chosen, device)
                images[index] = images[index].flip(axis)
        for layer in range(operations.shape[1]):
            self._apply_layer(images, operations[:, layer])
        _normalise(images, self.augmentation.mean, self.augmentation.std)
        for layer in range(boxes.shape[1]):
            self._erase(images, boxes[:, layer], noise, layer)
        return images

    def _apply_layer(self, images: Tensor, layer: np.ndarray) -> None:
        """One operation of each sample, in place; ``layer`` is (B, 2): operation and argument."""
        order = np.argsort(layer[:, 0], kind="stable")
        index = to_device(order, images.device)  # one copy to the device for all operations of the layer
        kinds = layer[order, 0]
        for kind in np.unique(kinds[kinds >= 0]):
            low, high = np.searchsorted(kinds, kind), np.searchsorted(kinds, kind, side="right")
            part = index[low:high]
            images[part] = _OPERATIONS[int(kind)](images[part], layer[order[low:high], 1], self.augmentation)

    def _erase(self, images: Tensor, boxes: np.ndarray, noise: np.ndarray, layer: int) -> None:
        """One box (B, 4) of each sample, in place; ``noise`` (B,) seeds what fills it."""
        chosen = np.flatnonzero(boxes[:, 2])
        if not len(chosen):
            return
        index, (height, width) = to_device(chosen, images.device), images.shape[2:]
        top, left, h, w = (to_device(column, images.device)[:, None] for column in boxes[chosen].astype(np.int64).T)
        y, x = torch.arange(height, device=images.device)[None], torch.arange(width, device=images.device)[None]
        inside = ((y >= top) & (y < top + h))[:, None, :, None] & ((x >= left) & (x < left + w))[:, None, None, :]
        seeds = to_device((noise[chosen].astype(np.int64) + layer * 0x9E3779B97F4A7) & (2 ** 48 - 1), images.device)
        channels = images.shape[1]
        shape = dict(pixel=(channels, height, width), rand=(channels, 1, 1)).get(self.augmentation.erase)
        filling = normal_noise(seeds, shape) if shape is not None else torch.zeros((), device=images.device)
        images[index] = torch.where(inside, filling, images[index])


class DeviceNormalise:
    """``(crops (B, H, W, C) uint8) -> (B, C, H, W) float``, normalised, on the device."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std

    def __call__(self, crops: Tensor) -> Tensor:
        return _normalise(_to_planes(crops), self.mean, self.std)


def _to_planes(crops: Tensor) -> Tensor:
    """(B, H, W, C) bytes as (B, C, H, W) floats, contiguous: a plane per channel."""
    return crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    mean, std = (constant(tuple(v.tolist()), images.device)[:, None, None] for v in (mean, std))
    return images.div_(255).sub_(mean).div_(std)


@functools.lru_cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Single-precision numbers on ``device``, copied there once: from pageable memory, for which the host waits."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """On CUDA a copy from pinned memory, which the host does not wait for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _column(values: np.ndarray, device: torch.device) -> Tensor:
    """(B,) numbers as a float tensor (B, 1, 1, 1)."""
    return to_device(values.astype(np.float32), device)[:, None, None, None]


# --------------------------------------------------------------------------------------------------
# Noise: a function of a sample's seed alone, the same in any batch and on any device
# --------------------------------------------------------------------------------------------------

def normal_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers (B, *shape) by Box and Muller, each from a hash of its sample's 48-bit seed (B,) and its position."""
    place = torch.arange(math.prod(shape), device=seeds.device, dtype=torch.int64)[None]
    key = (seeds[:, None] & 0xFFFFFF) + place * 2
    first = _hash(_hash(key) ^ (seeds[:, None] >> 24))
    second = _hash(_hash(key + 1) ^ (seeds[:, None] >> 24) ^ 0x5BD1E995)
    radius = torch.sqrt(-2 * torch.log((first.to(torch.float32) + 1) * 2.0 ** -32).clamp_(max=0))
    return (radius * torch.cos(second.to(torch.float32) * (2 * math.pi * 2.0 ** -32))).reshape(-1, *shape)


def _hash(value: Tensor) -> Tensor:
    """Two rounds of multiply and shift on 32 bits held in int64, which mix every bit of the value into every bit of the hash."""
    mask = 0xFFFFFFFF
    value = value & mask
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & mask
    value = ((value ^ (value >> 15)) * 0x846CA68B) & mask
    return value ^ (value >> 16)


# --------------------------------------------------------------------------------------------------
# The operations: ``(images (B, C, H, W), arguments (B,) of numpy, augmentation) -> images``
# --------------------------------------------------------------------------------------------------

def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Each pixel's entry in its sample's and channel's table (B, C, 256)."""
    return tables.to(torch.float32).gather(2, images.flatten(2).long()).view_as(images)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Pillow computes tables in double


def _auto_contrast(images: Tensor, _: np.ndarray, __: Augmentation) -> Tensor:
    low, high = images.flatten(2).aminmax(dim=2)
    low, high = (v[..., None].to(_wide(images.device)) for v in (low, high))
    levels = torch.arange(256, device=images.device, dtype=low.dtype)
    scale = torch.full_like(low, 255.0) / (high - low)  # `255.0 / tensor` multiplies by a rounded reciprocal
    stretched = (levels * scale + -low * scale).trunc().clamp(0, 255)
    return _look_up(images, torch.where(high > low, stretched, levels))


def _equalize(images: Tensor, _: np.ndarray, __: Augmentation) -> Tensor:
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device).scatter_add_(2, flat, torch.ones_like(flat))
    levels = torch.arange(256, device=images.device)
    last = torch.where(counts > 0, levels, -1).amax(2, keepdim=True)
    step = (flat.shape[2] - counts.gather(2, last)) // 255
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return _look_up(images, torch.where(step > 0, table, levels))


def _invert(images: Tensor, _: np.ndarray, __: Augmentation) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, bits: np.ndarray, _: Augmentation) -> Tensor:
    step = _column(2.0 ** (8 - np.minimum(8, bits.astype(np.int64))), images.device)
    return (images / step).floor() * step


def _solarize(images: Tensor, threshold: np.ndarray, _: Augmentation) -> Tensor:
    return torch.where(images < _column(threshold, images.device), images, 255 - images)


def _solarize_add(images: Tensor, addend: np.ndarray, _: Augmentation) -> Tensor:
    return torch.where(images < 128, (images + _column(addend.astype(np.int64), images.device)).clamp(max=255), images)


def _grey(images: Tensor) -> Tensor:
    """Pillow's luminance (B, 1, H, W), whole numbers; the sums fit single precision exactly."""
    red, green, blue = ra.GREY.tolist()
    return ((images[:, :1] * red + images[:, 1:2] * green + images[:, 2:] * blue + 32768) / 65536).floor()


def _blend(base: Tensor | float, images: Tensor, factors: np.ndarray) -> Tensor:
    return (base + (images - base) * _column(factors, images.device)).clamp(0, 255).trunc()


def _color(images: Tensor, factors: np.ndarray, _: Augmentation) -> Tensor:
    return _blend(_grey(images), images, factors)


def _contrast(images: Tensor, factors: np.ndarray, _: Augmentation) -> Tensor:
    grey = (_grey(images) if images.shape[1] == 3 else images).flatten(1)
    mean = (grey.long().sum(1).to(_wide(images.device)) / grey.shape[1] + 0.5).floor()
    return _blend(mean.to(torch.float32)[:, None, None, None], images, factors)


def _brightness(images: Tensor, factors: np.ndarray, _: Augmentation) -> Tensor:
    return _blend(0.0, images, factors)


def _sharpness(images: Tensor, factors: np.ndarray, _: Augmentation) -> Tensor:
    if min(images.shape[2:]) < 3:
        return images
    sums = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
    sums = sums[:, :, :-2] + sums[:, :, 1:-1] + sums[:, :, 2:]
    centre = images[:, :, 1:-1, 1:-1]
    smooth = ((sums + 4 * centre) / 13 + 0.5).floor()
    out = images.clone()  # Pillow leaves the border as it is
    out[:, :, 1:-1, 1:-1] = _blend(smooth, centre, factors)
    return out


def _fill(augmentation: Augmentation, device: torch.device) -> Tensor:
    return constant(tuple(map(float, augmentation.fill)), device)[None, :, None, None]


def _shift(images: Tensor, shifts: np.ndarray, augmentation: Augmentation) -> Tensor:
    """Row y of sample b at x is the image's row y at ``x + shifts[b, y]``; shifts (B, H) in double precision."""
    batch, channels, height, width = images.shape
    device, whole = images.device, np.floor(shifts)
    start = to_device(whole.astype(np.int64), device)[:, None, :, None]
    x = torch.arange(width, device=device)
    points = [images.gather(3, (x + start + k).clamp_(0, width - 1).expand(batch, channels, height, width)) for k in (-1, 0, 1, 2)]
    weights = interpolation_weights(shifts - whole, augmentation.mode)
    out = _interpolate(points, [to_device(w.astype(np.float32), device)[:, None, :, None] for w in weights]).clamp_(0, 255).trunc_()
    low = to_device(np.ceil(-shifts - 0.5).astype(np.int64), device)[:, None, :, None]
    high = to_device(np.ceil(width - shifts - 0.5).astype(np.int64), device)[:, None, :, None]
    return torch.where((x >= low) & (x < high), out, _fill(augmentation, device))


def _interpolate(points: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Between four neighbours, by the weights of ``interpolation_weights``."""
    p1, p2, p3, p4 = points
    c1, c2, c3 = weights
    return p2 + c1 * (p2 - p1) + c2 * (p3 - p2) + c3 * (p4 - p3)


def _shear_x(images: Tensor, shear: np.ndarray, augmentation: Augmentation) -> Tensor:
    return _shift(images, shear[:, None] * (np.arange(images.shape[2]) + 0.5), augmentation)


def _translate_x(images: Tensor, pixels: np.ndarray, augmentation: Augmentation) -> Tensor:
    return _shift(images, np.repeat(pixels[:, None], images.shape[2], axis=1), augmentation)


def _shear_y(images: Tensor, shear: np.ndarray, augmentation: Augmentation) -> Tensor:
    return _shear_x(images.transpose(2, 3), shear, augmentation).transpose(2, 3)


def _translate_y(images: Tensor, pixels: np.ndarray, augmentation: Augmentation) -> Tensor:
    return _translate_x(images.transpose(2, 3), pixels, augmentation).transpose(2, 3)


def rotation(degrees: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(cos, sin, offset_x, offset_y) of degrees (B,): a point (x, y) of the result comes from ``cos x + sin y + offset_x`` and
    ``cos y - sin x + offset_y`` of the image."""
    angle = -np.radians(degrees % 360)
    cos, sin = np.cos(angle).round(15), np.sin(angle).round(15)
    return cos, sin, width / 2 - cos * width / 2 - sin * height / 2, height / 2 + sin * width / 2 - cos * height / 2


def _rotate(images: Tensor, degrees: np.ndarray, augmentation: Augmentation) -> Tensor:
    """About the centre, counter-clockwise."""
    batch, channels, height, width = images.shape
    device = images.device
    y, x = torch.arange(height, device=device)[:, None] + 0.5, torch.arange(width, device=device) + 0.5
    cos, sin, offset_x, offset_y = (_column(values, device)[:, 0] for values in rotation(degrees, height, width))
    source_x, source_y = cos * x + sin * y + offset_x, -sin * x + cos * y + offset_y  # (B, H, W)
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    source_x, source_y = source_x - 0.5, source_y - 0.5
    x0, y0 = source_x.floor(), source_y.floor()
    across, down = interpolation_weights(source_x - x0, augmentation.mode), interpolation_weights(source_y - y0, augmentation.mode)
    x0, y0 = x0.long(), y0.long()
    columns = [(x0 + k).clamp_(0, width - 1) for k in (-1, 0, 1, 2)]
    flat, rows = images.flatten(2), []
    for k in (-1, 0, 1, 2):
        first = (y0 + k).clamp_(0, height - 1) * width
        points = [flat.gather(2, (first + column).flatten(1)[:, None].expand(-1, channels, -1)).view_as(images) for column in columns]
        rows.append(_interpolate(points, [c[:, None] for c in across]))
    out = _interpolate(rows, [c[:, None] for c in down]).clamp_(0, 255).trunc_()
    return torch.where(inside[:, None], out, _fill(augmentation, device))


_OPERATIONS: dict[int, Callable[[Tensor, np.ndarray, Augmentation], Tensor]] = {
    ra.AUTO_CONTRAST: _auto_contrast, ra.EQUALIZE: _equalize, ra.INVERT: _invert, ra.ROTATE: _rotate, ra.POSTERIZE: _posterize,
    ra.SOLARIZE: _solarize, ra.SOLARIZE_ADD: _solarize_add, ra.COLOR: _color, ra.CONTRAST: _contrast, ra.BRIGHTNESS: _brightness,
    ra.SHARPNESS: _sharpness, ra.SHEAR_X: _shear_x, ra.SHEAR_Y: _shear_y, ra.TRANSLATE_X: _translate_x, ra.TRANSLATE_Y: _translate_y}
