"""Some of the images of a dense source, with classes by other numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from data.dense.base import IGNORED, DenseSource, Objects
from data.sources.base import View


class DenseView(View, DenseSource):
    """Images ``indices`` of ``source``.

    Args:
        targets: (indices,) int64: the class that each image is grouped by, in ``classes``.
        classes: class names; None: the source's.
        table: (the source's classes,) int64: their positions in ``classes``, -1 for those left out; None: the same.
    """

    def __init__(self, source: DenseSource, indices: np.ndarray, targets: np.ndarray, notices: Sequence[str],
                 classes: Sequence[str] | None = None, table: np.ndarray | None = None):
        super().__init__(source, indices, list(source.classes if classes is None else classes), targets, list(notices))
        self.kind, self.has_masks, self.faults = source.kind, source.has_masks, source.faults
        self.sizes, self.image_ids, self.table = source.sizes[indices], source.image_ids[indices], table
        self.category_ids, self.things = list(source.category_ids), list(source.things)
        if table is not None:
            own = {int(at): i for i, at in reversed(list(enumerate(table.tolist()))) if at >= 0}
            ids = {at: int(source.category_ids[i]) for at, i in own.items()}
            unused = iter(range(max([0, *ids.values()]) + 1, max([0, *ids.values()]) + 1 + len(self.classes)))
            self.category_ids = [ids[at] if at in ids else next(unused) for at in range(len(self.classes))]
            self.things = [source.things[own[at]] if at in own else True for at in range(len(self.classes))]

    def load(self, index: int) -> Image.Image:
        return self.source.load(int(self.indices[index]))

    def identity(self) -> bytes:
        return super().identity() + (b"" if self.table is None else self.table.tobytes())

    def objects(self, index: int) -> Objects:
        found = self.source.objects(int(self.indices[index]))
        if self.table is None:
            return found
        labels = self.table[found.labels]
        keep = np.flatnonzero(labels >= 0)
        masks = None if found.masks is None else [found.masks[i] for i in keep.tolist()]
        return Objects(found.boxes[keep], labels[keep], found.crowd[keep], found.areas[keep], found.ids[keep], masks)

    def index_map(self, index: int) -> np.ndarray:
        found = self.source.index_map(int(self.indices[index]))
        if self.table is None:
            return found
        values = np.full(256, IGNORED, dtype=np.uint8)
        values[:len(self.table)] = np.where(self.table >= 0, self.table, IGNORED)
        return values[found]
