"""RandAugment's fifteen operations on one image in a worker: Pillow's pixels, in numpy where that is faster.

An image is an array (H, W, 3), uint8, contiguous. All but the geometric operations give Pillow's very bytes; those compute
Pillow's bicubic (a = -1, rounded down) in single precision, which differs in a pixel of some ten thousand by 1.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

(AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y,
 TRANSLATE_X, TRANSLATE_Y) = range(15)

# timm's names; variants of a name differ in how the magnitude becomes the argument, not in what is done.
OPERATIONS = dict(
    AutoContrast=AUTO_CONTRAST, Equalize=EQUALIZE, Invert=INVERT, Rotate=ROTATE,
    Posterize=POSTERIZE, PosterizeIncreasing=POSTERIZE, PosterizeOriginal=POSTERIZE,
    Solarize=SOLARIZE, SolarizeIncreasing=SOLARIZE, SolarizeAdd=SOLARIZE_ADD,
    Color=COLOR, ColorIncreasing=COLOR, Contrast=CONTRAST, ContrastIncreasing=CONTRAST,
    Brightness=BRIGHTNESS, BrightnessIncreasing=BRIGHTNESS, Sharpness=SHARPNESS, SharpnessIncreasing=SHARPNESS,
    ShearX=SHEAR_X, ShearY=SHEAR_Y, TranslateX=TRANSLATE_X, TranslateXRel=TRANSLATE_X, TranslateY=TRANSLATE_Y, TranslateYRel=TRANSLATE_Y)

GREY = np.float32([19595, 38470, 7471])  # Pillow's luminance in 65536ths; sums of bytes stay exact in single precision
_GREY3 = np.repeat(GREY[:, None], 3, axis=1)
_RESAMPLE = dict(bicubic=Image.Resampling.BICUBIC, bilinear=Image.Resampling.BILINEAR)


def apply(image: np.ndarray, operation: int, argument: float, fill: tuple[int, int, int], mode: str) -> np.ndarray:
    """One operation.

    Args:
        argument: degrees, bits, threshold, addend, factor, shear or pixels, as timm's level functions give it.
        fill: colour of what a geometric operation uncovers.
        mode: bicubic or bilinear, of the geometric operations.
    """
    height, width = image.shape[:2]
    if operation == AUTO_CONTRAST:
        return np.array(ImageOps.autocontrast(Image.fromarray(image)))
    if operation == EQUALIZE:
        return np.array(ImageOps.equalize(Image.fromarray(image)))
    if operation == INVERT:
        return 255 - image
    if operation == ROTATE:
        return np.array(Image.fromarray(image).rotate(argument, resample=_RESAMPLE[mode], fillcolor=fill))
    if operation == POSTERIZE:
        # 0 bits, to which increasing posterize is rounded at times, is black; Pillow from 13 refuses them.
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
        base = int(_grey(image.reshape(-1, 3).astype(np.float32), GREY).mean(dtype=np.float64) + 0.5) if operation == CONTRAST else 0
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
    height, width = image.shape[:2]
    if height < 3 or width < 3:
        return image  # Pillow leaves the border as it is
    flat = torch.from_numpy(image.reshape(height, -1).astype(np.float32))
    sums = (flat[:, :-6] + flat[:, 3:-3]).add_(flat[:, 6:])
    centre = flat[1:-1, 3:-3]
    smooth = (sums[:-2] + sums[1:-1]).add_(sums[2:]).add_(centre, alpha=4).mul_(1 / 13).add_(0.5).floor_()
    out = image.copy()
    out.reshape(height, -1)[1:-1, 3:-3] = (centre - smooth).mul_(factor).add_(smooth).clamp_(0, 255).numpy()
    return out


# --------------------------------------------------------------------------------------------------
# Shears and translations: every row, or every column, moved by a number of pixels
# --------------------------------------------------------------------------------------------------

_REACH = 3


def taps(fraction: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors c1, c2, c3 of the three differences between four neighbours p1..p4 for a point ``fraction`` beyond p2:
    ``p2 + c1 (p2 - p1) + c2 (p3 - p2) + c3 (p4 - p3)``. Written in differences a flat area stays exactly flat."""
    if mode == "bilinear":
        return 0 * fraction, fraction, 0 * fraction
    return fraction * (1 - fraction) ** 2, fraction, -fraction ** 2 * (1 - fraction)


def _split(shifts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Whole part and fraction of each shift, and the range of target positions whose source lies inside the image."""
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


def _shift_rows(image: np.ndarray, shifts: np.ndarray, fill: tuple[int, int, int], mode: str) -> np.ndarray:
    """Row y of the result at x is the image's row y at ``x + shifts[y]``."""
    height, width = image.shape[:2]
    whole, fraction, low, high = _split(shifts, width)
    # Columns -1 .. width + 1 of the moved rows. The image's first and last column go on as far as taps reach from inside it;
    # what lies beyond is covered by the fill.
    moved = np.empty((height, width + 3, 3), np.uint8)
    for y0, y1 in _runs(whole):
        start = int(whole[y0]) - 1  # the source of column -1
        left, right = min(max(0, -start), width + 3), max(0, min(width + 3, width - start))
        rows, out = image[y0:y1], moved[y0:y1]
        if left < right:
            out[:, left:right] = rows[:, start + left:start + right]
        out[:, max(0, left - _REACH):left] = rows[:, :1]
        right = max(left, right)
        out[:, right:right + _REACH] = rows[:, -1:]
    pixels = torch.from_numpy(moved.reshape(height, -1).astype(np.float32))
    steps = pixels[:, 3:] - pixels[:, :-3]
    n = 3 * width
    out = _mix(pixels[:, 3:3 + n], [steps[:, i:i + n] for i in (0, 3, 6)],
               [torch.from_numpy(c.astype(np.float32)[:, None]) for c in taps(fraction, mode)], image.shape)
    colour = np.tile(np.uint8(fill), (width, 1))  # a copy of whole rows is thirty times as fast as three bytes at a time
    for y0, y1 in _runs(low, high):
        out[y0:y1, :low[y0]] = colour[:low[y0]]
        out[y0:y1, high[y0]:] = colour[high[y0]:]
    return out


def _shift_columns(image: np.ndarray, shifts: np.ndarray, fill: tuple[int, int, int], mode: str) -> np.ndarray:
    """Column x of the result at y is the image's column x at ``y + shifts[x]``."""
    height, width = image.shape[:2]
    whole, fraction, low, high = _split(shifts, height)
    moved = np.empty((height + 3, width, 3), np.uint8)
    for x0, x1 in _runs(whole):
        start = int(whole[x0]) - 1
        top, bottom = min(max(0, -start), height + 3), max(0, min(height + 3, height - start))
        if top < bottom:
            moved[top:bottom, x0:x1] = image[start + top:start + bottom, x0:x1]
        moved[max(0, top - _REACH):top, x0:x1] = image[:1, x0:x1]
        bottom = max(top, bottom)
        moved[bottom:bottom + _REACH, x0:x1] = image[-1:, x0:x1]
    pixels = torch.from_numpy(moved.reshape(height + 3, -1).astype(np.float32))
    steps = pixels[1:] - pixels[:-1]
    out = _mix(pixels[1:1 + height], [steps[i:i + height] for i in (0, 1, 2)],
               [torch.from_numpy(np.repeat(c.astype(np.float32), 3)[None]) for c in taps(fraction, mode)], image.shape)
    colour = np.tile(np.uint8(fill), (width, 1))
    for x0, x1 in _runs(low, high):
        out[:low[x0], x0:x1] = colour[x0:x1]
        out[high[x0]:, x0:x1] = colour[x0:x1]
    return out


def _mix(pixels: Tensor, steps: list[Tensor], coefficients: list[Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """The first of ``pixels`` with the first, second and third of ``steps``, each (rows, n), in the proportions given."""
    out = torch.addcmul(pixels, steps[0], coefficients[0])
    for step, factor in zip(steps[1:], coefficients[1:], strict=True):
        out.addcmul_(step, factor)
    return out.clamp_(0, 255).numpy().astype(np.uint8).reshape(shape)
