"""Notes, during an evaluation, what becomes of every image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import DataError
from data.errors import UnreadableImage
from data.sampler import ShardSampler
from utils import distributed
from utils.outcomes import MOST_IMAGES, Outcomes, names_of, thumbnail

_THUMBNAILS = 24


def recorder(loader: Any, classes: Sequence[str]) -> Recorder | None:
    """For the images of ``loader``; None for a stream, whose images have no numbers, and for more than ``MOST_IMAGES``."""
    known = isinstance(loader.batch_sampler, ShardSampler) and len(loader.dataset.folder) <= MOST_IMAGES
    return Recorder(loader, classes) if known else None


class Recorder:
    """Called with each batch of an evaluation in turn; ``write`` brings all ranks' together."""

    def __init__(self, loader: Any, classes: Sequence[str]):
        self.source, self.classes, self.indices = loader.dataset.folder, list(classes), iter(loader.batch_sampler)
        self.parts: list[tuple[Tensor, ...]] = []

    def __call__(self, logits: Tensor, targets: Tensor) -> None:
        """Note a batch: logits (B, C), targets (B,), of which -1 are no images. Nothing is read from the device yet."""
        indices = torch.full(targets.shape, -1)
        numbers = next(self.indices)
        indices[:len(numbers)] = torch.tensor(numbers)
        probabilities = logits.softmax(1)
        probability, predicted = probabilities.max(1)
        correct = probabilities.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        self.parts.append((indices, targets, predicted, probability, correct))

    def write(self, path: str) -> None:
        """Every rank must call it; rank 0 writes.

        Raises:
            OSError: it cannot be written.
        """
        kinds = (np.int64, np.int32, np.int32, np.float32, np.float32)
        columns = zip(*self.parts, strict=True)  # none on a rank without an image
        own = [torch.cat(part).cpu().numpy().astype(kind) for part, kind in zip(columns, kinds, strict=bool(self.parts))]
        gathered = [part for part in distributed.gather_objects(own) if part]
        if not distributed.is_main() or not gathered:
            return
        columns = [np.concatenate(part) for part in zip(*gathered, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        order = order[columns[1][order] >= 0]
        index, *columns = (column[order] for column in columns)
        made = Outcomes(index, *columns, names_of(self.source, index.tolist()), self.classes, {})
        made.thumbnails = self._thumbnails(made)
        made.write(path)

    def _thumbnails(self, made: Outcomes) -> dict[int, bytes]:
        found = {}
        for position in made.worst(_THUMBNAILS):
            try:
                found[position] = thumbnail(self.source.load(int(made.index[position])))
            except (UnreadableImage, DataError, OSError):
                continue
        return found
