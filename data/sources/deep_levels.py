"""Which values of a data set's images of more than 8 bits a channel are black and white: found once, for all of them.

Pixels are worked on in 8 bits. Twelve bits stored in sixteen would keep 16 of their 4,096 levels by the type's own range, and a range of
each image's own would make two shots of one scene differ: so the range is that of the images together, and it is kept with the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from config import pairs_of
from data.decoding.deep import Stored, Window, eight_bits
from data.decoding.pillow import Reading, decode_stored
from data.errors import DataError, UnreadableImage
from data.messages import Caution, Message, Notice
from data.sources.base import Source
from data.sources.threads import THREADS, Hang, in_threads

FEWEST_LEVELS = 64  # of 256; with less, what distinguishes images may be lost
FIRST_LOOK, WHOLE_LOOK = 256, 2048  # images of a large set: whether there are deep ones, and what range they have
_PIXELS = 4096  # of an image, at most, that levels are counted on; the range is that of all its pixels
_MOST_OUTSIDE = 0.5  # share of the values outside of a trained model's window from where the images may be stored in another range
_OUTLIERS = 0.1  # percent of the pixels at each end that a window may leave out where their range wastes the levels
_EIGHT_BITS = (".jpg", ".jpeg", ".webp", ".bmp", ".gif")  # formats without deep images are not opened

_DEEP = "images of more than 8 bits a channel"

T = TypeVar("T")
# An image's lowest and highest values (C,) and some of its values (N, C), as floats that may be NaN: C is 1 for grey and colour, which have
# one window, and the number of bands for images of more than four, whose bands may hold quite different quantities.
Sample = tuple[np.ndarray, np.ndarray, np.ndarray]
_OWN_WINDOWS = 5  # bands from which each has a window
_LARGEST = 1e30  # floats beyond stand for missing values


@dataclass(frozen=True)
class DeepLevels:
    """The black and white level of a data set's deep images.

    Attributes:
        window: the values that are black and white.
        levels: how many of 256 are then used.
        stored: how many different values the pixels looked at have.
        better: a window that uses more, where levels are few.
        outside: share of the values that lie outside of the window.
    """

    window: Window
    levels: int
    stored: int
    better: Window | None
    outside: float = 0.0

    @property
    def few(self) -> bool:
        """Whether the step to 8 bits loses so much that it is worth a warning."""
        return self.levels < min(FEWEST_LEVELS, self.stored)

    def messages(self, trained: bool = False) -> list[Message]:
        """For the log; the doctor has findings of its own for them.

        Args:
            trained: the window is that of images which a model was trained on.
        """
        if trained:
            told = Caution(f"{100 * self.outside:.0f} % of the values in {_DEEP} lie outside of the range of the images of training, where "
                           f"{self.words()} (DATA.WINDOW); are they stored in another one?", "other-range")
            return [told] if self.outside > _MOST_OUTSIDE else []
        found: list[Message] = [Notice(f"there are {_DEEP}: {self.words()}, in all of them (DATA.WINDOW)", "deep")]
        return [*found, Caution(f"{self.loss()}{self.advice()}", "few-levels")] if self.few else found

    def words(self) -> str:
        """Such as ``0 is black and 4095 white``, or that of each band."""
        pairs = pairs_of(self.window)
        if len(pairs) == 1:
            return f"{pairs[0][0]:g} is black and {pairs[0][1]:g} white"
        return "black and white of the bands are " + ", ".join(f"{low:g} to {high:g}" for low, high in pairs)

    def loss(self) -> str:
        """Such as ``of 4,096 values or more ... 16 levels remain``, of the band that loses most."""
        return f"of {self.stored:,} values or more in {_DEEP}, {self.levels} levels remain where {self.words()}"

    def advice(self) -> str:
        return f"; --opts {window_option(self.better)} uses more" if self.better is not None else "; give a range with DATA.WINDOW"


def window_option(window: Window) -> str:
    """KEY and VALUE as a shell takes them."""
    pairs = [f"[{low:.7g}, {high:.7g}]" for low, high in pairs_of(window)]
    return f"DATA.WINDOW '{pairs[0] if len(pairs) == 1 else '[' + ', '.join(pairs) + ']'}'"


def settle_reading(source: Source, reading: Reading, patience: float, timeout: float) -> DeepLevels | None:
    """Have a source read as ``reading`` says, with the window of its own deep images where ``reading`` has none.

    Args:
        patience: seconds that a failing read is tried again.
        timeout: as of ``find_levels``.
    """
    source.configure(reading, patience)
    levels = find_levels(source, reading.window, timeout)
    if levels is not None:
        source.configure(reading._replace(window=levels.window), patience)
    return levels


def find_levels(source: Source, window: Window | None = None, timeout: float = 0) -> DeepLevels | None:
    """The levels of a source's deep images, or None where it has none.

    Of more than ``FIRST_LOOK`` images that many, evenly spread, tell whether there are any, and ``WHOLE_LOOK`` their range.

    Args:
        window: one that is given, whose levels are counted.
        timeout: seconds for which no image may be read; 0 waits for ever.

    Raises:
        DataError: no image could be read for so long.
    """
    found = _look(source, FIRST_LOOK, timeout)
    if found and window is None and len(source) > FIRST_LOOK:
        found = _look(source, WHOLE_LOOK, timeout)
    return levels_of(found, window)


def levels_of(samples: Iterable[Sample], window: Window | None = None) -> DeepLevels | None:
    """The levels of images by their ``sample``; None of none. Of several bands each has a window, and the worst counts are told."""
    samples = list(samples)
    if not samples:
        return None
    count = samples[0][0].size
    own = [None] * count if window is None else list(pairs_of(window)) * (count if len(pairs_of(window)) == 1 else 1)
    bands = [_levels_of_band(*(np.concatenate([part[..., band] for part in parts], axis=None) for parts in zip(*samples, strict=True)),
                             own[band]) for band in range(count)]
    if count == 1:
        return bands[0]
    worst, better = min(bands, key=lambda band: (not band.few, band.levels)), None
    if any(band.better is not None for band in bands):
        better = tuple(band.better or band.window for band in bands)
    return DeepLevels(window or tuple(band.window for band in bands), worst.levels, worst.stored, better,
                      max(band.outside for band in bands))


def _levels_of_band(lows: np.ndarray, highs: np.ndarray, values: np.ndarray, window: Window | None) -> DeepLevels:
    """By the lowest and highest value of each image and some values of all; NaN is none.

    The window is the whole range of the values, unless that leaves few levels and the range without outliers leaves more.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return DeepLevels(window or (0.0, 1.0), 0, 0, None)
    low, high = float(np.nanmin(lows)), float(np.nanmax(highs))
    whole = window or (low, high if high > low else low + 1)
    levels, better = _count(values, whole), None
    if levels < FEWEST_LEVELS:
        ranges = [(low, high), tuple(np.percentile(values, (_OUTLIERS, 100 - _OUTLIERS)).tolist())]
        better = max((r for r in ranges if r[1] > r[0]), key=lambda r: _count(values, r), default=None)
        better = better if better is not None and _count(values, better) > levels else None
    if better is not None and window is None:
        whole, levels, better = better, _count(values, better), None
    return DeepLevels(whole, levels, len(np.unique(values)), better, float(((values < whole[0]) | (values > whole[1])).mean()))


def sample(stored: Stored) -> Sample | None:
    """An image's range and some of its values, the same at every call; None where none of them is a number."""
    bands = stored.values.shape[2]
    values = stored.values.reshape(-1, bands if bands >= _OWN_WINDOWS else 1)
    most = _PIXELS if values.shape[1] == 1 else _PIXELS // 4
    places = slice(None) if len(values) <= most else np.random.RandomState(0).randint(0, len(values), most)
    if values.dtype.kind == "f" or stored.no_data is not None:
        values = values.astype(np.float64)
        values[~(np.abs(values) < _LARGEST) | (values == stored.no_data)] = np.nan
        if np.isnan(values).all():
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a band without a number
            return np.nanmin(values, axis=0), np.nanmax(values, axis=0), values[places]
    return values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64), values[places].astype(np.float64)


def _count(values: np.ndarray, window: Window) -> int:
    return len(np.unique(eight_bits(values, window)))


def _look(source: Source, most: int, timeout: float) -> list[Sample]:
    """Samples of the deep images among ``most`` of a source."""
    def look(index: int) -> Sample | None:
        if source.path(index).lower().endswith(_EIGHT_BITS):
            return None
        try:
            stored = decode_stored(source.read(index), source.path(index), source.reading.channels)
        except (UnreadableImage, MemoryError):  # training or evaluation meets it again, and says so
            return None
        return sample(stored) if stored is not None else None

    return look_at(source, most, look, timeout)


def look_at(source: Source, most: int, look: Callable[[int], T | None], timeout: float) -> list[T]:
    """What ``look`` returns for up to ``most`` images that lie evenly over a source, without None.

    Raises:
        DataError: none came for ``timeout`` seconds (0: wait for ever).
    """
    places = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(np.int64)).tolist()
    try:
        return [found for found in in_threads(look, places, timeout, THREADS if source.parallel else 1) if found is not None]
    except Hang as hang:
        busy = ", ".join(source.path(index) for index in hang.busy)
        raise DataError(f"no image came for {timeout:g} seconds (DATA.TIMEOUT); being read at that moment: {busy}; check the disk or "
                        "network share that holds it, or raise DATA.TIMEOUT") from None
