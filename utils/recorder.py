"""The file of what became of every image of an evaluation, from the answers of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data import DataError
from data.errors import UnreadableImage
from data.sampler import ShardSampler
from utils import distributed
from utils.answers import Answers
from utils.outcomes import MOST_IMAGES, Outcomes, names_of, thumbnail

_THUMBNAILS = 24


def recordable(loader: Any) -> bool:
    """Whether the images of ``loader`` have numbers (a stream's have none), and are no more than ``MOST_IMAGES``."""
    return isinstance(loader.batch_sampler, ShardSampler) and len(loader.dataset.folder) <= MOST_IMAGES


def write_outcomes(answers: Answers, loader: Any, classes: Sequence[str], path: str) -> None:
    """Write the ``answers`` on the images of ``loader``, which are ``recordable``; rank 0's business.

    Raises:
        OSError: it cannot be written.
    """
    if not distributed.is_main():
        return
    source, index = loader.dataset.folder, np.flatnonzero(answers.target >= 0)
    target, top1, confidence, loss = (column[index] for column in (answers.target, answers.top1, answers.confidence, answers.loss))
    made = Outcomes(index, target.astype(np.int32), top1.astype(np.int32), confidence, np.exp(-loss), names_of(source, index.tolist()),
                    list(classes), {})
    made.thumbnails = _thumbnails(made, source)
    made.write(path)


def _thumbnails(made: Outcomes, source: Any) -> dict[int, bytes]:
    found = {}
    for position in made.worst(_THUMBNAILS):
        try:
            found[position] = thumbnail(source.load(int(made.index[position])))
        except (UnreadableImage, DataError, OSError):
            continue
    return found
