"""TIFF files that Pillow does not know, such as those of more than four bands, through the optional package ``tifffile``."""

from __future__ import annotations

import io
import logging
import math

import numpy as np
from PIL import Image

from data.decoding.deep import as_number

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_tiff(data: bytes) -> bool:
    """Whether ``data`` begins as a TIFF or BigTIFF file."""
    return data[:4] in _MAGIC


def read_bands(data: bytes, channels: int) -> tuple[np.ndarray, float | None]:
    """(the values of a TIFF file, (H, W, channels), that of pixels which hold none); bands may be samples of a pixel, planes or pages.

    Raises:
        ValueError: tifffile is missing, or the file has another number of bands, or more pixels than Pillow would open.
        Exception: whatever tifffile raises for damaged bytes, or for a compression that needs imagecodecs.
    """
    try:
        import tifffile
    except ImportError:
        raise ValueError("such a TIFF file needs the package tifffile: pip install tifffile") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what matters is raised
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        axes, shape = series.axes, series.shape
        at = _band_axis(axes, shape, channels)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and math.prod(shape) > 2 * limit * channels:
            raise ValueError(f"{math.prod(shape) // channels} pixels, which may be a decompression bomb")
        values, tag = series.asarray(), file.pages[0].tags.get("GDAL_NODATA")
    values = values.reshape(shape) if at is None else np.moveaxis(values.reshape(shape), at, -1)
    values = values.reshape(*(size for size in values.shape if size != 1 or values.ndim <= 3)) if at is not None else values[..., None]
    if values.ndim != 3 or values.dtype.kind not in "buif":
        raise ValueError(f"{values.dtype} values of the axes {axes}")
    values = values.astype(np.uint8) * 255 if values.dtype.kind == "b" else values.astype(values.dtype.newbyteorder("="))
    return values, as_number(tag.value if tag is not None else None)


def _band_axis(axes: str, shape: tuple[int, ...], channels: int) -> int | None:
    """The axis that has the bands, None for a single one: that which is none of the image's two, or, as files do not always say it, the
    last or the first."""
    others = [place for place, axis in enumerate(axes) if axis not in "YX" and shape[place] != 1]
    if not others and channels == 1:
        return None
    for place in (*others, len(shape) - 1, 0):
        if shape[place] == channels:
            return place
    count = math.prod(shape[place] for place in others)
    raise ValueError(f"it has {count} channel{'s' * (count != 1)}, and MODEL.IN_CHANS is {channels}")
