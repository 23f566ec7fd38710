"""``DenseSource``: the images of one split with what each of them shows, which every layout of dense tasks becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from yacs.config import CfgNode

from data.sources.base import Source

IGNORED = 255  # in a map of classes: pixels that neither loss nor evaluation counts


class DenseOptions(NamedTuple):
    """What opening a split needs to know of the config.

    Attributes:
        data: its node DATA.
        task: detection, instance, semantic or mask.
    """

    data: CfgNode
    task: str


@dataclass
class Objects:
    """The objects of an image, in its own pixels.

    Attributes:
        boxes: (n, 4) float32: x0, y0, x1, y1.
        labels: (n,) int64, positions in the source's ``classes``.
        crowd: (n,) bool: a group that evaluation ignores (COCO's iscrowd); never trained on.
        areas: (n,) float32: as the annotations have them, else of the mask, else of the box.
        ids: (n,) int64: of the annotations.
        masks: run lengths of each (``dict(size=[H, W], counts=bytes)`` as pycocotools has them), or None where the data has none.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    masks: list[Mapping[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Fault:
    """What is wrong with the annotations, by kind.

    Attributes:
        kind: a word or two: ``outside``, ``no area``, ``unknown class``, ``image missing``, ``mask of another size``.
        count: how often.
        examples: the first few, each naming its file or annotation.
        remedy: what is done about them, or what to do.
    """

    kind: str
    count: int
    examples: list[str] = field(default_factory=list)
    remedy: str = ""


class DenseSource(Source):
    """Images with objects, or with a map of classes; subclasses give ``objects`` or ``index_map``, whichever they have.

    Attributes:
        kind: ``objects``; ``maps``, a class for each pixel; or ``panoptic``, masks of things and of stuff that cover the image.
        sizes: (images, 2) int32: height and width as the annotations or the files' headers have them.
        image_ids: (images,) int64: COCO's, or 1, 2, ...
        category_ids: of each class, what the annotations call it (COCO's ids, not contiguous; a map's pixel value).
        things: of each class, whether it is of countable things; stuff is of panoptic data alone.
        has_masks: whether objects have masks.
        faults: what was wrong with the annotations; each is told as a notice too.
    """

    kind: str = "objects"
    sizes: np.ndarray
    image_ids: np.ndarray
    category_ids: Sequence[int]
    things: Sequence[bool]
    has_masks: bool = False
    faults: list[Fault]

    def objects(self, index: int) -> Objects:
        """What image ``index`` shows, crowds included, broken annotations left out. Of a map of classes: one mask a class that is there.

        Raises:
            UnreadableImage: the file of the annotation cannot be read, or its mask is of another size than the image; names the file.
        """
        raise NotImplementedError

    def shown(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(image, class) of whatever the images show, (n,) int64 each, images rising; without crowds. None where files would have to be
        read."""
        return None

    def index_map(self, index: int) -> np.ndarray:
        """The class of each pixel (H, W) uint8, ``IGNORED`` where none; of objects, the smaller ones lie on top.

        Raises:
            UnreadableImage: as ``objects``.
        """
        raise NotImplementedError
