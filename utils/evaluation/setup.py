"""What an evaluation begins with: loaders and precision."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch
from yacs.config import CfgNode

from data import Loaders
from utils.checkpoints.file_format import is_own
from utils.evaluation.data_messages import teller
from utils.loggers.console import tell
from utils.loggers.progress import listing, periodic
from utils.runtime import distributed
from utils.runtime.compile import require_compiler
from utils.runtime.precision import Precision, choose_precision
from utils.runtime.seed import make_deterministic

if TYPE_CHECKING:
    from utils.tasks.base import Task


def open_images(task: Task, config: CfgNode, content: Any, classes: Any, device: torch.device, logger: logging.Logger) -> Loaders:
    """The loaders of the validation images for a file of weights.

    Args:
        content: of the file.
        classes: what the targets count, as of ``data.build_loaders``.
    """
    with listing(functools.partial(periodic, logger)):
        loaders = task.build_loaders(config, distributed.rank(), distributed.world_size(), splits=("val",), classes=classes,
                                     device=device, published=not is_own(content))
    loaders.tell(teller(logger))
    tell(logger, loaders.notices)
    return loaders


def prepare(config: CfgNode, device: torch.device, logger: logging.Logger) -> Precision:
    """Precision and determinism of an evaluation."""
    precision = choose_precision(config, device)
    tell(logger, [precision.notice])
    make_deterministic(device)
    require_compiler(device, config.COMPILE)
    return precision
