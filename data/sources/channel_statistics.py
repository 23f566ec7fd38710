"""Mean and deviation of each channel of a data set, for the normalisation of images that are not RGB."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from data.decoding.pillow import decode_pixels
from data.errors import DataError, UnreadableImage
from data.sources.base import Source
from data.sources.deep_levels import look_at

LOOK = 512  # images, evenly spread, of a large set

Sums = tuple[int, np.ndarray, np.ndarray]  # number of pixels; per channel (C,) the sum of the values and of their squares


def measure_channels(source: Source, timeout: float) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) of each channel over all pixels of up to ``LOOK`` images, in 0 to 1, read as ``source.reading`` says.

    Raises:
        DataError: none of them can be read, with the reason; or no image came for ``timeout`` seconds.
    """
    faults: list[UnreadableImage] = []

    def look(index: int) -> Sums | None:
        try:
            return sums(decode_pixels(source.read(index), source.path(index), source.reading))
        except UnreadableImage as error:
            faults.append(error)
            return None

    found = look_at(source, LOOK, look, timeout)
    if not found:
        raise DataError(f"none of the {len(faults)} images looked at can be read with {source.reading.channels} channels; {faults[0]}"
                        if faults else f"{source.root}: holds no images")
    return statistics(found)


def sums(pixels: np.ndarray) -> Sums:
    """Of an image (H, W, C), uint8."""
    values = pixels.reshape(-1, pixels.shape[2]).astype(np.int64)
    return len(values), values.sum(axis=0), (values * values).sum(axis=0)


def statistics(found: Iterable[Sums]) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) of each channel; 1 for the deviation of a channel that has one value only, such as opaque alpha."""
    counts, first, second = zip(*found, strict=True)
    count = sum(counts)
    means, squares = np.sum(first, axis=0) / count / 255, np.sum(second, axis=0) / count / 255 ** 2
    deviations = [math.sqrt(max(0.0, square - mean * mean)) for mean, square in zip(means.tolist(), squares.tolist(), strict=True)]
    return [round(mean, 4) for mean in means.tolist()], [round(d, 4) if d > 1e-3 else 1.0 for d in deviations]
