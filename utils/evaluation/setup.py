"""What an evaluation begins with: loaders and precision."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch
from yacs.config import CfgNode

from data import Loaders
from utils.evaluation.data_messages import unreadable_image_reporter
from utils.loggers.console import tell
from utils.loggers.progress import listing_shown, log_periodic
from utils.runtime import distributed, launcher
from utils.runtime.compile import require_compiler
from utils.runtime.precision import Precision, choose_precision
from utils.runtime.seed import make_deterministic

if TYPE_CHECKING:
    from utils.tasks.base import Task


def open_loaders(task: Task, config: CfgNode, device: torch.device, logger: logging.Logger, **options: Any) -> Loaders:
    """The task's loaders for this process, their notices told; unreadable images will be told as they are met.

    Args:
        options: as of ``data.build_loaders``: splits, classes, published, or another rank and world size.
    """
    with listing_shown(functools.partial(log_periodic, logger)):
        here = dict(rank=distributed.rank(), world_size=distributed.world_size(), local_world_size=launcher.local_world_size())
        loaders = task.build_loaders(config, **here | dict(device=device) | options)
    loaders.report_unreadable(unreadable_image_reporter(logger))
    tell(logger, loaders.notices)
    return loaders


def prepare(config: CfgNode, device: torch.device, logger: logging.Logger) -> Precision:
    """Precision and determinism of an evaluation."""
    precision = choose_precision(config, device)
    tell(logger, [precision.notice])
    make_deterministic(device)
    require_compiler(device, config.COMPILE)
    return precision
