"""What the doctor records about an image file: 72 bytes, a row of a table that may have a million."""

from __future__ import annotations

import hashlib
import io
import os
import time

import numpy as np
from PIL import Image

from data.decoding.deep import is_deep
from data.decoding.pillow import FORMATS, decode, decode_stored, is_single_colour
from data.errors import UnreadableImage
from data.sources.base import Source

LARGEST_FILE = 256 << 20  # bytes; no encoded image is larger, and reading one would only fill the memory

# Flags of a row. SEEN: the file has been read or tried. FATAL: the process that read it died. PLAIN: too even for a fingerprint.
# DEEP: more than 8 bits a channel.
SEEN, UNREADABLE, FATAL, EXIF_ROTATED, ANIMATED, MISNAMED, ALPHA, BLANK, PLAIN, DEEP = (1 << bit for bit in range(10))

MODES = ("?", "RGB", "L", "CMYK", "P", "RGBA", "LA", "1", "I;16", "I", "F", "PA", "other")
_KINDS = ("?", *FORMATS)

ROW = np.dtype([
    ("sha256", np.uint8, 32),
    ("hash", np.uint64, 2),  # fingerprint: whether brightness falls to the right, and downwards, on an 8 x 8 grid
    ("bytes", np.uint32),
    ("width", np.uint32), ("height", np.uint32),
    ("read_us", np.uint32), ("decode_us", np.uint32),  # waiting for the bytes; processor time of the decoder
    ("flags", np.uint16), ("mode", np.uint8), ("format", np.uint8),
], align=False)

EXTENSION_OF = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif", "PPM": ".ppm"}
_EXTENSIONS = {extension: kind for kind, extension in EXTENSION_OF.items()} | {".jpeg": "JPEG", ".tiff": "TIFF", ".pgm": "PPM"}
_GRID = 9
_BITS = 1 << np.arange(64, dtype=np.uint64)


def format_of(row: np.void) -> str:
    """The name of a row's file format."""
    return _KINDS[row["format"]]


def inspect_image(source: Source, index: int, row: np.void) -> str:
    """Read and decode image ``index`` as training does, and fill ``row``; returns why it cannot be read, or "".

    Memory is bounded by ``LARGEST_FILE`` and by Pillow's limit on decompression bombs.
    """
    row["flags"] |= SEEN
    name = source.path(index)
    try:
        started = time.perf_counter()
        if os.path.isfile(name) and os.path.getsize(name) > LARGEST_FILE:
            raise UnreadableImage.of(name, f"{os.path.getsize(name) >> 20} MiB, too large for an image file")
        data = source.read(index)
        row["read_us"] = min(int((time.perf_counter() - started) * 1e6), 2**32 - 1)
        row["bytes"] = len(data)
        row["sha256"] = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8)
        _describe(data, name, row)
        started = time.thread_time()
        image = decode(data, name, source.reading)
        if not row["width"]:  # a TIFF file that Pillow does not know
            row["width"], row["height"] = image.size
            row["format"], row["mode"] = _KINDS.index("TIFF"), MODES.index("other")
            row["flags"] |= DEEP * (decode_stored(data, name, source.reading.channels) is not None)
        row["decode_us"] = int((time.thread_time() - started) * 1e6)
        _fingerprint(image, row)
        row["flags"] |= BLANK * bool(row["flags"] & PLAIN and is_single_colour(data, name, source.reading.channels))
        return ""
    except UnreadableImage as error:
        reason = error.reason
    except MemoryError:
        reason = "there is not enough memory to decode it"
    row["flags"] |= UNREADABLE
    return reason


def _describe(data: bytes, name: str, row: np.void) -> None:
    """Fill in what the file's header says."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # ``decode`` raises the error
        return
    row["width"], row["height"] = image.size
    mode = "I;16" if image.mode.startswith("I;16") else image.mode  # whatever its byte order
    row["mode"] = MODES.index(mode if mode in MODES else "other")
    row["format"] = _KINDS.index(image.format) if image.format in _KINDS else 0
    flags = 0
    try:
        flags |= ANIMATED * bool(getattr(image, "is_animated", False))
        flags |= EXIF_ROTATED * (image.getexif().get(0x0112, 1) in range(2, 9))
    except Exception:  # a damaged block of metadata is no reason to refuse the pixels
        pass
    flags |= DEEP * is_deep(image)
    flags |= ALPHA * (image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info)
    expected = _EXTENSIONS.get(os.path.splitext(name)[1].lower())
    flags |= MISNAMED * (expected is not None and expected != image.format)
    row["flags"] |= flags


def _fingerprint(image: Image.Image, row: np.void) -> None:
    grey = np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BOX).convert("L")).astype(np.int16)
    contrast = int(grey.max() - grey.min())
    row["flags"] |= PLAIN * (contrast < 8)
    right, down = grey[:8, 1:] < grey[:8, :8], grey[1:, :8] < grey[:8, :8]
    row["hash"] = (_BITS[right.ravel()].sum(dtype=np.uint64), _BITS[down.ravel()].sum(dtype=np.uint64))


def thumbnail(source: Source, index: int) -> np.ndarray:
    """A (16, 16, 3) float32 thumbnail, by which two images with similar fingerprints are compared.

    Raises:
        UnreadableImage: it cannot be read.
    """
    return np.asarray(source.load(index).resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
