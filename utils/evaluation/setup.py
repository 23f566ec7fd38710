"""What an evaluation begins with: the config for the data it is given, loaders and precision."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from yacs.config import CfgNode

from config import COMMAND_LINE, ConfigError, history, lookup, with_values
from data import DataError, Loaders
from utils.checkpoints.file_format import is_own
from utils.evaluation.data_messages import unreadable_image_reporter
from utils.loggers.console import tell
from utils.loggers.progress import listing_shown, log_periodic
from utils.runtime import distributed, launcher
from utils.runtime.compile import require_compiler
from utils.runtime.precision import Precision, choose_precision
from utils.runtime.seed import make_deterministic

if TYPE_CHECKING:
    from utils.tasks.base import Task


# What says how the data of training lie and are divided; it need not hold for others.
_OF_TRAINING_DATA = {"DATA.DATASET": "imagenet", "DATA.ZIP_MODE": False, "DATA.VAL_FRACTION": 0.0, "DATA.FOLD": "", "DATA.IMAGE_ROOT": ""}


def config_for_data(task: Task, config: CfgNode, content: Any, logger: logging.Logger) -> CfgNode:
    """``config`` of a checkpoint for the data that --data-path gives.

    What the checkpoint says of its own data (DATA.VAL_FRACTION, DATA.FOLD and the like) holds where these are the same images, at
    whatever place; others are evaluated as they lie, all of them where they have no split.
    """
    told = {key: values[-1][0] for key, values in history(config).items()}
    kept = {key: value for key, value in _OF_TRAINING_DATA.items() if lookup(config, key) != value and told.get(key) != COMMAND_LINE}
    given = told.get("DATA.DATA_PATH") == COMMAND_LINE and os.path.abspath(config.DATA.DATA_PATH) != (
        os.path.abspath(content["data_path"]) if is_own(content) else "")
    if not (kept and given and is_own(content)):
        return config
    try:
        with contextlib.closing(task.build_loaders(config, splits=("val",), classes=content["classes"])) as loaders:
            found = loaders.fingerprints()
    except (ConfigError, DataError):
        found = {}
    if found and found == {"val": content.get("image_fingerprints", {}).get("val")}:
        return config
    dividing = [f"{key} {lookup(config, key)}" for key in ("DATA.FOLD", "DATA.VAL_FRACTION") if key in kept]
    if dividing:
        logger.warning(f"{config.DATA.DATA_PATH} holds other images than those of training, which {dividing[0]} divided; that is not "
                       f"applied to them (--opts {dividing[0]} does)")
    return with_values(config, kept, "derived from DATA.DATA_PATH")


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
