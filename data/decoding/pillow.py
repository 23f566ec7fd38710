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

from PIL import Image, ImageOps
from yacs.config import CfgNode

from data.decoding.deep import Stored, Window, eight_bits, orientation_of, stored_values, turned
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
    """

    exif: bool = False
    window: Window | None = None

    @classmethod
    def of(cls, config: CfgNode) -> Reading:
        """By DATA.EXIF and DATA.WINDOW."""
        return cls(config.DATA.EXIF, tuple(config.DATA.WINDOW) if config.DATA.WINDOW else None)


AS_STORED = Reading()


def decode(data: bytes, name: str, reading: Reading = AS_STORED) -> Image.Image:
    """The image in ``data``, in RGB with 8 bits a channel.

    Args:
        name: the image's name in errors.

    Raises:
        UnreadableImage: not an image, another format, truncated, damaged, above Pillow's limit of 179 million pixels, or of numbers
            without a white level.
    """
    with _opened(data, name) as image:
        stored = stored_values(image, data)
        if stored is not None:
            return _shown(stored, orientation_of(image) if reading.exif else 1, reading.window, name)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image) if reading.exif else image)


def decode_stored(data: bytes, name: str) -> Stored | None:
    """What an image of more than 8 bits a channel stores; None for other images, which are not decoded.

    Raises:
        UnreadableImage: as ``decode``.
    """
    with _opened(data, name) as image:
        return stored_values(image, data)


def is_single_colour(data: bytes, name: str) -> bool:
    """Whether all pixels of an image store the same values."""
    with _opened(data, name) as image:
        stored = stored_values(image, data)
        if stored is not None:
            return bool((stored.values == stored.values[:1, :1]).all())
        return all(low == high for low, high in to_rgb(image).getextrema())


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The image as Pillow opens it, not loaded yet; whatever fails within is an ``UnreadableImage``."""
    if not data:
        raise UnreadableImage.of(name, "an empty file")
    try:
        yield Image.open(io.BytesIO(data), formats=FORMATS)
    except (MemoryError, UnreadableImage):
        raise
    except Image.UnidentifiedImageError:  # Pillow's message contains the address of a buffer
        raise UnreadableImage.of(name, f"none of {', '.join(FORMATS)}") from None
    except Exception as error:  # on damaged bytes Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UnreadableImage.of(name, error) from None


def _shown(stored: Stored, orientation: int, window: Window | None, name: str) -> Image.Image:
    """In RGB, 8 bits a channel, on white where it is transparent."""
    window = window or stored.window
    if window is None:
        raise UnreadableImage.of(name, f"{stored.values.dtype} values, of which none is known to be black or white: set DATA.WINDOW")
    pixels = turned(eight_bits(stored.values, window), orientation)
    image = Image.frombytes(stored.mode, pixels.shape[1::-1], pixels.tobytes()).convert("RGB")
    if stored.alpha is None:
        return image
    alpha = turned(stored.alpha, orientation)
    return Image.composite(image, Image.new("RGB", image.size, "white"), Image.frombytes("L", image.size, alpha.tobytes()))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel in RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
