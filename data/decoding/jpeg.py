"""Plain JPEGs by simplejpeg, where it is installed, or torchvision: Pillow's pixels, faster, and only the rows that are needed.

Everything else is left to Pillow.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    # torchvision has announced since 0.29 that a later release will not have it. Where simplejpeg is not installed either,
    # Pillow decodes everything, and the log says so: slower, the same pixels.
    decode_jpeg = ImageReadMode = None
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision are deprecated", DeprecationWarning)

LIBRARY = "simplejpeg" if simplejpeg is not None else "torchvision" if decode_jpeg is not None else "Pillow"

_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive, Huffman coded
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})  # markers
_ORIENTATION = 0x0112
_END_OF_IMAGE = b"\xff\xd9"


class Header(NamedTuple):
    """The header of a plain JPEG.

    Attributes:
        width, height: in pixels.
        height_at: offset of the height in the file.
        sequential: rows are coded from top to bottom in a single scan, so that the first can be decoded alone.
        block: rows coded together.
        upright: the orientation surely needs no rotation.
    """

    width: int
    height: int
    height_at: int
    sequential: bool
    block: int
    upright: bool


def read_header(data: bytes) -> Header | None:
    """The header of a plain JPEG, which all decoders read alike; None for anything else.

    Plain means: 8 bits a channel, grey or YCbCr or RGB, Huffman coded, and within Pillow's limit on decompression bombs.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, end, frame, upright = 2, len(data) - 20, None, True
    while at < end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF or marker in _WITHOUT_LENGTH:
            at += 1 if marker == 0xFF else 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES and frame is None:
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            limit = Image.MAX_IMAGE_PIXELS
            if bits != 8 or components not in (1, 3) or not width or not height or (limit is not None and width * height > limit):
                return None
            block = 8 * max(data[at + 11 + 3 * i] & 15 for i in range(components))
            frame, height_at, progressive = (width, height, components, block), at + 5, marker == 0xC2
        elif marker == 0xDA and frame is not None:
            width, height, components, block = frame
            return Header(width, height, height_at, not progressive and data[at + 4] == components, block, upright)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker in (0xD9, 0xDA):
            return None  # lossless or arithmetic coding; or no frame before the scan
        elif marker == 0xE1 and _may_be_rotated(data[at + 4:at + 2 + length]):
            upright = False
        at += 2 + length
    return None


def is_whole(data: bytes) -> bool:
    """Whether the end of a JPEG is there."""
    return _END_OF_IMAGE in data[-32:]


def is_ycc(data: bytes, header: Header) -> bool:
    """Whether a plain JPEG is surely grey or YCbCr, the only ones that all decoders take alike without a look at Adobe's marker."""
    names = header.height_at + 5  # of the channels, three bytes each
    adobe = data.find(b"\xff\xee\x00\x0eAdobe")
    return data[header.height_at + 4] == 1 or data[names:names + 9:3] != b"RGB" and (adobe < 0 or data[adobe + 15] == 1)


def _may_be_rotated(block: bytes) -> bool:
    """Whether an EXIF or XMP block may contain an orientation other than upright."""
    if block[:6] != b"Exif\0\0":
        return b"tiff:Orientation" in block
    tiff = block[6:]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return True
    try:
        start, = struct.unpack_from(order + "I", tiff, 4)
        entries, = struct.unpack_from(order + "H", tiff, start)
        for number in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * number)
            if tag == _ORIENTATION:
                return kind != 3 or value != 1
    except struct.error:
        return True
    return False


def decode(data: bytes, header: Header, rows: int | None = None) -> np.ndarray | None:
    """The pixels (H, W, 3) uint8 as Pillow decodes them; None where the file is damaged or there is no library for it.

    Args:
        rows: rows needed from the top; the result has at least these, and the time for most of the others is saved. None: all.
    """
    buffer, partial = bytearray(data), False
    if rows is not None and rows + header.block < header.height and header.sequential and is_whole(data):
        # With a smaller height in its header the decoder skips the rows below: one block of rows more than needed is decoded, since
        # colour is interpolated across its border. A file without its end is decoded whole, so that whether it counts as damaged
        # does not depend on the rows.
        struct.pack_into(">H", buffer, header.height_at, rows + header.block)
        partial = True
    try:
        if simplejpeg is not None:
            return simplejpeg.decode_jpeg(buffer, "RGB", strict=not partial)
        if decode_jpeg is None:
            return None
        with _silent_stderr() if partial else contextlib.nullcontext():
            return decode_jpeg(torch.frombuffer(buffer, dtype=torch.uint8), ImageReadMode.RGB).permute(1, 2, 0).numpy()
    except (RuntimeError, ValueError):  # Pillow then decides whether the file is damaged, and says how
        return None


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Nothing on stderr, where libjpeg warns of the bytes that it skips. Takes some microseconds."""
    saved = os.dup(2)
    try:
        os.dup2(_devnull(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@functools.cache
def _devnull() -> int:
    return os.open(os.devnull, os.O_WRONLY)
