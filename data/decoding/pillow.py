"""From the bytes of an image file to its pixels in RGB, by Pillow: one defined result for every file.

The result is that of torchvision's ImageFolder and timm: no rotation, no colour profiles, the first frame of an animation, CMYK by
Pillow's rule (inverted, as Adobe writes it). With two exceptions: more than 8 bits a channel are scaled by the data set's black and white
levels instead of clipped to white, and transparent pixels are white instead of the arbitrary colour stored below them.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from yacs.config import CfgNode

from config import input_channels, pairs_of
from data.decoding.bands import is_tiff, read_bands
from data.decoding.deep import Stored, Window, eight_bits, in_planes, orientation_of, stored_values, turned
from data.errors import UnreadableImage

# The formats that are opened; Pillow has forty more, some of them with dangerous decoders.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Pillow warns of broken EXIF blocks, of palettes and, at half its limit, of size: nothing that a user could act on here.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Reading(NamedTuple):
    """How the files of a data set are read, the same for all of them.

    Attributes:
        exif: rotate images as their EXIF orientation says; the papers, torchvision and timm do not.
        window: the values of images of more than 8 bits a channel that are black and white; None takes the type's own, which only
            unsigned numbers of 16 bits have.
        channels: 3 is RGB, 1 grey, 2 grey with alpha, 4 RGB with alpha; a TIFF file may have its own bands, as many as this.
    """

    exif: bool = False
    window: Window | None = None
    channels: int = 3

    @classmethod
    def of(cls, config: CfgNode) -> Reading:
        """By DATA.EXIF, DATA.WINDOW and the model's input channels."""
        window = tuple(map(tuple, pairs_of(config.DATA.WINDOW))) if config.DATA.WINDOW else None
        return cls(config.DATA.EXIF, window[0] if window is not None and len(window) == 1 else window, input_channels(config))


AS_STORED = Reading()
_PHOTOMETRIC, _SAMPLES, _EXTRA = 0x0106, 0x0115, 0x0152  # tags of a TIFF file: what a pixel's samples are, how many, those beside colour
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def decode(data: bytes, name: str, reading: Reading = AS_STORED) -> Image.Image:
    """The image in ``data``, in RGB with 8 bits a channel; of images of other channels what can be shown of them.

    Args:
        name: the image's name in errors.

    Raises:
        UnreadableImage: not an image, another format, truncated, damaged, above Pillow's limit of 179 million pixels, of numbers
            without a white level, or of another number of channels.
    """
    if reading.channels == 3:
        return _decoded(data, name, reading)
    pixels = decode_pixels(data, name, reading)
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3] if reading.channels > 2 else pixels[..., 0])).convert("RGB")


def decode_pixels(data: bytes, name: str, reading: Reading = AS_STORED) -> np.ndarray:
    """The pixels (H, W, ``reading.channels``) of an image, uint8; arguments and errors as of ``decode``."""
    found = _decoded(data, name, reading)
    return np.array(found).reshape(*found.size[::-1], -1) if isinstance(found, Image.Image) else found


def from_rgb(pixels: np.ndarray, channels: int) -> np.ndarray:
    """RGB pixels (H, W, 3), uint8 and opaque, as Pillow would convert them to (H, W, channels)."""
    if channels == 3:
        return pixels
    return np.array(Image.fromarray(pixels).convert(_MODES[channels])).reshape(*pixels.shape[:2], channels)


def decode_stored(data: bytes, name: str, channels: int = 3) -> Stored | None:
    """What an image of more than 8 bits a channel stores; None for other images, which are not decoded.

    Raises:
        UnreadableImage: as ``decode``.
    """
    with _told(name):
        image, stored = _open(data, channels)
        stored = stored if image is None else stored_values(image, data)
    return stored if stored is not None and stored.values.dtype != np.uint8 else None


def is_single_colour(data: bytes, name: str, channels: int = 3) -> bool:
    """Whether all pixels of an image store the same values."""
    with _told(name):
        image, stored = _open(data, channels)
        stored = stored if image is None else stored_values(image, data)
        if stored is not None:
            return bool((stored.values == stored.values[:1, :1]).all())
        return all(low == high for low, high in to_rgb(image).getextrema())


def _decoded(data: bytes, name: str, reading: Reading) -> Image.Image | np.ndarray:
    """In ``reading.channels``, 8 bits each: as Pillow's image, or the bands (H, W, C) of a TIFF file that it does not know."""
    with _told(name):
        image, stored = _open(data, reading.channels)
        if image is None and reading.channels not in (1, 3):
            return _scaled(stored, reading.window, name)
        stored = stored if image is None else stored_values(image, data)
        orientation = orientation_of(image) if reading.exif and image is not None else 1
        if stored is not None:
            return _shown(stored, orientation, reading, name)
        image.load()
        image = ImageOps.exif_transpose(image) if reading.exif else image
        if reading.channels in (1, 3):
            return to_rgb(image).convert(_MODES[reading.channels])
        return image.convert(_MODES[reading.channels])


def _open(data: bytes, channels: int) -> tuple[Image.Image | None, Stored | None]:
    """(the image as Pillow opens it, not loaded; None), or of a TIFF file whose bands Pillow does not know (None, their values)."""
    if not data:
        raise ValueError("an empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if not is_tiff(data) or not (in_planes(image) or _has_own_bands(image, channels)):
            if channels not in _MODES:
                raise ValueError(f"it has {len(image.getbands())} channels, and MODEL.IN_CHANS is {channels}")
            return image, None
    except Image.UnidentifiedImageError:
        if not is_tiff(data):
            raise
    values, no_data = read_bands(data, channels)
    return None, Stored(values, None, _MODES.get(channels, ""), (0.0, 65535.0) if values.dtype == np.uint16 else None, no_data)


def _has_own_bands(image: Image.Image, channels: int) -> bool:
    """Whether a TIFF file may have the bands that are asked for, and Pillow would convert or drop them."""
    if channels not in (2, 4) or image.mode == _MODES[channels]:
        return channels > 4
    samples = getattr(image, "tag_v2", {}).get(_SAMPLES, 1)
    return samples > 3 or samples == 1 and getattr(image, "n_frames", 1) > 1


def bands_beside_colour(data: bytes) -> int | None:
    """How many bands a TIFF file has, where more than red, green and blue and none of them is alpha; None for any other file."""
    with contextlib.suppress(Exception):  # whoever decodes it says what is wrong
        tags = getattr(Image.open(io.BytesIO(data), formats=("TIFF",)), "tag_v2", {})
        if tags.get(_SAMPLES, 1) > 3 and tags.get(_PHOTOMETRIC) in (1, 2) and not set(tags.get(_EXTRA, ())) & {1, 2}:
            return tags[_SAMPLES]
    return None


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever fails within is an ``UnreadableImage``."""
    try:
        yield
    except (MemoryError, UnreadableImage):
        raise
    except Image.UnidentifiedImageError:  # Pillow's message contains the address of a buffer
        raise UnreadableImage.of(name, f"none of {', '.join(FORMATS)}") from None
    except Exception as error:  # on damaged bytes Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UnreadableImage.of(name, error) from None


def _scaled(stored: Stored, window: Window | None, name: str) -> np.ndarray:
    """The values as uint8."""
    if stored.values.dtype == np.uint8:
        return stored.values
    window = window or stored.window
    if window is None:
        raise UnreadableImage.of(name, f"{stored.values.dtype} values, of which none is known to be black or white: set DATA.WINDOW")
    return eight_bits(stored.values, window)


def _shown(stored: Stored, orientation: int, reading: Reading, name: str) -> Image.Image:
    """In the channels of ``reading``, 8 bits each; on white where it is transparent and they have no alpha."""
    pixels = turned(_scaled(stored, reading.window, name), orientation)
    image, alpha = Image.frombytes(stored.mode, pixels.shape[1::-1], pixels.tobytes()).convert("RGB"), None
    if stored.alpha is not None:
        alpha = Image.frombytes("L", image.size, turned(stored.alpha, orientation).tobytes())
    if reading.channels in (1, 3):
        image = image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
        return image.convert(_MODES[reading.channels])
    image = image.convert(_MODES[reading.channels])
    if alpha is not None:
        image.putalpha(alpha)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel in RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
