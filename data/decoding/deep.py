"""Images of more than 8 bits a channel: the values that they store, and from these to 8 bits by one black and one white level.

Pillow has grey of 16 and 32 bits and of floating point, but of 16-bit colour the high bytes alone: a second look at the file gives the low
ones. Which values are black and white is a property of the data set (``data/sources/deep_levels.py``), never of an image.
"""

from __future__ import annotations

import functools
import io
import sys
from typing import NamedTuple

import numpy as np
from PIL import Image

# The values that are black and white, of all channels or of each.
Window = tuple[float, float] | tuple[tuple[float, float], ...]

_NO_DATA = 0xA481  # tag of GDAL's: the value of pixels that hold none
_BITS_PER_SAMPLE, _PLANES, _ORIENTATION = 0x0102, 0x011C, 0x0112
_OTHER_ENDIAN = ";16B" if sys.byteorder == "little" else ";16L"
# From the suffix of Pillow's raw mode, which takes the high bytes, to that which takes the low ones.
_LOW_BYTES = {";16B": ";16L", ";16L": ";16B", ";16N": _OTHER_ENDIAN}


class Stored(NamedTuple):
    """What an image of more than 8 bits a channel stores.

    Attributes:
        values: (H, W, C), uint16, int32, uint32 or float32.
        alpha: (H, W) uint8; None for an opaque image.
        mode: Pillow's of these channels: L, RGB or CMYK.
        window: that of the type, for unsigned numbers of 16 bits; other types have none.
        no_data: the value of pixels that hold none, where a TIFF file says so.
    """

    values: np.ndarray
    alpha: np.ndarray | None
    mode: str
    window: Window | None
    no_data: float | None = None


def is_deep(image: Image.Image) -> bool:
    """Whether an image that ``Image.open`` returned, loaded or not, has more than 8 bits a channel."""
    return image.mode.startswith(("I", "F")) or _raw_mode(image)[-4:] in _LOW_BYTES or _white_of_ppm(image) > 255 or in_planes(image)


def in_planes(image: Image.Image) -> bool:
    """Whether a TIFF file stores deep colours plane by plane, which Pillow does not read."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(_PLANES) == 2 and len(image.getbands()) > 1 and max(tags.get(_BITS_PER_SAMPLE, (8,))) > 8


def stored_values(image: Image.Image, data: bytes) -> Stored | None:
    """The values of a deep image, as Pillow turns them; None for any other image.

    Args:
        image: as ``Image.open`` returned it for ``data``.
    """
    if not is_deep(image):
        return None
    if image.mode.startswith(("I", "F")):
        return _grey(image)
    values = _colour_of_ppm(image, data) if image.format == "PPM" else _colour(image, data)
    bands, alpha = image.getbands(), None
    if bands[-1] == "A":
        values, alpha = values[..., :-1], (values[..., -1] >> 8).astype(np.uint8)
        if (values[..., :1] == values).all() and _raw_mode(image).startswith("LA"):
            values, bands = values[..., :1], ("L", "A")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and len(key) == values.shape[2]:
        alpha = np.where((values == np.array(key)).all(axis=2), 0, 255).astype(np.uint8)
    return Stored(values, alpha, "".join(band for band in bands if band != "A"), (0.0, 65535.0))


def eight_bits(values: np.ndarray, window: Window) -> np.ndarray:
    """``values`` (H, W, C) as uint8: the window's ends are 0 and 255, what lies outside is clipped, not-a-number is black."""
    if isinstance(window[0], tuple):
        return np.stack([eight_bits(values[..., band], own) for band, own in enumerate(window)], axis=-1)
    return _table(window)[values] if values.dtype == np.uint16 else _scaled(values.astype(np.float64), window)


def no_data_of(image: Image.Image) -> float | None:
    """The value of pixels that hold none, where a TIFF file names one."""
    return as_number(getattr(image, "tag_v2", {}).get(_NO_DATA))


def as_number(text: object) -> float | None:
    """The number in a tag's text; None where there is none."""
    try:
        return float(str(text).strip("\0 "))
    except ValueError:
        return None


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) upright, given the EXIF orientation that it is stored in."""
    if orientation in (5, 6, 7, 8):
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. Of a loaded TIFF it is 1: Pillow has turned it."""
    return image.getexif().get(_ORIENTATION, 1)


def _scaled(values: np.ndarray, window: Window) -> np.ndarray:
    low, high = window
    return np.nan_to_num((values - low) * (255 / (high - low)) + 0.5, nan=0.0).clip(0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def _table(window: Window) -> np.ndarray:
    return _scaled(np.arange(65536, dtype=np.float64), window)


def _raw_mode(image: Image.Image) -> str:
    """How Pillow unpacks the samples of a PNG or TIFF file; "" for others, and for a loaded image."""
    if image.format not in ("PNG", "TIFF") or not getattr(image, "tile", None):
        return ""
    args = image.tile[0].args
    return args if isinstance(args, str) else str(args[0])


def _white_of_ppm(image: Image.Image) -> int:
    """The white level that a PPM file of colour names."""
    tile = getattr(image, "tile", None)
    return int(tile[0].args[-1]) if image.format == "PPM" and tile and tile[0].codec_name.startswith("ppm") else 0


def _grey(image: Image.Image) -> Stored:
    image.load()
    values = np.asarray(image)
    if image.mode.startswith("I;16") or image.format == "PPM" and image.mode == "I":  # Pillow scales PPM's own white to 65535
        return Stored(values.astype(np.uint16)[..., None], _keyed(image, values), "L", (0.0, 65535.0), no_data_of(image))
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(_BITS_PER_SAMPLE) == (32,) and tags.get(0x0153, (1,))[0] == 1:
        values = values.view(np.uint32)
    return Stored(values[..., None], None, "L", None, no_data_of(image))


def _keyed(image: Image.Image, values: np.ndarray) -> np.ndarray | None:
    key = image.info.get("transparency")
    return np.where(values == key, 0, 255).astype(np.uint8) if isinstance(key, int) else None


def _colour(image: Image.Image, data: bytes) -> np.ndarray:
    """(H, W, C) uint16 of a PNG or TIFF file."""
    raw = _raw_mode(image)
    if raw == "LA;16B":  # two samples of two bytes, as four of one
        pixels = _unpacked(data, image.format, "RGBA").astype(np.uint16)
        grey, alpha = (pixels[..., i] << 8 | pixels[..., i + 1] for i in (0, 2))
        return np.stack([grey, grey, grey, alpha], axis=-1)
    image.load()
    return np.asarray(image).astype(np.uint16) << 8 | _unpacked(data, image.format, raw[:-4] + _LOW_BYTES[raw[-4:]])


def _unpacked(data: bytes, form: str, raw: str) -> np.ndarray:
    """The pixels of a file under another raw mode than its own."""
    image = Image.open(io.BytesIO(data), formats=(form,))
    image.tile = [tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:])) for tile in image.tile]
    image.load()
    return np.asarray(image)


def _colour_of_ppm(image: Image.Image, data: bytes) -> np.ndarray:
    """(H, W, 3) uint16 of a PPM file, its own white scaled to 65535 as Pillow does for grey."""
    tile, count = image.tile[0], 3 * image.width * image.height
    if tile.codec_name == "ppm":
        values = np.frombuffer(data, ">u2", count, tile.offset)
    else:
        values = np.array(data[tile.offset:].split()[:count], dtype=np.uint16)
    return (values.reshape(image.height, image.width, 3) * (65535 / _white_of_ppm(image)) + 0.5).clip(0, 65535).astype(np.uint16)
