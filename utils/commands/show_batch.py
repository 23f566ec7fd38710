"""``--show-batch FILE``: the first training batch as the model sees it, with its labels, as a picture."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from yacs.config import CfgNode

from config import ConfigError
from utils.checkpoints.file_format import is_own
from utils.commands.outputs import check_outputs
from utils.evaluation.setup import open_loaders
from utils.runtime import distributed
from utils.tasks.build import build_task
from utils.visualization.batch_grid import sheet
from utils.visualization.drawing import require_png, save

MOST = 36  # images of a picture


def show_batch(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> None:
    """Draw the first batch of training, through the loader, the augmentation and the mixup that training has; builds no model.

    Raises:
        ConfigError: the picture cannot be written where SHOW.BATCH says.
    """
    path = require_png(config.SHOW.BATCH, "SHOW.BATCH")
    check_outputs(config, [("SHOW.BATCH", path)])
    if not distributed.is_main():
        return
    classes = content["classes"] if is_own(content) else None
    task = build_task(config)
    if task.pretrains:
        raise ConfigError(f"--show-batch shows images with their classes, and TASK {task.name} has none; add --opts TASK classification")
    loaders = open_loaders(task, config, device, logger, splits=("train",), classes=classes, rank=0, world_size=1, local_world_size=1)
    with contextlib.closing(loaders):
        batch = next(loaders.batches())
    transform = task.batch_transform(config, len(loaders.classes), rank=0)
    batch = transform(task.to_device(batch, device), 0)
    number = len(task.images(batch))
    if number == 0:
        raise ConfigError(f"{config.DATA.DATA_PATH}: the first batch holds no image")
    tiles, lines, recipe = task.shown_batch(config, batch, loaders.classes, MOST)
    title = (f"{config.DATA.DATA_PATH}: " + (f"{len(tiles)} of the {number} images" if len(tiles) < number else f"the {number} images")
             + " of the first training batch, as the model sees them")
    save(sheet(tiles, lines, title, recipe), path)
    logger.info(f"wrote {path}: {len(tiles)} images of {tiles[0].width} x {tiles[0].height} pixels; "
                f"{loaders.train.dataset.pipeline.description()}")
