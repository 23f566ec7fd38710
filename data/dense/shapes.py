"""The outlines and run lengths of many objects in flat arrays, which forked processes share."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from config import ConfigError

_STEP = 1 << 20  # coordinates that are looked at together
_FAR = 2  # an outline that lies further outside than this many sides of its image is none


def mask_library() -> Any:
    """``pycocotools.mask``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise ConfigError("masks and COCO's figures need pycocotools, which is not installed; pip install -r requirements-extras.txt"
                          ) from None
    return mask


def decode_mask(mask: Mapping[str, Any]) -> np.ndarray:
    """(H, W) bool of run lengths as pycocotools has them; raises as ``mask_library``."""
    return mask_library().decode(dict(mask)).astype(bool)


class ShapeList:
    """Shapes as they come from a file, one object after another."""

    def __init__(self) -> None:
        self.coordinates, self.ends, self.parts = array("d"), array("q"), array("q")
        self.odd, self.runs_of = bytearray(), array("q")
        self.runs, self.run_ends, self.run_sizes = bytearray(), array("q"), array("q")

    def add(self, shape: object) -> None:
        """What an object's ``segmentation`` is in COCO's format: outlines, run lengths, or anything else, which is none."""
        before, odd = len(self.ends), False
        runs = -1
        if type(shape) is list:
            for outline in [shape] if shape and type(shape[0]) in (int, float) else shape:
                odd |= not self._add_outline(outline)
        elif type(shape) is dict:
            runs = self._add_runs(shape)
            odd = runs < 0
        elif shape is not None:
            odd = True
        self.parts.append(len(self.ends) - before)
        self.runs_of.append(runs)
        self.odd.append(odd)

    def _add_outline(self, outline: object) -> bool:
        """Of three points or more."""
        if type(outline) is not list or len(outline) < 6 or len(outline) % 2:
            return False
        start = len(self.coordinates)
        try:
            self.coordinates.extend(outline)
        except (TypeError, OverflowError):
            del self.coordinates[start:]
            return False
        self.ends.append(len(self.coordinates))
        return True

    def _add_runs(self, shape: Mapping[str, Any]) -> int:
        """The position of run lengths, -1 for broken ones."""
        size, counts = shape.get("size"), shape.get("counts")
        if not (type(size) is list and len(size) == 2 and all(type(side) is int and 0 < side < 1 << 20 for side in size)):
            return -1
        if type(counts) is list:
            if not all(type(run) is int and 0 <= run <= size[0] * size[1] for run in counts) or sum(counts) != size[0] * size[1]:
                return -1
            counts = mask_library().frPyObjects(dict(size=size, counts=counts), *size)["counts"]
        elif type(counts) is str and counts.isascii():
            counts = counts.encode("ascii")
            lengths = run_lengths(counts)
            if lengths is None or int(lengths.sum()) != size[0] * size[1]:
                return -1
        else:
            return -1
        self.runs += counts
        self.run_ends.append(len(self.runs))
        self.run_sizes.extend(size)
        return len(self.run_ends) - 1


def run_lengths(counts: bytes) -> np.ndarray | None:
    """The lengths of runs (runs,) int64 that COCO's compressed string stands for, None for a string that is none.

    Six bits a character, from "0": five of the number, least significant first, and whether it goes on; from the third number on each is
    the difference to the one before the last (pycocotools, maskApi.c). Checked here since the library trusts it.
    """
    values = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if not len(values) or values.min() < 0 or values.max() > 63 or values[-1] & 32:
        return None
    ends = np.flatnonzero(values & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(values)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 7:
        return None
    numbers = np.add.reduceat((values & 31) << 5 * places, starts)
    numbers -= np.where(values[ends] & 16, 1 << 5 * (ends - starts + 1), 0)  # negative
    if len(numbers) > 3:  # the third has no difference: the first is not counted
        for first in (1, 2):
            numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers if numbers.min() >= 0 else None


class Shapes:
    """The shapes of objects that were checked.

    Attributes:
        coordinates: x, y of all outlines, float64, or int32 hundredths where that loses nothing, as in COCO's files.
        bounds: (outlines + 1,) int64: where each begins in them.
        first, parts: (objects,) int64: the first outline of each object, and how many there are.
        runs_of: (objects,) int64: position of its run lengths, -1 for none.
        odd: (objects,) bool: something of its shape was unusable.
        whole: (outlines,) bool: not far outside the image, and of numbers.
        extents: (outlines, 4) float64: x0, y0, x1, y1.
    """

    def __init__(self, shapes: ShapeList, sizes: np.ndarray):
        """``sizes``: (objects, 2): height and width of each one's image, zeros where not known."""
        numbers = np.frombuffer(shapes.coordinates, dtype=np.float64) if shapes.coordinates else np.zeros(0)
        self.bounds = np.concatenate([[0], np.array(shapes.ends, dtype=np.int64)])
        self.parts = np.array(shapes.parts, dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.parts)[:-1]]).astype(np.int64)
        self.runs_of, self.odd = np.array(shapes.runs_of, dtype=np.int64), np.frombuffer(bytes(shapes.odd), dtype=np.uint8).astype(bool)
        self.runs = np.frombuffer(bytes(shapes.runs), dtype=np.uint8)
        self.run_bounds = np.concatenate([[0], np.array(shapes.run_ends, dtype=np.int64)])
        self.run_sizes = np.array(shapes.run_sizes, dtype=np.int32).reshape(-1, 2)
        self.extents = _extents(numbers, self.bounds[:-1])
        owner = np.repeat(np.arange(len(self.parts)), self.parts)
        sides = sizes.max(axis=1, initial=1).astype(np.float64)[owner]
        limit = np.where(sides > 1, _FAR * sides, 1 << 16)
        with np.errstate(invalid="ignore"):
            self.whole = (self.extents[:, 2:].max(axis=1, initial=-np.inf) <= limit) & (self.extents[:, :2].min(axis=1, initial=np.inf)
                                                                                         >= -limit)
        self.odd |= np.bincount(owner, ~self.whole, len(self.parts)).astype(bool)
        self.coordinates = _compact(numbers)

    def take(self, order: np.ndarray) -> Shapes:
        """Those of some objects, in this order; the outlines stay where they are."""
        taken = object.__new__(Shapes)
        taken.__dict__.update(self.__dict__)
        taken.first, taken.parts, taken.runs_of, taken.odd = self.first[order], self.parts[order], self.runs_of[order], self.odd[order]
        return taken

    def there(self) -> np.ndarray:
        """(objects,) bool: whether each has a usable shape."""
        owner = np.repeat(np.arange(len(self.parts)), self.parts)
        places = np.repeat(self.first, self.parts) + np.arange(len(owner)) - np.repeat(np.cumsum(self.parts) - self.parts, self.parts)
        return (np.bincount(owner, self.whole[places], len(self.parts)) > 0) | (self.runs_of >= 0)

    def box(self, i: int) -> np.ndarray:
        """(4,) float64: the box around object ``i``'s shape; NaN without one."""
        if self.runs_of[i] >= 0:
            x, y, width, height = mask_library().toBbox(self._runs(int(self.runs_of[i])))
            return np.array([x, y, x + width, y + height])
        around = self.extents[self.first[i]:self.first[i] + self.parts[i]][self.whole[self.first[i]:self.first[i] + self.parts[i]]]
        return np.concatenate([around[:, :2].min(axis=0), around[:, 2:].max(axis=0)]) if len(around) else np.full(4, np.nan)

    def mask(self, i: int, size: Sequence[int]) -> dict[str, Any]:
        """Object ``i`` as run lengths over an image of ``size`` (height, width), as pycocotools makes them."""
        if self.runs_of[i] >= 0:
            return self._runs(int(self.runs_of[i]))
        library, (height, width) = mask_library(), (int(side) for side in size)
        outlines = []
        for part in range(int(self.first[i]), int(self.first[i] + self.parts[i])):
            if self.whole[part]:
                outline = self.coordinates[self.bounds[part]:self.bounds[part + 1]]
                outlines.append(outline / 100.0 if outline.dtype == np.int32 else outline)
        if not outlines:
            return library.encode(np.zeros((height, width), dtype=np.uint8, order="F"))
        return library.merge(library.frPyObjects(outlines, height, width))

    def _runs(self, at: int) -> dict[str, Any]:
        return dict(size=self.run_sizes[at].tolist(), counts=self.runs[self.run_bounds[at]:self.run_bounds[at + 1]].tobytes())


def _extents(numbers: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(outlines, 4) float64: x0, y0, x1, y1; NaN where a coordinate is."""
    if not len(starts):
        return np.zeros((0, 4))
    with np.errstate(invalid="ignore"):
        return np.stack([reduce.reduceat(numbers[axis::2], starts // 2) for reduce in (np.minimum, np.maximum) for axis in (0, 1)], axis=1)


def _compact(numbers: np.ndarray) -> np.ndarray:
    """In hundredths as int32 where dividing them gives the same numbers."""
    small = np.empty(len(numbers), dtype=np.int32)
    for start in range(0, len(numbers), _STEP):
        part = numbers[start:start + _STEP]
        with np.errstate(invalid="ignore", over="ignore"):
            hundredths = np.rint(part * 100)
            if not (np.abs(hundredths) < 1 << 30).all() or not (hundredths / 100 == part).all():
                return numbers.copy()
        small[start:start + _STEP] = hundredths
    return small
