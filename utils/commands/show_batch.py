"""``--show-batch FILE``: the first training batch as the model sees it, with its labels, as a picture."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from yacs.config import CfgNode

from config import ConfigError
from data import preprocessing
from utils.checkpoints.file_format import is_own
from utils.commands.outputs import check_outputs
from utils.evaluation.setup import open_loaders
from utils.runtime import distributed
from utils.tasks.build import build_task
from utils.visualization.batch_grid import labels_of, sheet
from utils.visualization.drawing import require_png, save, to_image

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
    images, targets = transform(task.to_device(batch, device), 0)
    if len(images) == 0:
        raise ConfigError(f"{config.DATA.DATA_PATH}: the first batch holds no image")
    labels = labels_of(targets.cpu(), task.smoothing)
    prepare, shown = preprocessing(config), min(len(images), MOST)
    tiles = [to_image(image, prepare["mean"], prepare["std"]) for image in images[:shown]]
    title = (f"{config.DATA.DATA_PATH}: " + (f"{shown} of the {len(images)} images" if shown < len(images) else f"the {shown} images")
             + " of the first training batch, as the model sees them")
    save(sheet(tiles, labels[:shown], loaders.classes, title, _recipe(config)), path)
    logger.info(f"wrote {path}: {shown} images of {tiles[0].width} x {tiles[0].height} pixels; "
                f"{loaders.train.dataset.pipeline.description()}")


def _recipe(config: CfgNode) -> str:
    aug = config.AUG
    mixed = f"mixup {aug.MIXUP:g}, cutmix {aug.CUTMIX:g}, probability {aug.MIXUP_PROB:g}" if aug.MIXUP_PROB else "no mixup"
    return (f"policy {aug.AUTO_AUGMENT or 'none'}; scale {aug.SCALE[0]:g} to {aug.SCALE[1]:g}; erasing {aug.REPROB:g}; {mixed}; "
            f"label smoothing {config.MODEL.LABEL_SMOOTHING:g}; seed {config.SEED}")
