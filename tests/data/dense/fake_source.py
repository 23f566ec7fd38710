"""A dense source whose images and annotations are files of a few rectangles, for what does not hang on a layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths

from config import get_config
from data.dense.base import IGNORED, Objects
from data.dense.base import DenseSource as Base
from data.dense.loaders import build_dense_loaders

COLOURS = ((220, 40, 40), (40, 200, 60))


class Rectangles(Base):
    """Images of grey noise with filled rectangles, one class a colour, JPEGs and PNGs by turns."""

    def __init__(self, root: Path, sizes: list[tuple[int, int]], kind: str = "objects", seed: int = 0):
        self.root, self.classes, self.notices, self.kind, self.has_masks = str(root), ["red", "green"], [], kind, True
        self.sizes, self.image_ids = np.array(sizes, dtype=np.int32), np.arange(len(sizes)) + 1
        self.targets, self.category_ids, self.things, self.faults = np.zeros(len(sizes), dtype=np.int64), [1, 2], [True, True], []
        root.mkdir(parents=True, exist_ok=True)
        generator = np.random.RandomState(seed)
        self.boxes, self.label_of = [], []
        for index, (height, width) in enumerate(sizes):
            pixels = generator.randint(90, 110, (height, width, 3)).astype(np.uint8)
            boxes, labels = [], []
            for number in range(1 + index % 3):
                left, top = generator.randint(0, width // 2), generator.randint(0, height // 2)
                right, bottom = left + generator.randint(8, width // 2), top + generator.randint(8, height // 2)
                boxes.append([left, top, right, bottom])
                labels.append((index + number) % 2)
                pixels[top:bottom, left:right] = COLOURS[labels[-1]]
            self.boxes.append(np.array(boxes, dtype=np.float32))
            self.label_of.append(np.array(labels))
            Image.fromarray(pixels).save(self.path(index), quality=95)

    def path(self, index: int) -> str:
        return f"{self.root}/{index}.{'png' if index % 2 else 'jpg'}"

    def fetch(self, index: int) -> bytes:
        return Path(self.path(index)).read_bytes()

    def identity(self) -> bytes:
        return b"rectangles"

    def _masks(self, index: int) -> np.ndarray:
        """(n, H, W), later ones on top."""
        masks = np.zeros((len(self.label_of[index]), *self.sizes[index]), dtype=np.uint8)
        for number, (left, top, right, bottom) in enumerate(self.boxes[index].astype(int).tolist()):
            masks[:number, top:bottom, left:right] = 0
            masks[number, top:bottom, left:right] = 1
        return masks

    def objects(self, index: int) -> Objects:
        masks = self._masks(index)
        seen = [number for number in range(len(masks)) if masks[number].any()]
        rows, columns = masks.any(axis=2), masks.any(axis=1)
        boxes = np.array([[columns[i].argmax(), rows[i].argmax(), columns[i].nonzero()[0][-1] + 1, rows[i].nonzero()[0][-1] + 1]
                          for i in seen], dtype=np.float32).reshape(-1, 4)
        coded = [run_lengths.encode(np.asfortranarray(masks[i])) for i in seen]
        return Objects(boxes, self.label_of[index][seen], np.zeros(len(seen), dtype=bool), masks.sum(axis=(1, 2))[seen].astype(np.float32),
                       np.arange(len(seen)), coded)

    def index_map(self, index: int) -> np.ndarray:
        found = np.full(tuple(self.sizes[index]), IGNORED, dtype=np.uint8)
        for mask, label in zip(self._masks(index), self.label_of[index], strict=True):
            found[mask > 0] = label
        return found


def config_for(task: str, *opts: object):
    base = {"TASK": task, "DATA.DATA_PATH": "rectangles", "DATA.BATCH_SIZE": 4, "DATA.NUM_WORKERS": 0, "DATA.READ_PATIENCE": 0,
            "DATA.DENSE.SHORT_SIDE": "[64]", "DATA.DENSE.LONG_SIDE": 107, "TRAIN.EPOCHS": 3, "TRAIN.WARMUP_EPOCHS": 0}
    return get_config(None, [str(part) for pair in base.items() for part in pair] + [str(part) for part in opts])


def loaders_of(task: str, train: Base | None, val: Base | None, *opts: object, **options: object):
    """The loaders of two sources."""
    sources = {split: source for split, source in (("train", train), ("val", val)) if source is not None}
    return build_dense_loaders(config_for(task, *opts), open_sources=lambda config, splits, classes: (sources, "rectangles"), **options)


def same(some, others) -> None:
    """Assert that two lists of batches are equal, bit for bit."""
    import torch
    for one, other in zip(some, others, strict=True):
        for name, value in one._asdict().items():
            assert torch.equal(value, getattr(other, name)), name
