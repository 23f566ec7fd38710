"""A training batch as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from utils.visualization.drawing import FAINT, INK, LINE, canvas, drawable, fitted, length, magnification, write_line

_MARGIN, _GAP, _TITLE, _LETTERS = 24, 14, 17, 14


def labels_of(targets: Tensor, smoothing: float) -> list[list[tuple[int, float]]]:
    """The classes of each image and their weights, heaviest first, with the label smoothing taken out.

    Args:
        targets: class numbers (B,), or the share of each class (B, C), as mixup makes them.
    """
    if targets.ndim == 1:
        return [[(int(target), 1.0)] for target in targets]
    floor = smoothing / targets.shape[1]
    weights = ((targets.double() - floor) / (1 - smoothing)).clamp(min=0)
    return [sorted(((int(i), float(row[i])) for i in torch.nonzero(row > 1e-4).flatten()), key=lambda pair: -pair[1]) for row in weights]


def lines_of(targets: Tensor, smoothing: float, classes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """What ``sheet`` writes below images: their class, and where classes are mixed all of them with their shares; as of ``labels_of``."""
    return [[(classes[which], f": {100 * weight:.0f} %" if len(label) > 1 else "") for which, weight in label]
            for label in labels_of(targets, smoothing)]


def sheet(tiles: Sequence[Image.Image], lines: Sequence[Sequence[tuple[str, str]]], title: str, subtitle: str) -> Image.Image:
    """A page with a tile an image, all of one size, and lines below each: a name, cut where there is no room, and what stands behind it."""
    width, height = tiles[0].size
    factor = magnification(height, width, 176)
    width, height = factor * width, factor * height
    columns = min(len(tiles), max(3, math.ceil(math.sqrt(len(tiles)))))
    rows = math.ceil(len(tiles) / columns)
    most = max(map(len, lines))
    cell_width, cell_height = max(width, 130) + _GAP, height + 6 + most * _TITLE + _GAP
    head = _MARGIN + 28 + 22 + 12
    page, draw = canvas(2 * _MARGIN + columns * cell_width - _GAP, head + rows * cell_height - _GAP + _MARGIN)
    write_line(draw, (_MARGIN, _MARGIN), title, 18, INK, page.width - 2 * _MARGIN)
    write_line(draw, (_MARGIN, _MARGIN + 28), subtitle, _LETTERS, FAINT, page.width - 2 * _MARGIN)
    for number, (tile, below) in enumerate(zip(tiles, lines, strict=True)):
        left, top = _MARGIN + number % columns * cell_width, head + number // columns * cell_height
        page.paste(tile.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.rectangle((left - 1, top - 1, left + width, top + height), outline=LINE)
        for line, (name, behind) in enumerate(below):
            name = fitted(drawable(name), _LETTERS, cell_width - _GAP - length(behind, _LETTERS))
            write_line(draw, (left, top + height + 5 + line * _TITLE), name + behind, _LETTERS, INK if line == 0 else FAINT, cell_width)
    return page
