"""RandAugment's fifteen operations on one image in a DataLoader worker: Pillow's pixels, in numpy and torch where that is faster.

Our own because timm's work on Pillow images only: these and the fast decoder read training images 1.9 times as fast (docs/data.md),
and the device has the same operations. An image is a contiguous array (H, W, C) uint8, of which RGB is
the usual case; only the saturation needs it. All but the geometric operations give exactly
Pillow's bytes; shears and translations compute Pillow's bicubic (a = -1, rounded down) in single precision, which differs by 1 in
about one pixel of ten thousand. A rotation is Pillow's own, or where OpenCV is installed its bicubic (a = -0.75), in a third of the
time and 1 of 255 away on average.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

try:
    import cv2
    cv2.setNumThreads(0)  # no thread pool in each DataLoader worker
except ImportError:
    cv2 = None

(AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y,
 TRANSLATE_X, TRANSLATE_Y) = range(15)

# timm's names; the variants of an operation differ only in how a magnitude becomes the argument.
OPERATIONS = dict(
    AutoContrast=AUTO_CONTRAST, Equalize=EQUALIZE, Invert=INVERT, Rotate=ROTATE,
    Posterize=POSTERIZE, PosterizeIncreasing=POSTERIZE, PosterizeOriginal=POSTERIZE,
    Solarize=SOLARIZE, SolarizeIncreasing=SOLARIZE, SolarizeAdd=SOLARIZE_ADD,
    Color=COLOR, ColorIncreasing=COLOR, Contrast=CONTRAST, ContrastIncreasing=CONTRAST,
    Brightness=BRIGHTNESS, BrightnessIncreasing=BRIGHTNESS, Sharpness=SHARPNESS, SharpnessIncreasing=SHARPNESS,
    ShearX=SHEAR_X, ShearY=SHEAR_Y, TranslateX=TRANSLATE_X, TranslateXRel=TRANSLATE_X, TranslateY=TRANSLATE_Y, TranslateYRel=TRANSLATE_Y)

GREY = np.float32([19595, 38470, 7471])  # Pillow's luminance in 65536ths; sums of bytes stay exact in single precision
_GREY3 = np.repeat(GREY[:, None], 3, axis=1)
Fill = Sequence[int]  # a number a channel
_RESAMPLE = dict(bicubic=Image.Resampling.BICUBIC, bilinear=Image.Resampling.BILINEAR)


def apply(image: np.ndarray, operation: int, argument: float, fill: Fill, mode: str) -> np.ndarray:
    """``image`` (H, W, C) uint8 after one operation.

    Args:
        argument: degrees, bits, threshold, addend, factor, shear or pixels, as timm's level functions give it.
        fill: (C,) of what a geometric operation uncovers.
        mode: interpolation of the geometric operations, bicubic or bilinear.
    """
    height, width = image.shape[:2]
    if operation == AUTO_CONTRAST:
        return _by_pillow(ImageOps.autocontrast, image)
    if operation == EQUALIZE:
        return _by_pillow(ImageOps.equalize, image)
    if operation == INVERT:
        return 255 - image
    if operation == ROTATE:
        return _rotate(image, argument, fill, mode)
    if operation == POSTERIZE:
        # timm's increasing posterize at times asks for 0 bits, which is black; Pillow from 13 on refuses them.
        return image & np.uint8(0xFF & ~(2 ** (8 - min(8, int(argument))) - 1))
    if operation == SOLARIZE:
        return image ^ ((image >= argument).view(np.uint8) * np.uint8(255))
    if operation == SOLARIZE_ADD:
        levels = np.arange(256)
        return _look_up(image, np.where(levels < 128, np.minimum(255, levels + int(argument)), levels))
    if operation == COLOR:
        pixels = image.reshape(-1, 3).astype(np.float32)
        return _blend(_grey(pixels, _GREY3), pixels, argument).reshape(image.shape)
    if operation in (CONTRAST, BRIGHTNESS):
        base = int(_brightness_of(image) + 0.5) if operation == CONTRAST else 0
        return _look_up(image, _blend(np.float32(base), np.arange(256, dtype=np.float32), argument))
    if operation == SHARPNESS:
        return _sharpen(image, argument)
    if operation == SHEAR_X:
        return _shift_rows(image, argument * (np.arange(height) + 0.5), fill, mode)
    if operation == TRANSLATE_X:
        return _shift_rows(image, np.full(height, float(argument)), fill, mode)
    if operation == SHEAR_Y:
        return _shift_columns(image, argument * (np.arange(width) + 0.5), fill, mode)
    if operation == TRANSLATE_Y:
        return _shift_columns(image, np.full(width, float(argument)), fill, mode)
    raise ValueError(f"no operation {operation}")


def _by_pillow(operation: Callable[[Image.Image], Image.Image], image: np.ndarray) -> np.ndarray:
    """An operation that works on each channel by itself."""
    if image.shape[2] == 3:
        return np.array(operation(Image.fromarray(image)))
    return np.stack([np.asarray(operation(Image.fromarray(band))) for band in np.moveaxis(image, -1, 0).copy()], axis=-1)


def _brightness_of(image: np.ndarray) -> float:
    """The mean luminance of an RGB image as Pillow has it, the mean of all values of any other."""
    if image.shape[2] != 3:
        return float(image.mean(dtype=np.float64))
    return float(_grey(image.reshape(-1, 3).astype(np.float32), GREY).mean(dtype=np.float64))


def _rotate(image: np.ndarray, degrees: float, fill: Fill, mode: str) -> np.ndarray:
    if image.shape[2] != 3:
        channels = np.minimum(np.arange(-(-image.shape[2] // 3) * 3), image.shape[2] - 1).reshape(-1, 3)  # by threes
        turned = [_rotate(np.ascontiguousarray(image[..., c]), degrees, tuple(fill[i] for i in c), mode) for c in channels.tolist()]
        return np.ascontiguousarray(np.concatenate(turned, axis=2)[..., :image.shape[2]])
    if cv2 is None or mode != "bicubic":
        return np.array(Image.fromarray(image).rotate(degrees, resample=_RESAMPLE[mode], fillcolor=fill))
    height, width = image.shape[:2]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = (width - 1) / 2, (height - 1) / 2
    matrix = np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderValue=fill)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    # bytes.translate is twice as fast as an index array
    return np.frombuffer(bytearray(image).translate(table.astype(np.uint8).tobytes()), np.uint8).reshape(image.shape)


def _grey(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pillow's luminance of (N, 3) float pixels, as whole numbers."""
    grey = pixels @ weights
    grey += 32768
    grey *= 1 / 65536
    return np.floor(grey, out=grey)


def _blend(base: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """``base + factor * (image - base)`` as Pillow blends: single precision, clipped, rounded down."""
    out = image - base
    out *= np.float32(factor)
    out += base
    if not 0 <= factor <= 1:
        np.clip(out, 0, 255, out=out)
    return out.astype(np.uint8)


def _sharpen(image: np.ndarray, factor: float) -> np.ndarray:
    height, width, channels = image.shape
    if height < 3 or width < 3:
        return image  # Pillow leaves the border as it is
    n = channels * (width - 2)
    pixels, sums, smooth = (scratch_buffer(name, np.float32, *shape) for name, shape in (
        ("pixels", (height, channels * width)), ("steps", (height, n)), ("mix", (height - 2, n))))
    np.copyto(pixels, image.reshape(height, -1))
    pixels, sums, smooth = torch.from_numpy(pixels), torch.from_numpy(sums), torch.from_numpy(smooth)
    torch.add(pixels[:, :-2 * channels], pixels[:, channels:-channels], out=sums).add_(pixels[:, 2 * channels:])
    centre = pixels[1:-1, channels:-channels]
    torch.add(sums[:-2], sums[1:-1], out=smooth).add_(sums[2:]).add_(centre, alpha=4).mul_(1 / 13).add_(0.5).floor_()
    blended = torch.sub(centre, smooth, out=sums[:-2]).mul_(factor).add_(smooth).clamp_(0, 255)
    out = image.copy()
    out.reshape(height, -1)[1:-1, channels:-channels] = blended.numpy()
    return out


# --------------------------------------------------------------------------------------------------
# Shears and translations: every row, or every column, moved by a number of pixels
# --------------------------------------------------------------------------------------------------

_REACH = 3


def interpolation_weights(fraction: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights c1, c2, c3 that interpolate a point ``fraction`` beyond p2 between four neighbours p1..p4:
    ``p2 + c1 (p2 - p1) + c2 (p3 - p2) + c3 (p4 - p3)``. In this form, in differences, a flat area stays exactly flat."""
    if mode == "bilinear":
        return 0 * fraction, fraction, 0 * fraction
    return fraction * (1 - fraction) ** 2, fraction, -fraction ** 2 * (1 - fraction)


def _split_shifts(shifts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(whole part of each shift, its fraction, first and end of the target positions whose source lies inside the image)."""
    whole = np.floor(shifts)
    fraction = shifts - whole
    low = np.clip(np.ceil(-shifts - 0.5), 0, size).astype(np.int64)
    high = np.clip(np.ceil(size - shifts - 0.5), 0, size).astype(np.int64)
    return whole.astype(np.int64), fraction, low, high


def _runs(*arrays: np.ndarray) -> list[tuple[int, int]]:
    """Ranges over which all arrays are constant."""
    change = np.zeros(len(arrays[0]) - 1, dtype=bool)
    for array in arrays:
        change |= array[1:] != array[:-1]
    edges = [0, *(np.flatnonzero(change) + 1).tolist(), len(arrays[0])]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _filled(height: int, width: int, fill: Fill) -> np.ndarray:
    out = np.empty((height, width, len(fill)), np.uint8)
    out[:] = np.tile(np.uint8(fill), (width, 1))  # row by row; pixel by pixel takes thirty times as long
    return out


def _shift_rows(image: np.ndarray, shifts: np.ndarray, fill: Fill, mode: str) -> np.ndarray:
    """Row y of the result at x is the image's row y at ``x + shifts[y]``."""
    height, width, c = image.shape
    whole, fraction, low, high = _split_shifts(shifts, width)
    first, n = int(low.min()), max(0, int(high.max() - low.min()))  # there is only fill outside of these columns
    out = _filled(height, width, fill)
    if not n:
        return out
    # Their source columns, one neighbour before and two behind. The image's first and last column are repeated as far as the
    # interpolation reaches from inside it; everything beyond is covered by the fill.
    start = whole + first - 1
    left, right = max(0, -int(start.min())), max(0, int(start.max()) + n + 3 - width)
    padded = scratch_buffer("padded", np.uint8, height, left + width + right, c)
    padded[:, left:left + width] = image
    padded[:, max(0, left - _REACH):left] = image[:, :1]
    padded[:, left + width:left + width + _REACH] = image[:, -1:]
    moved = scratch_buffer("moved", np.uint8, height, n + 3, c)
    for y0, y1 in _runs(whole):
        x0 = left + int(start[y0])
        moved[y0:y1] = padded[y0:y1, x0:x0 + n + 3]
    pixels = scratch_buffer("pixels", np.float32, height, c * (n + 3))
    np.copyto(pixels, moved.reshape(height, -1))
    pixels = torch.from_numpy(pixels)
    steps = torch.sub(pixels[:, c:], pixels[:, :-c], out=torch.from_numpy(scratch_buffer("steps", np.float32, height, c * (n + 2))))
    made = _add_steps(pixels[:, c:c + c * n], [steps[:, i:i + c * n] for i in (0, c, 2 * c)],
                [torch.from_numpy(w.astype(np.float32)[:, None]) for w in interpolation_weights(fraction, mode)]).reshape(height, n, c)
    for y0, y1 in _runs(low, high):
        x0, x1 = int(low[y0]), int(high[y0])
        out[y0:y1, x0:x1] = made[y0:y1, x0 - first:x1 - first]
    return out


def _shift_columns(image: np.ndarray, shifts: np.ndarray, fill: Fill, mode: str) -> np.ndarray:
    """Column x of the result at y is the image's column x at ``y + shifts[x]``."""
    height, width, c = image.shape
    whole, fraction, low, high = _split_shifts(shifts, height)
    first, n = int(low.min()), max(0, int(high.max() - low.min()))
    out = _filled(height, width, fill)
    if not n:
        return out
    start = whole + first - 1
    above, below = max(0, -int(start.min())), max(0, int(start.max()) + n + 3 - height)
    padded = scratch_buffer("padded", np.uint8, above + height + below, width, c)
    padded[above:above + height] = image
    padded[max(0, above - _REACH):above] = image[:1]
    padded[above + height:above + height + _REACH] = image[-1:]
    moved = scratch_buffer("moved", np.uint8, n + 3, width, c)
    for x0, x1 in _runs(whole):
        y0 = above + int(start[x0])
        moved[:, x0:x1] = padded[y0:y0 + n + 3, x0:x1]
    pixels = scratch_buffer("pixels", np.float32, n + 3, c * width)
    np.copyto(pixels, moved.reshape(n + 3, -1))
    pixels = torch.from_numpy(pixels)
    steps = torch.sub(pixels[1:], pixels[:-1], out=torch.from_numpy(scratch_buffer("steps", np.float32, n + 2, c * width)))
    made = _add_steps(pixels[1:1 + n], [steps[i:i + n] for i in (0, 1, 2)],
                [torch.from_numpy(np.repeat(w.astype(np.float32), c)[None]) for w in interpolation_weights(fraction, mode)])
    made = made.reshape(n, width, c)
    for x0, x1 in _runs(low, high):
        y0, y1 = int(low[x0]), int(high[x0])
        out[y0:y1, x0:x1] = made[y0 - first:y1 - first, x0:x1]
    return out


def _add_steps(pixels: Tensor, steps: list[Tensor], weights: list[Tensor]) -> np.ndarray:
    """``pixels`` (rows, n) plus each of the three ``steps`` (rows, n) times its weight, as bytes."""
    out = torch.addcmul(pixels, steps[0], weights[0], out=torch.from_numpy(scratch_buffer("mix", np.float32, *pixels.shape)))
    for step, weight in zip(steps[1:], weights[1:], strict=True):
        out.addcmul_(step, weight)
    return out.clamp_(0, 255).numpy().astype(np.uint8)


_buffers = threading.local()


def scratch_buffer(name: str, dtype: type, *shape: int) -> np.ndarray:
    """A buffer of this thread that the next call with the same name reuses: fresh pages would cost as much as the arithmetic."""
    size = math.prod(shape)
    buffer = getattr(_buffers, name, None)
    if buffer is None or buffer.size < size:
        buffer = np.zeros(size, dtype)
        setattr(_buffers, name, buffer)
    return buffer[:size].reshape(shape)
