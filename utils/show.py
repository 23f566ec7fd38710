"""``--show-batch FILE``: the first training batch as the model sees it, with its labels, as a picture."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from config import ConfigError
from data import build_loaders, preprocessing
from utils import checkpoint, distributed
from utils.picture import FAINT, INK, LINE, canvas, drawable, fitted, length, magnification, require_png, save, to_image, write_line
from utils.progress import listing, periodic
from utils.reading import teller

MOST = 36  # images of a picture
_MARGIN, _GAP, _TITLE, _LETTERS = 24, 14, 17, 14


def show_batch(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> None:
    """Draw the first batch of training, through the loader, the augmentation and the mixup that training has; builds no model.

    Raises:
        ConfigError: the picture cannot be written where SHOW.BATCH says.
    """
    path = require_png(config.SHOW.BATCH, "SHOW.BATCH")
    if not distributed.is_main():
        return
    classes = content["classes"] if checkpoint.is_own(content) else None
    with listing(functools.partial(periodic, logger)):
        loaders = build_loaders(config, splits=("train",), classes=classes, device=device)
    loaders.tell(teller(logger))
    for line in loaders.notices:
        logger.info(line)
    with contextlib.closing(loaders):
        images, targets = next(loaders.batches())
    images, targets = loaders.mixup(images.to(device), targets.to(device), 0)
    if len(images) == 0:
        raise ConfigError(f"{config.DATA.DATA_PATH}: the first batch holds no image")
    labels = labels_of(targets.cpu(), config.MODEL.LABEL_SMOOTHING)
    prepare, shown = preprocessing(config), min(len(images), MOST)
    tiles = [to_image(image, prepare["mean"], prepare["std"]) for image in images[:shown]]
    title = (f"{config.DATA.DATA_PATH}: " + (f"{shown} of the {len(images)} images" if shown < len(images) else f"the {shown} images")
             + " of the first training batch, as the model sees them")
    save(sheet(tiles, labels[:shown], loaders.classes, title, _recipe(config)), path)
    logger.info(f"wrote {path}: {shown} images of {tiles[0].width} x {tiles[0].height} pixels; "
                f"{loaders.train.dataset.pipeline.description()}")


def labels_of(targets: Tensor, smoothing: float) -> list[list[tuple[int, float]]]:
    """The classes of each image and their weights, heaviest first, with the label smoothing taken out.

    Args:
        targets: class numbers (B,), or what mixup makes of them (B, C).
    """
    if targets.ndim == 1:
        return [[(int(target), 1.0)] for target in targets]
    floor = smoothing / targets.shape[1]
    weights = ((targets.double() - floor) / (1 - smoothing)).clamp(min=0)
    return [sorted(((int(i), float(row[i])) for i in torch.nonzero(row > 1e-4).flatten()), key=lambda pair: -pair[1]) for row in weights]


def _recipe(config: CfgNode) -> str:
    aug = config.AUG
    mixed = f"mixup {aug.MIXUP:g}, cutmix {aug.CUTMIX:g}, probability {aug.MIXUP_PROB:g}" if aug.MIXUP_PROB else "no mixup"
    return (f"policy {aug.AUTO_AUGMENT or 'none'}; scale {aug.SCALE[0]:g} to {aug.SCALE[1]:g}; erasing {aug.REPROB:g}; {mixed}; "
            f"label smoothing {config.MODEL.LABEL_SMOOTHING:g}; seed {config.SEED}")


def sheet(tiles: Sequence[Image.Image], labels: Sequence[Sequence[tuple[int, float]]], classes: Sequence[str], title: str,
          subtitle: str) -> Image.Image:
    """A page with a tile an image, its labels below it: the class, and where two are mixed both with their shares."""
    width, height = tiles[0].size
    factor = magnification(height, width, 176)
    width, height = factor * width, factor * height
    columns = min(len(tiles), max(3, math.ceil(math.sqrt(len(tiles)))))
    rows = math.ceil(len(tiles) / columns)
    lines = max(map(len, labels))
    cell_width, cell_height = max(width, 130) + _GAP, height + 6 + lines * _TITLE + _GAP
    head = _MARGIN + 28 + 22 + 12
    page, draw = canvas(2 * _MARGIN + columns * cell_width - _GAP, head + rows * cell_height - _GAP + _MARGIN)
    write_line(draw, (_MARGIN, _MARGIN), title, 18, INK, page.width - 2 * _MARGIN)
    write_line(draw, (_MARGIN, _MARGIN + 28), subtitle, _LETTERS, FAINT, page.width - 2 * _MARGIN)
    for number, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        left, top = _MARGIN + number % columns * cell_width, head + number // columns * cell_height
        page.paste(tile.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.rectangle((left - 1, top - 1, left + width, top + height), outline=LINE)
        for line, (which, weight) in enumerate(label):
            share = f": {100 * weight:.0f} %" if len(label) > 1 else ""
            name = fitted(drawable(classes[which]), _LETTERS, cell_width - _GAP - length(share, _LETTERS))
            write_line(draw, (left, top + height + 5 + line * _TITLE), name + share, _LETTERS, INK if line == 0 else FAINT, cell_width)
    return page
