"""From the bytes of an image file to its pixels in RGB, by Pillow: one defined result for every file.

The result is that of torchvision's ImageFolder and timm: no rotation, no colour profiles, the first frame of an animation, CMYK by
Pillow's rule (inverted, as Adobe writes it). With two exceptions: grey of more than 8 bits is scaled instead of clipped to white,
and transparent pixels are white instead of the arbitrary colour stored below them.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from data.errors import UnreadableImage

# The formats that are opened; Pillow has forty more, some of them with dangerous decoders.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Pillow warns of broken EXIF blocks, of palettes and, at half its limit, of size: nothing that a user could act on here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(data: bytes, name: str, exif: bool = False) -> Image.Image:
    """The image in ``data``, in RGB with 8 bits a channel.

    Args:
        name: the image's name in errors.
        exif: rotate it as its EXIF orientation says; the papers, torchvision and timm do not.

    Raises:
        UnreadableImage: not an image, another format, truncated, damaged, or above Pillow's limit of 179 million pixels.
    """
    if not data:
        raise UnreadableImage.of(name, "an empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image) if exif else image)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:  # Pillow's message contains the address of a buffer
        raise UnreadableImage.of(name, f"none of {', '.join(FORMATS)}") from None
    except Exception as error:  # on damaged bytes Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UnreadableImage.of(name, error) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image in RGB, 8 bits a channel."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_eight_bits(np.asarray(image), image))
    elif image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Grey (H, W) of 16 or 32 bits or floating point, scaled to uint8.

    16 bits are scaled by their full range. 32-bit integers and floats have no agreed white: it is taken to be the smallest of 1
    (floats only), 255 and 65535 that no value exceeds; where there is none, or a value is negative, the image's own range counts.
    """
    if image.mode.startswith("I;16") or image.format == "PPM":  # Pillow scales PPM's own white to 65535
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    white = next((w for w in whites if high <= w), None)
    if low < 0 or white is None:
        values, white = values - low, (high - low) or 1.0
    return (values * (255 / white) + 0.5).astype(np.uint8)
