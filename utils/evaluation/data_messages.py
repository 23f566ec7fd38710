"""What is said about the reading of images: which could not be read, and who decoded the others."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable
from typing import Any

from data import DataError
from utils.evaluation.metrics import Evaluation
from utils.loggers.console import plain, tell
from utils.runtime import distributed


def unreadable_image_reporter(logger: logging.Logger) -> Callable[[str], None]:
    """Where lines about bad images go: rank 0's to the log, those of a rank that has none to standard error."""
    if distributed.is_main():
        return lambda line: tell(logger, [line])
    return lambda line: print(f"{plain(line)} (rank {distributed.rank()})", file=sys.stderr, flush=True)


def decoding(loader: Any) -> str:
    """How the images of the loader's last pass were made, over all ranks; every rank must ask."""
    counts = itertools.zip_longest(*distributed.gather_objects(loader.decoded), fillvalue=0)
    return loader.dataset.pipeline.summary(*map(sum, counts))


def tell_unreadable(loader: Any, result: Evaluation, logger: logging.Logger) -> None:
    """Say how many images of an evaluation could not be read, over all ranks.

    Raises:
        DataError: none could be read, or there was none.
    """
    bad = sum(distributed.gather_objects(loader.unreadable))
    if not bad and not result.samples:
        raise DataError(f"{loader.dataset.source.root}: holds no image to evaluate")
    if bad and not result.samples:
        raise DataError(f"{loader.dataset.source.root}: none of its {bad} validation images can be read; the lines above say why")
    if bad:
        logger.warning(f"{bad} of {result.samples + bad} validation images could not be read and are not counted")
